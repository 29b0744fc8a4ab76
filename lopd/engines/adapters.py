"""Adapters of peft, loaded in the precision that they were trained in, and with what ends a response of theirs."""

from pathlib import Path
from typing import Any

import torch
import transformers

from lopd.engines.finding import local_folder


def keep_precision(model: Any, folder: str | Path) -> None:
    """Load the adapters of a model again, in float32 if its weights are narrower, as peft trains them: transformers rounds them to the weights'.

    Args:
        model: as transformers loaded it from `folder`; one without adapters is left as it is.
        folder: a folder with adapters, or a hub name.
    """
    if not getattr(model, "_hf_peft_config_loaded", False) or model.dtype not in (torch.float16, torch.bfloat16):
        return
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    (name,) = model.peft_config
    cast_adapter_dtype(model, name)
    found = load_peft_weights(str(folder), device=str(model.device))
    # peft looks saved modules and tokens up by the names of this model, which is not in a model of peft's
    weights = {key if ".lora_" in key else key.removeprefix("base_model.model."): value for key, value in found.items()}
    set_peft_model_state_dict(model, weights, adapter_name=name)


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
