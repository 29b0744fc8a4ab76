r"""Who wrote this text?  For students whose SFT teacher was not recorded.

Import a sample of the SFT text as rollouts, score it with every model that may have written it, one column each, and ask:

    audit(store, ["qwen3-32b", "qwq-32b", "student"]).verdict

*Among the candidates* the likeliest author is the one to whom the text is least surprising: \(E_p[-\log p] \le E_p[-\log q]\) for every q
(Gibbs), whatever the prompt.  The difference of two candidates is one number a rollout, so it is tested as a paired mean.

*Whether the text is consistent with it* shows in a column that keeps the most likely tokens.  Let g be the probability of the token that is there, 0
for one outside the K.  Under the author its mean \(\sum_k p_k^2\) and its variance are known at every position, and what it deviates is
a martingale: \(z = \sum_t (E g_t - g_t) / \sqrt{1 + \sum_t \mathrm{Var}\,g_t}\) is then about standard normal, if the text was sampled at
temperature 1.  Another author writes what the model finds less likely than its own text, which makes z large; a lower temperature, or a cut of
the tail, makes it negative.  (The 1 keeps a single rare token from speaking where a model is all but certain.)

Consistent is not "wrote it": z is small too for a model near the author, such as another seed or a later checkpoint of it.  Only asking that model
as well tells the two apart.  `benchmarks/results/intervals.json` has how near it may be.
"""

import math
from collections.abc import Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.protocols import LogprobReader
from lopd.protocols.doors import check_noun
from lopd.protocols.labels import refuse_labels
from lopd.protocols.reading import chosen, named, walk
from lopd.records.checks import several
from lopd.records.estimates import Estimate, RolloutSums
from lopd.records.identity import ModelId
from lopd.records.rollouts import ScoredRollout, prompt_id_of

#: A text is another author's beyond this; below minus this it is surer than the model at temperature 1.
FOREIGN_Z = 4.0


@frozen
class Candidate:
    """One model, and what it makes of the text.

    Args:
        column: name of its score column.
        model: whose they are.
        surprisal: nats per token; its interval, as that of `behind`, is over prompts.
        behind: how much more surprising than to the first candidate, nats per token, paired; 0 for the first itself.
        z: deviation of the text from what this model would write, in standard errors; None where the column keeps no top-k.
    """

    column: str
    model: ModelId
    surprisal: Estimate
    behind: Estimate
    z: float | None


@frozen
class Audit:
    """What was found.

    Args:
        candidates: the least surprised first.
        rollouts, tokens: that were looked at.
        author: column of the likeliest author; None if the text is not consistent with any, or another cannot be told from it.
        error: chance that a text by another candidate puts the first this far before it, the largest of all others' (p-value of a paired t
            test over rollouts, at least that of as many tossed coins; 1 without another one).
        verdict: all of it in a sentence.
    """

    candidates: tuple[Candidate, ...]
    rollouts: int
    tokens: int
    author: str | None
    error: float
    verdict: str


def audit(store: LogprobReader, columns: Sequence[str], *, rows: NDArray[np.int64] | None = None, max_error: float = 0.01) -> Audit:
    """Return which of these models is the likeliest author of the rollouts of this store, and whether they are consistent with it.

    A model near the author passes for it where the author is not among the columns.  How often another than the author is named was measured
    on known pairs: `benchmarks/results/audit_errors.json`, and `intervals.json` for the stated error.

    Args:
        store: text whose author is asked for.
        columns: one for each candidate; with top-k, a text by none of them is seen as such.
        rows: a sample of the text, each counted once; None for all.
        max_error: an author is named if `Audit.error` is at most this.

    Raises:
        ArgumentError: the store is something else, or one text is given in place of several.
        MissingScoresError: a column is not there, or a row has no scores in it.
        InvalidRecordError: there are no columns or one comes twice, or there are no rows, or no tokens that count.
        NoSuchRowError: a row is not in the store.
    """
    check_noun(store, LogprobReader)
    columns = list(several("Audit: columns", columns))
    refuse_labels(store, *columns)
    every = chosen(store, rows)
    if not columns or len(set(columns)) < len(columns):
        raise InvalidRecordError(
            f"Audit: it was given {len(columns)} columns ({len(set(columns))} distinct), expected at least 1; name each once."
        )
    for column in columns:
        if column not in store.columns:
            raise MissingScoresError(
                f"{named(store)}: column {column!r} is absent, expected a candidate's scores; run `score_rollouts` first."
            )
    sums, prompts, deviations = _read(store, columns, every)
    pooled = {column: each.by_prompt(prompts) for column, each in sums.items()}
    means = {column: each.per_token() for column, each in pooled.items()}
    ordered = sorted(columns, key=lambda column: means[column].mean)
    best, first = sums[ordered[0]], pooled[ordered[0]]
    candidates = tuple(Candidate(c, store.columns[c].model, means[c], pooled[c].minus(first), deviations.get(c)) for c in ordered)
    tokens = int(best.counts.sum())
    # over rollouts: the author is the least surprised whatever the prompt, and given their prompts rollouts are independent;
    # the largest, as one that is further behind on average may also vary more
    chances = [sums[column].p_value(best) for column in ordered[1:]]
    error = max(*chances, 0.5 ** len(best.sums)) if chances else 1.0
    author, verdict = _judge(candidates[0], candidates[1 + int(np.argmax(chances))] if chances else None, error, max_error)
    return Audit(candidates, len(best.sums), tokens, author, error, f"{verdict} ({len(best.sums)} rollouts, {tokens} response tokens).")


def _read(
    store: LogprobReader, columns: Sequence[str], rows: NDArray[np.int64]
) -> tuple[dict[str, RolloutSums], list[str], dict[str, float]]:
    """Return surprisals by column, the prompt of each rollout in them, and z by column."""
    supported = [column for column in columns if store.columns[column].top_k > store.columns[column].drawn]
    found: dict[str, list[float]] = {column: [] for column in columns}
    moments = {column: np.zeros(2) for column in supported}
    counts, prompts = list[float](), list[str]()
    for record in walk(store, rows, columns, supported):
        on_T = record.rollout.loss_mask
        if not on_T.any():
            continue
        counts.append(float(on_T.sum()))
        prompts.append(prompt_id_of(record.rollout.rollout_id))
        for column in columns:
            found[column].append(-float(record.scores[column][on_T].sum(dtype=np.float64)))
        for column in supported:
            moments[column] += _deviation(record, column)
    sums = {column: RolloutSums(np.array(values), np.array(counts)) for column, values in found.items()}
    return sums, prompts, {column: float(total / math.sqrt(1 + variance)) for column, (total, variance) in moments.items()}


def _deviation(record: ScoredRollout, column: str) -> NDArray[np.float64]:
    """Return sums over the counted tokens of E g - g, and of the variance of g."""
    support, on_T = record.top_k[column], record.rollout.loss_mask
    own = slice(support.distinct)
    chance_TK = np.exp(support.logprobs[:, own].astype(np.float64))
    mean_T = (chance_TK**2).sum(-1)
    variance_T = (chance_TK**3).sum(-1) - mean_T**2
    found_T = np.where(support.ids[:, own] == record.rollout.response_ids[:, None], chance_TK, 0.0).sum(-1)
    moments: NDArray[np.float64] = np.stack([mean_T - found_T, variance_T])[:, on_T].sum(-1)
    return moments


def _judge(first: Candidate, rival: Candidate | None, error: float, max_error: float) -> tuple[str | None, str]:
    margin = ""
    if first.z is not None and first.z > FOREIGN_Z:
        surprise = f"even to {first.column!r} it is more surprising than its own text, by {first.z:.1f} standard errors"
        return None, f"Consistent with none of the candidates: {surprise}"
    if rival is not None:
        if error > max_error:
            doubt = f"a text by {rival.column!r} puts {first.column!r} this far before it with a chance of {error:.2g}"
            return None, f"Cannot be told: {doubt}; audit more text"
        margin = f", {rival.behind.mean:.3g} nats a token before {rival.column!r}, error {error:.1g}"
    likeliest = f"{first.column!r} is the likeliest author among the candidates{margin}"
    if first.z is None:
        return first.column, f"{likeliest}; without a top-k nothing shows whether the text is consistent with it"
    surer = " but surer than it is at temperature 1" if first.z < -FOREIGN_Z else ""
    return first.column, f"{likeliest}; the text is consistent with it{surer} (z {first.z:.1f}), as it may be with a model near it"
