"""What griffe does not know of lopd's sources: what attrs makes of a class, and that `>>>` is code where Markdown sees a quotation."""

from collections.abc import Iterator
from typing import Any

import griffe

_ATTRS = {"attrs.frozen", "attrs.define"}


class Docstrings(griffe.Extension):
    """Gives attrs classes their `__init__`, and doctests their fences."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence the doctests of an object; griffe calls this for everything it finds."""
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = fence(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Give attrs classes their constructor.

        griffe calls this when all modules are loaded, so that the fields of a base in another one are known.
        """
        for cls in _classes(pkg):
            if "__init__" not in cls.members and any(decorator.callable_path in _ATTRS for decorator in cls.decorators):
                kind = griffe.ParameterKind.positional_or_keyword
                own = griffe.Parameter("self", kind=griffe.ParameterKind.positional_only)
                cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(own, *_parameters(cls, kind))))


def _classes(module: griffe.Module) -> Iterator[griffe.Class]:
    for member in module.members.values():
        if isinstance(member, griffe.Module):
            yield from _classes(member)
        elif isinstance(member, griffe.Class):
            yield member


def _parameters(cls: griffe.Class, kind: griffe.ParameterKind) -> Iterator[griffe.Parameter]:
    for attribute in cls.attributes.values():
        value = attribute.value
        if attribute.annotation is None or (value is None and "property" in attribute.labels):
            continue
        options = _field_options(value)
        if options is None:
            yield griffe.Parameter(attribute.name, annotation=attribute.annotation, kind=kind, default=value)
        elif str(options.get("init")) != "False":
            default = options.get("default", f"{options['factory']}()" if "factory" in options else None)
            yield griffe.Parameter(attribute.name.lstrip("_"), annotation=attribute.annotation, kind=kind, default=default)


def _field_options(value: Any) -> dict[str, Any] | None:
    """Return the keywords of `field(...)`; None if the value is something else."""
    if not isinstance(value, griffe.ExprCall) or str(value.function) != "field":
        return None
    return {argument.name: argument.value for argument in value.arguments if isinstance(argument, griffe.ExprKeyword)}


def fence(docstring: str) -> str:
    """Return the docstring with fences around its doctests."""
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(f"```pycon\n{text}\n```" if text.lstrip().startswith(">>>") else text for text in paragraphs)
