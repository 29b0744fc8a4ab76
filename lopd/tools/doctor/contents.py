"""What is in a store: counts, identities, coverage, and what the advantages look like before anybody trains on them."""

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.errors import TeacherConsistencyError
from lopd.guards.consistency import check_teacher_consistency
from lopd.protocols import DurableStore, LogprobReader
from lopd.protocols.reading import evenly, in_batches
from lopd.records.estimates import RolloutSums
from lopd.records.identity import ModelId
from lopd.records.manifest import Commit, Manifest, Provenance
from lopd.records.rollouts import BEHAVIOR_COLUMN

QUANTILES = (0.001, 0.01, 0.05, 0.5, 0.95, 0.99, 0.999)


@frozen
class ColumnInfo:
    """One score column.

    Args:
        name: of the column.   provenance: who computed it.
        scored: rollouts that have scores in it.
        quarantined: row -> why it could not be scored.
        of_policy: whether the model is one of the policies that sampled.
        objection: why its model is no consistent teacher, in one sentence; None if it is one.
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
        rollouts, tokens: in the sample.
        mean: over tokens.   ci95: half-width of its 95 % interval, rollouts being the draws; None for a single rollout.
        mean_abs: mean of the absolute value.
        quantiles: level -> nats.
        below_half_clip: share of tokens below minus half the clip threshold; they are where ratio-1 OPD goes wrong.
        negative: share of tokens below 0.
    """

    teacher: str
    student: str
    rollouts: int
    tokens: int
    mean: float
    ci95: float | None
    mean_abs: float
    quantiles: Mapping[float, float]
    below_half_clip: float
    negative: float


@frozen
class StoreInfo:
    """What `inspect_store` found.

    Args:
        store: how messages name it.   manifest: what all rollouts have in common.
        generations: rounds of sampling and their policies.
        rollouts, prompt_tokens, response_tokens: in all.
        stored_bytes: of the files that the current state is made of.
        behavior: rollouts with log-probs of the sampling engine.
        columns: scores.
        sampled: rollouts that were read for what follows, evenly spaced.
        finish_reasons: of the sampled rollouts.   masked: share of their response tokens that do not count.
        clip: threshold of the advantage, nats.
        advantages: of each teacher against each student column, each over at most as many rollouts as `sampled`.
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
    columns: tuple[ColumnInfo, ...]
    sampled: int
    finish_reasons: Mapping[str, int]
    masked: float
    clip: float
    advantages: tuple[AdvantageInfo, ...]
    history: tuple[Commit, ...]

    @property
    def bytes_per_token(self) -> float:
        """Stored bytes for each prompt or response token."""
        return self.stored_bytes / max(1, self.prompt_tokens + self.response_tokens)


def inspect_store(store: DurableStore, *, sample: int = 1000, clip: float = 10.0) -> StoreInfo:
    """Everything that `python -m lopd.tools.doctor info` shows.

    Args:
        store: any durable store.
        sample: most rollouts to read for finish reasons, masks and each pair of columns.
        clip: threshold of the advantage, nats.

    Memory: 8 bytes for each response token of the sample.

    Raises:
        CorruptStoreError: a row of the sample is damaged.
    """
    history = tuple(store.history())
    prompt_tokens, response_tokens = store.lengths().sum(axis=0).tolist()
    columns = tuple(_describe(store, name, provenance, history) for name, provenance in store.columns.items())
    sampled, finish_reasons, masked = _look_at_rollouts(store, sample)
    behavior = int(store.scored(BEHAVIOR_COLUMN).sum())
    students = [BEHAVIOR_COLUMN] * bool(behavior) + [column.name for column in columns if column.of_policy]
    pairs = [(column.name, student) for column in columns if not column.of_policy for student in students]
    found = [describe_advantages(store, teacher, student, sample=sample, clip=clip) for teacher, student in pairs]
    return StoreInfo(
        store=repr(store),
        manifest=store.manifest,
        generations=dict(store.generations),
        rollouts=len(store),
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        stored_bytes=store.stored_bytes(),
        behavior=behavior,
        columns=columns,
        sampled=sampled,
        finish_reasons=finish_reasons,
        masked=masked,
        clip=clip,
        advantages=tuple(pair for pair in found if pair is not None),
        history=history,
    )


def _describe(store: LogprobReader, name: str, provenance: Provenance, history: tuple[Commit, ...]) -> ColumnInfo:
    of_policy = any(provenance.model.same_weights(policy) for policy in store.generations.values())
    objection = None
    try:
        check_teacher_consistency(store.manifest, [provenance])
    except TeacherConsistencyError as error:
        objection = str(error)
    rounding = max((commit.rounding for commit in history if commit.column == name), default=0.0)
    scored, quarantined = int(store.scored(name).sum()), dict(store.quarantined(name))
    return ColumnInfo(name, provenance, scored, quarantined, of_policy, objection, rounding)


def _look_at_rollouts(store: LogprobReader, sample: int) -> tuple[int, Mapping[str, int], float]:
    rows = evenly(np.arange(len(store)), sample)
    reasons: Counter[str] = Counter()
    tokens = masked = 0
    for batch in in_batches(rows):
        for row in store.read(batch):
            reasons[row.rollout.finish_reason] += 1
            tokens += row.rollout.loss_mask.size
            masked += int((~row.rollout.loss_mask).sum())
    return len(rows), dict(reasons), masked / max(1, tokens)


def describe_advantages(
    reader: LogprobReader, teacher: str, student: str, *, sample: int = 1000, clip: float = 10.0
) -> AdvantageInfo | None:
    """Statistics of the advantage of one pair of columns, over an evenly spaced sample of the rollouts that have both.

    Args:
        reader: any store.
        teacher: a column.
        student: another; `behavior` is one.
        sample: most rollouts to read.
        clip: threshold of the advantage, nats.

    Returns:
        None if no token that counts has both scores.
    """
    rows = evenly(np.flatnonzero(reader.scored(teacher) & reader.scored(student)), sample)
    gaps: list[NDArray[np.float64]] = []
    for batch in in_batches(rows):
        for row in reader.read(batch, columns=(teacher, student)):
            gap_T = row.scores[teacher].astype(np.float64) - row.scores[student]
            gaps.append(gap_T[row.rollout.loss_mask])
    gaps = [gap for gap in gaps if gap.size]
    if not gaps:
        return None
    mean = RolloutSums(np.array([gap.sum() for gap in gaps]), np.array([gap.size for gap in gaps], np.float64)).per_token()
    every = np.concatenate(gaps)
    return AdvantageInfo(
        teacher,
        student,
        rollouts=len(rows),
        tokens=every.size,
        mean=mean.mean,
        ci95=mean.ci95 if math.isfinite(mean.ci95) else None,
        mean_abs=float(np.abs(every).mean()),
        quantiles=dict(zip(QUANTILES, np.quantile(every, QUANTILES).tolist(), strict=True)),
        below_half_clip=float((every < -clip / 2).mean()),
        negative=float((every < 0).mean()),
    )
