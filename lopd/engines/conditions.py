"""What a model must be for the engines to compute what it means: a causal LM, with its caps, and the same at each forward.

Shape suffixes: N tokens, D hidden size.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DataParallel

from lopd.engines.causal_lm import hidden_states, text_config, unwrap
from lopd.errors import ModelError, ModelWarning
from lopd.records.devices import check_device, has_bfloat16
from lopd.records.warn import warn_user


def check_causal_lm(model: Any) -> None:
    """Refuse what is not a causal LM of transformers, adapters that act outside its layers, and weights on several devices.

    Warns:
        ModelWarning: DataParallel is around it, and has several cards, of which one computes.

    Raises:
        ModelError: it names what was given.
    """
    for config in getattr(model, "peft_config", {}).values():
        # both depend on more than the layers: virtual tokens, or where a rollout has certain tokens
        kind = "activated LoRA" if getattr(config, "alora_invocation_tokens", None) else str(config.peft_type).removeprefix("PeftType.")
        if kind == "activated LoRA" or getattr(config, "is_prompt_learning", False):
            raise ModelError(
                f"Model {type(unwrap(model)).__name__}: its adapter is {kind}, and does not act within the layers as LoRA and its kin do; train "
                "such an adapter instead."
            )
    check_loaded(model)
    # what brings outputs back to one device hangs on the root module, and lopd calls the layers below the head
    if len(devices := sorted({str(parameter.device) for parameter in model.parameters()})) > 1:
        raise ModelError(
            f"Model {type(unwrap(model)).__name__}: its weights are on several devices ({', '.join(devices)}); load it on one card "
            "(`load_model(folder, device='cuda:0')`), or, where that is too small, a teacher with vLLM (`tensor_parallel_size`) and a student with "
            "`fully_shard`."
        )
    base = unwrap(model)
    around = [module for module in model.modules() if isinstance(module, DataParallel) and base in module.modules()]
    if (cards := max((len(module.device_ids) for module in around), default=0)) > 1:
        warn_user(
            f"Model {type(base).__name__}: its DataParallel over {cards} cards is passed by, as lopd calls its layers, so one of them computes; to "
            "train on all, put the student in DistributedDataParallel, in a process for each card (torchrun); to sample or score, use `LocalSource` "
            "or `LocalScorer`.",
            ModelWarning,
        )


def check_loaded(model: Any) -> None:
    """Refuse what is not a model of transformers, is not in memory, or is on a device that lacks something.

    Raises:
        ModelError: it names what was given.
    """
    base = unwrap(model)
    if not all(hasattr(base, name) for name in ("config", "get_decoder", "parameters")):
        raise ModelError(
            f"Model: it is {type(base).__name__}, expected a causal LM of transformers, or a peft model around one; load one with "
            "`lopd.engines.hf.load_model`."
        )
    if absent := [name for name, parameter in base.named_parameters() if parameter.is_meta]:
        raise ModelError(
            f"Model {type(base).__name__}: {len(absent)} of its weights ({absent[0]!r}) are on the meta device, expected all in memory; load it "
            "whole, without offloading."
        )
    check_device(f"Model {type(base).__name__}", next(base.parameters()).device)


def check_trained_dtype(model: Any, autocast: torch.dtype | None) -> None:
    """Refuse float16, which has no number below 6e-8: the gradient of a token is divided by the weight of a step, and nothing scales it up again.

    Raises:
        ModelError: the weights are float16, or autocast is another dtype than bfloat16.
    """
    # over a frozen base an autocast computes in its own dtype
    half = torch.float16 in {p.dtype for p in model.parameters() if p.requires_grad or autocast is None}
    if half or autocast not in (None, torch.bfloat16, torch.float32):
        fast = has_bfloat16(next(model.parameters()).device)
        raise ModelError(
            f"Model {type(unwrap(model)).__name__}: {'its weights are torch.float16' if half else f'autocast is {autocast!r:.40}'}, expected "
            "torch.float32 or torch.bfloat16, as float16 rounds gradients below 3e-8 to 0; load float32 weights, and "
            f"{'pass `autocast=torch.bfloat16` for speed' if fast else 'leave out `autocast`'}."
        )


def warn_of_bfloat16(model: Any, autocast: torch.dtype | None) -> None:
    """Warn where layers compute in bfloat16 on a card that has none of its own (`has_bfloat16`): there it is slow, and attention keeps all scores.

    Warns:
        ModelWarning: it names the card, and what to do.
    """
    device = next(model.parameters()).device
    steps = ["leave out `autocast`"] if autocast == torch.bfloat16 else []
    if torch.bfloat16 in {parameter.dtype for parameter in model.parameters()}:
        steps.append("load it as torch.float32, which keeps its identity")
    if steps and not has_bfloat16(device):
        warn_user(
            f"Model {type(unwrap(model)).__name__}: it computes in bfloat16, which torch emulates on {device}, slowly and with all scores of "
            f"attention kept; {', and '.join(steps)}.",
            ModelWarning,
        )


def keep_caps(model: Any) -> None:
    """Set the attention to "eager" where another would drop the cap that the model has on attention scores.

    transformers loads such models with "sdpa", which has no cap, and does not save the choice with the weights.

    Warns:
        ModelWarning: it was set.
    """
    if drops_cap(model):
        unwrap(model).set_attn_implementation("eager")
        warn_user(
            f"Model {type(unwrap(model)).__name__}: its attention dropped the cap on attention scores, and was set to 'eager', which keeps it; load "
            "the model with attn_implementation='eager', or with `lopd.engines.hf.load_model`.",
            ModelWarning,
        )


def drops_cap(model: Any) -> bool:
    """Return whether the model caps attention scores, and runs with an attention that does not."""
    config = text_config(model)
    capped = any("att" in name and "cap" in name and isinstance(value, int | float) and value for name, value in vars(config).items())
    return capped and str(getattr(config, "_attn_implementation", "sdpa")) == "sdpa"


def recompute_plainly(model: Any) -> None:
    """Take torch's reentrant form, in which no gradient can be asked for by itself, from a model that recomputes; its other options stay."""
    for module in unwrap(model).modules():
        for name, form in [*vars(module).items()]:
            if name.endswith("_checkpointing_func") and isinstance(form, partial):
                setattr(module, name, partial(form, use_reentrant=False))


def warn_of_dropout(model: Any) -> None:
    """Warn where a student is another function at each forward, so that a ratio to its policy is noise.

    Warns:
        ModelWarning: a module in training mode drops values at random; it names the first, and p.
    """
    kinds = (torch.nn.modules.dropout._DropoutNd, torch.nn.AlphaDropout)
    dropping = [
        (name, module.p) for name, module in model.named_modules() if isinstance(module, kinds) and module.training and module.p > 0
    ]
    # an adapter that begins at 0 hides its dropout for a step; a dropout that is not a module shows in the states alone
    if not dropping and _same_twice(model):
        return
    what = (
        f"{len(dropping)} modules drop values at random ({dropping[0][0]} with p = {dropping[0][1]:g})"
        if dropping
        else "its layers draw at random"
    )
    warn_user(
        f"Student {type(unwrap(model)).__name__}: {what}, so its log-probs differ from the policy's by chance, and importance ratios and drift are "
        "noise; set dropout to 0, and a router's jitter.",
        ModelWarning,
    )


@torch.no_grad()
def _same_twice(model: Any) -> bool:
    ids_N = torch.arange(8, device=next(model.parameters()).device) % unwrap(model).get_input_embeddings().num_embeddings
    with randomly(model):
        first_ND, second_ND = (hidden_states(model, ids_N[None])[0] for _ in range(2))
    # a router that jitters its input by 1 % shows as little; kernels that add in any order show less
    share = 1e-3 if first_ND.dtype == torch.float32 else 2e-2
    return float((first_ND - second_ND).abs().max()) <= share * float(first_ND.abs().max())


@contextmanager
def randomly(model: Any) -> Iterator[None]:
    """Draw random numbers without taking them from the caller's streams, of the CPU and of the model's device."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def embeddings_kept(model: Any) -> Iterator[list[Tensor]]:
    """Give a list of what the input embeddings return meanwhile: leaves, to which a gradient can be taken."""
    kept: list[Tensor] = []

    def keep(*given: Any) -> Tensor:
        kept.append(given[-1].detach().requires_grad_())
        return kept[-1].clone()  # some families scale it in place

    # what is compiled does not see a new hook, and FlexAttention warns where it is not compiled
    with (
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(action="ignore"),
        unwrap(model).get_input_embeddings().register_forward_hook(keep),
    ):
        yield kept
