"""The life of a vLLM: started when it is first asked, restarted when it dies, given less at a time when memory runs out, stopped to free it.

vLLM is imported where it is used: it takes seconds, and its reading of the environment (`VLLM_*`) is left to the caller.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, final

from attrs import define, field

from lopd.engines.asked import FIRST, IDS
from lopd.engines.causal_lm import rope_borders
from lopd.engines.finding import described
from lopd.engines.identity import folder_dtype, folder_version
from lopd.engines.vllm.liveness import ran_out_of_memory, told_of_death, was_refused, words_of
from lopd.engines.vllm.settings import VLLMSettings
from lopd.errors import EngineError, LopdError, ModelError, ModelWarning
from lopd.records.devices import give_back
from lopd.records.optional import need
from lopd.records.warn import warn_user

#: The most prompts that vLLM answers side by side, unless its option `max_num_seqs` is given.
ROWS = 256


def import_vllm() -> Any:
    """Return the module vllm, found by importing it: builds for other devices are distributed under other names; raises as `need` does."""
    return need("vllm", "VLLMEngine", "vllm")


@final
@define(eq=False)
class VLLMEngine:
    """One vLLM, for sampling or for scoring; it answers in order, and holds no memory until it is asked or after `close`.

    Args:
        folder: the model's folder.
        vocab_size: ids of its tokenizer, without added tokens that the head has no row for; the rows of the head beyond them are cut off.
        settings: how to start it.
        scoring: without prefix caching, whose log-probs of a prompt would depend on what was asked before; for sampling it is on.
        top_k: the most log-probs a token that are ever asked for beside that of the token itself (`lopd.engines.vllm.reading.widest`).
        tokens_per_batch: at the moment; less than in `settings` after memory ran out.
        starts: how often it was started.

    Warns:
        ModelWarning: `float32_head` is asked for, and this version of vLLM computes logits in another dtype.

    Raises:
        EngineError, ModelError: see `context`.
    """

    folder: Path
    vocab_size: int
    settings: VLLMSettings = field(factory=VLLMSettings)
    scoring: bool = False
    top_k: int = 0
    tokens_per_batch: int = field(init=False)
    starts: int = field(init=False, default=0)
    _llm: Any = field(init=False, default=None, repr=False)
    _loaded: int = field(init=False, default=0, repr=False)
    _asks_worker: bool | None = field(init=False, default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        self.tokens_per_batch = self.settings.tokens_per_batch
        _ = self.context  # one that is refused is refused here

    @property
    def _name(self) -> str:
        return f"vLLM with {self.folder}"

    @property
    def _logprobs_mode(self) -> str:
        """Of sampled tokens: after temperature and top_p.  Those of a prompt are at temperature 1 in either mode."""
        return "raw_logprobs" if self.scoring else "processed_logprobs"

    @cached_property
    def context(self) -> int:
        """Tokens of the longest prompt and response together.

        Raises:
            EngineError: its configuration cannot be read.
            ModelError: neither the settings nor the model's configuration state it, or vLLM would compute another function with it (LongRoPE).
        """
        config = described(self.folder).get_text_config()
        length = self.settings.max_model_len or getattr(config, "max_position_embeddings", None)
        if length is None:
            raise ModelError(f"Model {self.folder}: its configuration has no max_position_embeddings; pass `max_model_len`.")
        # vLLM chooses the factors by its context, once, and transformers by the length of what it reads
        for border in rope_borders(config)[:1]:
            if length > border:
                raise ModelError(
                    f"Model {self.folder}: in a context of {length} vLLM turns all positions by the long factors of LongRoPE, and transformers by "
                    f"the short ones up to {border} tokens, expected a context of at most {border}; pass `max_model_len=` {border}, or use "
                    "transformers for longer texts."
                )
        return int(length)

    @property
    def version(self) -> int:
        """The version of its folder (`folder_version`) that it has loaded, or would load now."""
        return folder_version(self.folder) if self._llm is None else self._loaded

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the `RequestOutput` of vLLM for each prompt of token ids; `params` are arguments of `vllm.SamplingParams`.

        An engine that fails is restarted, and the whole call repeated.  Where memory ran out it is given half as much at a
        time; so it is where it died twice, since a dead process does not report of what.  One that cannot start ends the call.

        Raises:
            EngineError: it did not start, its folder was replaced while it did, it went on failing, or refused a request.
        """
        deaths, lived = 0, False
        while True:
            try:
                return self._generate(prompts, params)
            except Exception as error:
                alive = self._llm is not None
                lived = lived or alive
                self.close()
                if isinstance(error, LopdError):
                    raise
                if ran_out_of_memory(error) and self._halve():
                    continue
                deaths += 1
                if alive and was_refused(error):
                    raise EngineError(f"{self._name}: it refused {words_of(error)}; ask otherwise.") from error
                if not lived:
                    raise EngineError(
                        f"{self._name}: it did not start ({words_of(error)}), see its log; close other engines of this program (`source.close()`), "
                        "`del` models that it keeps on the card, or pass a smaller `max_model_len` or `tokens_per_batch`, another "
                        "`gpu_memory_utilization`, or a `tensor_parallel_size` of at most the GPUs that it sees (`num_gpus` of a Ray worker); "
                        "if the log has 'forked subprocess', set VLLM_WORKER_MULTIPROC_METHOD=spawn."
                    ) from error
                if deaths > self.settings.restarts:
                    raise EngineError(
                        f"{self._name}: it failed {deaths} times in one call, the last time by {words_of(error)}, expected at most "
                        f"{self.settings.restarts}; see its log, and call again to resume."
                    ) from error
                if deaths > 1:
                    self._halve()
            except BaseException:
                # requests that an interrupt left unfinished would be answered in the next call
                self.close()
                raise

    def close(self) -> None:
        """Stop it and free its memory; the next call starts it again."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            give_back()

    def arguments(self) -> dict[str, Any]:
        """Return arguments of `vllm.LLM`."""
        settings, options = self.settings, dict(self.settings.options)
        overrides: dict[str, Any] = {"head_dtype": "float32"} if settings.float32_head else {}
        config = described(self.folder)
        if overrides and getattr(config, "text_config", None) is config.get_text_config():
            overrides["text_config"] = dict(overrides)  # a model that also reads images makes its head by that
        tokens = self.tokens_per_batch if self._may_split_prompts() else max(self.tokens_per_batch, self.context)
        return {
            "disable_log_stats": True,
            **options,
            "model": str(self.folder),
            "dtype": str(settings.dtype or folder_dtype(self.folder)).removeprefix("torch."),
            "max_model_len": self.context,
            "max_num_batched_tokens": tokens,
            "max_num_seqs": min(options.get("max_num_seqs", ROWS), tokens),
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "seed": settings.seed,
            "enforce_eager": settings.enforce_eager,
            "hf_overrides": {**overrides, **options.get("hf_overrides", {})},
            "max_logprobs": max(self.top_k, 1),
            "logprobs_mode": self._logprobs_mode,
            "enable_prefix_caching": not self.scoring,
            "enable_chunked_prefill": self._may_split_prompts(),
            # vLLM would take temperature and cuts from beside the weights
            "generation_config": "vllm",
            "worker_extension_cls": "lopd.engines.vllm.worker.WorkerExtension",
        }

    def _generate(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[Any]:
        vllm = import_vllm()
        llm = self._llm or self._start(vllm)
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        with told_of_death(llm.llm_engine.engine_core):
            asked = [self._asking(vllm, llm, p) if IDS in p else p for p in params]
            outputs = llm.generate(requests, [vllm.SamplingParams(**p) for p in asked], use_tqdm=False)
            if not self.scoring:
                # nothing that was computed in this call is left for the next: the same call computes the same again
                llm.reset_prefix_cache()
        got = [list(output.prompt_token_ids) for output in outputs]
        if got != [request["prompt_token_ids"] for request in requests]:
            raise EngineError(f"{self._name}: it answered {len(got)} prompts, expected the {len(requests)} asked, in order; report it.")
        return list(outputs)

    def _start(self, vllm: ModuleType) -> Any:
        self.starts += 1
        self._asks_worker, self._loaded = None, folder_version(self.folder)
        give_back()  # vLLM's share of a card has to be free, and torch keeps the memory of models that are gone
        # kept before it is looked at, so that one which is refused is stopped
        self._llm = llm = vllm.LLM(**self.arguments())
        if folder_version(self.folder) != self._loaded:
            raise EngineError(f"{self._name}: the files in its folder were replaced while it started; call again.")
        config = llm.llm_engine.vllm_config
        self._check("logprobs_mode", str(config.model_config.logprobs_mode), self._logprobs_mode)
        self._check("enable_prefix_caching", bool(config.cache_config.enable_prefix_caching) and self.scoring, False)
        rows = config.model_config.get_vocab_size()
        if rows < self.vocab_size:
            raise ModelError(
                f"Model {self.folder}: its head has {rows} rows, expected at least {self.vocab_size}, the tokenizer's; resize the embeddings."
            )
        if rows > self.vocab_size and not all(self._ask_workers(llm, "lopd_cut_head", self.vocab_size)):
            raise ModelError(
                f"Model {self.folder}: its head has {rows} rows and cannot be cut, expected the tokenizer's {self.vocab_size}; drop the padding rows."
            )
        if self.settings.float32_head:
            self._warn_of_rounded_logits(llm, vllm.__version__)
        return llm

    def _warn_of_rounded_logits(self, llm: Any, version: str) -> None:
        rounded = {name for names in self._ask_workers(llm, "lopd_head_dtypes") for name in names} - {"torch.float32"}
        if rounded:
            warn_user(
                f"{self._name}: version {version} computes its logits in {', '.join(sorted(rounded))}, expected torch.float32; use vLLM 0.32, or "
                "pass `float32_head=False` if rounded log-probs will do.",
                ModelWarning,
            )

    def _ask_workers(self, llm: Any, name: str, *args: Any) -> list[Any]:
        with told_of_death(llm.llm_engine.engine_core):
            return list(llm.collective_rpc(name, args=args))

    def _asking(self, vllm: ModuleType, llm: Any, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the sampling parameters of a request that asks for ids, as this vLLM takes them: its own, or what `WorkerExtension` reads."""
        if self._asks_worker is None:
            self._asks_worker = self._must_ask_worker(vllm, llm)
        if not self._asks_worker:
            return params
        rest = {name: value for name, value in params.items() if name not in (IDS, FIRST)}
        extra = {IDS: params[IDS].tolist(), FIRST: params[FIRST]}
        return {**rest, "prompt_logprobs": params["prompt_logprobs"] + params[IDS].shape[1], "extra_args": extra}

    def _must_ask_worker(self, vllm: ModuleType, llm: Any) -> bool:
        second = bool(getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", False))
        if second and hasattr(vllm.SamplingParams, IDS):
            return False
        if second or not all(llm.collective_rpc("lopd_read_asked")):
            raise EngineError(
                f"{self._name}: version {vllm.__version__} of vLLM scores only ids of its own choice with its {'second' if second else 'first'} "
                "model runner, expected version 0.32; install it, or score candidates with HFScorer."
            )
        return True

    def _check(self, name: str, got: object, wanted: object) -> None:
        if got != wanted:
            raise EngineError(f"{self._name}: {name} is {got!r}, expected {wanted!r}; use a model for which vLLM keeps to it.")

    def _halve(self) -> bool:
        """Halve the tokens at a time, if that is not too few; return whether it was done."""
        least = self.settings.least_tokens_per_batch if self._may_split_prompts() else self.context
        half = self.tokens_per_batch // 2
        if half < least:
            return False
        self.tokens_per_batch = half
        return True

    def _may_split_prompts(self) -> bool:
        """Return whether a prompt may be read in parts ("chunked prefill").

        Between the parts vLLM winds the random stream of a request with a seed back, which a CPU's generators cannot do: it kills the engine.
        """
        return self.scoring or not _on_cpu()


def _on_cpu() -> bool:
    import_vllm()
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
