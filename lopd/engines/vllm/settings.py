"""How a vLLM is run."""

from collections.abc import Mapping
from typing import Any, final

import torch
from attrs import field, frozen

from lopd.errors import InvalidRecordError
from lopd.records.checks import check_number, own_numbers

#: Arguments of `vllm.LLM` that lopd sets itself, and where to set them instead.
_OURS = {
    "model": "the folder",
    "tokenizer": "the folder",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "max_num_batched_tokens": "tokens_per_batch",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "tensor_parallel_size": "tensor_parallel_size",
    "seed": "seed",
    "enforce_eager": "enforce_eager",
    "max_logprobs": "top_k of the scorer",
    "logprobs_mode": "nothing: lopd needs those of what was drawn, and records those at temperature 1 beside them",
    "enable_prefix_caching": "nothing: it is on for sampling and off for scoring",
    "enable_chunked_prefill": "nothing: it is on wherever seeds survive it",
    "generation_config": "SamplingParams",
    "logits_processors": "nothing: tokens would be drawn from another distribution than the policy's, and log-probs not be of it",
    "worker_extension_cls": "nothing: lopd cuts the head with it",
}


@final
@frozen
class VLLMSettings:
    """How vLLM is started.

    Args:
        dtype: type of the weights; None takes the one of the model's configuration (vLLM's own "auto" would turn float32 into less).
        max_model_len: tokens of the longest prompt and response together; None is the context of the model.  One with LongRoPE
            (Phi-3-128k, Phi-4-mini) is refused with more than its `original_max_position_embeddings`: vLLM would compute another function.
        tokens_per_batch: positions of one forward pass.  Scoring holds the logits of so many at once, a few times over: float32, V each.  So
            does sampling with a temperature or top_p other than 1, which reads its rollouts once more.
        gpu_memory_utilization: share of a GPU's memory; what scoring needs for logits comes from the rest.
        tensor_parallel_size: GPUs that share one model.
        seed: the engine's seed; rollouts have seeds of their own (`SamplingParams.seed`).
        enforce_eager: no compilation and no CUDA graphs: quicker to start, slower to run.
        float32_head: logits in float32, as lopd computes them everywhere, and not in the dtype of the weights; what it gains on a bfloat16 model
            is in `benchmarks/results/bench_engines.json`.  A vLLM that does not, as versions before 0.32 may not, is warned of when it starts.
        restarts: how often one call may restart a dead engine.
        least_tokens_per_batch: memory that runs out halves `tokens_per_batch` down to this.
        options: any other arguments of `vllm.LLM`, by name.

    Raises:
        InvalidRecordError: a number makes no sense, or an option is one that lopd sets itself.
    """

    dtype: torch.dtype | None = None
    max_model_len: int | None = None
    tokens_per_batch: int = 4096
    gpu_memory_utilization: float = 0.85
    tensor_parallel_size: int = 1
    seed: int = 0
    enforce_eager: bool = False
    float32_head: bool = True
    restarts: int = 2
    least_tokens_per_batch: int = 256
    options: Mapping[str, Any] = field(factory=dict, repr=False)  # one is hf_token

    def __attrs_post_init__(self) -> None:
        owner = "VLLMSettings"
        own_numbers(self, owner, tokens_per_batch=1, least_tokens_per_batch=1, tensor_parallel_size=1, restarts=0)
        check_number(owner, "max_model_len", self.max_model_len, self.max_model_len is None or self.max_model_len > 1, "None or at least 2")
        check_number(owner, "gpu_memory_utilization", self.gpu_memory_utilization, 0 < self.gpu_memory_utilization <= 1, "in (0, 1]")
        for name in self.options:
            if name in _OURS:
                raise InvalidRecordError(
                    f"{owner}: options has {name!r}, expected an argument that lopd does not set itself; the place for it is {_OURS[name]}."
                )
