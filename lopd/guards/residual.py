r"""A teacher's scores with its habits taken out: what to train on where the scoring teacher did not write the SFT text.

Another teacher differs from the student by what it knows and by how it writes; the second is an offset that follows the token, or the place
and how sure the reference policy was, whatever the prompt.  It is estimated on other prompts and subtracted:

\(d_t = \ell_T(a_t) - \ell_{ref}(a_t)\),  \(\hat b_t = \tfrac12 m_{tok}(a_t) + \tfrac12 m_{ctx}(p_t, r_t)\),  \(\tilde\ell_T = \ell_T - \hat b_t\)

\(m_{tok}\) and \(m_{ctx}\) are means of d by token, and by position in the response and surprisal \(r = -\ell_{ref}\), in bins; every response has
weight 1, spread over the tokens that count.  They are fitted on the prompts of all other folds, so that no prompt explains itself.

Source: Lightning OPD 2.0 (arXiv 2607.28449), from accounts of it.  Its bins and smoothing were not at hand; ours are stated with the arguments.
"""

from hashlib import blake2b
from typing import final

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.protocols import LogprobReader, LogprobStore
from lopd.protocols.doors import check_noun
from lopd.protocols.labels import refuse_labels
from lopd.protocols.reading import chosen, in_batches, named, walk, way_to
from lopd.records.checks import check_at_least, check_number, own_numbers
from lopd.records.manifest import RESIDUAL, Provenance
from lopd.records.rollouts import BEHAVIOR_COLUMN, ScoredRollout, Scores, prompt_id_of

Float64Array = NDArray[np.float64]
_VERSION = 1
#: Borders of the surprisal bins, nats.
_SURPRISAL = np.array([0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0])


@frozen
class ResidualReport:
    """What one call of `residualise` did.

    Args:
        rollouts, tokens: corrected; tokens that count.
        offset: mean of what was subtracted, nats.
        spread: its standard deviation over tokens, nats.
        beyond_before, beyond_after: share of tokens on which the scores are more than 1 nat from the reference policy's.
    """

    rollouts: int = 0
    tokens: int = 0
    offset: float = 0.0
    spread: float = 0.0
    beyond_before: float = 0.0
    beyond_after: float = 0.0


@final
@frozen
class Residualiser:
    """How offsets are estimated.

    Args:
        folds: prompts are dealt to so many by a hash of their id; a prompt's offsets come from the others.  At least 2.
        positions: bins of the position in the response, from its first token to its last.
        prior: a group of tokens is shrunk to the mean of all as if it had so many more tokens of that mean.

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    folds: int = 5
    positions: int = 10
    prior: float = 20.0

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Residualiser", folds=2, positions=1)
        check_number("Residualiser", "prior", self.prior, 0 <= self.prior < np.inf, "finite and at least 0")

    def fit(self, store: LogprobReader, rows: NDArray[np.int64], column: str, ref: str) -> "Offsets":
        """Return the offsets of these rows, in one pass that holds sums and no tokens."""
        sizes = (store.manifest.tokenizer.vocab_size, self.positions * (_SURPRISAL.size + 1))
        tables, tokens = [np.zeros((2, self.folds, size)) for size in sizes], np.zeros(self.folds)
        for record in walk(store, rows, (column, ref)):
            on_T = record.rollout.loss_mask
            if on_T.any():
                fold, gap_M = self.fold(record), _gap(record, column, ref)[on_T]
                tokens[fold] += gap_M.size
                for (sums, weights), groups_T in zip(tables, self.groups(record, ref), strict=True):
                    np.add.at(sums[fold], groups_T[on_T], gap_M / gap_M.size)
                    np.add.at(weights[fold], groups_T[on_T], 1 / gap_M.size)
        return Offsets(self, *(_means(sums, weights, tokens, self.prior) for sums, weights in tables))

    def fold(self, record: ScoredRollout) -> int:
        """Return the fold of the rollout's prompt, whatever else is in the store."""
        digest = blake2b(prompt_id_of(record.rollout.rollout_id).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.folds

    def groups(self, record: ScoredRollout, ref: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (T,) the group of each token in either table."""
        length = record.rollout.response_ids.size
        position_T = np.arange(length) * self.positions // length
        surprisal_T = np.searchsorted(_SURPRISAL, -record.scores[ref], side="right")
        return record.rollout.response_ids.astype(np.int64), position_T * (_SURPRISAL.size + 1) + surprisal_T


@frozen(eq=False)
class Offsets:
    """Fitted tables.

    Args:
        how: what they were fitted with.
        by_token: (folds, V) nats: the offset of each token for a prompt of each fold.
        by_context: (folds, positions times surprisal bins), likewise.
    """

    how: Residualiser
    by_token: Float64Array
    by_context: Float64Array

    def of(self, record: ScoredRollout, ref: str) -> Float64Array:
        """Return (T,) nats; 0 for tokens that do not count."""
        fold, (token_T, context_T) = self.how.fold(record), self.how.groups(record, ref)
        return np.where(record.rollout.loss_mask, (self.by_token[fold, token_T] + self.by_context[fold, context_T]) / 2, 0.0)

    def digest(self) -> str:
        """Return the hash of all values, so that one column never mixes two fits."""
        return blake2b(self.by_token.tobytes() + self.by_context.tobytes(), digest_size=8).hexdigest()


def residualise(
    store: LogprobStore,
    column: str = "teacher",
    *,
    ref: str = BEHAVIOR_COLUMN,
    into: str = "teacher-residual",
    how: Residualiser | None = None,
    rollouts_per_batch: int = 256,
    rows: NDArray[np.int64] | None = None,
) -> ResidualReport:
    """Write a new column: the scores of `column` less the offsets of its model.  Run it again to resume.

    Train on it with `batches(teacher=into, consistency=ConsistencyPolicy.RESIDUALISE)`.  Two passes over the store; memory is that of the tables,
    16 bytes * folds * V.  Rollouts in quarantine in either column are so in the new one.

    Args:
        store: with both columns.
        column: the teacher's column.
        ref: the reference policy's column.
        into: the new column.
        how: bins, folds and smoothing.
        rollouts_per_batch: committed together.
        rows: fitted on, and written; None for all.  Of one teacher of several pass those of its own prompts: `rows_of(store, prompts)`.

    Raises:
        MissingScoresError: a column is not there, or not complete.
        InvalidRecordError: `column` is a residual already, or is what the policy itself reported; or there are no rows.
        NoSuchRowError: a row is not in the store.
        ConflictError: `into` holds something else, or a fit on other rollouts: write another column.
    """
    check_noun(store, LogprobStore)
    how = how or Residualiser()
    rollouts_per_batch = check_at_least("Residualiser", "rollouts_per_batch", rollouts_per_batch, 1)
    refuse_labels(store, column, ref)
    teacher = _teacher(store, column)
    usable, reasons = _rows(store, (column, ref), chosen(store, rows))
    offsets = how.fit(store, usable, column, ref)
    engine = (
        f"lopd residual {_VERSION}: {column} less offsets against {ref}, {how.folds} folds, {how.positions} positions, prior {how.prior:g}, "
        f"fit {offsets.digest()}"
    )
    provenance = Provenance(teacher.model, teacher.vocab_hash, engine, RESIDUAL, eos_id=teacher.eos_id)
    store.append_scores(into, provenance, ())
    totals = np.zeros(6)
    pending = usable[~store.scored(into)[usable]]
    for batch in in_batches(pending, rollouts_per_batch):
        scores = []
        for record in store.read(batch, columns=(column, ref)):
            offset_T = offsets.of(record, ref)
            totals += _count(record, offset_T, _gap(record, column, ref))
            scores.append(Scores.of(record.rollout, record.scores[column] - offset_T, signed=True))
        store.append_scores(into, provenance, scores)
    if reasons:
        store.quarantine(into, provenance, reasons)
    return _report(totals)


def _teacher(store: LogprobReader, column: str) -> Provenance:
    provenance = store.columns.get(column)
    if provenance is None and column != BEHAVIOR_COLUMN:
        raise MissingScoresError(f"{named(store)}: column {column!r} is absent, expected a teacher's scores; run `score_rollouts` first.")
    if provenance is None or provenance.residual or provenance.privileged:
        of = "of other prompts than the policy's" if provenance is not None and provenance.privileged else "a residual already"
        what = "what the policy itself reported" if provenance is None else of
        raise InvalidRecordError(
            f"{named(store)}: column {column!r} is {what}, expected a teacher's log-probs; pass the column of the teacher."
        )
    return provenance


def _rows(store: LogprobReader, columns: tuple[str, str], every: NDArray[np.int64]) -> tuple[NDArray[np.int64], dict[str, str]]:
    """Return those of the rows with scores in both columns, and why others have none."""
    usable, reasons, wanted = np.ones(every.size, np.bool_), dict[int, str](), set(every.tolist())
    for column in columns:
        scored = store.scored(column)[every]
        quarantined = {row: reason for row, reason in store.quarantined(column).items() if row in wanted}
        done = int(scored.sum())
        if done + len(quarantined) < every.size or not done:
            own = ", or pass the rows of its own prompts as `rows=`" if done else ""
            raise MissingScoresError(
                f"{named(store)}: column {column!r} has scores for {done} rollouts, expected {every.size}; {way_to(store, column)}{own}."
            )
        usable &= scored
        reasons.update({row: f"column {column!r}: {reason}" for row, reason in quarantined.items()})
    ids = [record.rollout.rollout_id for record in store.read(sorted(reasons))]
    return every[usable], dict(zip(ids, (reasons[row] for row in sorted(reasons)), strict=True))


def _gap(record: ScoredRollout, column: str, ref: str) -> Float64Array:
    return record.scores[column].astype(np.float64) - record.scores[ref]


def _means(sums: Float64Array, weights: Float64Array, tokens: Float64Array, prior: float) -> Float64Array:
    """Return (folds, groups): the shrunk mean of every group over all folds except one; that of all tokens where a group has none.

    Gaps are summed up in (folds, groups), their weights likewise; tokens are counted in (folds,).
    """
    sums, weights, tokens = (total.sum(0) - total for total in (sums, weights, tokens))
    weight_of_all = weights.sum(1)
    mean_of_all = np.divide(sums.sum(1), weight_of_all, out=np.zeros(len(sums)), where=weight_of_all > 0)[:, None]
    # so many tokens of average weight, in the unit in which a response weighs 1
    extra = (prior * np.divide(weight_of_all, tokens, out=np.zeros(len(sums)), where=tokens > 0))[:, None]
    total = weights + extra
    means: Float64Array = np.where(weights > 0, (sums + extra * mean_of_all) / np.where(total > 0, total, 1.0), mean_of_all)
    return means


def _count(record: ScoredRollout, offset_T: Float64Array, gap_T: Float64Array) -> Float64Array:
    """Return (6,): 1, and of the tokens that count: their number, sums of offsets and of squares, and how many are beyond 1 nat before and after."""
    on_T = record.rollout.loss_mask
    offset_M, gap_M = offset_T[on_T], gap_T[on_T]
    beyond = [float((np.abs(values_M) > 1).sum()) for values_M in (gap_M, gap_M - offset_M)]
    return np.array([1.0, offset_M.size, offset_M.sum(), (offset_M**2).sum(), *beyond])


def _report(totals: Float64Array) -> ResidualReport:
    tokens = max(float(totals[1]), 1.0)
    mean, square, *beyond = (totals[2:] / tokens).tolist()
    return ResidualReport(int(totals[0]), int(totals[1]), mean, max(square - mean**2, 0.0) ** 0.5, *beyond)
