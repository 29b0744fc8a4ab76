"""A store that is there as the model of one that is not: what is in it, and how fast it was filled."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lopd.errors import InvalidRecordError
from lopd.protocols import DurableStore
from lopd.protocols.reading import evenly, named
from lopd.records.manifest import Commit
from lopd.records.rollouts import BEHAVIOR_COLUMN, SAMPLER_COLUMN, policy_column
from lopd.tools.plan.work import Work


def work_like(store: DurableStore, logprob_dtype: str = "float32", *, sample: int = 1000) -> Work:
    """Return the work that made a store, measured, as if all its columns were complete; one that is not scored gets one without top-k.

    Labels are bytes alone: a verifier costs no GPU-hours.  What the policy wrote while it sampled is stored, and not scored.

    Args:
        store: at least one rollout.
        logprob_dtype: "float32" or "float16", as the store was created.
        sample: most rollouts to read for masks and the length of ids.

    Raises:
        InvalidRecordError: the store is empty.
    """
    if not len(store):
        raise InvalidRecordError(f"{named(store)}: it has 0 rollouts, expected at least 1 to measure; pass lengths instead.")
    prompt_tokens, response_tokens = store.lengths().mean(axis=0).tolist()
    read = [row.rollout for row in store.read(evenly(np.arange(len(store)), sample).tolist())]
    samples = store.manifest.sampling.samples_per_prompt
    supports = {name: made.top_k for name, made in store.columns.items() if not made.label}
    scored = len(supports.keys() - _sampled_columns(store))
    return Work(
        prompts=max(1, round(len(store) / samples)),
        samples=samples,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        vocab_size=store.manifest.tokenizer.vocab_size,
        columns=(*supports.values(), *(() if scored else (0,))),
        behavior=bool(store.scored(BEHAVIOR_COLUMN).any()),
        sampler=bool(store.scored(SAMPLER_COLUMN).any()),
        masked=not all(rollout.loss_mask.all() for rollout in read),
        logprob_dtype=logprob_dtype,
        id_bytes=sum(len(rollout.rollout_id.encode("utf-8", "surrogatepass")) for rollout in read) / len(read),
        rollouts_per_commit=max(1.0, len(store) * (1 + len(store.columns)) / max(1, _segments(store.history()))),
        scored=max(1, scored),
        labels=sum(made.label for made in store.columns.values()),
    )


def _sampled_columns(store: DurableStore) -> set[str]:
    """Return the columns of the policy's log-probs of other tokens, which are written between its rollouts."""
    sampling = store.manifest.sampling
    return {policy_column(generation) for generation in store.generations} if sampling.candidates + sampling.drawn else set()


def _segments(history: Sequence[Commit]) -> int:
    """Return how many appends the rows are in; a compaction makes one of those of its column."""
    count: Counter[str | None] = Counter()
    for commit in history:
        if commit.kind in {"rollouts", "scores", "compaction"}:
            count[commit.column] = 1 if commit.kind == "compaction" else count[commit.column] + 1
    return count.total()


def measured_rates(store: DurableStore) -> dict[str, float]:
    """Return tokens a second as `GpuRates` counts them, of what filled a store: "sampling" and "scoring", where the history has them.

    Each is the median over commits, so that nights between runs do not count.
    """
    prompts, responses = store.lengths().sum(axis=0).tolist()
    # labels are not a model's
    others = _sampled_columns(store) | {name for name, made in store.columns.items() if made.label}
    history, rates = [commit for commit in store.history() if commit.column not in others], dict[str, float]()
    # the history counts all tokens of rollouts, and only the response tokens of scores
    share = max(1, responses) / max(1, prompts + responses)
    for name, kind, factor in (("sampling", "rollouts", share), ("scoring", "scores", 1 / share)):
        found = [
            commit.tokens / (commit.when - before.when)
            for before, commit in pairwise(history)
            if (before.kind, before.column) == (commit.kind, commit.column) == (kind, commit.column) and commit.when > before.when
        ]
        if found:
            rates[name] = float(np.median(found)) * factor
    return rates
