"""Which model is it?  The same answer from a loaded model and from its folder, so that engines which never show their weights can report it too.

A model is identified by the function that it computes: the weights that it applies (`lopd.engines.effective`), its saved buffers, and the
settings that decide what is computed from them (`lopd.engines.configs`).  `folder_model_id` reads the same weights out of safetensors files
(`lopd.engines.stored`), a few at a time, whatever the size of the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from attrs import define
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lopd.engines.adapters import keep_precision
from lopd.engines.causal_lm import unwrap
from lopd.engines.conditions import check_loaded
from lopd.engines.configs import function_settings, rope_moves
from lopd.engines.derived import changed_buffers
from lopd.engines.effective import Weight, effective_weights
from lopd.engines.stored import StoredModel, stored_places
from lopd.errors import EngineError, LopdError, ModelError
from lopd.records.checks import check_kind
from lopd.records.identity import ModelId, hash_function
from lopd.records.lineage import refuse_store
from lopd.records.paths import local_path

#: Seconds for the hub to answer at all.
_PATIENCE_S = 10.0
_DESCRIPTIONS = ("*.json", "*.jinja", "*.model", "*.txt")


def model_id(model: Any) -> ModelId:
    """Return the identity of a loaded model: equal for equal functions, whatever is wrapped around it.

    It is a hash of the weights that the model applies now (active adapters merged in, adapters that are off left out), of its saved buffers, and
    of the settings that decide what it computes from them.

    Raises:
        ModelError: it is not a causal LM, some of its weights are not in memory, or the effect of an adapter is not in the weights (prompt tuning,
            for example).
    """
    check_loaded(model)
    return ModelId(model_name(model), _revision(model, Weight.read), _name_of(next(model.parameters()).dtype))


def model_name(model: Any) -> str:
    """Return the folder or hub name that a model was loaded from, without what is above it; or what kind it is."""
    base = unwrap(model)
    return Path(str(getattr(base.config, "_name_or_path", "") or type(base).__name__)).name


def function_version(model: Any) -> int:
    """Return a number that changes when the function of a model is changed: weights and buffers in place, adapters, or settings; values are not read.

    torch counts changes in place, as optimizers make them, but not those through `.data`: a few values of each parameter are compared for these.
    """
    base = unwrap(model)
    moving = "inv_freq" if rope_moves(base.config) else "not a name"
    buffers = (buffer for name, buffer in base.named_buffers() if moving not in name)
    counts = tuple((t._version, t.dtype) for t in (*base.parameters(), *buffers) if not t.is_inference())
    return hash((counts, _some_values(base), tuple(map(_adapters, base.modules())), function_settings(model)))


def _some_values(base: Any) -> bytes:
    """Return up to 16 values of each parameter, evenly spaced."""
    plain = (t.detach() for t in base.parameters() if type(t) in (torch.nn.Parameter, Tensor) and t.is_floating_point() and not t.is_meta)
    parts = [t.reshape(-1)[:: max(t.numel() // 16, 1)][:16].float().cpu() for t in plain]
    return torch.cat(parts).numpy().tobytes() if parts else b""


def _adapters(module: Any) -> tuple[Any, ...] | None:
    """Return which adapters a layer of peft applies, and how strongly; None for any other layer."""
    if not hasattr(module, "merged_adapters"):
        return None
    scaling = getattr(module, "scaling", None)
    strengths = tuple(sorted(scaling.items())) if isinstance(scaling, dict) else ()
    return module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters), strengths


@define(eq=False)
class Identified:
    """The identity of a model, and the version of its function that has it; None if the identity was stated."""

    identity: ModelId
    version: int | None


def identify(model: Any, identity: ModelId | None) -> Identified:
    """Return the identity that was stated, or that of the model with the version of its function, for `check_unchanged`."""
    if identity is not None:
        check_kind("Model: identity", identity, ModelId, "pass `model_id(model)`, or `ModelId(name, commit, dtype)`")
    return Identified(identity, None) if identity else Identified(model_id(model), function_version(model))


def check_unchanged(owner: str, model: Any, identified: Identified) -> None:
    """Stop if the function was changed since it was identified: rollouts or scores would be recorded as another model's.

    Where something was changed, the identity is taken again: adapters may be trained while they are off, or merged.

    An error of the call as a whole: one that names a record would have the verbs ask in halves, and put the records away.

    Args:
        owner: how messages name who computes.
        model: that computes.
        identified: what it was; its version is brought up to date.

    Raises:
        EngineError: it was changed.
    """
    if identified.version is None or (version := function_version(model)) == identified.version:
        return
    if model_id(model) != identified.identity:
        raise EngineError(
            f"{owner}: the weights of its model were changed after it was identified (or its buffers, active adapters or settings), expected the "
            "same function; make a new one, or name the model with `identity=`."
        )
    identified.version = version


def folder_model_id(folder: str | Path, dtype: torch.dtype | None = None) -> ModelId:
    """Return the identity that `model_id(load_model(folder, dtype)[0])` gives, without loading the model; a model with adapters is loaded.

    The names of the weights, and which of them are tied, are those of a model that transformers builds from the folder's configuration
    without memory for its weights.

    Args:
        folder: a folder with a transformers model in safetensors, whole or in shards, or with adapters that name their base model; or a hub name.
        dtype: type of the weights in use; None takes the configuration's.

    Raises:
        EngineError: there is no such folder, or a file is damaged.
        ModelError: there is not a whole model, there are no safetensors files, its weights are quantised, or the files name or shape a weight
            otherwise than the loaded model does: take the identity of the loaded model, or state one.
    """
    folder = local_folder(folder)
    with looking_for(folder):
        if (folder / "adapter_config.json").exists():
            adapted = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
            keep_precision(adapted, folder)
            dtype, revision = adapted.dtype, _revision(adapted, Weight.read, capped=True)
        elif (folder / "config.json").exists():
            stored = StoredModel(folder, dtype := dtype or folder_dtype(folder))
            revision = _revision(stored.model, stored.read, capped=True)
        else:
            raise ModelError(
                f"Model {folder}: it holds neither config.json nor adapter_config.json, expected a model; save one there, or pass `identity=`."
            )
    return ModelId(_folder_name(folder), revision, _name_of(dtype))


def folder_dtype(folder: str | Path) -> torch.dtype:
    """Return the dtype in which transformers loads a folder when it is left to choose: the configuration's, or else that of the first weights.

    Raises:
        EngineError: there is no such folder, or a file is damaged.
        ModelError: there are no safetensors files, and the configuration does not state it.
    """
    with looking_for(folder) as found:
        configured = getattr(transformers.AutoConfig.from_pretrained(found), "dtype", None)
        if isinstance(configured, torch.dtype):
            return configured
        first, path = min(stored_places(found).items())
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
    """Give what `find_model` does; turn what goes wrong while a model is looked for and read into one sentence.

    Raises:
        EngineError: there is no such folder, no such model in the hub or its cache, or it cannot be read.
    """
    found = find_model(name)
    if not found.exists():
        _reach_hub(name)
    try:
        yield found
    except LopdError:
        raise
    except (OSError, ValueError, KeyError, ImportError, HFValidationError, SafetensorError) as error:
        raise _not_loaded(name, (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")) from error


def _reach_hub(name: str | Path) -> None:
    """Ask the hub once for a model that is not in its cache: huggingface_hub tries each file for most of a minute."""
    described = (try_to_load_from_cache(str(name), file) for file in ("config.json", "adapter_config.json"))
    if constants.HF_HUB_OFFLINE or any(isinstance(path, str) for path in described):
        return
    try:
        HfApi().model_info(str(name), timeout=_PATIENCE_S)
    except Exception as error:  # of the hub, or of its HTTP library
        raise _not_loaded(
            name, f"{type(error).__name__} of {constants.ENDPOINT}: {str(error).strip().splitlines()[0]}".rstrip(".")
        ) from error


def _not_loaded(name: str | Path, reason: str) -> EngineError:
    return EngineError(
        f"Model {str(name)!r}: it cannot be loaded ({reason}), expected a folder that transformers saved, or a name in the hub; check the path, and "
        "HF_HUB_OFFLINE, proxies and certificates of the environment if it is to be downloaded."
    )


def local_folder(name: str | Path, *, weights: bool = True) -> Path:
    """Return a folder as it is, or the local snapshot of a hub name; it is downloaded unless it is there or HF_HUB_OFFLINE is set.

    Args:
        name: a folder, or a name in the hub.
        weights: whether the weights have to be there too, or only what stands beside them.

    Raises:
        EngineError: there is no such folder or snapshot.
    """
    with looking_for(name) as found:
        if found.is_dir():
            return found
        return Path(snapshot_download(str(name), allow_patterns=[*_DESCRIPTIONS, *(["*.safetensors"] if weights else [])]))


def _revision(model: Any, read: Callable[[Weight], Tensor], *, capped: bool = False) -> str:
    weights = effective_weights(model)
    changed = changed_buffers(model, weights)
    parameters = ((weight.names[0], read(weight)) for weight in weights if weight.kind == "parameter")
    buffers = ((weight.names[0], read(weight)) for weight in weights if weight.kind == "buffer" or weight in changed)
    return hash_function(parameters, buffers, function_settings(model, capped=capped))


def _folder_name(folder: Path) -> str:
    """Return the name of a folder; that of the model for a snapshot in the cache of the hub, which is named by its commit."""
    return folder.parent.parent.name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
