"""What is in a store: counts, identities, coverage, and the advantages before training."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from attrs import frozen

from lopd.errors import TeacherConsistencyError
from lopd.guards.consistency import ConsistencyPolicy, check_teacher_consistency, manifest_of_model
from lopd.guards.start import StartReport
from lopd.protocols import DurableStore, LogprobReader
from lopd.protocols.labels import mean_labels
from lopd.protocols.reading import evenly, in_batches, named, walk
from lopd.records.checks import check_at_least
from lopd.records.drift import AdvantageSummary
from lopd.records.estimates import Estimate, RolloutSums
from lopd.records.identity import ModelId
from lopd.records.manifest import Commit, Manifest, Provenance
from lopd.records.rollouts import BEHAVIOR_COLUMN, SAMPLER_COLUMN
from lopd.tools.advantages import sample_advantages, scored_rows
from lopd.tools.facts import find_start


@frozen
class ColumnInfo:
    """One score column.

    Args:
        name: the column's name.   provenance: who computed it.
        scored: rollouts that have scores in it.
        quarantined: row -> why it could not be scored.
        of_policy: whether the model is one of the policies that sampled.
        objection: why its model is not a consistent teacher, in one sentence; None if it is one, or the column has labels.
        rounding: largest error, nats, by which a log-prob was rounded when it was stored.
    """

    name: str
    provenance: Provenance
    scored: int
    quarantined: Mapping[int, str]
    of_policy: bool
    objection: str | None
    rounding: float


@frozen
class AdvantageInfo:
    """The unclipped advantage, teacher minus student log-prob in nats, over the response tokens that count in a sample of rollouts.

    Args:
        teacher, student: columns.
        rollouts: number in the sample.
        mean: prompts are the draws.
        mean_abs: mean of the absolute value.
        summary: quantiles and shares of the tokens.
    """

    teacher: str
    student: str
    rollouts: int
    mean: Estimate
    mean_abs: float
    summary: AdvantageSummary


@frozen
class StoreInfo:
    """What `inspect_store` found.

    Args:
        store: its name in messages.   manifest: what all rollouts have in common.
        generations: rounds of sampling and their policies.
        rollouts, prompt_tokens, response_tokens: in all.
        stored_bytes: size of the files that the current state is made of.
        behavior: rollouts with log-probs of the sampling engine.
        sampler: rollouts with those of the distribution that drew them, where temperature or top-p is not 1.
        columns: scores.
        sampled: rollouts that were read for what follows, evenly spaced.
        finish_reasons: those of the sampled rollouts.   masked: share of their response tokens that do not count.
        advantages: those of each teacher against each student column, each over at most as many rollouts as `sampled`.
        labels: column of labels -> their mean, over at most as many rollouts.
        starts: teacher -> what is known of a run with it before the first step, or why nothing is; over at most as many rollouts.
        history: all commits, oldest first.
    """

    store: str
    manifest: Manifest
    generations: Mapping[int, ModelId]
    rollouts: int
    prompt_tokens: int
    response_tokens: int
    stored_bytes: int
    behavior: int
    sampler: int
    columns: tuple[ColumnInfo, ...]
    sampled: int
    finish_reasons: Mapping[str, int]
    masked: float
    advantages: tuple[AdvantageInfo, ...]
    labels: Mapping[str, float]
    starts: Mapping[str, StartReport | str]
    history: tuple[Commit, ...]

    @property
    def bytes_per_token(self) -> float:
        """Stored bytes for each prompt or response token."""
        return self.stored_bytes / max(1, self.prompt_tokens + self.response_tokens)


def inspect_store(store: DurableStore, *, sample: int = 1000) -> StoreInfo:
    """Return everything that `lopd info` shows.

    Args:
        store: any durable store.
        sample: most rollouts to read for finish reasons, masks and each pair of columns.

    Memory: 16 bytes for each response token of the sample.

    Raises:
        InvalidRecordError: the sample is empty.
        CorruptStoreError: a row of the sample is damaged.
    """
    check_at_least("Store info", "sample", sample, 1)
    history = tuple(store.history())
    prompt_tokens, response_tokens = store.lengths().sum(axis=0).tolist()
    columns = tuple(_describe(store, name, provenance, history) for name, provenance in store.columns.items())
    sampled, finish_reasons, masked = _look_at_rollouts(store, sample)
    behavior = int(store.scored(BEHAVIOR_COLUMN).sum())
    students = [BEHAVIOR_COLUMN] * bool(behavior) + [column.name for column in columns if column.of_policy]
    teachers = [column.name for column in columns if not (column.of_policy or column.provenance.label)]
    pairs = [(teacher, student) for teacher in teachers for student in students]
    found = [describe_advantages(store, teacher, student, sample=sample) for teacher, student in pairs]
    return StoreInfo(
        store=named(store),
        manifest=store.manifest,
        generations=dict(store.generations),
        rollouts=len(store),
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        stored_bytes=store.stored_bytes(),
        behavior=behavior,
        sampler=int(store.scored(SAMPLER_COLUMN).sum()),
        columns=columns,
        sampled=sampled,
        finish_reasons=finish_reasons,
        masked=masked,
        advantages=tuple(pair for pair in found if pair is not None),
        labels={column.name: _mean_label(store, column.name, sample) for column in columns if column.provenance.label and column.scored},
        starts={teacher: find_start(store, teacher=teacher, count=sample) for teacher in teachers},
        history=history,
    )


def _describe(store: LogprobReader, name: str, provenance: Provenance, history: tuple[Commit, ...]) -> ColumnInfo:
    of_policy = any(provenance.is_of(policy) for policy in store.generations.values())
    objection = None
    try:
        judged = [] if provenance.label else [provenance]
        check_teacher_consistency(manifest_of_model(store, provenance), judged, ConsistencyPolicy.PRIVILEGED, own_prompts=True)
    except TeacherConsistencyError as error:
        objection = str(error)
    rounding = max((commit.rounding for commit in history if commit.column == name), default=0.0)
    scored, quarantined = int(store.scored(name).sum()), dict(store.quarantined(name))
    return ColumnInfo(name, provenance, scored, quarantined, of_policy, objection, rounding)


def _mean_label(store: LogprobReader, column: str, sample: int) -> float:
    parts = in_batches(evenly(scored_rows(store, (column,)), sample))
    return float(np.concatenate([mean_labels(store.read(part, columns=(column,)), column) for part in parts]).mean())


def _look_at_rollouts(store: LogprobReader, sample: int) -> tuple[int, Mapping[str, int], float]:
    rows = evenly(np.arange(len(store)), sample)
    reasons: Counter[str] = Counter()
    tokens = masked = 0
    for record in walk(store, rows):
        reasons[record.rollout.finish_reason] += 1
        tokens += record.rollout.loss_mask.size
        masked += int((~record.rollout.loss_mask).sum())
    return len(rows), dict(reasons), masked / max(1, tokens)


def describe_advantages(reader: LogprobReader, teacher: str, student: str, *, sample: int = 1000) -> AdvantageInfo | None:
    """Return statistics of the advantage of one pair of columns, over an evenly spaced sample of the rollouts that have both.

    Args:
        reader: any store.
        teacher: a column.
        student: another; `behavior` is one.
        sample: most rollouts to read.

    Returns:
        None if no token that counts has both scores.
    """
    sampled = sample_advantages(reader, teacher, student, evenly(scored_rows(reader, (teacher, student)), sample))
    summary = sampled.summary
    if summary is None:
        return None
    counted, counts = np.unique(sampled.segments, return_counts=True)
    sums = np.bincount(sampled.segments, sampled.gap)[counted].astype(np.float64)
    return AdvantageInfo(
        teacher,
        student,
        rollouts=len(sampled.rows),
        mean=RolloutSums(sums, counts.astype(np.float64)).by_prompt(sampled.prompt_ids[counted]).per_token(),
        mean_abs=float(np.abs(sampled.gap).mean()),
        summary=summary,
    )
