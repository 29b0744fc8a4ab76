"""vLLM in this process as a RolloutSource and as a TeacherScorer: token ids in, token ids and log-probs out, never text.

Log-probs are those of the model itself: log-softmax of the logits at temperature 1, uncut, over the ids of the tokenizer.  Where a source draws
from another distribution, the log-probs in that one are recorded too.  Two computers of log-probs never agree to the last bit; how far vLLM is from
transformers on a model is measured, not assumed (`benchmarks/bench_engines.py`).
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from attrs import evolve, field, frozen

from lopd.engines.asked import check_drawn
from lopd.engines.causal_lm import cut_to_rows
from lopd.engines.finding import configured_eos
from lopd.engines.identity import Identified
from lopd.engines.inputs import (
    SEED_BITS,
    check_prompts,
    check_rollouts,
    check_support,
    check_top_k,
    make_rollout,
    sampling_settings,
    stop_ids,
    stream_seed,
)
from lopd.engines.supports import make_support, provenance_of
from lopd.engines.vllm.engine import ROWS, VLLMEngine, import_vllm
from lopd.engines.vllm.folders import as_identified, check_engine, identify, open_folder
from lopd.engines.vllm.reading import entries, look_up, read_scores, widest
from lopd.engines.vllm.settings import VLLMSettings
from lopd.errors import ContextOverflowError, EngineError
from lopd.records.checks import check_kind, check_number, own_numbers
from lopd.records.identity import ModelId, TokenizerId, fingerprint_tokenizer
from lopd.records.lineage import Lineage
from lopd.records.manifest import Manifest, Provenance, SamplingParams
from lopd.records.rollouts import Prompt, Rollout, Scores, rollout_id

_COLDEST = 0.01
# log-probs of one call of sampling, 12 GB of vLLM's objects; more than of scoring, for each call waits for its longest response
_ENTRIES = 1 << 27


class OnEngine:
    """What a source and a scorer on an engine have in common."""

    engine: VLLMEngine
    tokenizer: Any
    identity: ModelId | None

    @cached_property
    def tokenizer_id(self) -> TokenizerId:
        """Whose ids it reads."""
        return fingerprint_tokenizer(self.tokenizer)

    @cached_property
    def _known(self) -> TokenizerId:
        return cut_to_rows(self.tokenizer, self.engine.vocab_size)

    @cached_property
    def _identified(self) -> Identified:
        return identify(self.engine, self.identity)

    def close(self) -> None:
        """Free the engine's memory; a later call starts it again."""
        self.engine.close()


@final
@frozen(eq=False)
class VLLMSource(OnEngine):
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
        identity: the model's identity; by default that of its folder (`lopd.engines.identity.folder_model_id`), taken when first needed.
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
    def from_folder(
        cls, folder: str | Path, sampling: SamplingParams, settings: VLLMSettings | None = None, *, identity: ModelId | None = None
    ) -> "VLLMSource":
        """Return a source on a model folder or hub name, with the SFT teacher that is recorded there.

        Raises:
            EngineError: there is no such model, or it cannot be read.
            ModelError: it has adapters, its identity has to be stated, or see `VLLMEngine.context`.
        """
        engine, tokenizer = open_folder(folder, settings, identity, top_k=sampling.candidates)
        return cls(engine, tokenizer, sampling, Lineage.read(engine.folder), identity)

    def __attrs_post_init__(self) -> None:
        check_kind("VLLMSource: sampling", self.sampling, SamplingParams, "make it: `SamplingParams(...)`")
        check_drawn("VLLMSource", self.sampling)
        check_top_k("VLLMSource", self.sampling.candidates, self._known, "candidates")
        check_engine("VLLMSource", self.engine, self._known, self.sampling.candidates, scoring=False)
        temperature = self.sampling.temperature
        # vLLM would raise it to that
        check_number("VLLMSource", "temperature", temperature, temperature == 0 or temperature >= _COLDEST, f"0 or at least {_COLDEST}")

    @property
    def manifest(self) -> Manifest:
        """The manifest of a store of these rollouts; the policy is identified once."""
        return Manifest(self.tokenizer_id, self._identified.identity, self.sampling, self.lineage.sft_teacher, self.generation)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a response: those asked for, or the model's and the tokenizer's EOS."""
        return stop_ids(self.sampling, configured_eos(self.engine.folder), self.tokenizer_id)

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """Return `samples_per_prompt` rollouts for each prompt, in their order.

        Raises:
            EngineError: its folder holds another model than when it was identified, or vLLM failed; see `VLLMEngine.generate`.
        """
        check_prompts(prompts, self._known, self._context)
        rows = [(p, rollout_id(p.prompt_id, s, self.generation)) for p in prompts for s in range(self.sampling.samples_per_prompt)]
        if not rows:
            return []
        with as_identified("VLLMSource", self.engine, self._identified):
            rollouts = [rollout for run in self._runs(rows) for rollout in self._sample(run)]
            if self._reads_again:
                scores = read_scores(self.engine, rollouts, self.sampling.candidates)
                rollouts = [evolve(r, behavior_logprobs=s.logprobs, candidates=s.top_k) for r, s in zip(rollouts, scores, strict=True)]
        return rollouts

    def _runs(self, rows: list[tuple[Prompt, str]]) -> list[list[tuple[Prompt, str]]]:
        """Return rows in calls of like size that memory can hold, none with fewer than vLLM samples side by side."""
        entries = len(rows) * min(self.sampling.max_new_tokens, self._context) * (1 + self._kept)
        calls = max(1, min(1 + entries // _ENTRIES, len(rows) // self.engine.settings.options.get("max_num_seqs", ROWS)))
        return [rows[len(rows) * i // calls : len(rows) * (i + 1) // calls] for i in range(calls)]

    def _sample(self, rows: list[tuple[Prompt, str]]) -> list[Rollout]:
        """Return rollouts of one call; a function of its own, so that what vLLM gave is dropped before the next."""
        outputs = self.engine.generate([p.token_ids.tolist() for p, _ in rows], [self._params(p, name) for p, name in rows])
        return [self._rollout(prompt, name, output.outputs[0]) for (prompt, name), output in zip(rows, outputs, strict=True)]

    @property
    def _reads_again(self) -> bool:
        return not self.sampling.neutral and self.sampling.temperature > 0

    @property
    def _kept(self) -> int:
        """How many candidates come with each sampled token; where rollouts are read again, they come with that."""
        return 0 if self._reads_again else self.sampling.candidates

    @property
    def _context(self) -> int:
        """Tokens of the longest rollout."""
        return self.engine.context - self._reads_again

    def _params(self, prompt: Prompt, name: str) -> dict[str, Any]:
        greedy = self.sampling.temperature == 0
        return {
            **sampling_settings(self.sampling, self.stop_ids, self._known),
            "logprobs": self._kept,
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
        if ids.max() >= self._known.vocab_size:
            raise EngineError(f"Rollout {name!r}: vLLM sampled id {ids.max()}, expected ids below {self._known.vocab_size}; report it.")
        owner = f"Rollout {name!r}"
        reported, ids_TK, logprobs_TK = look_up(owner, ids, *entries(completion.logprobs), top_k=self._kept)
        return make_rollout(
            name,
            prompt.token_ids,
            completion.token_ids,
            None if self._reads_again else reported,
            None if self.sampling.neutral else reported if self._reads_again else np.zeros_like(reported),
            stops=self.stop_ids,
            generation=self.generation,
            candidates=make_support(owner, ids_TK, logprobs_TK) if self._kept else None,
        )


@final
@frozen(eq=False)
class VLLMScorer(OnEngine):
    """Reads rollouts with vLLM: each as a prompt whose log-probs are asked for, shortest first, with prefix caching off.

    `contextlib.closing(scorer)` frees the GPU when the phase is over.

    vLLM must generate one token, so a rollout has at most one token less than the context.

    Args:
        engine: for scoring; it starts when first asked.
        tokenizer: the model's own.
        identity: the model's identity; by default that of its folder (`lopd.engines.identity.folder_model_id`).
        top_k: how many of the model's own most likely tokens, outside of the candidates, are kept beside each response token.
        candidates: how many of each rollout's candidates are scored: the first of `Rollout.candidates`, which are the policy's most likely.
        drawn: how many of its drawn candidates are scored: the last.

    A support is ordered as that of `HFScorer`.  Candidates need vLLM 0.32: its `prompt_logprob_token_ids` with the second model runner, code of
    lopd's in vLLM's worker with the first.

    Raises:
        InvalidRecordError: `top_k`, `candidates` or both together are not 0 to V, or `drawn` is less than 0.
        EngineError: the engine is one for sampling, or for fewer log-probs a token.
    """

    engine: VLLMEngine
    tokenizer: Any = field(repr=False)
    identity: ModelId | None = None
    top_k: int = 0
    candidates: int = 0
    drawn: int = 0

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        settings: VLLMSettings | None = None,
        *,
        identity: ModelId | None = None,
        top_k: int = 0,
        candidates: int = 0,
        drawn: int = 0,
    ) -> "VLLMScorer":
        """Return a scorer on a model folder or hub name.

        Raises:
            EngineError: there is no such model, or it cannot be read.
            ModelError: it has adapters, its identity has to be stated, or see `VLLMEngine.context`.
        """
        engine, tokenizer = open_folder(folder, settings, identity, scoring=True, top_k=widest(top_k, candidates, drawn))
        return cls(engine, tokenizer, identity, top_k, candidates, drawn)

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "VLLMScorer")
        check_support("VLLMScorer", self._known, self.top_k, self.candidates, self.drawn)
        check_engine("VLLMScorer", self.engine, self._known, widest(self.top_k, self.candidates, self.drawn), scoring=True)

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are; the model is identified once."""
        whose = self._identified.identity, self.tokenizer_id, f"vllm {import_vllm().__version__}"
        return provenance_of(*whose, top_k=self.top_k, candidates=self.candidates, drawn=self.drawn)

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """Return (T_i,) log-probs, nats, of each rollout's response tokens, in the order given.

        Raises:
            EngineError: its folder holds another model than when it was identified, or vLLM failed; see `VLLMEngine.generate`.
        """
        check_rollouts(rollouts, self._known, self.engine.context, self.candidates, self.drawn)
        for rollout in rollouts:
            if len(rollout) == self.engine.context:
                raise ContextOverflowError(
                    f"Rollout {rollout.rollout_id!r}: it has {len(rollout)} tokens, expected at most {len(rollout) - 1}, one less than the context, "
                    "since vLLM always generates a token; use a longer context, or drop it."
                )
        if not rollouts:
            return []
        with as_identified("VLLMScorer", self.engine, self._identified):
            return read_scores(self.engine, rollouts, self.top_k, self.candidates, self.drawn)
