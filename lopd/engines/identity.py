"""Which model is it?  The same answer from a loaded model and from its folder, so that engines which never show their weights can report it too.

A model is identified by the function that it computes: the weights that it applies (`lopd.engines.effective`), its saved buffers, and the
settings that decide what is computed from them (`lopd.engines.configs`).  `folder_model_id` reads the same weights out of safetensors files
(`lopd.engines.stored`), a few at a time, whatever the size of the model.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define
from safetensors import safe_open
from torch import Tensor

from lopd.records.optional import needing

with needing("transformers", __name__):
    import transformers

from lopd.engines.causal_lm import unwrap
from lopd.engines.conditions import check_loaded
from lopd.engines.configs import function_settings, rope_moves
from lopd.engines.effective import Weight, effective_weights
from lopd.engines.finding import check_described, local_folder, looking_for
from lopd.engines.stored import StoredModel, plain_config, stored_places
from lopd.engines.whole import load_whole
from lopd.errors import EngineError
from lopd.records.checks import check_kind
from lopd.records.identity import ModelId, hash_function
from lopd.records.values import few_values


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
    values = tuple(few.cpu().numpy().tobytes() for few in few_values(base.named_parameters(), 16).values())
    return hash((counts, values, tuple(map(_adapters, base.modules())), function_settings(model)))


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
    beside = local_folder(folder, weights=False)
    check_described(beside)
    with looking_for(beside):
        # before the weights are downloaded: there may be hundreds of GB of them
        if not (adapters := (beside / "adapter_config.json").exists()):
            plain_config(beside)
        folder = local_folder(folder)
        if adapters:
            adapted = load_whole(str(folder), dtype or "auto")
            dtype, revision = adapted.dtype, _revision(adapted, Weight.read, capped=True)
        else:
            stored = StoredModel(folder, dtype := dtype or folder_dtype(folder))
            revision = _revision(stored.model, stored.read, capped=True)
    return ModelId(_folder_name(folder), revision, _name_of(dtype))


def folder_version(folder: Path) -> int:
    """Return a number that changes when a model in its folder is replaced; values are not read.

    Raises:
        EngineError: there is no such folder.
    """
    with looking_for(folder):
        files = sorted(file for file in folder.iterdir() if file.name == "config.json" or "safetensors" in file.name)
        return hash(tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def folder_dtype(folder: str | Path) -> torch.dtype:
    """Return the dtype in which transformers loads a folder when it is left to choose: the configuration's, or else that of the first weights.

    Raises:
        EngineError: there is no such folder, or a file is damaged.
        ModelError: there are no safetensors files, and the configuration does not state it.
    """
    with looking_for(folder) as found:
        configured = getattr(transformers.AutoConfig.from_pretrained(found, trust_remote_code=False), "dtype", None)
        if isinstance(configured, torch.dtype):
            return configured
        first, path = min(stored_places(found).items())
        with safe_open(path, "pt") as file:
            dtype: torch.dtype = file.get_tensor(first).dtype
    return dtype


def _revision(model: Any, read: Callable[[Weight], Tensor], *, capped: bool = False) -> str:
    weights = effective_weights(model)
    changed = _changed_buffers(model, weights)
    parameters = ((weight.names[0], read(weight)) for weight in weights if weight.kind == "parameter")
    buffers = ((weight.names[0], read(weight)) for weight in weights if weight.kind == "buffer" or weight in changed)
    return hash_function(parameters, buffers, function_settings(model, capped=capped))


def _changed_buffers(model: Any, weights: Sequence[Weight]) -> list[Weight]:
    """Return those of the derived buffers among these weights that hold other values than a new model of the same configuration.

    They are not saved: a model makes them from its configuration, and they count only where they were changed.
    """
    derived = [weight for weight in weights if weight.kind == "derived" and weight.held.device.type != "meta"]
    if rope_moves(unwrap(model).config):
        derived = [weight for weight in derived if "inv_freq" not in weight.names[0]]
    made = _made_again(model) if derived else {}
    return [weight for weight in derived if not _agree(weight.held, made.get(weight.names[0]))]


def _agree(held: Tensor, made: Tensor | None) -> bool:
    if made is None or made.shape != held.shape:
        return made is None  # what cannot be made again is not known to be changed
    if not held.is_floating_point():
        return torch.equal(held.cpu(), made.to(held.dtype))
    # devices round in their own way, and a cast of the model rounds its buffers too
    tolerance, value = 8 * torch.finfo(held.dtype).eps, held.cpu().double()
    casts = (made.to(dtype).double() for dtype in (held.dtype, torch.bfloat16, torch.float16))
    return any(torch.allclose(value, cast, rtol=tolerance, atol=0.0, equal_nan=True) for cast in casts)


@torch.no_grad()
def _made_again(model: Any) -> dict[str, Tensor]:
    """Return the derived buffers of a new model, by name, without memory for its weights: as transformers makes them when it loads one."""
    base = unwrap(model)
    try:
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                new = type(base)(copy.deepcopy(base.config))
            for module in new.modules():
                for name in module._non_persistent_buffers_set:
                    held = module._buffers[name]
                    module._buffers[name] = None if held is None else torch.empty_like(held, device="cpu")
            new.initialize_weights()
    except Exception:  # a class that cannot be built from its configuration alone
        return {}
    return {weight.names[0]: weight.held for weight in effective_weights(new) if weight.kind == "derived"}


def _folder_name(folder: Path) -> str:
    """Return the name of a folder; that of the model for a snapshot in the cache of the hub, which is named by its commit."""
    return folder.parent.parent.name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
