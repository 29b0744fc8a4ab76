"""A source and a scorer of one small table, which can be wrong on purpose."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen
from served_table import MODEL
from served_table import TOKENIZER as TABLE
from suite_cases import TABLE_CONTEXT
from vllm_stub import EOS, VOCAB, drawn_from

from lopd.engines.inputs import asked_ids, check_prompts, check_rollouts
from lopd.engines.supports import arrange
from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError
from lopd.records import Manifest, Prompt, Provenance, Rollout, SamplingParams, Scores, TopK, rollout_id

TABLE_VV = np.log(np.random.default_rng(0).dirichlet(np.full(VOCAB, 0.3), VOCAB)).astype(np.float32)
Change = Callable[..., Any]
#: What the table was asked for, by whomever.
WORK: list[str] = []


def support_of(rows_TV: Any, ids_TK: Any, drawn: int = 0) -> TopK:
    """Return the table's log-probs of these ids, of which the last were drawn."""
    among_TK = np.take_along_axis(rows_TV, ids_TK, axis=1)
    return TopK(ids_TK, among_TK, np.clip(1 - np.exp(among_TK[:, : ids_TK.shape[1] - drawn]).sum(1), 0, 1), drawn)


def tempered(rows_TV: Any, temperature: float) -> Any:
    scaled_TV = np.exp(rows_TV.astype(np.float64) / temperature)
    return np.log(scaled_TV / scaled_TV.sum(1, keepdims=True))


def unchecked(items: Sequence[Any]) -> None:
    """Refuse nothing."""


def nameless(check: Change) -> Change:
    """Return a check that refuses the same, and does not name what."""

    def refuse(items: Sequence[Any]) -> None:
        try:
            check(items)
        except (ContextOverflowError, InvalidRecordError) as error:
            raise type(error)("one of them will not do") from error

    return refuse


def as_if_all_were_wrong(check: Change) -> Change:
    """Return a check that refuses the same, with the error that ends a run."""

    def refuse(items: Sequence[Any]) -> None:
        try:
            check(items)
        except (ContextOverflowError, InvalidRecordError) as error:
            raise EngineError(str(error)) from error

    return refuse


def refuse_prompts(prompts: Sequence[Prompt]) -> None:
    check_prompts(prompts, TABLE, TABLE_CONTEXT)


def refuse_rollouts(rollouts: Sequence[Rollout]) -> None:
    check_rollouts(rollouts, TABLE, TABLE_CONTEXT)


def refuse_responses(rollouts: Sequence[Rollout]) -> None:
    """Check responses alone, never a prompt."""
    check_rollouts([evolve(rollout, prompt_ids=[2] * rollout.prompt_ids.size) for rollout in rollouts], TABLE, TABLE_CONTEXT)


def checked_ids(rollout: Rollout, candidates: int, drawn: int) -> Any:
    if candidates or drawn:
        check_rollouts([rollout], TABLE, TABLE_CONTEXT, candidates, drawn)
    return asked_ids(rollout, candidates, drawn)


def ids_that_make_do(rollout: Rollout, candidates: int, drawn: int) -> Any:
    """Return the first ids of the vocabulary, where a rollout has no candidates."""
    if rollout.candidates is None:
        return np.tile(np.r_[:candidates, :drawn], (rollout.response_ids.size, 1))
    return asked_ids(rollout, candidates, drawn)


def ids_modulo_the_vocabulary(rollout: Rollout, candidates: int, drawn: int) -> Any:
    return asked_ids(rollout, candidates, drawn) % VOCAB


@frozen
class TableSource:
    """The next token depends on the last one only; `change` makes something else of the rollouts of a call, given the source and the prompts."""

    sampling: SamplingParams
    generation: int = 0
    change: Change = lambda source, prompts, rollouts: rollouts  # the mistakes have these arguments too
    refuse: Change = refuse_prompts

    @property
    def manifest(self) -> Manifest:
        return Manifest(TABLE, MODEL, self.sampling, generation=self.generation)

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        self.refuse(prompts)
        rows = itertools.product(prompts, range(self.sampling.samples_per_prompt))
        return list(self.change(self, prompts, [self._one(prompt, sample) for prompt, sample in rows]))

    def _one(self, prompt: Prompt, sample: int) -> Rollout:
        name = rollout_id(prompt.prompt_id, sample, self.generation)
        WORK.append(name)
        random = np.random.default_rng([self.sampling.seed, *name.encode()])
        stop_ids, ids, logprobs, drawn = self.sampling.stop_ids or (EOS,), [int(prompt.token_ids[-1])], [], []
        while len(ids) <= self.sampling.max_new_tokens and (len(ids) == 1 or ids[-1] not in stop_ids):
            row = TABLE_VV[ids[-1]].astype(np.float64)
            processed = drawn_from(row, self.sampling.temperature, self.sampling.top_p)
            ids.append(int(random.choice(VOCAB, p=np.exp(processed))))
            logprobs.append(row[ids[-1]])
            drawn.append(processed[ids[-1]])
        reason = "stop" if ids[-1] in stop_ids else "length"
        reports = logprobs, self.generation, None if self.sampling.neutral else drawn, self._keep(TABLE_VV[ids[:-1]], name)
        return Rollout(name, prompt.token_ids, ids[1:], [True] * (len(ids) - 1), reason, *reports)

    def _keep(self, rows_TV: Any, name: str) -> TopK | None:
        width, drawn = self.sampling.candidates, self.sampling.drawn
        if not width + drawn:
            return None
        random = np.random.default_rng([self.sampling.seed, 1, *name.encode()])
        draws = [random.choice(VOCAB, drawn, p=np.exp(row) / np.exp(row).sum()) for row in rows_TV.astype(np.float64)]
        return support_of(rows_TV, np.concatenate([np.argsort(-rows_TV, axis=1)[:, :width], draws], axis=1).astype(int), drawn)


@frozen
class TableScorer:
    """The same model; `change` makes something else of the scores of a call, given its rollouts."""

    top_k: int = 0
    change: Change = lambda rollouts, scores: scores  # likewise
    name: str = "table"
    refuse: Change = refuse_rollouts
    candidates: int = 0
    drawn: int = 0
    ask: Change = checked_ids

    @property
    def provenance(self) -> Provenance:
        made, kept = (evolve(MODEL, name=self.name), TABLE.vocab_hash, "table 1.0"), self.candidates + self.top_k + self.drawn
        return Provenance(*made, top_k=kept, eos_id=EOS, candidates=self.candidates, drawn=self.drawn)

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        self.refuse(rollouts)
        asked = [self.ask(rollout, self.candidates, self.drawn) for rollout in rollouts]
        return list(self.change(rollouts, [self._one(*both) for both in zip(rollouts, asked, strict=True)]))

    def _one(self, rollout: Rollout, asked_TA: Any) -> Scores:
        WORK.append(rollout.rollout_id)
        rows_TV = TABLE_VV[np.concatenate([rollout.prompt_ids[-1:], rollout.response_ids[:-1]])]
        likely_TW = np.argsort(-rows_TV, axis=1, kind="stable")[:, : self.candidates + self.top_k]
        tables = (np.take_along_axis(rows_TV, ids, axis=1) for ids in (asked_TA, likely_TW))
        asked, likely = zip((asked_TA, likely_TW), tables, strict=True)
        ids_TK, _ = arrange(*asked, *likely, candidates=self.candidates, top_k=self.top_k)
        support = support_of(rows_TV, ids_TK, self.drawn) if ids_TK.shape[1] else None
        return Scores.of(rollout, rows_TV[np.arange(len(rows_TV)), rollout.response_ids], top_k=support)
