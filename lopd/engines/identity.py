"""Which model is it?  The same answer from a loaded model and from its folder, so that engines which never show their weights can say it too.

A loaded model is identified by the names and values of its parameters.  `folder_model_id` reads the same parameters out of safetensors
files, one at a time: it needs memory for one tensor, whatever the size of the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from json import loads
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lopd.engines.causal_lm import unwrap
from lopd.errors import EngineError, LopdError, ModelError
from lopd.records.checks import local_path
from lopd.records.identity import ModelId, hash_weights, hash_weights_in_order
from lopd.records.manifest import refuse_store

_INDEX = "model.safetensors.index.json"
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def model_id(model: Any) -> ModelId:
    """The identity of a loaded model, by a hash of its weights."""
    return ModelId(model_name(model), hash_weights(model.named_parameters()), _name_of(next(model.parameters()).dtype))


def model_name(model: Any) -> str:
    """The folder or hub name that a model was loaded from, without what is above it; or what kind it is."""
    return Path(str(getattr(unwrap(model).config, "_name_or_path", "") or type(model).__name__)).name


def weights_version(model: Any) -> int:
    """A number that grows whenever weights are changed in place, as optimizers do; torch counts without looking at values."""
    return sum(parameter._version for parameter in model.parameters() if not parameter.is_inference())


def identify(model: Any, identity: ModelId | None) -> tuple[ModelId, int | None]:
    """The identity that was stated, or the hash of the weights with their version, for `check_unchanged`."""
    return (identity, None) if identity else (model_id(model), weights_version(model))


def check_unchanged(owner: str, model: Any, version: int | None) -> None:
    """Stop if the weights were changed since they were hashed: rollouts or scores would be recorded as another model's.

    An error of the call as a whole: one that speaks of a record would have the verbs ask in halves, and put the records away.

    Args:
        owner: how messages name who computes.
        model: whose weights.
        version: when they were hashed; None if they were not.

    Raises:
        EngineError: they were.
    """
    if version is not None and weights_version(model) != version:
        raise EngineError(
            f"{owner}: the weights of its model were changed after it was identified, expected those of its hash; make a new one, or name the model "
            "with `identity=`."
        )


def folder_model_id(folder: str | Path, dtype: torch.dtype | None = None) -> ModelId:
    """The identity that `model_id(load_model(folder, dtype)[0])` gives, without loading the model.

    The names of the parameters, and which of them are tied, are those of a model that transformers builds from the folder's configuration
    without memory for its weights.

    Args:
        folder: of a transformers model, in safetensors, whole or in shards.
        dtype: of the weights in use; None is what the configuration says.

    Raises:
        EngineError: a file is damaged.
        ModelError: there is no whole model (but adapters, say), there are no safetensors files, or they name or shape a parameter otherwise than
            the loaded model does (transformers renames or merges weights of some architectures while it loads them): take the identity of the
            loaded model, or state one.
    """
    folder = find_model(folder)
    if not (folder / "config.json").exists():
        raise ModelError(
            f"Model {folder}: it holds no config.json, expected a whole model (adapters have none: merge them first); save one there, or pass "
            "`identity=`."
        )
    dtype = dtype or folder_dtype(folder)
    with looking_for(folder):
        places = _places(folder)
        weights = ((names[0], _read(folder, places, names, shape).to(dtype)) for names, shape in _parameters(folder))
        return ModelId(folder.name, hash_weights_in_order(weights), _name_of(dtype))


def folder_dtype(folder: str | Path) -> torch.dtype:
    """The dtype in which transformers loads a folder when it is left to choose: the configuration's, or else that of the first weights.

    Raises:
        EngineError: there is no such folder, or a file is damaged.
        ModelError: there are no safetensors files, and the configuration does not say it.
    """
    with looking_for(folder) as found:
        configured = getattr(transformers.AutoConfig.from_pretrained(found), "dtype", None)
        if isinstance(configured, torch.dtype):
            return configured
        first, path = min(_places(found).items())
        with safe_open(path, "pt") as file:
            dtype: torch.dtype = file.get_tensor(first).dtype
    return dtype


def find_model(name: str | Path) -> Path:
    """Return the folder that a model's name is, with `~` expanded; a name in the hub as it is.

    Raises:
        EngineError: it is a path, and there is no such folder: the hub would be asked for it, again and again.
    """
    path = local_path("Model", name, EngineError)
    is_path = (
        isinstance(name, Path)
        or str(name).startswith((".", "/", "~"))
        or len(path.parts) > 2
        or (len(path.parts) > 1 and path.parent.is_dir())
    )
    if is_path and not path.exists():
        raise _not_loaded(name, f"there is no such folder, seen from {Path.cwd()}")
    refuse_store("Model", path, EngineError)
    return path


@contextmanager
def looking_for(name: str | Path) -> Iterator[Path]:
    """Where a model is looked for and read: what goes wrong there is one sentence.  Gives what `find_model` does.

    Raises:
        EngineError: there is no such folder, no such model in the hub or its cache, or it cannot be read.
    """
    found = find_model(name)
    try:
        yield found
    except LopdError:
        raise
    except (OSError, ValueError, ImportError, HFValidationError, SafetensorError) as error:
        raise _not_loaded(name, (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")) from error


def _not_loaded(name: str | Path, reason: str) -> EngineError:
    return EngineError(
        f"Model {str(name)!r}: it cannot be loaded ({reason}), expected a folder that transformers saved, or a name in the hub; check the path, and "
        "HF_HUB_OFFLINE, proxies and certificates of the environment if it is to be downloaded."
    )


def local_folder(name: str | Path) -> Path:
    """A folder as it is, or the local snapshot of a hub name; it is downloaded unless it is there or HF_HUB_OFFLINE is set.

    Raises:
        EngineError: there is none.
    """
    with looking_for(name) as found:
        if found.is_dir():
            return found
        return Path(snapshot_download(str(name), allow_patterns=_FILES))


def _parameters(folder: Path) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Of each parameter, sorted by name: its name, then its other names if it is tied, and its shape."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        yield names[id(parameter)], tuple(parameter.shape)


def _places(folder: Path) -> Mapping[str, Path]:
    """Which file holds which tensor."""
    if (folder / _INDEX).exists():
        return {name: folder / file for name, file in loads((folder / _INDEX).read_text())["weight_map"].items()}
    path = folder / "model.safetensors"
    if not path.exists():
        raise ModelError(
            f"Model {folder}: it holds 0 files of weights in safetensors, expected model.safetensors or its shards; "
            "save it in that format, or pass `identity=`."
        )
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), path)


def _read(folder: Path, places: Mapping[str, Path], names: Sequence[str], shape: tuple[int, ...]) -> Tensor:
    stored = next((name for name in names if name in places), None)
    if stored is None:
        raise ModelError(
            f"Model {folder}: its files hold no {names[0]!r}, expected every parameter of the loaded model; transformers renames weights of this "
            "architecture while it loads them, so load it once and pass `identity=model_id(model)`."
        )
    with safe_open(places[stored], "pt") as file:
        tensor: Tensor = file.get_tensor(stored)
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"Model {folder}: {stored!r} has shape {tuple(tensor.shape)}, expected {shape} as in the loaded model; transformers changes weights of "
            "this architecture while it loads them, so load it once and pass `identity=model_id(model)`."
        )
    return tensor


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
