"""The tokens of a batch that count, with everything that is stored of them.

Shape suffixes: M counted tokens, K of a support each, D drawn ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from attrs import evolve, fields, frozen
from torch import Tensor

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.losses import functional
from lopd.records.checks import a_kind
from lopd.records.steps import Batch


class TopKColumn(NamedTuple):
    """(M, K) ids, (M, K) log-probs in nats, and (M,) probability of all other tokens."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor


class DrawnColumn(NamedTuple):
    """(M, D) ids that were drawn from the policy, and (M, D) log-probs of them in nats: the teacher's, and the policy's own."""

    ids: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor


@frozen(eq=False)
class Tokens:
    """The M counted tokens of a batch.  Others are dropped before any arithmetic, so nothing of theirs can leak through a mask.

    Args:
        targets: (M,) int64.
        weight: (M,) more than 0.
        segment_ids: (M,) int64, which rollout of the batch; tokens of one rollout are in their order.
        teacher_logprobs, ref_logprobs, sampler_logprobs: (M,) nats, or None where the batch has no such column.
        top_k_ids, top_k_logprobs, top_k_tail: (M, K), (M, K) and (M,) of the teacher's support, or None where the batch has none.
        drawn_ids, drawn_logprobs, drawn_ref_logprobs: (M, D) each, see `DrawnColumn`; None where the batch has none.
        label_values, label_means: (M,), or None where the batch has none.
        counts: how many tokens each rollout has here, in their order; None where that is not known without asking a GPU.
        student_entropies: (M,) nats, of the student's distributions, differentiable; a loss brings them for an objective that `wants_entropy`.
        of_chunk: whether they are those of a chunk, which begins and ends within rollouts.
    """

    targets: Tensor
    weight: Tensor
    segment_ids: Tensor
    teacher_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    top_k_ids: Tensor | None = None
    top_k_logprobs: Tensor | None = None
    top_k_tail: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    drawn_ids: Tensor | None = None
    drawn_logprobs: Tensor | None = None
    drawn_ref_logprobs: Tensor | None = None
    label_values: Tensor | None = None
    label_means: Tensor | None = None
    counts: tuple[int, ...] | None = None
    student_entropies: Tensor | None = None
    of_chunk: bool = False

    @classmethod
    def counted(cls, batch: Batch) -> "Tokens":
        """Return the tokens of the batch whose weight is more than 0."""
        columns = [getattr(batch, f.name) for f in fields(cls) if f.name not in ("student_entropies", "of_chunk")]
        return evolve(cls(*columns).where(batch.counted), counts=batch.counts)

    def where(self, rows: Tensor | slice) -> "Tokens":
        """Return some of them."""
        return evolve(self._map(lambda column: column[rows]), counts=None)

    def to(self, dtype: torch.dtype) -> "Tokens":
        """Return the same with weights and log-probs in this dtype."""
        return self._map(lambda column: column.to(dtype) if column.is_floating_point() else column)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Tokens)}
        changed: dict[str, Any] = {name: change(column) for name, column in columns.items() if isinstance(column, Tensor)}
        return evolve(self, **changed)

    def split(self, values_M: Tensor) -> tuple[Tensor, ...]:
        """Return the (T,) values of each rollout that has tokens here.

        Raises:
            InvalidRecordError: the tokens are those of a chunk, in which rollouts are cut off.
        """
        if self.of_chunk:
            text = "Tokens: they are those of a chunk, which ends within a rollout, expected whole rollouts to split; leave the mark `per_token` out."
            raise InvalidRecordError(text)
        counts = self.counts
        if counts is None:
            counts = tuple(self.segment_ids.unique_consecutive(return_counts=True)[1].tolist())
        parts: tuple[Tensor, ...] = values_M.split([count for count in counts if count])
        return parts

    def teacher(self) -> Tensor:
        """Return the teacher's log-probs; MissingScoresError where the batch has none."""
        return _present(self.teacher_logprobs, "Batch: teacher_logprobs", "a score column; name it in `batches(teacher=...)`")

    def ref(self) -> Tensor:
        """Return the reference policy's log-probs at temperature 1; MissingScoresError where the batch has none."""
        return _present(self.ref_logprobs, "Batch: ref_logprobs", 'those of the policy that sampled; pass `batches(ref="behavior")`')

    def sampler(self) -> Tensor:
        """Return the log-probs in the distribution that drew the tokens: an importance ratio is to these.

        They are the reference policy's where the batch has no others; MissingScoresError where it has neither.
        """
        return self.ref() if self.sampler_logprobs is None else self.sampler_logprobs

    def reverse_kl(self, student_M: Tensor) -> Tensor:
        """Return the (M,) terms of `LossOutput.reverse_kl_sum`, not weighted, given the student's log-probs; MissingScoresError without a teacher."""
        unknown = self.ref_logprobs is None and self.sampler_logprobs is None
        return functional.sampled_reverse_kl(student_M, self.teacher(), None if unknown else self.sampler())

    def labels(self, *, centred: bool = False) -> Tensor:
        """Return the labels, less the mean of their group if that is asked for; MissingScoresError where the batch has none."""
        found_M = _present(self.label_values, "Batch: label_values", "a column of labels; name it in `batches(label=...)`")
        expected = (
            "the mean of several rollouts of a prompt; sample with `samples_per_prompt` of at least 2, and import trajectories with "
            '`turns="together"`, for each turn alone has a prompt of its own'
        )
        return found_M - _present(self.label_means, "Batch: label_means", expected) if centred else found_M

    def entropies(self, *, gradient: bool = False) -> Tensor:
        """Return the student's entropies, with their gradient only if it is asked for; MissingScoresError where the loss brought none."""
        remedy = "mark the transform with `lopd.losses.objective.with_entropy`"
        found_M = _present(self.student_entropies, "Tokens: student_entropies", f"the student's entropies; {remedy}")
        return found_M if gradient else found_M.detach()

    def top_k(self) -> TopKColumn:
        """Return the teacher's most likely tokens; MissingScoresError where the batch has none."""
        columns = (self.top_k_ids, self.top_k_logprobs, self.top_k_tail)
        expected = "the teacher's most likely tokens; ask for them in `batches(top_k=True)`"
        return TopKColumn(*(_present(column, "Batch: top_k_ids", expected) for column in columns))

    def drawn(self) -> DrawnColumn:
        """Return the tokens that were drawn from the policy; MissingScoresError where the batch has none, or not the policy's log-probs of them."""
        columns = (self.drawn_ids, self.drawn_logprobs, self.drawn_ref_logprobs)
        expected = (
            "tokens that the policy drew; sample with `SamplingParams(drawn=...)`, score them, and ask for "
            "`batches(ref=policy_column(generation), top_k=True)` and the rows of that round"
        )
        return DrawnColumn(*(_present(column, "Batch: drawn_ref_logprobs", expected) for column in columns))


def counted_rows(values_ND: Tensor, batch: Batch) -> Tensor:
    """Return (M, D) the rows of the tokens that count; where all do, the very tensor: a selection would copy it, and its gradient once more."""
    return values_ND if len(batch.counted) == len(values_ND) else values_ND.index_select(0, batch.counted)


def check_per_token(owner: str, value: Any, tokens: Tokens) -> None:
    """Refuse what is not one value a token: another shape broadcasts with the weights, and trains on another gradient.

    Raises:
        InvalidRecordError: it has another shape, or is not a tensor.
    """
    if not isinstance(value, Tensor) or value.shape != tokens.weight.shape:
        expected = tuple(tokens.weight.shape)
        raise InvalidRecordError(f"{owner} is {_found(value)}, expected shape {expected}; return one value for each token.")


def check_ids(ids_MK: Any, states: int) -> Tensor:
    """Return ids as int64; refuse those that are not a row for each of so many hidden states: gathered, they would be those of other tokens.

    Raises:
        InvalidRecordError: they have another shape or dtype, or are not a tensor.
    """
    if not isinstance(ids_MK, Tensor) or ids_MK.ndim != 2 or len(ids_MK) != states:
        raise InvalidRecordError(f"Loss: ids are {_found(ids_MK)}, expected shape ({states}, K); pass a row of ids for each hidden state.")
    if ids_MK.dtype not in (torch.int32, torch.int64):
        raise InvalidRecordError(f"Loss: ids are of dtype {ids_MK.dtype}, expected torch.int64; convert them: `ids.long()`.")
    return ids_MK.long()  # the gather of older torch takes no other


@contextmanager
def naming_ids(ids_MK: Tensor, vocabulary: int) -> Iterator[None]:
    """Name ids outside the vocabulary where torch fails on them: only then are they looked at, as a GPU would be waited for.

    Raises:
        InvalidRecordError: in place of torch's own error, on a CPU.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if ids_MK.device.type != "cpu" or not ids_MK.numel() or (ids_MK.min() >= 0 and ids_MK.max() < vocabulary):
            raise
        held, expected = f"from {int(ids_MK.min())} to {int(ids_MK.max())}", f"from 0 to {vocabulary - 1}, the rows of the head's weight"
        raise InvalidRecordError(f"Loss: ids are {held}, expected {expected}; leave out tokens with others.") from error


def _found(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else a_kind(value)


def _present(column: Tensor | None, name: str, expected: str) -> Tensor:
    if column is None:
        raise MissingScoresError(f"{name} is None, expected {expected}.")
    return column
