"""Checking a store to the last bit."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from attrs import evolve

from lopd.backends import admission
from lopd.backends.files import is_damage
from lopd.errors import CorruptStoreError, InvalidRecordError, LopdError, StoreReadError
from lopd.protocols import DurableStore, LogprobReader, Progress
from lopd.protocols.doors import check_noun
from lopd.protocols.reading import Part, named, parts
from lopd.records.rollouts import ScoredRollout, Scores
from lopd.verbs.asking import shown


def check_store(store: DurableStore, *, rows_per_read: int = 64, progress: Progress | None = None) -> Iterator[str]:
    """Yield one sentence for each problem: what the store finds in its own bytes, then what reading every row with every column brings up.

    Every rollout, score and top-k support is made again from what was read, so it is checked as strictly as when it was first made.

    Args:
        store: any durable store.
        rows_per_read: how many at a time, or fewer where the values of each are very many; bounds memory.
        progress: see `lopd.tools.console.RichProgress`.

    Raises:
        ArgumentError: the progress is something else.
        StoreReadError: the storage refused a read, which does not mean that the store is damaged; a bad sector of a local disk does.
    """
    if progress is not None:
        check_noun(progress, Progress)
    seen: set[str] = set()
    for problem in _problems(store, rows_per_read, progress):
        # one damaged file is met by every row in it
        if problem not in seen:
            seen.add(problem)
            yield problem


def _problems(store: DurableStore, rows_per_read: int, progress: Progress | None) -> Iterator[str]:
    yield from store.verify()
    try:
        tokens, whole = store.lengths().sum(axis=1), parts(store, rows_per_read)
    except (CorruptStoreError, StoreReadError) as error:
        yield _problem(store, error)
        return
    silent = nullcontext(lambda *_: None)
    with silent if progress is None else shown(progress, "verifying", len(store), 0, int(tokens.sum())) as advance:
        for part in whole:
            yield from _check_part(store, part, part.rows)
            advance(len(part.rows), int(tokens[[*part.rows]].sum()), 0)


def _problem(store: LogprobReader, error: LopdError) -> str:
    if not is_damage(named(store), error):
        raise error
    return str(error)


def _check_part(store: LogprobReader, part: Part, rows: Sequence[int]) -> Iterator[str]:
    try:
        read = store.read(rows, columns=part.columns, top_k=part.top_k)
        found = store.find([row.rollout.rollout_id for row in read]).tolist()
    except LopdError as error:
        problem = _problem(store, error)
        if len(rows) == 1:
            yield problem
        else:
            for number in rows:
                yield from _check_part(store, part, [number])
        return
    for number, place, row in zip(rows, found, read, strict=True):
        yield from _check_row(store, row)
        if place != number:
            yield (
                f"{named(store)}: rollout {row.rollout.rollout_id!r} is found in row {place}, expected row {number}, where it was read; "
                "restore the store from a backup."
            )


def _check_row(store: LogprobReader, row: ScoredRollout) -> Iterator[str]:
    stored = row.rollout
    try:
        # a copy is checked as if it were new
        made = evolve(stored)
        # nothing is known, so what a store checks of new rollouts is checked of this one
        size = store.manifest.tokenizer.vocab_size
        admission.new_rollouts(named(store), [made], vocab_size=size, generations=store.generations, known={})
        for column, logprobs in row.scores.items():
            kept = row.top_k.get(column)
            support = None if kept is None else evolve(kept)
            Scores.of(made, logprobs, top_k=support, signed=column in store.columns and store.columns[column].signed)
    except InvalidRecordError as error:
        yield f"{named(store)}: row of rollout {stored.rollout_id!r} breaks its contract: {error}"
        return
    if made.content_hash != stored.content_hash:
        yield (
            f"{named(store)}: rollout {stored.rollout_id!r} has content hash {stored.content_hash.hex()[:8]}, expected "
            f"{made.content_hash.hex()[:8]} of the tokens that were read; restore the store from a backup."
        )
