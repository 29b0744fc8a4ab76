"""What a store reads: many rollouts end to end, in columns.  Training works on the columns; people and engines look at one rollout at a time.

Shape suffixes: B rollouts, M response tokens of all of them, K candidates of a top-k support.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, final, overload

import numpy as np
from attrs import Factory, evolve, field, frozen
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError, MissingScoresError
from lopd.records.arrays import BoolArray, Float32Array, read_only
from lopd.records.glance import ROWS, Glance, Glanced, first_ids, quoted
from lopd.records.rollouts import VIRTUAL_COLUMNS, FinishReason, Rollout, ScoredRollout, mean_of
from lopd.records.support import TopK

_Int64 = NDArray[np.int64]


class HasDecode(Protocol):
    """What a text needs of a tokenizer; transformers' tokenizers fit."""

    def decode(self, token_ids: list[int], /) -> str:
        """Return the text of these ids."""
        ...


def ends(lengths: NDArray[Any]) -> _Int64:
    """Return (n + 1,): where each piece starts in the concatenation, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@final
@frozen(eq=False, repr=False)
class Rows(Glanced, Sequence[ScoredRollout]):
    """Rollouts end to end, in the order in which they were asked for; as a sequence, one `ScoredRollout` each.

    The arrays are not to be written to: they may be views of files.

    Args:
        rollout_ids: B names.
        prompt_lengths, response_lengths: (B,) int64, tokens.
        token_ids: integers, the prompt and the response of one rollout after the other.
        loss_mask: (M,) bool; None where every token counts.
        behavior_logprobs: (M,) float32, nats, NaN for a rollout whose engine reported none; None if all lack them.
        finish_reasons: B words.
        generations: (B,) int64.
        content_hashes: B hashes, see `Rollout`.
        scores: column name -> (M,) float32, nats.
        top_k: column name -> the support of all M tokens.
        sampler_logprobs: (M,) float32, nats, with gaps as in `behavior_logprobs`; None if all lack them.
    """

    rollout_ids: Sequence[str]
    prompt_lengths: _Int64
    response_lengths: _Int64
    token_ids: NDArray[Any]
    loss_mask: BoolArray | None
    behavior_logprobs: Float32Array | None
    finish_reasons: Sequence[FinishReason]
    generations: _Int64
    content_hashes: Sequence[bytes]
    scores: Mapping[str, Float32Array] = field(factory=dict)
    top_k: Mapping[str, TopK] = field(factory=dict)
    sampler_logprobs: Float32Array | None = None
    token_ends: _Int64 = field(init=False, default=Factory(lambda self: ends(self.prompt_lengths + self.response_lengths), takes_self=True))
    response_ends: _Int64 = field(init=False, default=Factory(lambda self: ends(self.response_lengths), takes_self=True))

    def __attrs_post_init__(self) -> None:
        """Refuse arrays whose lengths do not match `lengths`; values were checked when the records were made."""
        tokens, responses = int(self.token_ends[-1]), int(self.response_ends[-1])
        arrays = {name: getattr(self, name) for name in ("loss_mask", *VIRTUAL_COLUMNS.values())} | dict(self.scores)
        sizes = {"token_ids": (self.token_ids, tokens), **{name: (values, responses) for name, values in arrays.items()}}
        for name, (values, size) in sizes.items():
            if values is not None and values.shape != (size,):
                raise InvalidRecordError(
                    f"Rows: {name} has shape {values.shape}, expected {(size,)}; pass the values of all rollouts, end to end."
                )

    @classmethod
    def of(cls, records: Sequence[ScoredRollout], columns: Iterable[str] | None = None, top_k: Iterable[str] | None = None) -> "Rows":
        """Put records end to end.

        Args:
            records: any number.
            columns: whose scores come along; None for those of the first record.
            top_k: whose supports come along; None for those of the first record.

        Raises:
            MissingScoresError: a record lacks a column; it names the rollout.
            InvalidRecordError: their K differ.
        """
        columns = columns if columns is not None else records[0].scores if records else ()
        top_k = top_k if top_k is not None else records[0].top_k if records else ()
        return cls.joined(
            [record.rollout for record in records],
            {name: [column_of(r.rollout.rollout_id, r.scores, name, "columns") for r in records] for name in columns},
            {name: [column_of(r.rollout.rollout_id, r.top_k, name, "top_k") for r in records] for name in top_k},
        )

    @classmethod
    def joined(
        cls, rollouts: Sequence[Rollout], scores: Mapping[str, Sequence[Float32Array]], top_k: Mapping[str, Sequence[TopK]]
    ) -> "Rows":
        """Put rollouts end to end, and the scores and supports of each column, one for each rollout.

        Raises:
            InvalidRecordError: their K differ.
        """
        prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
        lengths = np.array([len(ids) for ids in (*prompts, *responses)], np.int64).reshape(2, -1)
        mask_M = _end_to_end([r.loss_mask for r in rollouts], np.bool_)
        return cls(
            [r.rollout_id for r in rollouts],
            lengths[0],
            lengths[1],
            _end_to_end([ids for both in zip(prompts, responses, strict=True) for ids in both], np.int32),
            None if mask_M.all() and mask_M.size == lengths[1].sum() else mask_M,
            _with_gaps([r.behavior_logprobs for r in rollouts], lengths[1]),
            [r.finish_reason for r in rollouts],
            np.array([r.generation for r in rollouts], np.int64),
            [r.content_hash for r in rollouts],
            {name: _end_to_end(values, np.float32) for name, values in scores.items()},
            {name: _one(supports, rollouts) for name, supports in top_k.items()},
            _with_gaps([r.sampler_logprobs for r in rollouts], lengths[1]),
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def decoded(self, tokenizer: HasDecode) -> Glance:
        """Return the first rollouts as text, for `print` and for notebooks; the tokenizer must be the one whose ids these are."""
        return self._with_texts("text", lambda ids: quoted(tokenizer.decode(ids.tolist())))

    def _glance(self) -> Glance:
        return self._with_texts("ids", first_ids)

    def _with_texts(self, what: str, show: Callable[[NDArray[Any]], str]) -> Glance:
        facts = {
            "prompt tokens": int(self.prompt_lengths.sum()),
            "response tokens": int(self.response_ends[-1]),
            "columns": ", ".join(self.scores) or "none were read",
            **({"top-k": ", ".join(self.top_k)} if self.top_k else {}),
        }
        names = (
            "rollout",
            f"prompt {what}",
            f"response {what}",
            "response tokens",
            "ended by",
            *(f"mean of {name}" for name in self.scores),
        )
        rows = [
            (
                quoted(record.rollout.rollout_id),
                show(record.rollout.prompt_ids),
                show(record.rollout.response_ids),
                record.rollout.response_ids.size,
                record.rollout.finish_reason,
                *map(mean_of, record.scores.values()),
            )
            for record in self[:ROWS]
        ]
        shown = f", the first {ROWS} shown" if len(self) > ROWS else ""
        return Glance(f"{len(self):,} rollouts{shown}", facts, names, rows)

    @overload
    def __getitem__(self, index: int, /) -> ScoredRollout: ...
    @overload
    def __getitem__(self, index: slice, /) -> "Rows": ...
    def __getitem__(self, index: int | slice, /) -> "ScoredRollout | Rows":
        """Return one rollout as a record; or some neighbours as columns, which are views of these."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise InvalidRecordError(
                    f"Rows: the slice has a step of {step}, expected neighbours; read the rows you want in their order."
                )
            return self._slice(start, max(start, stop))
        i = range(len(self))[index]
        at = slice(*self.response_ends[i : i + 2].tolist())
        return ScoredRollout(
            self._rollout(i, at),
            {name: read_only(values[at].copy()) for name, values in self.scores.items()},
            {name: TopK.from_store(s.ids[at].copy(), s.logprobs[at].copy(), s.tail[at].copy(), s.drawn) for name, s in self.top_k.items()},
        )

    def _rollout(self, i: int, at: slice) -> Rollout:
        start, stop = self.token_ends[i : i + 2].tolist()
        middle = start + int(self.prompt_lengths[i])
        return Rollout.from_store(
            rollout_id=self.rollout_ids[i],
            # copies: a view would keep all that was read, and its file, for as long as the caller keeps the rollout
            prompt_ids=read_only(self.token_ids[start:middle].astype(np.int32)),
            response_ids=read_only(self.token_ids[middle:stop].astype(np.int32)),
            loss_mask=read_only(np.ones(at.stop - at.start, np.bool_) if self.loss_mask is None else self.loss_mask[at].copy()),
            finish_reason=self.finish_reasons[i],
            generation=int(self.generations[i]),
            content_hash=self.content_hashes[i],
            candidates=None,
            **{name: _reported(getattr(self, name), at) for name in VIRTUAL_COLUMNS.values()},
        )

    def _slice(self, start: int, stop: int) -> "Rows":
        at, tokens = slice(*self.response_ends[[start, stop]].tolist()), slice(*self.token_ends[[start, stop]].tolist())
        return Rows(
            self.rollout_ids[start:stop],
            self.prompt_lengths[start:stop],
            self.response_lengths[start:stop],
            self.token_ids[tokens],
            None if self.loss_mask is None else self.loss_mask[at],
            None if self.behavior_logprobs is None else self.behavior_logprobs[at],
            self.finish_reasons[start:stop],
            self.generations[start:stop],
            self.content_hashes[start:stop],
            {name: values[at] for name, values in self.scores.items()},
            {name: support[at] for name, support in self.top_k.items()},
            None if self.sampler_logprobs is None else self.sampler_logprobs[at],
        )

    def named(self, **roles: str | None) -> "Rows":
        """Return these with scores and supports under other names: `rows.named(teacher="qwen3-32b")`; a role without a column is left out."""
        given = {role: column for role, column in roles.items() if column is not None}
        for column in given.values():
            if column not in self.scores:
                raise MissingScoresError(f"Rows: column {column!r} was not read; name it in `read(columns=...)`.")
        return evolve(
            self,
            scores={role: self.scores[column] for role, column in given.items()},
            top_k={role: self.top_k[column] for role, column in given.items() if column in self.top_k},
        )


def _end_to_end(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _with_gaps(values: Sequence[Float32Array | None], lengths: _Int64) -> Float32Array | None:
    if all(value is None for value in values):
        return None
    return np.concatenate([np.full(n, np.nan, np.float32) if v is None else v for v, n in zip(values, lengths.tolist(), strict=True)])


def _reported(values: Float32Array | None, at: slice) -> Float32Array | None:
    """Return what an engine reported of one rollout; NaN stands for nothing."""
    return None if values is None or np.isnan(values[at.start]) else read_only(values[at].copy())


def column_of(rollout: str, values: Mapping[str, Any], name: str, argument: str) -> Any:
    """Return what was read of a column; MissingScoresError names the rollout, and the argument of `read` that it takes."""
    if name not in values:
        what = "" if argument == "columns" else "top-k of "
        raise MissingScoresError(f"Rollout {rollout!r}: {what}column {name!r} was not read; name it in `read({argument}=...)`.")
    return values[name]


def _one(supports: Sequence[TopK], rollouts: Sequence[Rollout]) -> TopK:
    widths = [(support.ids.shape[1], support.drawn) for support in supports]
    for rollout, (k, drawn) in zip(rollouts, widths, strict=True):
        if (k, drawn) != widths[0]:
            raise InvalidRecordError(
                f"Rollout {rollout.rollout_id!r}: its top-k has {k} tokens, {drawn} of them drawn, expected {widths[0][0]} and {widths[0][1]} as the "
                "first of the batch; score all rollouts with one K."
            )
    return TopK.joined(supports)
