"""What N prompts will cost in bytes and hours, before anything is spent."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from attrs import frozen

from lopd.backends.zarr.encode import ROLLOUT_FIELDS, SCORE_FIELDS
from lopd.errors import InvalidRecordError
from lopd.protocols import DurableStore
from lopd.protocols.reading import evenly
from lopd.records.manifest import Commit
from lopd.records.rollouts import BEHAVIOR_COLUMN

LOGPROB_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2}
_TAIL_BYTES = 4
# Metadata of one array of one commit, and of one table of lines: small, but many small commits make it count.
_ARRAY_BYTES, _TABLE_BYTES = 342, 530
_ROLLOUT_LINE, _SCORE_LINE = 8 * len(ROLLOUT_FIELDS), 8 * len(SCORE_FIELDS)


@frozen
class Plan:
    """What is going to be stored.

    Args:
        rollouts: prompts times samples of each.
        prompt_tokens, response_tokens: of a rollout, on average.
        vocab_size: of the tokenizer.
        columns: one entry for each score column: K of its top-k support, 0 if it keeps none.
        behavior: whether the sampling engine reports its log-probs.
        masked: whether loss masks are stored, which they are not where every token counts.
        logprob_dtype: "float32" or "float16".
        id_bytes: of a rollout id in UTF-8, on average.
        rollouts_per_commit: appended or scored in one call.

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    rollouts: int
    prompt_tokens: float
    response_tokens: float
    vocab_size: int
    columns: Sequence[int] = (0, 0)
    behavior: bool = False
    masked: bool = False
    logprob_dtype: str = "float32"
    id_bytes: float = 24.0
    rollouts_per_commit: float = 256.0

    def __attrs_post_init__(self) -> None:
        least = {"rollouts": 0, "prompt_tokens": 1, "response_tokens": 1, "vocab_size": 1, "rollouts_per_commit": 1}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise InvalidRecordError(f"Plan: {name} is {getattr(self, name)}, expected at least {bound}; pass such a number.")
        if self.logprob_dtype not in LOGPROB_BYTES:
            raise InvalidRecordError(
                f"Plan: logprob_dtype is {self.logprob_dtype!r}, expected one of {list(LOGPROB_BYTES)}; pass one that stores have."
            )

    @property
    def tokens(self) -> float:
        """Prompt and response tokens of all rollouts."""
        return self.rollouts * (self.prompt_tokens + self.response_tokens)


@frozen
class Cost:
    """What a plan costs, in bytes: exact for each token and line, an average for rollout ids and array metadata.

    Args:
        token_ids: in the smallest unsigned type that holds the vocabulary.
        logprobs: of all columns and `behavior`.
        top_k: ids, log-probs and tails.
        masks: one byte a response token.
        overhead: lengths, hashes, checksums and ids of rollouts and scores, and array metadata.
        tokens: prompt and response tokens.
        sampling_seconds, scoring_seconds: None without a rate.
    """

    token_ids: int
    logprobs: int
    top_k: int
    masks: int
    overhead: int
    tokens: int
    sampling_seconds: float | None = None
    scoring_seconds: float | None = None

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.token_ids + self.logprobs + self.top_k + self.masks + self.overhead

    @property
    def bytes_per_token(self) -> float:
        """Of all bytes, over prompt and response tokens."""
        return self.total / max(1, self.tokens)


@frozen
class Rates:
    """Tokens per second; None where nobody knows.

    Args:
        sampling: response tokens that the policy samples.
        scoring: prompt and response tokens that one scorer reads.
    """

    sampling: float | None = None
    scoring: float | None = None


def estimate(plan: Plan, rates: Rates | None = None) -> Cost:
    """Bytes of a store on disk (uncompressed, as `ZarrStore` writes it by default), and time if there are rates.

    Args:
        plan: what is going to be stored.
        rates: of the engines; they are taken to run one after the other.
    """
    responses = plan.rollouts * plan.response_tokens
    id_width, width = np.min_scalar_type(plan.vocab_size - 1).itemsize, LOGPROB_BYTES[plan.logprob_dtype]
    columns = len(plan.columns)
    # token ids and rollout ids; log-probs of each column; three arrays of a top-k support
    arrays = 2 + plan.behavior + plan.masked + sum(4 if k else 1 for k in plan.columns)
    commits = max(1.0, plan.rollouts / plan.rollouts_per_commit)
    metadata = commits * (arrays * _ARRAY_BYTES + (1 + columns) * _TABLE_BYTES)
    per_rollout = _ROLLOUT_LINE + plan.id_bytes + columns * _SCORE_LINE
    rates = rates or Rates()
    return Cost(
        token_ids=round(plan.tokens * id_width),
        logprobs=round(responses * (columns + plan.behavior) * width),
        top_k=round(responses * sum(k * (id_width + width) + _TAIL_BYTES for k in plan.columns if k)),
        masks=round(responses * plan.masked),
        overhead=round(plan.rollouts * per_rollout + metadata),
        tokens=round(plan.tokens),
        sampling_seconds=responses / rates.sampling if rates.sampling else None,
        scoring_seconds=plan.tokens * columns / rates.scoring if rates.scoring else None,
    )


def plan_like(store: DurableStore, logprob_dtype: str = "float32", *, sample: int = 1000) -> Plan:
    """The plan of a store that is there, measured, with all its columns complete.

    Args:
        store: with at least one rollout.
        logprob_dtype: of the store.
        sample: most rollouts to read for masks and the length of ids.

    Raises:
        InvalidRecordError: the store is empty.
    """
    if not len(store):
        raise InvalidRecordError(f"{store!r}: it has 0 rollouts, expected at least 1 to measure; pass lengths instead.")
    prompt_tokens, response_tokens = store.lengths().mean(axis=0).tolist()
    read = [row.rollout for row in store.read(evenly(np.arange(len(store)), sample).tolist())]
    return Plan(
        rollouts=len(store),
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        vocab_size=store.manifest.tokenizer.vocab_size,
        columns=tuple(provenance.top_k for provenance in store.columns.values()),
        behavior=bool(store.scored(BEHAVIOR_COLUMN).any()),
        masked=not all(rollout.loss_mask.all() for rollout in read),
        logprob_dtype=logprob_dtype,
        id_bytes=sum(len(rollout.rollout_id.encode("utf-8", "surrogatepass")) for rollout in read) / len(read),
        rollouts_per_commit=max(1.0, len(store) * (1 + len(store.columns)) / max(1, _segments(store.history()))),
    )


def _segments(history: Sequence[Commit]) -> int:
    """How many appends the rows are in; a compaction makes one of those of its column."""
    count: Counter[str | None] = Counter()
    for commit in history:
        if commit.kind in {"rollouts", "scores", "compaction"}:
            count[commit.column] = 1 if commit.kind == "compaction" else count[commit.column] + 1
    return count.total()


def measure_rates(store: DurableStore) -> Rates:
    """How fast the rollouts of a store were sampled and scored: the median over its commits, so that nights between runs do not count."""
    prompt_tokens, response_tokens = store.lengths().sum(axis=0).tolist()
    share = response_tokens / max(1, prompt_tokens + response_tokens)
    history = store.history()
    sampling, scoring = _median_rate(history, "rollouts"), _median_rate(history, "scores")
    # the history counts all tokens of rollouts, and only the response tokens of scores
    return Rates(None if sampling is None else sampling * share, None if scoring is None else scoring / share)


def _median_rate(history: Sequence[Commit], kind: str) -> float | None:
    rates = [
        commit.tokens / (commit.when - before.when)
        for before, commit in pairwise(history)
        if (before.kind, before.column) == (commit.kind, commit.column) == (kind, commit.column) and commit.when > before.when
    ]
    return float(np.median(rates)) if rates else None
