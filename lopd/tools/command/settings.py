"""What the file of `lopd run` may hold: each key is a field here, and `example.yaml` explains each."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from attrs import asdict, field, frozen

from lopd.errors import InvalidRecordError
from lopd.records.checks import check_at_least, check_number
from lopd.records.manifest import SamplingParams
from lopd.records.optional import need
from lopd.records.paths import local_path, read_regular, without_secrets
from lopd.records.plain import as_text, plain
from lopd.records.stored import read_as
from lopd.tools.command.models import Model

#: Keys that may change at any time: which seeds there are, where things are and run, how servers are reached, and how much is sampled side by side.
_PASSING = ("seeds", "out", "device", "served_as", "key_variable", "wait", "rows")
#: Values that anchors of YAML may make of each that is written: merged again and again, they double with each line.
_LARGEST_GROWTH = 100
# They are counted up to this: a number of thousands of digits cannot be shown.
_MANY = 1 << 60
#: Kinds of plain words that YAML 1.1 rewrites: no is false to it, 1:30 is 90, and 010 is 8.
_READ_AS_VALUES = ("bool", "int", "float", "timestamp")


@frozen
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int = 4096
    samples_per_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    rows: int = 64

    def __attrs_post_init__(self) -> None:
        self.params(0)  # which refuses what makes no sense
        check_at_least("Sampling", "rows", self.rows, 1)

    def params(self, seed: int) -> SamplingParams:
        """Return what decides the responses, which `rows` does not."""
        return SamplingParams(**{key: value for key, value in asdict(self).items() if key != "rows"}, seed=seed)


@frozen
class Training:
    """How a student is trained, in SFT or in OPD."""

    steps: int
    lr: float
    rollouts_per_step: int | None = None
    tokens_per_batch: int = 8192
    warmup: int = 0
    decay: bool = False
    weighting: Literal["rollout", "token"] = "rollout"
    autocast: Literal["bfloat16"] | None = None
    gradient_checkpointing: bool = False

    def __attrs_post_init__(self) -> None:
        check_at_least("Training", "steps", self.steps, 1)
        check_number("Training", "lr", self.lr, self.lr > 0, "more than 0")
        check_at_least("Training", "warmup", self.warmup, 0)
        check_at_least("Training", "tokens_per_batch", self.tokens_per_batch, 1)
        check_at_least("Training", "rollouts_per_step", 1 if self.rollouts_per_step is None else self.rollouts_per_step, 1)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a function of its number alone, so that a run that goes on needs no state."""
        return self.lr * min((step + 1) / (self.warmup + 1), 1.0) * (1 - step / self.steps if self.decay else 1.0)


@frozen
class Loss:
    """What OPD minimises."""

    kind: Literal["opd", "reverse_kl", "forward_kl"] = "opd"
    clip: float | None = None
    ratio: bool | None = None
    top_k: int = 0

    def __attrs_post_init__(self) -> None:
        check_at_least("Loss", "top_k", self.top_k, 0)
        check_number("Loss", "clip", 1.0 if self.clip is None else self.clip, self.clip is None or self.clip > 0, "more than 0")
        if self.kind != "opd" and (self.clip is not None or self.ratio or self.top_k < 1):
            raise InvalidRecordError(f"Loss: {self.kind!r} needs top_k of at least 1, and takes neither clip nor ratio; change these.")
        if self.ratio is None:
            object.__setattr__(self, "ratio", self.kind == "opd")


@frozen
class Prompts:
    """A file of prompts."""

    file: str
    field: str = "prompt"
    template: str = "{prompt}"
    chat_template_kwargs: Mapping[str, Any] | None = None


@frozen
class Text:
    """What SFT trains on, where it is a file."""

    file: str
    written_by: str
    field: str = "prompt"
    response: str = "response"
    #: None takes those of the prompts, here and below: a text that answers one that is held out is known by its tokens.
    template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


@frozen
class Evaluation:
    """What is measured before and after OPD."""

    held_out: int
    reverse_kl: bool = True
    verifier: str | None = None
    samples_per_prompt: int = 1

    def __attrs_post_init__(self) -> None:
        # one prompt has no interval
        check_at_least("Evaluation", "held_out", self.held_out, 2)
        check_at_least("Evaluation", "samples_per_prompt", self.samples_per_prompt, 1)
        if self.verifier is not None and not re.fullmatch(r".+\.py:\w+", self.verifier):
            raise InvalidRecordError(f"Evaluation: verifier is {self.verifier!r:.80}, expected FILE.py:FUNCTION; write that.")


@frozen
class RunSettings:
    """A whole run."""

    out: str
    student: Model
    teacher: Model
    prompts: Prompts | list[str | Mapping[str, Any]]
    opd: Training
    loss: Loss = field(factory=Loss)
    sampling: Sampling = field(factory=Sampling)
    sft: Training | None = None
    text: Text | None = None
    evaluation: Evaluation | None = None
    store: str | None = None
    consistency: Literal["error", "warn"] = "error"
    seeds: tuple[int, ...] = (0,)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "out", str(local_path("Run: out", self.out)))
        if not self.seeds or len({*self.seeds}) < len(self.seeds) or min(self.seeds) < 0:
            raise InvalidRecordError(f"Run: seeds are {list(self.seeds)}, expected one or several from 0, each once; correct them.")
        if self.text and not self.sft:
            raise InvalidRecordError("Run: text is given without sft, which trains on it; give both, or neither.")
        if self.student.urls:
            raise InvalidRecordError("Run: student.engine is a server, expected hf or vllm, which load the student after SFT; choose one.")
        if self.student.revision:
            raise InvalidRecordError("Run: student.revision is given, and training changes which weights they are; leave it out.")
        if self.teacher.urls and self.evaluation and self.evaluation.reverse_kl:
            raise InvalidRecordError("Run: evaluation.reverse_kl needs the teacher here, and its engine is a server; set it to false.")

    def flat(self) -> dict[str, Any]:
        """Return all settings by their path in the file: prompts as their hash, and URLs without secrets."""
        tops = asdict(self)
        if isinstance(self.prompts, list):
            tops["prompts"] = sha256(repr(self.prompts).encode()).hexdigest()[:16]
        sections = {top: keys for top, keys in tops.items() if isinstance(keys, dict)}
        pairs = ((top, *pair) for top, keys in sections.items() for pair in keys.items())
        # runs were begun when there was no such key
        inner = {f"{top}.{key}": value for top, key, value in pairs if (key, value) != ("chat_template_kwargs", None)}
        flat = {key: value for key, value in tops.items() if not isinstance(value, dict)} | inner
        return {key: _shown(value) for key, value in flat.items()}


def decisive(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the flat settings that decide the result of a seed, wherever the run and its servers are.

    >>> decisive({"out": "runs/a", "teacher.engine": "http://host", "opd.lr": 1e-3})
    {'teacher.engine': 'server', 'opd.lr': 0.001}
    """
    found = {key: value for key, value in flat.items() if key.rpartition(".")[2] not in _PASSING}
    return {key: "server" if key.endswith(".engine") and value not in ("hf", "vllm") else value for key, value in found.items()}


def _shown(value: Any) -> Any:
    """Return the value, with URLs as they may be shown and kept."""
    if isinstance(value, Mapping):
        return {key: _shown(item) for key, item in plain(value, "Run file").items()}  # YAML has dates
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return without_secrets(value) if isinstance(value, str) and "://" in value else value


def read_settings(path: str | Path) -> RunSettings:
    """Read a file of YAML, or of JSON, which is YAML too.

    Raises:
        InvalidRecordError: it cannot be read, or a key is unknown, missing, there twice, or of another kind; the message has its path.
    """
    owner = f"Run file {path}"
    yaml = need("yaml", owner)
    try:
        data = yaml.load(read_regular(local_path(owner, path)).decode(), _loader(yaml))
    # a scalar with a tag, or one that only looks like a date or a number, ends in any of the last three
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f" in line {mark.line + 1}" if mark else ""
        raise InvalidRecordError(
            f"{owner}: it cannot be read ({problem}{where}), expected YAML; correct it, or begin with `lopd run --example`."
        ) from error
    for section, key in (("student", "model"), ("teacher", "model"), ("prompts", "file")):
        if isinstance(data, dict) and isinstance(data.get(section), str):
            data[section] = {key: data[section]}
    return read_as(RunSettings, data, owner, InvalidRecordError, "correct it; `lopd run --example` shows every key")


def _loader(yaml: Any) -> Any:
    """Return YAML's safe loader, which also refuses a key that is there twice, and anchors that grow, and takes 1e-3 for a number.

    Answers and ids of prompts are as they are written; in them, and where the record is JSON, numbers of JSON that a float holds stay numbers.
    """

    def as_written(self: Any, node: Any, path: Sequence[Sequence[str]], as_json: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            pairs = list[tuple[Any, Any]]()
            is_json = not path or (node.flow_style and all(getattr(key, "style", "") == '"' for key, _ in node.value))
            for key, part in node.value:
                merged, found = key.tag == "tag:yaml.org,2002:merge", not path or key.value in path[0]
                below = path if merged else path[1:]
                rewritten = as_written(self, part, below, is_json) if merged or found else part
                pairs.append((key if path else as_written(self, key, ()), rewritten))
            return yaml.MappingNode(node.tag, pairs, node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return yaml.SequenceNode(node.tag, [as_written(self, part, path, not path) for part in node.value], node.start_mark)
        if path or node.tag.rpartition(":")[2] not in _READ_AS_VALUES:
            return node
        with suppress(ValueError, OverflowError):  # a number too long to read, a month 13, or what is not JSON
            value = self.construct_object(node)
            if as_text(plain(value, "")) == node.value or (as_json and json.loads(node.value) == value and math.isfinite(value)):
                return node
        return yaml.ScalarNode("tag:yaml.org,2002:str", node.value)

    def construct_document(self: Any, node: Any) -> Any:
        if (size := _size(node, seen := dict[int, int]())) > _LARGEST_GROWTH * len(seen):
            problem = f"its anchors make {size:,} values of {len(seen):,} that are written"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return yaml.SafeLoader.construct_document(self, as_written(self, node, (("prompts",), ("answer", "id"))))

    def construct_mapping(self: Any, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return yaml.SafeLoader.construct_mapping(self, node, deep)

    loader: Any = type("Loader", (yaml.SafeLoader,), {"construct_mapping": construct_mapping, "construct_document": construct_document})
    loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
    return loader


def _size(node: Any, seen: dict[int, int]) -> int:
    """Return how many values a node of YAML stands for, those of anchors as often as they are named."""
    if id(node) not in seen:
        seen[id(node)] = 1  # one that holds itself
        parts = node.value if isinstance(node.value, list) else ()
        each = (one for part in parts for one in (part if isinstance(part, tuple) else (part,)))
        seen[id(node)] = min(1 + sum(_size(one, seen) for one in each), _MANY)
    return seen[id(node)]
