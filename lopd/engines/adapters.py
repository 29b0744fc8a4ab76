"""Adapters of peft: loaded whole, in the precision that they were trained in, with what ends a response of theirs, on the base that they are for."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor

from lopd.engines.causal_lm import unwrap
from lopd.engines.effective import applied_adapter, effective_weights
from lopd.engines.finding import local_folder
from lopd.engines.stored import StoredModel, plain_config
from lopd.errors import ModelError, ModelWarning
from lopd.records.ranks import sharded
from lopd.records.values import is_plain
from lopd.records.warn import warn_user

#: Initialisations of adapters that change the weights under them, and do so again, in the same way, where they are loaded.
_REPEATED = ("pissa", "olora", "loftq")


def read_again(model: Any, folder: str | Path) -> set[str]:
    """Read the adapters of a model again, by peft, in float32 if its weights are narrower; return the names of the tensors that this did not read.

    transformers rounds them to the type of the weights, and does not find those that peft saves under another name, such as the magnitudes of DoRA.

    Args:
        model: as transformers loaded it, with these adapters.
        folder: a folder with adapters, or a hub name.
    """
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    (name,) = model.peft_config
    narrow = model.dtype in (torch.float16, torch.bfloat16)
    if narrow and model.peft_config[name].peft_type != "LN_TUNING":  # norms compute in the type of their weights, for peft too
        cast_adapter_dtype(model, name)
    found = load_peft_weights(str(folder), device=str(model.device))
    # peft looks saved modules and tokens up by the names of this model, which is not in a model of peft's
    weights = {key if ".lora_" in key else key.removeprefix("base_model.model."): value for key, value in found.items()}
    try:
        lacked = set_peft_model_state_dict(model, weights, adapter_name=name).missing_keys
    except (KeyError, ValueError):  # names of an older architecture, which transformers finds
        if narrow:
            raise
        lacked = [*model.state_dict()]
    return {key for key in lacked if ".ranknum." not in key}  # AdaLoRA derives it


def take_generation_config(model: Any, folder: str | Path) -> None:
    """Take the generation configuration that an export wrote beside adapters: transformers takes the base model's.

    Args:
        model: as transformers loaded it from `folder`; one without adapters is left as it is.
        folder: a folder with adapters, or a hub name.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        found = local_folder(str(folder), weights=False)
        if (found / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(found)


def check_base(model: Any, *, before: bool, found: str | None = None) -> str | None:
    """Return the first weight under adapters that is not as in the folder that their export names, which it is loaded on, by some of its values.

    What cannot be compared passes: a base that is not on this machine, is quantised, or has code of its own, and weights that are converted.

    Args:
        model: a model of peft, or one with adapters that transformers loaded.
        before: whether nothing is exported yet, and perhaps never is: what would be refused is a warning.
        found: what was returned before, which counts where the weights are sharded since.

    Warns:
        ModelWarning: nothing loads what is exported by itself, as the base has no name, or transformers does not load such adapters; or `before` has
            found what is an error later, adapters that stay as they are while something else is trained, or a base that was quantised while it was
            loaded.

    Raises:
        ModelError: the base has other values than the folder; or several adapters are active.
    """
    adapter = applied_adapter(model) or next(iter(model.peft_config))
    config = model.peft_config[adapter]
    name, owner = config.base_model_name_or_path, f"Model {type(unwrap(model)).__name__}"
    kept, beside = _of_adapter(unwrap(model), adapter), [path for path, parameter in model.named_parameters() if parameter.requires_grad]
    if before and kept and beside and not any(parameter.requires_grad for parameter in kept):
        warn_user(
            f"{owner}: its adapters stay as they are, since 0 of their parameters require a gradient, while {beside[0]!r} does; to train them, load "
            "them by `PeftModel.from_pretrained(base, folder, is_trainable=True)`.",
            ModelWarning,
        )
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    if before and getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type), "uses_shared_state", False):
        warn_user(
            f"{owner}: its adapters are of the kind {config.peft_type.value}, which transformers does not load, and so neither does `load_model`; "
            "after training merge them (`merge_and_unload()`), and export that.",
            ModelWarning,
        )
    if not name:
        if not before:
            warn_user(
                f"{owner}: its adapters are on a model without a name, so `load_model` does not load them by themselves, expected that of its "
                "folder; save that model too, and load these on it by `PeftModel.from_pretrained`.",
                ModelWarning,
            )
        return None
    if before and getattr(unwrap(model).config, "quantization_config", None) and _is_plain(name):
        warn_user(
            f"{owner}: its weights were quantised when it was loaded, and those of {name}, on which an export of its adapters is loaded, are not, so "
            "the export is another policy than the student; save the quantised model with its tokenizer, load that, and put adapters on it.",
            ModelWarning,
        )
    changed = _changed(unwrap(model), name, config) or (found if sharded(model) else None)
    if changed:
        wrong = (
            f"{owner}: {changed!r} under its adapters is not as in {name}, on which an export of them is loaded; export it merged "
            "(`merge_and_unload()`), or save that model without them, load it, and put adapters on what is loaded"
        )
        if not before:
            raise ModelError(f"{wrong}.")
        warn_user(f"{wrong}; until then its export is refused.", ModelWarning)
    return changed


def _of_adapter(base: Any, adapter: str) -> list[Tensor]:
    """Return the parameters of an adapter in the layers that it changes; saved modules, tokens and biases are beside those."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for path, module in base.named_modules() if isinstance(module, BaseTunerLayer) and not path.endswith(".token_adapter")]
    named = [(name.split("."), layer, parameter) for layer in layers for name, parameter in layer.named_parameters()]
    return [parameter for (part, *rest), layer, parameter in named if part in layer.adapter_layer_names and adapter in rest]


def _here(name: str) -> Path:
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))


def _is_plain(name: str) -> bool:
    """Return whether the weights in a folder, or of a hub name that is on this machine, are not quantised."""
    try:
        return plain_config(_here(name)) is not None
    except Exception:  # it is quantised, or cannot be read
        return False


def _changed(base: Any, name: str, config: Any) -> str | None:
    """Return the first weight under adapters that the files of this folder or hub name hold otherwise."""
    # merged adapters are in weights until they are taken out again, and trained biases are saved with adapters
    aside = [f"{path}." for path, module in base.named_modules() if getattr(module, "merged_adapters", None)]
    repeated = str(getattr(config, "init_lora_weights", None)).lower() in _REPEATED
    biased = getattr(config, "bias", "none") != "none"
    try:
        stored = StoredModel(_here(name), base.dtype)
        for path, held in base.named_parameters():
            own = (repeated and ".base_layer." in path) or (biased and "bias" in path) or path.startswith(tuple(aside))
            original = re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", path)
            layer, below, _ = path.partition(".base_layer.")
            same = not is_plain(held) or own or stored.holds(original, held.detach())
            if not same and not (below and stored.holds(original, held.detach(), _adapted(base.get_submodule(layer), held))):
                return original
    except Exception:  # what cannot be read is refused where it is loaded
        return None
    return None


def _adapted(layer: Any, held: Tensor) -> Tensor:
    """Return what adapters make of a weight, or the weight where they cannot be merged, and so never were."""
    try:
        return next((weight.read() for weight in effective_weights(layer) if weight.held is held), held)
    except ModelError:
        return held
