"""A whole model from a folder: each weight that it has is in the files, those of its adapters and of the base that they are on."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.peft_utils import find_adapter_config_file

from lopd.engines.adapters import read_again
from lopd.engines.finding import local_folder
from lopd.engines.stored import AUTO, base_of, class_of, has_part, text_alone
from lopd.errors import ModelError


def load_whole(folder: str, dtype: torch.dtype | str) -> Any:
    """Return a model from a folder or hub name, of `class_of`, or its text part where that is all; adapters on their base.

    Raises:
        ModelError: its files lack weights, which transformers would make up.
    """
    base = folder
    if (adapters := find_adapter_config_file(folder)) and not (Path(folder) / "config.json").exists():
        base = base_of(Path(adapters))
    config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
    place, below = base, ""
    if adapters and find_adapter_config_file(base):
        # transformers would put what lies beside the base on it, and looks for that in the folder alone, not in one below it
        whole = local_folder(base).absolute()
        place, below = whole.anchor, str(whole.relative_to(whole.anchor))

    def load(kind: Any) -> tuple[Any, set[str], list[str]]:
        model, read = kind.from_pretrained(place, subfolder=below, dtype=dtype, output_loading_info=True, trust_remote_code=False)
        lacked = set(read["missing_keys"])
        lost = [name for name, _ in model.named_parameters(remove_duplicate=False) if name in lacked]
        if adapters:
            model.name_or_path = model.config.name_or_path = base
            # by itself, since transformers reports what adapters lack in place of what their base does
            lacked = model.load_adapter(folder).missing_keys & read_again(model, folder)
            named = [*model.named_parameters(remove_duplicate=False)]
            # adapters of tied weights are saved once, and lacking under the other name
            there = {id(parameter) for name, parameter in named if name not in lacked}
            lost += [name for name, parameter in named if name in lacked and id(parameter) not in there]
        return model, lacked, sorted(lost)

    model, lacked, lost = load(class_of(config))
    # adapters that lack some may be of the text part
    if lost and has_part(config) and (adapters or text_alone(config, model, model.state_dict().keys() - lacked)):
        model = None  # make room first
        model, _, lost = load(AUTO)
    if lost:
        raise ModelError(
            f"Model {folder!r}: its files lack {len(lost)} weights ({lost[0]!r}), expected all of a {type(model).__name__}; transformers draws such "
            "weights at random, so load the folder of a whole causal LM."
        )
    return model
