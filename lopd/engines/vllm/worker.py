"""What runs inside vLLM's worker processes; vLLM finds it by name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from lopd.engines.asked import FIRST, IDS


class WorkerExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    get_model: Any
    model_runner: Any

    def lopd_cut_head(self, vocab_size: int) -> int:
        """Cut the logits to the tokenizer's vocabulary, as `lopd.engines.causal_lm.lm_head` does, and return in how many layers.

        The rows of a head beyond the tokenizer's ids are padding.  vLLM samples from them and counts their mass; with the cut, no such id is
        ever drawn and every log-prob is over the ids that exist.
        """
        layers = _logits_layers(self.get_model())
        for layer in layers:
            # vLLM's own cut of the rows that it pads a head with
            layer.org_vocab_size = vocab_size
        return len(layers)

    def lopd_head_dtypes(self) -> list[str]:
        """Return in which dtypes logits are computed, as far as this vLLM states it; one that lets no layer choose states it for the model."""
        try:
            whole = getattr(self.model_runner.model_config, "head_dtype", None)
            stated = {getattr(layer, "head_dtype", None) or whole for layer in _logits_layers(self.get_model())}
        except Exception:  # of a worker that is built otherwise nothing is known, and it does its work all the same
            return []
        return sorted(str(dtype) for dtype in stated if dtype is not None)

    def lopd_read_asked(self) -> bool:
        """Let prompt log-probs hold, last at each position, those of the ids that a request asks for; return whether this vLLM can be made to.

        vLLM's first model runner has nothing for that.  It reads the prompts of a step one after another, and takes from the log-probs over
        the vocabulary what it returns: here one prompt at a time is shown to it, so that it is known whose ids to take besides.
        """
        runner = self.model_runner
        parts = (runner, "_get_prompt_logprobs_dict"), (runner, "num_prompt_logprobs"), (runner, "requests"), (runner, "sampler")
        if not all(hasattr(*part) for part in parts) or not hasattr(runner.sampler, "gather_logprobs"):
            return False
        runner._get_prompt_logprobs_dict = partial(_read_each, runner, runner._get_prompt_logprobs_dict, runner.sampler.gather_logprobs)
        return True


def _logits_layers(model: torch.nn.Module) -> list[Any]:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    return [layer for layer in model.modules() if isinstance(layer, LogitsProcessor)]


def _read_each(runner: Any, read: Callable[..., Mapping[str, Any]], gather: Callable[..., Any], *step: Any) -> dict[str, Any]:
    """Return what `read` gives for all prompts that wait for their log-probs; it removes those that it has finished."""
    waiting: dict[str, int] = runner.num_prompt_logprobs
    finished: dict[str, Any] = {}
    for name in list(waiting):
        request = runner.requests[name]
        asked = request.sampling_params.extra_args
        runner.sampler.gather_logprobs = _with_asked(gather, asked, request.num_computed_tokens) if asked else gather
        runner.num_prompt_logprobs = {name: waiting[name]}
        finished |= read(*step)
        if not runner.num_prompt_logprobs:
            del waiting[name]
    runner.sampler.gather_logprobs, runner.num_prompt_logprobs = gather, waiting
    return finished


def _with_asked(gather: Callable[..., Any], asked: Mapping[str, Any], start: int) -> Callable[..., Any]:
    """Return what `gather` does, for positions from `start` on, with the ids asked for last.

    Positions of the prompt, before the first that is asked about, get the ids of that one; their log-probs are not read.
    """

    def taken(logprobs_SV: torch.Tensor, width: int, tokens_S: torch.Tensor) -> Any:
        places = range(start - asked[FIRST], start - asked[FIRST] + len(logprobs_SV))
        ids_SA = torch.tensor([asked[IDS][max(place, 0)] for place in places], device="cpu").to(logprobs_SV.device)
        own = gather(logprobs_SV, width - ids_SA.shape[1], tokens_S)
        return own._replace(
            logprob_token_ids=torch.cat([own.logprob_token_ids, ids_SA.to(own.logprob_token_ids.dtype)], dim=1),
            logprobs=torch.cat([own.logprobs, logprobs_SV.gather(-1, ids_SA)], dim=1),
        )

    return taken
