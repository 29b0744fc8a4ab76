"""What transformers writes of a model is what the model has: files are looked at before they take the place of others."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from torch import Tensor

from lopd.engines.causal_lm import head_rows
from lopd.engines.effective import effective_weights
from lopd.engines.stored import StoredModel
from lopd.errors import ModelError


@contextmanager
def quantiser_forgotten(model: Any) -> Iterator[None]:
    """Let transformers save weights as they are that it made of quantised ones: by itself it goes back over the conversions that it loaded them by.

    Those of the architecture, which join and rename weights, stay.
    """
    conversions = getattr(model, "_weight_conversions", None)
    operations = (step for one in conversions or () for step in getattr(one, "operations", ()))
    if getattr(model.config, "quantization_config", None) is None and any(hasattr(step, "hf_quantizer") for step in operations):
        model._weight_conversions = None  # it looks those of the architecture up then
    try:
        yield
    finally:
        if conversions is not None:
            model._weight_conversions = conversions


def check_written(owner: str, fresh: Path, folder: Path, model: Any, state: Mapping[str, Tensor] | None) -> None:
    """Compare what was written with what the model has, by a few values of each weight.

    Experts, and whatever else is made of several tensors of the files, are read as a whole for that.  What cannot be compared passes: quantised
    weights, and a model with code of its own.

    Args:
        owner: how messages name the export.
        fresh: what the model was saved in; it is kept under another name where it is refused, since no other files have the weights.
        folder: what it was to become.
        model: without wrappers around the whole.
        state: its weights by name, where its own are sharded.

    Raises:
        ModelError: a parameter is not there, or is another.
    """
    try:
        wrong = _written_otherwise(fresh, model, state)
    except Exception:  # whatever stands in the way of comparing them
        return
    if wrong is not None:
        fresh.rename(aside := fresh.with_name(f"{folder.name}-refused.{uuid4().hex[:8]}"))
        raise ModelError(
            f"{owner}: transformers wrote {wrong!r} otherwise than the model has it, or not at all, so the export would load as another model; "
            f"what was written stands in {aside}, so compare its config.json and weights with the model, and correct the one that is wrong."
        )


def name_end(path: Path, model: Any, tokenizer: Any) -> None:
    """Add the tokenizer's EOS to the ends in a generation_config.json: what `generate` of transformers stops at is read from there alone.

    The model in memory stays as it is, and so does a file that has it, or that is not there; an id that the head has no row for is never drawn.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None or end >= (head_rows(model) or 0) or not path.exists():
        return
    stated = json.loads(path.read_text())
    ends = {*np.ravel(stated.get("eos_token_id")).tolist()} - {None}
    if end not in ends:
        path.write_text(json.dumps({**stated, "eos_token_id": sorted({*ends, end})}, indent=2, sort_keys=True) + "\n")


def _written_otherwise(fresh: Path, model: Any, state: Mapping[str, Tensor] | None) -> str | None:
    stored = StoredModel(fresh, model.dtype)
    # layers may be wrapped one by one, as activation checkpointing does it
    weights = {name: weight.held for weight in effective_weights(model) for name in weight.names} if state is None else state
    for weight in effective_weights(stored.model) if isinstance(model, type(stored.model)) else ():
        name = stored.found_name(weight)
        held = None if name is None else weights.get(name)
        with suppress(Exception):  # whatever stands in the way of comparing this one
            if weight.kind == "parameter" and (
                name is None or (held is not None and not stored.holds(name, held.detach(), converted=True))
            ):
                return weight.names[0]
    return None
