"""The weights in the files of a folder, as the model that is loaded from it holds them: read a few at a time."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers
from attrs import define, field, frozen
from safetensors import safe_open
from torch import Tensor

from lopd.engines.effective import Weight
from lopd.errors import ModelError
from lopd.records.paths import read_regular
from lopd.records.stored import Name, parse, read_as

AUTO = transformers.AutoModelForCausalLM
_INDEX = "model.safetensors.index.json"
_REMEDY = (
    "pass `model_id(model)` of the loaded model, or `ModelId(name, commit, dtype)`: as the teacher to `import_text` or `Lineage.of`, as `identity=` "
    "to a source or scorer; to the command as `revision` and `dtype`"
)


class _Index(TypedDict):
    weight_map: Mapping[str, Name]


def plain_config(folder: Path) -> Any:
    """Return the configuration of a model whose weights are what is stored.

    Raises:
        ModelError: they are quantised.
    """
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"Model {folder}: its weights are quantised, expected plain ones, since scales decide what a quantised weight is; {_REMEDY}."
        )
    return config


def stored_places(folder: Path) -> Mapping[str, Path]:
    """Return which file holds which tensor.

    Raises:
        ModelError: there are no files of weights in safetensors.
    """
    if (folder / _INDEX).exists():
        index = read_as(_Index, parse(read_regular(folder / _INDEX)), f"Model {folder}: {_INDEX}")
        return {name: folder / file for name, file in index["weight_map"].items()}
    path = folder / "model.safetensors"
    if not path.exists():
        raise ModelError(
            f"Model {folder}: it holds 0 files of weights in safetensors, expected model.safetensors or its shards; "
            f"save it in that format, or {_REMEDY}."
        )
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), path)


@frozen(eq=False)
class _Source:
    """What a tensor of the model is made of.

    Args:
        stored: names in the files, each with the pattern of `converter` that it matched.
        target: the first of the tensors that are made of them.
        converter: the converter of transformers that stacks, splits or joins them; None if a single tensor is taken as it is.
    """

    stored: list[tuple[str, Any]]
    target: str
    converter: Any


@define(eq=False)
class StoredModel:
    """A model that is built without memory for its weights, and their values in the files of its folder.

    Args:
        folder: the model's folder.
        dtype: type of the weights in use.

    Raises:
        ModelError: there are no files of weights in safetensors, or the weights are quantised.
    """

    folder: Path
    dtype: torch.dtype
    model: Any = field(init=False)
    _places: Mapping[str, Path] = field(init=False)
    _sources: Mapping[str, _Source] = field(init=False)
    _last: tuple[_Source | None, Mapping[str, Tensor]] = field(init=False, default=(None, {}))

    def __attrs_post_init__(self) -> None:
        config = plain_config(self.folder)
        self._places = stored_places(self.folder)
        with torch.device("meta"):
            self.model = _build(class_of(config), config, self.dtype)
        self._sources = _find_sources(self.model, self._places)
        text = text_alone(config, self.model, self._sources.keys())
        if text is not None:
            self.model, self._sources = text, _find_sources(text, self._places)

    def read(self, weight: Weight) -> Tensor:
        """Return the values of a weight of `model`.

        Raises:
            ModelError: the files lack it, or have it in another shape.
        """
        name = self.found_name(weight)
        if name is None:
            raise ModelError(
                f"Model {self.folder}: its files hold no {weight.names[0]!r}, expected every weight of the loaded model; {_REMEDY}."
            )
        kept = (dtype for part, dtype in self.model._get_dtype_plan(self.dtype).items() if re.search(part.replace("*", ".*"), name))
        tensor, shape = self._make(self._sources[name], name, next(kept, weight.held.dtype)), tuple(weight.held.shape)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"Model {self.folder}: {name!r} has shape {tuple(tensor.shape)}, expected {shape} as in the loaded model; {_REMEDY}."
            )
        return tensor

    def found_name(self, weight: Weight) -> str | None:
        """Return that of the names of a weight by which the files have it; None if they lack it."""
        return next((name for name in weight.names if name in self._sources), None)

    def holds(self, name: str, held: Tensor, adapted: Tensor | None = None, *, converted: bool = False) -> bool:
        """Return whether a weight has the values of the files, whatever 16 bits it was in between; it looks at a few rows.

        Args:
            name: the one that it has in the model.
            held: its values.
            adapted: what its adapters make of it: where they were merged and taken out again, it has the values up to rounding of what was added.
            converted: compare it too where it is made of several tensors of the files, such as a stack of experts: they are read as a whole.
        """
        source = self._sources.get(name)
        if source is None or (source.converter is not None and not converted) or not held.ndim or not held.numel():
            return True
        if source.converter is not None:
            return self._makes(source, name, held)
        with safe_open(self._places[source.stored[0][0]], "pt") as file:
            part = file.get_slice(source.stored[0][0])
            if part.get_shape() != [*held.shape]:
                return False
            # of a stack, such as the matrices of experts, one row of each that is looked at
            places = [(slice(i, i + 1), *[slice(0, 1)] * (held.ndim - 2)) for i in range(0, len(held), max(len(held) // 4, 1))]

            def rows(values: Any) -> Tensor:
                return torch.cat([values[place].flatten() for place in places]).cpu()

            ours, theirs = rows(held), rows(part)
        casts = [theirs.to(dtype).to(ours.dtype) for dtype in (theirs.dtype, torch.bfloat16, torch.float16)]
        if adapted is None:
            return any(torch.allclose(ours, cast, rtol=0.0, atol=0.0, equal_nan=True) for cast in casts)
        # what was added may exceed a weight, and the sum is rounded by its own size; a share of the largest weight would let whole adapters pass
        room, added = 4 * torch.finfo(held.dtype).eps, (rows(adapted) - ours).abs().max()
        return any(bool(((ours - cast).abs() <= room * (cast.abs() + added)).all()) for cast in casts)

    def _makes(self, source: _Source, name: str, held: Tensor) -> bool:
        """Return whether the files make these values: by the first and the last row of each matrix of a stack; what cannot be made passes."""
        try:
            made = self._make(source, name, held.dtype)
        except Exception:  # of the converter, or of memory, or since one of several stacks lacks a matrix
            return len({*Counter(pattern for _, pattern in source.stored if "*" in pattern).values()}) < 2
        ends = (slice(None), *(slice(None, None, max(side - 1, 1)) for side in held.shape[1:-1]))
        return made.shape == held.shape and torch.allclose(held[ends].cpu(), made[ends], rtol=0.0, atol=0.0, equal_nan=True)

    def _make(self, source: _Source, name: str, dtype: torch.dtype) -> Tensor:
        if source.converter is None:
            return self._load(source.stored[0][0]).to(dtype)
        if self._last[0] is not source:
            self._last = (None, {})  # make room first
            converter = deepcopy(source.converter)
            for stored, pattern in source.stored:
                converter.add_tensor(source.target, stored, pattern, self._load(stored).to(dtype))
            made = converter.convert(source.target, model=self.model, config=self.model.config)
            self._last = source, {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        return self._last[1][name]

    def _load(self, stored: str) -> Tensor:
        with safe_open(self._places[stored], "pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor


def named_class(config: Any) -> Any:
    """Return the class that a configuration names, which may read images or sound too; None if transformers does not have it."""
    return next((getattr(transformers, name) for name in config.architectures or () if hasattr(transformers, name)), None)


def class_of(config: Any) -> Any:
    """Return what makes a whole model of a configuration: the class that it names, where AutoModelForCausalLM has none, or one of its text part."""
    known, named, text = AUTO._model_mapping.get(type(config), None), named_class(config), config.sub_configs.get("text_config")
    of_part = known is not None and text is not None and getattr(known, "config_class", None) is text
    return named if named is not None and (known is None or (of_part and named.can_generate() and named is not known)) else AUTO


def base_of(adapters: Path) -> str:
    """Return the base model that an `adapter_config.json` names.

    Raises:
        ValueError: it is damaged, or names none.
    """
    try:
        content = parse(read_regular(adapters))
    except ValueError as error:
        raise ValueError(f"its {adapters.name} is damaged: {error}") from error
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not (isinstance(base, str) and base):
        raise ValueError(
            f"'base_model_name_or_path' of its {adapters.name} is {base!r:.80}, expected the folder or the name of its base model"
        )
    return base


def _build(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    return (kind.from_config if kind is AUTO else kind._from_config)(config, dtype=dtype)


def has_part(config: Any) -> bool:
    """Return whether AutoModelForCausalLM makes the text part alone of a configuration."""
    return class_of(config) is not AUTO and type(config) in AUTO._model_mapping


def _names(model: Any) -> set[str]:
    """Return the names of the tensors in the files of a model; tied tensors are there under their first name."""
    return {*model.state_dict()} - {*(getattr(model, "all_tied_weights_keys", None) or ())}


def text_alone(config: Any, whole: Any, found: Collection[str]) -> Any:
    """Return the text part, without memory for its weights, if files with these of the tensors have all of it and nothing of the rest; else None."""
    names = _names(whole)
    if not has_part(config) or names.issubset(found):
        return None
    with torch.device("meta"):
        text = _build(AUTO, config, whole.dtype)
    # its own names may be no names of the whole, or of few of its tensors, such as the head
    known = names.intersection(found)
    return text if known.issubset(text.state_dict()) or len(known) == len(_names(text)) else None


def _find_sources(model: Any, stored_names: Iterable[str]) -> dict[str, _Source]:
    """Return what each tensor is made of, by name: transformers renames and converts weights of many architectures while it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    held, prefix, mapping = model.state_dict(), model.base_model_prefix, get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, _Source] = {}
    for stored in sorted(stored_names, key=dot_natural_key):
        target, pattern = rename_source_key(stored, renamings, converters, prefix, held)
        if target not in held and stored in held:
            target, pattern = rename_source_key(stored, [], [], prefix, held)
        converter = by_pattern.get(pattern)
        source = found.setdefault(target, _Source([], target, converter))
        source.stored.append((stored, pattern))
        if converter is not None:
            first, *others = converter.target_patterns
            found |= {target.replace(first, other): source for other in others}
    return found
