"""What is going to be done, and the bytes that it leaves in a store."""

import math
from collections.abc import Mapping

import numpy as np
from attrs import frozen

from lopd.backends.zarr.columns import ROLLOUT_FIELDS, SCORE_FIELDS
from lopd.errors import InvalidRecordError
from lopd.records.checks import check_at_least, check_number, own_numbers

LOGPROB_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2}
# float32 in every store
_TAIL_BYTES = _LABEL_BYTES = 4
# Metadata of one array of one commit, and of one table of lines: small, but many small commits make it count.
_ARRAY_BYTES, _TABLE_BYTES = 342, 560
# with its place in an index of ids
_ROLLOUT_LINE, _SCORE_LINE = 8 * len(ROLLOUT_FIELDS) + 16, 8 * len(SCORE_FIELDS)
# what the paper's runs did: 150 steps of 256 rollouts over 17,400
_PASSES = 150 * 256 / 17_400


@frozen
class StoreSize:
    """Bytes of a store: exact for each token and line, an average for rollout ids and array metadata.

    Args:
        token_ids: in the smallest unsigned type that holds the vocabulary.
        logprobs: those of all columns, of `behavior`, and of the sampler's.
        top_k: ids, log-probs and tails.
        masks: one byte a response token.
        overhead: lengths, hashes, checksums and ids of rollouts and scores, and array metadata.
        tokens: prompt and response tokens.
        labels: those of all columns of labels.
    """

    token_ids: int
    logprobs: int
    top_k: int
    masks: int
    overhead: int
    tokens: int
    labels: int = 0

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.token_ids + self.logprobs + self.top_k + self.masks + self.overhead + self.labels

    @property
    def bytes_per_token(self) -> float:
        """All bytes over prompt and response tokens."""
        return self.total / max(1, self.tokens)


@frozen(kw_only=True)
class Work:
    """What is going to be done, and stored.

    Args:
        prompts: number of prompts.
        samples: responses to each prompt.
        prompt_tokens, response_tokens: length of a rollout, on average.
        steps: training steps; None for as many as pass over the rollouts as often as the paper's do, 2.2 times.
        rollouts_per_step: rollouts that one step trains on.
        tokens_per_batch: size of a micro-batch, the least that one GPU can be given.
        student_billions, teacher_billions: parameters.
        student_active, teacher_active: parameters that a token meets (mixture of experts), billions; None for all.
        vocab_size: ids of the tokenizer.
        columns: K of the top-k support of each score column, 0 without one.
        behavior: whether the sampling engine's log-probs are stored.
        sampler: whether those after temperature and top-p are stored beside them, which they are not where both are 1.
        masked: whether loss masks are stored, which they are not where every token counts.
        logprob_dtype: "float32" or "float16".
        id_bytes: length of a rollout id in UTF-8, on average.
        rollouts_per_commit: rollouts appended or scored in one call.
        scored: how many of the columns are counted as if the teacher read the rollouts for them; the others came with sampling.  None for all.
        labels: number of columns of labels, which no teacher reads the rollouts for.

    Raises:
        InvalidRecordError: a number makes no sense.
    """

    prompts: int
    samples: int = 1
    prompt_tokens: float = 200.0
    response_tokens: float = 3072.0
    steps: int | None = None
    rollouts_per_step: int = 256
    tokens_per_batch: int = 8192
    student_billions: float = 8.2
    teacher_billions: float = 32.8
    student_active: float | None = None
    teacher_active: float | None = None
    vocab_size: int = 151_936
    columns: tuple[int, ...] = (0,)
    behavior: bool = True
    sampler: bool = False
    masked: bool = False
    logprob_dtype: str = "float32"
    id_bytes: float = 24.0
    rollouts_per_commit: float = 256.0
    scored: int | None = None
    labels: int = 0

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "Work", prompts=1, samples=1, rollouts_per_step=1, tokens_per_batch=1, vocab_size=1)
        check_at_least("Work", "steps", self.all_steps, 1)
        check_at_least("Work", "number of columns", len(self.columns), 1)
        check_at_least("Work", "top-k", min(self.columns), 0)
        check_at_least("Work", "labels", self.labels, 0)
        check_number("Work", "scored", self.reads, 0 <= self.reads <= len(self.columns), f"0 to {len(self.columns)}, the number of columns")
        for name in ("prompt_tokens", "response_tokens", "rollouts_per_commit", "id_bytes"):
            value = getattr(self, name)
            check_number("Work", name, value, 1 <= value < math.inf, "finite and at least 1")
        for name in ("student_billions", "teacher_billions", "student_active", "teacher_active"):
            value = getattr(self, name)
            check_number("Work", name, value, value is None or 0 < value < math.inf, "finite and more than 0")
        if self.logprob_dtype not in LOGPROB_BYTES:
            raise InvalidRecordError(
                f"Work: logprob_dtype is {self.logprob_dtype!r}, expected one of {list(LOGPROB_BYTES)}; pass one that stores have."
            )

    @property
    def rollouts(self) -> int:
        """Rollouts that Lightning samples, scores and stores."""
        return self.prompts * self.samples

    @property
    def tokens(self) -> float:
        """Prompt and response tokens of all rollouts."""
        return self.rollouts * (self.prompt_tokens + self.response_tokens)

    @property
    def reads(self) -> int:
        """How many times the teacher reads the rollouts."""
        return len(self.columns) if self.scored is None else self.scored

    @property
    def all_steps(self) -> int:
        """Training steps."""
        return max(round(_PASSES * self.rollouts / self.rollouts_per_step), 1) if self.steps is None else self.steps

    @property
    def trained(self) -> int:
        """Rollouts that steps take, repetitions included: as many as online OPD samples and scores."""
        return self.all_steps * self.rollouts_per_step

    @property
    def flops_student(self) -> float:
        """Forward FLOPs a token: two for each parameter that it meets."""
        return 2e9 * (self.student_active or self.student_billions)

    @property
    def flops_teacher(self) -> float:
        """Forward FLOPs a token."""
        return 2e9 * (self.teacher_active or self.teacher_billions)

    @property
    def stored(self) -> StoreSize:
        """Bytes of the store on disk, uncompressed, as `ZarrStore` writes it by default."""
        responses, columns = self.rollouts * self.response_tokens, len(self.columns) + self.labels
        id_width, width = np.min_scalar_type(self.vocab_size - 1).itemsize, LOGPROB_BYTES[self.logprob_dtype]
        # token ids, rollout ids and their index; values of each column; three arrays of a top-k support
        arrays = 3 + self.behavior + self.sampler + self.masked + self.labels + sum(4 if k else 1 for k in self.columns)
        commits = max(1.0, self.rollouts / self.rollouts_per_commit)
        metadata = commits * (arrays * _ARRAY_BYTES + (1 + columns) * _TABLE_BYTES)
        per_rollout = _ROLLOUT_LINE + self.id_bytes + columns * _SCORE_LINE
        return StoreSize(
            token_ids=round(self.tokens * id_width),
            logprobs=round(responses * (len(self.columns) + self.behavior + self.sampler) * width),
            top_k=round(responses * sum(k * (id_width + width) + _TAIL_BYTES for k in self.columns if k)),
            masks=round(responses * self.masked),
            overhead=round(self.rollouts * per_rollout + metadata),
            tokens=round(self.tokens),
            labels=round(responses * self.labels * _LABEL_BYTES),
        )
