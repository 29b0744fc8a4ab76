"""Checks of a call against what a store holds.

Pure functions: a store passes in what it knows and gets back what is new, so that all stores refuse the same things in the same words.
`owner` is how messages name the store, and `vocab_size` that of its manifest's tokenizer.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from lopd.backends.column_names import check_column
from lopd.errors import ConflictError, InvalidRecordError, MissingScoresError, NoSuchRowError
from lopd.protocols.reading import row_numbers
from lopd.records.checks import a_kind, several
from lopd.records.identity import ModelId, rounding_note
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import SAMPLER_COLUMN, VIRTUAL_COLUMNS, Rollout, Scores
from lopd.records.rows import Rows
from lopd.records.support import TopK

R = TypeVar("R", Rollout, Scores)
_TOGETHER = 64


def new_rollouts(
    owner: str, rollouts: Sequence[Rollout], *, vocab_size: int, generations: Container[int], known: Mapping[str, bytes]
) -> list[Rollout]:
    """Return those rollouts of one append that are not there yet, each once, in order.

    `generations` are the rounds of sampling that were begun, and `known` the content hashes of those rollouts that are committed.

    Raises:
        ConflictError: other content under an id that is there, or twice in the call.
        InvalidRecordError: a token id is outside the vocabulary, or the generation was not begun.
    """
    fresh: dict[str, Rollout] = {}
    for rollout in rollouts:
        seen = fresh.get(rollout.rollout_id)
        hash_there = known.get(rollout.rollout_id) if seen is None else seen.content_hash
        if hash_there is None:
            if rollout.generation not in generations:
                raise InvalidRecordError(
                    f"Rollout {rollout.rollout_id!r}: its generation is {rollout.generation}, which was not begun; "
                    "call `begin_generation` with the policy that sampled it."
                )
            fresh[rollout.rollout_id] = rollout
        elif hash_there != rollout.content_hash:
            where = "is committed" if seen is None else "appears earlier in the same call"
            raise ConflictError(
                f"{owner}: rollout {rollout.rollout_id!r} has content hash {rollout.content_hash.hex()[:8]}, expected {hash_there.hex()[:8]}, "
                f"which {where} under this id; give another prompt another id, such as `math/1`, and another response another sample number "
                "(a round is for another policy)."
            )
    new = list(fresh.values())
    _check_ids(new, vocab_size)
    return new


def _check_ids(rollouts: Sequence[Rollout], vocab_size: int) -> None:
    """Refuse a rollout with an id outside the vocabulary.

    So many are looked at together as stay in the processor's cache: a look at each alone costs more, and fresh memory for all more still.
    """
    for first in range(0, len(rollouts), _TOGETHER):
        some = rollouts[first : first + _TOGETHER]
        if np.concatenate([ids for rollout in some for ids in (rollout.prompt_ids, rollout.response_ids)]).max() >= vocab_size:
            _refuse_ids(some, vocab_size)


def _refuse_ids(rollouts: Sequence[Rollout], vocab_size: int) -> None:
    for rollout in rollouts:
        for name, ids in (("prompt_ids", rollout.prompt_ids), ("response_ids", rollout.response_ids)):
            if ids.max() >= vocab_size:
                position = int(np.argmax(ids >= vocab_size))
                raise InvalidRecordError(
                    f"Rollout {rollout.rollout_id!r}: {name}[{position}] is {ids[position]}, expected an id below {vocab_size}, "
                    "the size of the manifest's vocabulary; check that policy and manifest share one tokenizer."
                )


def listed(owner: str, records: Iterable[R], kind: type[R]) -> list[R]:
    """Return the records as a list: an iterator would be used up before they are written.

    Raises:
        InvalidRecordError: they are something else.
    """
    found = list(records) if isinstance(records, Iterable) else None
    if found is None or not all(isinstance(record, kind) for record in found):
        wrong = records if found is None else next(record for record in found if not isinstance(record, kind))
        raise InvalidRecordError(f"{owner}: it was given {a_kind(wrong)}, expected a list of {kind.__name__} objects; pass `[...]`.")
    return found


def check_generation(owner: str, generation: int, stored: ModelId | None, given: ModelId) -> None:
    """Refuse another policy in a round that was begun.

    Raises:
        ConflictError: it names both.
        InvalidRecordError: it is not the number of a round, or not a policy.
    """
    if type(generation) is not int or generation not in range(1 << 50):
        raise InvalidRecordError(f"{owner}: the generation is {generation!r:.80}, expected an int below 2**50; count rounds from 0.")
    _check_is(owner, "the policy", given, ModelId, "pass `source.manifest.policy`")
    if stored is not None and stored != given:
        raise ConflictError(
            f"{owner}: generation {generation} was sampled by {stored}, expected {given}; give the round of another policy another number."
        )


def check_manifest(owner: str, manifest: object) -> None:
    """Refuse, by an InvalidRecordError, what is not a manifest, for example a source, which has one."""
    _check_is(owner, "its manifest", manifest, Manifest, "pass `source.manifest`")


def _check_is(owner: str, what: str, value: object, kind: type, remedy: str) -> None:
    if not isinstance(value, kind):
        raise InvalidRecordError(f"{owner}: {what} is {a_kind(value)}, expected a {kind.__name__}; {remedy}.")


def check_provenance(owner: str, column: str, columns: Mapping[str, Provenance], given: Provenance) -> None:
    """Refuse a name that no column can have, and scores of another model, or made in another way, than those already under it in `columns`.

    Raises:
        ConflictError: it names the first thing that differs.
        InvalidRecordError: it is not a provenance; or see `check_column`.
    """
    check_column(owner, column, columns)
    stored = columns.get(column)
    _check_is(owner, f"the provenance of column {column!r}", given, Provenance, "pass `scorer.provenance`")
    if stored is None or stored == given:
        return
    remedy = "write another column or score with the same model"
    if stored.model != given.model:
        # Two models that print alike differ in dtype, or in the tail of the revision: then show all of it.
        show: Callable[[Any], str] = str if str(stored.model) != str(given.model) else repr
        was, want = f"by {show(stored.model)}", f"{show(given.model)}{rounding_note(stored.model, given.model)}"
    else:
        name = next(
            n for n in ("vocab_hash", "logprobs_mode", "top_k", "candidates", "drawn", "engine") if getattr(stored, n) != getattr(given, n)
        )
        was, want, remedy = f"with {name} {getattr(stored, name)!r}", repr(getattr(given, name)), "write another column or score as before"
    if stored.model.name == given.model.name and stored.model.dtype != given.model.dtype:
        remedy += f" (it was in {stored.model.dtype}, and this one is in {given.model.dtype})"
    raise ConflictError(f"{owner}: column {column!r} was scored {was}, expected {want}; {remedy}.")


def new_scores(
    owner: str,
    scores: Sequence[Scores],
    *,
    provenance: Provenance,
    vocab_size: int,
    known: Mapping[str, tuple[bytes, int]],
    done: Container[str],
) -> list[Scores]:
    """Return those scores of one append whose rollout is not scored yet, each once, in order.

    `known` are the content hash and the number of response tokens of those rollouts that are committed, and `done` those that are scored.

    Raises:
        MissingScoresError: no such rollout.
        ConflictError: the scores were computed on other tokens.
        InvalidRecordError: there is not one log-prob per response token, or not the top-k support of the column, or one of the two states that
            values may be above 0 and the other does not.
    """
    fresh, signed, stated = dict[str, Scores](), provenance.signed, (provenance.top_k, provenance.drawn)
    asked = stated != (0, 0)
    for score in scores:
        name = score.rollout_id
        if known.get(name) != (score.content_hash, score.logprobs.size):
            _refuse_score(owner, score, known.get(name))
        if score.signed != signed:
            raise InvalidRecordError(
                f"{owner}: scores of rollout {name!r} have signed={score.signed}, expected {signed} as their provenance "
                f"has logprobs_mode {provenance.logprobs_mode!r}; write residuals and labels into columns of their own (`lopd.residualise`)."
            )
        if asked or score.top_k is not None:
            _check_top_k(owner, score, stated, vocab_size)
        if name not in done:
            fresh.setdefault(name, score)
    return list(fresh.values())


def _check_top_k(owner: str, score: Scores, stated: tuple[int, int], vocab_size: int) -> None:
    found = (0, 0) if score.top_k is None else (score.top_k.ids.shape[1], score.top_k.drawn)
    if found != stated:
        raise InvalidRecordError(
            f"{owner}: scores of rollout {score.rollout_id!r} have a top-k of {found[0]}, {found[1]} of them drawn, expected {stated[0]} and "
            f"{stated[1]} as in their provenance; state there what the scorer keeps."
        )
    if score.top_k is not None and score.top_k.ids.size and score.top_k.ids.max() >= vocab_size:
        raise InvalidRecordError(
            f"{owner}: scores of rollout {score.rollout_id!r} have top-k id {score.top_k.ids.max()}, expected ids below {vocab_size}; "
            "cut the scorer's logits to the tokenizer's vocabulary."
        )


def _refuse_score(owner: str, score: Scores, known: tuple[bytes, int] | None) -> NoReturn:
    if known is None:
        raise MissingScoresError(f"{owner}: rollout {score.rollout_id!r} is absent; append the rollout first.")
    content_hash, length = known
    if score.content_hash != content_hash:
        raise ConflictError(
            f"{owner}: scores of rollout {score.rollout_id!r} were computed on tokens with hash {score.content_hash.hex()[:8]}, "
            f"expected {content_hash.hex()[:8]}; score the rollout that is in the store."
        )
    raise InvalidRecordError(
        f"Scores of rollout {score.rollout_id!r}: logprobs has shape {score.logprobs.shape}, but response_ids has shape ({length},); "
        "make them with `Scores.of`, which checks this."
    )


def check_asked(
    owner: str, columns: Iterable[str], top_k: Iterable[str], provenances: Mapping[str, Provenance]
) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """Return columns, top_k, and what to read for them, each once, without virtual ones; what is absent is refused with its scores.

    Raises:
        ArgumentError: one text is given in place of several.
        MissingScoresError: the support of a column that keeps none is asked for; it names the column.
    """
    columns, top_k = several(owner, columns), several(owner, top_k)
    for name in top_k:
        if name in VIRTUAL_COLUMNS or (name in provenances and provenances[name].top_k == 0):
            raise MissingScoresError(f"{owner}: column {name!r} has no top-k support; score with a scorer whose provenance names a top_k.")
    return columns, top_k, [name for name in dict.fromkeys([*columns, *top_k]) if name not in VIRTUAL_COLUMNS]


def new_quarantine(
    owner: str, reasons: Mapping[str, str], *, rows: Sequence[int], done: Container[int], known: Mapping[int, str]
) -> dict[int, str]:
    """Return row -> reason of those rollouts that have neither scores nor this reason yet, by row.

    `rows` are those of the rollouts in `reasons`, -1 where there is none; `done` are the rows that have scores; `known` are the
    reasons that are there.

    Raises:
        MissingScoresError: no such rollout.
        InvalidRecordError: a reason is not text.
    """
    _check_is(owner, "the reasons", reasons, Mapping, "pass rollout id -> reason")
    for rollout_id, row in zip(reasons, rows, strict=True):
        _check_is(owner, f"the reason of rollout {rollout_id!r}", reasons[rollout_id], str, "pass text")
        if row < 0:
            raise MissingScoresError(f"{owner}: rollout {rollout_id!r} is not there; append it first.")
    return {row: reason for row, reason in sorted(zip(rows, reasons.values(), strict=True)) if row not in done and known.get(row) != reason}


def missing_scores(owner: str, rollout_id: str, column: str) -> MissingScoresError:
    """Return the error for a rollout that has no scores in a column."""
    if column in VIRTUAL_COLUMNS:
        neutral = " (where temperature and top_p are 1 they are the behavior_logprobs)" if column == SAMPLER_COLUMN else ""
        return MissingScoresError(
            f"{owner}: rollout {rollout_id!r} has no {VIRTUAL_COLUMNS[column]}, as the sampling engine reported none{neutral}; "
            "collect with an engine that reports them, or read another column."
        )
    return MissingScoresError(
        f"{owner}: rollout {rollout_id!r} has no scores in column {column!r}, expected one log-prob per response token; "
        f"run score_rollouts with column={column!r}, or read only rows that `scored` names."
    )


def with_columns(owner: str, rows: Rows, columns: Sequence[str], provenances: Mapping[str, Provenance]) -> Rows:
    """Return rows with these columns as their scores, the virtual ones among them, and supports that know how much of them was drawn.

    Raises:
        MissingScoresError: a rollout lacks what a virtual column reads, and it is asked for.
    """
    scores = dict(rows.scores)
    for column in filter(VIRTUAL_COLUMNS.__contains__, columns):
        gaps, reported = np.ones(len(rows), np.bool_), getattr(rows, VIRTUAL_COLUMNS[column])
        if reported is not None:
            scores[column], gaps = reported, np.isnan(reported[rows.response_ends[:-1]])
        for i in np.flatnonzero(gaps)[:1]:
            raise missing_scores(owner, rows.rollout_ids[int(i)], column)
    supports = {name: TopK.from_store(s.ids, s.logprobs, s.tail, provenances[name].drawn) for name, s in rows.top_k.items()}
    return evolve(rows, scores={name: scores[name] if len(rows) else np.zeros(0, np.float32) for name in columns}, top_k=supports)


def check_rows(owner: str, indices: Sequence[int], length: int) -> NDArray[np.int64]:
    """Return the indices as (n,).

    Raises:
        NoSuchRowError: one is negative or past the end; a store has no rows to count backwards from while it grows.
        InvalidRecordError: they are not whole numbers; a mask of rows is not.
    """
    rows = row_numbers(owner, indices)
    for row in rows[(rows < 0) | (rows >= length)][:1]:
        raise NoSuchRowError(f"{owner}: row {row} was asked for, expected 0 to {length - 1}; ask for rows that are there.")
    return rows
