"""What transformers writes of a model is what the model has: files are looked at before they take the place of others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lopd.engines.effective import effective_weights
from lopd.engines.stored import StoredModel
from lopd.errors import ModelError


def forget_quantiser(model: Any) -> None:
    """Let transformers save weights as they are that it made of quantised ones: by itself it goes back over the conversions that it loaded them by.

    Those of the architecture, which join and rename weights, stay.
    """
    operations = (step for one in getattr(model, "_weight_conversions", None) or () for step in getattr(one, "operations", ()))
    if getattr(model.config, "quantization_config", None) is None and any(hasattr(step, "hf_quantizer") for step in operations):
        model._weight_conversions = None  # it looks those of the architecture up then


def check_written(owner: str, folder: Path, model: Any, weights: Mapping[str, Tensor]) -> None:
    """Compare what was written with what the model has, by a few values of each weight.

    What cannot be compared passes: quantised weights, and a model with code of its own.

    Args:
        owner: how messages name the export.
        folder: what the model was saved in.
        model: without wrappers.
        weights: its weights by name, tied ones by each of theirs.

    Raises:
        ModelError: a parameter is not there, or is another.
    """
    try:
        stored = StoredModel(folder, model.dtype)
    except Exception:  # whatever stands in the way of building it
        return
    for weight in effective_weights(stored.model) if isinstance(model, type(stored.model)) else ():
        name = stored.found_name(weight)
        if weight.kind == "parameter" and (name is None or (name in weights and not stored.holds(name, weights[name].detach()))):
            raise ModelError(
                f"{owner}: transformers wrote {weight.names[0]!r} otherwise than the model has it, or not at all, so the export would load as "
                "another model; put the weights into a new model (`type(model)(model.config)`, `load_state_dict`), and export a student of that."
            )
