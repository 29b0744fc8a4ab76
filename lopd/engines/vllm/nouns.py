"""vLLM in this process as a RolloutSource and as a TeacherScorer: token ids in, token ids and log-probs out, never text.

Log-probs are those of the model itself: log-softmax of the logits at temperature 1, uncut, over the ids of the tokenizer.  Where a source draws
from another distribution, the log-probs in that one are recorded too.  Two computers of
log-probs never agree to the last bit; how far vLLM is from transformers on a model is measured, not assumed (`benchmarks/bench_engines.py`).

Shape suffixes: S positions, T response tokens, K candidates a token, W entries of a position.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import transformers
from attrs import evolve, field, frozen

from lopd.engines.identity import folder_model_id, local_folder, looking_for
from lopd.engines.inputs import (
    SEED_BITS,
    all_ids,
    check_prompts,
    check_rollouts,
    check_top_k,
    in_order,
    make_rollout,
    sampling_settings,
    stop_ids,
    stream_seed,
)
from lopd.engines.supports import entries, look_up, make_scores
from lopd.engines.vllm.engine import VLLMEngine, import_vllm
from lopd.engines.vllm.settings import VLLMSettings
from lopd.errors import ContextOverflowError, EngineError, ModelError
from lopd.records.checks import check_kind, check_number
from lopd.records.identity import ModelId, TokenizerId, fingerprint_tokenizer
from lopd.records.manifest import Lineage, Manifest, Provenance, SamplingParams
from lopd.records.rollouts import Prompt, Rollout, Scores, rollout_id

_COLDEST = 0.01
# Options of vLLM that change what the weights in a folder compute.
_CHANGING = {"hf_overrides", "hf_config_path", "quantization", "rope_scaling", "rope_theta"}


@final
@frozen(eq=False)
class VLLMSource:
    """Samples with vLLM; `contextlib.closing(source)` frees the GPU when a phase is over.

    Each (seed, prompt, sample, generation) has its own random stream, so a rollout does not depend on what shared its batch (up to the
    rounding of the matrix products).  They are other streams than HFSource's: the same seed gives other rollouts there.

    vLLM reports the log-probs of the distribution that it draws from.  Where that is not the one at temperature 1, rollouts are read once more
    for those; a rollout then has at most one token less than the context, as for `VLLMScorer`.  At temperature 0 vLLM reports those at 1.

    Args:
        engine: for sampling; it starts when first asked.
        tokenizer: the model's own.
        sampling: how to draw.
        lineage: what the model was trained on; `from_folder` reads it from beside the weights.
        identity: of the model; by default that of its folder (`lopd.engines.identity.folder_model_id`), taken when first asked for.
        generation: round of sampling.

    Raises:
        EngineError: the engine is one for scoring.
        InvalidRecordError: the temperature is one that vLLM would change.
    """

    engine: VLLMEngine
    tokenizer: Any = field(repr=False)
    sampling: SamplingParams = field(factory=SamplingParams)
    lineage: Lineage = field(factory=Lineage)
    identity: ModelId | None = None
    generation: int = 0

    @classmethod
    def from_folder(cls, folder: str | Path, sampling: SamplingParams, settings: VLLMSettings | None = None) -> "VLLMSource":
        """A source on a model folder or hub name, with the SFT teacher that is recorded there."""
        engine, tokenizer = _open(folder, settings)
        return cls(engine, tokenizer, sampling, Lineage.read(engine.folder))

    def __attrs_post_init__(self) -> None:
        check_kind("VLLMSource: sampling", self.sampling, SamplingParams, "make it: `SamplingParams(...)`")
        _check_purpose("VLLMSource", self.engine, scoring=False)
        temperature = self.sampling.temperature
        # vLLM would raise it to that
        check_number("VLLMSource", "temperature", temperature, temperature == 0 or temperature >= _COLDEST, f"0 or at least {_COLDEST}")

    @cached_property
    def tokenizer_id(self) -> TokenizerId:
        """Whose ids it reads."""
        return fingerprint_tokenizer(self.tokenizer)

    @cached_property
    def _identified(self) -> ModelId:
        return self.identity or _folder_identity(self.engine)

    @property
    def manifest(self) -> Manifest:
        """What a store of these rollouts must say; the policy is identified once."""
        return Manifest(self.tokenizer_id, self._identified, self.sampling, self.lineage.sft_teacher, self.generation)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a response: those asked for, or the model's and the tokenizer's EOS."""
        return stop_ids(self.sampling, _configured_eos(self.engine.folder), self.tokenizer_id)

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """`samples_per_prompt` rollouts for each prompt, in their order."""
        check_prompts(prompts, self.tokenizer_id, self._context)
        rows = [(p, rollout_id(p.prompt_id, s, self.generation)) for p in prompts for s in range(self.sampling.samples_per_prompt)]
        if not rows:
            return []
        outputs = self.engine.generate([p.token_ids.tolist() for p, _ in rows], [self._params(p, name) for p, name in rows])
        rollouts = [self._rollout(prompt, name, output.outputs[0]) for (prompt, name), output in zip(rows, outputs, strict=True)]
        if self._reads_again:
            scores = _read(self.engine, rollouts, top_k=0)
            rollouts = [evolve(rollout, behavior_logprobs=s.logprobs) for rollout, s in zip(rollouts, scores, strict=True)]
        return rollouts

    @property
    def _reads_again(self) -> bool:
        return not self.sampling.neutral and self.sampling.temperature > 0

    @property
    def _context(self) -> int:
        """Tokens of the longest rollout."""
        return self.engine.context - self._reads_again

    def _params(self, prompt: Prompt, name: str) -> dict[str, Any]:
        greedy = self.sampling.temperature == 0
        return {
            **sampling_settings(self.sampling, self.stop_ids, self.tokenizer_id),
            "seed": None if greedy else stream_seed(self.sampling, name, SEED_BITS),
            "max_tokens": min(self.sampling.max_new_tokens, self._context - prompt.token_ids.size),
            "flat_logprobs": True,
            "detokenize": False,
        }

    def _rollout(self, prompt: Prompt, name: str, completion: Any) -> Rollout:
        ids = np.array(completion.token_ids, np.int64)
        if completion.finish_reason not in ("stop", "length") or ids.size == 0:
            raise EngineError(
                f"Rollout {name!r}: vLLM gave {ids.size} tokens and the reason {completion.finish_reason!r}, expected 'stop' or 'length'; "
                "see its log, and call again to resume."
            )
        if ids.max() >= self.tokenizer_id.vocab_size:
            raise EngineError(
                f"Rollout {name!r}: vLLM sampled id {ids.max()}, expected one below the vocabulary's {self.tokenizer_id.vocab_size}; report it."
            )
        reported = look_up(f"Rollout {name!r}", ids, *entries(completion.logprobs), top_k=0)[0]
        drawn = None if self.sampling.neutral else reported if self._reads_again else np.zeros_like(reported)
        behavior = None if self._reads_again else reported
        return make_rollout(name, prompt.token_ids, completion.token_ids, behavior, drawn, stops=self.stop_ids, generation=self.generation)

    def close(self) -> None:
        """Free the engine's memory; a later call starts it again."""
        self.engine.close()


@final
@frozen(eq=False)
class VLLMScorer:
    """Reads rollouts with vLLM: each as a prompt whose log-probs are asked for, shortest first, with prefix caching off.

    `contextlib.closing(scorer)` frees the GPU when the phase is over.

    vLLM must generate one token, so a rollout has at most one token less than the context.

    Args:
        engine: for scoring; it starts when first asked.
        tokenizer: the model's own.
        identity: of the model; by default that of its folder (`lopd.engines.identity.folder_model_id`).
        top_k: how many of the most likely tokens, and the probability of all others, are kept beside each response token.

    Raises:
        InvalidRecordError: `top_k` is not 0 to V.
        EngineError: the engine is one for sampling, or for fewer candidates.
    """

    engine: VLLMEngine
    tokenizer: Any = field(repr=False)
    identity: ModelId | None = None
    top_k: int = 0

    @classmethod
    def from_folder(cls, folder: str | Path, settings: VLLMSettings | None = None, *, top_k: int = 0) -> "VLLMScorer":
        """A scorer on a model folder or hub name."""
        return cls(*_open(folder, settings, scoring=True, top_k=top_k), top_k=top_k)

    def __attrs_post_init__(self) -> None:
        check_top_k("VLLMScorer", self.top_k, self.tokenizer_id)
        _check_purpose("VLLMScorer", self.engine, scoring=True)
        if self.engine.top_k < self.top_k:
            raise EngineError(
                f"VLLMScorer: the engine gives {self.engine.top_k} candidates, expected {self.top_k}; pass it the same `top_k`."
            )

    @cached_property
    def tokenizer_id(self) -> TokenizerId:
        """Whose ids it reads."""
        return fingerprint_tokenizer(self.tokenizer)

    @cached_property
    def _identified(self) -> ModelId:
        return self.identity or _folder_identity(self.engine)

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are; the model is identified once."""
        engine = f"vllm {import_vllm().__version__}"
        return Provenance(self._identified, self.tokenizer_id.vocab_hash, engine, "raw", self.top_k, self.tokenizer_id.eos_id)

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """(T_i,) log-probs, nats, of each rollout's response tokens, in the order given."""
        check_rollouts(rollouts, self.tokenizer_id, self.engine.context)
        for rollout in rollouts:
            if len(rollout) == self.engine.context:
                raise ContextOverflowError(
                    f"Rollout {rollout.rollout_id!r}: it has {len(rollout)} tokens, expected at most {len(rollout) - 1}, one less than the context, "
                    "since vLLM always generates a token; use a longer context, or drop it."
                )
        if not rollouts:
            return []
        return _read(self.engine, rollouts, self.top_k)

    def close(self) -> None:
        """Free the engine's memory; a later call starts it again."""
        self.engine.close()


def _read(engine: VLLMEngine, rollouts: Sequence[Rollout], top_k: int) -> list[Scores]:
    """Scores of rollouts, which go in as prompts, shortest first."""
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i]))
    params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k, "flat_logprobs": True, "detokenize": False}
    outputs = engine.generate([all_ids(rollouts[i]) for i in order], [params] * len(order))
    return in_order(order, [_scores(rollouts[i], output.prompt_logprobs, top_k) for i, output in zip(order, outputs, strict=True)])


def _scores(rollout: Rollout, flat: Any, top_k: int) -> Scores:
    owner = f"Rollout {rollout.rollout_id!r}"
    positions = len(flat.start_indices)
    if positions != len(rollout):
        raise EngineError(f"{owner}: vLLM gave log-probs at {positions} positions, expected {len(rollout)}; report it.")
    # position 0 has no log-prob, and is never that of a response: a prompt has at least one token
    candidates = entries(flat, first=rollout.prompt_ids.size)
    return make_scores(rollout, *look_up(owner, rollout.response_ids, *candidates, top_k=top_k))


def _open(folder: str | Path, settings: VLLMSettings | None, *, scoring: bool = False, top_k: int = 0) -> tuple[VLLMEngine, Any]:
    path = local_folder(folder)
    with looking_for(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    vocab_size = fingerprint_tokenizer(tokenizer).vocab_size
    return VLLMEngine(path, vocab_size, settings or VLLMSettings(), scoring=scoring, top_k=top_k), tokenizer


def _check_purpose(owner: str, engine: VLLMEngine, *, scoring: bool) -> None:
    if engine.scoring != scoring:
        raise EngineError(
            f"{owner}: the engine has scoring={engine.scoring}, expected scoring={scoring}; sampling and scoring need engines of their own."
        )


def _folder_identity(engine: VLLMEngine) -> ModelId:
    for name in sorted(engine.settings.options.keys() & _CHANGING):
        raise ModelError(
            f"Model {engine.folder}: vLLM's option {name!r} makes another model of it than its folder says; pass `identity=` with a revision of its "
            "own."
        )
    return folder_model_id(engine.folder, engine.settings.dtype)


def _configured_eos(folder: Path) -> Any:
    """The EOS ids that a model loaded from this folder has in its generation configuration."""
    try:
        return transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        return transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(folder)).eos_token_id
