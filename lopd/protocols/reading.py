"""How to find rows in a store, and to walk over a whole one: which rows can be read in one call, with all that they have."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lopd.errors import ArgumentError, InvalidRecordError, MissingScoresError, NoSuchRowError
from lopd.protocols import LogprobReader, StatesName
from lopd.protocols.doors import check_noun, check_prompts_of, ids_of
from lopd.records.checks import a_kind
from lopd.records.glance import Glance
from lopd.records.manifest import Provenance
from lopd.records.rollouts import VIRTUAL_COLUMNS, Prompt, Rollout, ScoredRollout, policy_column, prompt_id_of, rollout_id
from lopd.records.rows import Rows

#: Values of one read or write, whatever its rows are: all of them are in memory, several times over, until it is done.
VALUES_AT_ONCE = 1 << 26
#: So many rows stand for those that were not found.
_LOOKED_AT = 1024


@frozen
class Part:
    """Rows close together that are scored in the same columns: the arguments of one `read`.

    Args:
        rows: row numbers in the store, ascending.
        columns: in which all of them have scores; never a virtual one, which comes with the rollouts.
        top_k: those of the columns that keep a top-k support.   values: about how many the rows have together.
    """

    rows: Sequence[int]
    columns: tuple[str, ...]
    top_k: tuple[str, ...]
    values: int

    def read(self, reader: LogprobReader) -> Rows:
        """Return the rows, with all that they have."""
        return reader.read(self.rows, columns=self.columns, top_k=self.top_k)


def values_of(reader: LogprobReader, scores: NDArray[np.int64] | int = 0) -> NDArray[np.int64]:
    """Return (len(reader),): about how many values each row has, with so many of scores for each response token."""
    prompts, responses = reader.lengths().T
    return np.asanyarray(prompts + responses * (4 + scores), np.int64)


def parts(reader: LogprobReader, rows_per_read: int = 64) -> list[Part]:
    """Return all rows in windows of `rows_per_read`, or fewer where the values that each has are many; reads no tokens.

    Rows of a window that are scored in the same columns are one part, the one with the first row first.
    """
    columns = dict(reader.columns)
    covered = np.stack([np.zeros(len(reader), np.bool_), *(reader.scored(name) for name in columns)], axis=1)
    values, made = values_of(reader, np.array([0, *(1 + 2 * each.top_k for each in columns.values())]) @ covered.T), []
    for window in in_batches(np.arange(len(reader)), rows_per_read, values, VALUES_AT_ONCE):
        near, alike = range(window[0], window[-1] + 1), dict[bytes, list[int]]()
        for row in near:
            alike.setdefault(covered[row].tobytes(), []).append(row)
        for rows in alike.values():
            names = tuple(name for name, there in zip(columns, covered[rows[0], 1:], strict=True) if there)
            top_k = tuple(name for name in names if columns[name].top_k)
            made.append(Part(near if len(alike) == 1 else rows, names, top_k, int(values[rows].sum())))
    return made


def to_score(reader: LogprobReader, rows: Sequence[int], provenance: Provenance) -> list[Rollout]:
    """Return these rollouts, with the policy's candidates where a scorer of this provenance needs them.

    Raises:
        MissingScoresError: the policy of a round kept none, or fewer.
    """
    read = reader.read(rows)
    rollouts = [record.rollout for record in read]
    if not provenance.candidates + provenance.drawn:
        return rollouts
    for generation in np.unique(read.generations).tolist():
        column = policy_column(generation)
        kept, policy = reader.columns.get(column), reader.generations[generation]
        # another model may have been scored into it
        found = (kept.top_k - kept.candidates - kept.drawn, kept.drawn) if kept is not None and kept.is_of(policy) else (0, 0)
        if found[0] < provenance.candidates or found[1] < provenance.drawn:
            raise MissingScoresError(
                f"{named(reader)}: column {column!r} has {found[0]} candidates and {found[1]} drawn tokens of {policy}, expected "
                f"{provenance.candidates} and {provenance.drawn} for {provenance.model}; sample with `SamplingParams(candidates=..., drawn=...)`, "
                f"or score the policy into this column with a scorer whose top_k is {provenance.candidates}."
            )
        places = np.flatnonzero(read.generations == generation).tolist()
        for place, record in zip(places, reader.read([rows[i] for i in places], top_k=(column,)), strict=True):
            rollouts[place] = rollouts[place].with_candidates(record.top_k[column])
    return rollouts


def evenly(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return at most `count` of these rows, evenly spaced, the first and the last among them."""
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


def in_batches(
    rows: NDArray[np.int64], rows_per_read: int = 64, values: NDArray[np.int64] | None = None, most: int = VALUES_AT_ONCE
) -> Iterator[Sequence[int]]:
    """Yield the rows, so many at a time, or fewer where the values that each of them has are some `most` together."""
    for first in range(0, len(rows), rows_per_read):
        batch = rows[first : first + rows_per_read]
        for places in [range(len(batch))] if values is None else in_runs(values[first : first + rows_per_read], most):
            yield batch[places].tolist()


def rows_at_once(rows: int, widths: Iterable[float]) -> int:
    """Return so many rows, or fewer where one of these numbers of values a row is very large."""
    return max(min(rows, int(VALUES_AT_ONCE / max([1, *widths]))), 1)


def in_runs(values: NDArray[np.int64], most: int) -> list[list[int]]:
    """Return places in runs of some `most` values, of which each place has so many; a run by itself is one run again."""
    before = np.cumsum(values) - values
    return [run.tolist() for run in np.split(np.arange(len(values)), np.flatnonzero(np.diff(before // most)) + 1)]


def walk(
    reader: LogprobReader, rows: NDArray[np.int64], columns: Sequence[str] = (), top_k: Sequence[str] = (), rows_per_read: int = 64
) -> Iterator[ScoredRollout]:
    """Yield these rows in the order given, each with these columns; the store is read a part at a time, and not at all for none."""
    scores = len(columns) + sum(2 * made.top_k for name, made in reader.columns.items() if name in top_k)
    values = values_of(reader, scores)[rows] if top_k and len(rows) else None
    for part in in_batches(rows, rows_per_read, values, VALUES_AT_ONCE):
        yield from reader.read(part, columns=columns, top_k=top_k)


def row_numbers(owner: str, rows: Any) -> NDArray[np.int64]:
    """Return rows as (R,) int64.

    Raises:
        InvalidRecordError: they are not whole numbers; a mask of rows is not.
    """
    try:
        given = np.asarray(rows)
    except ValueError as error:
        raise InvalidRecordError(f"{owner}: rows are of unlike lengths; join them with `np.concatenate`.") from error
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise InvalidRecordError(
            f"{owner}: rows have dtype {given.dtype} and shape {given.shape}, expected a vector of whole numbers; of a mask "
            "pass `np.flatnonzero(...)`."
        )
    return given.astype(np.int64, copy=False)


def chosen(reader: LogprobReader, rows: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return the rows that a verb was given, ascending and each once; all of them for None.

    Raises:
        NoSuchRowError: a row is not in the store.
        InvalidRecordError: there are none, or they are not whole numbers; a mask of rows is not.
    """
    if not len(reader):
        raise InvalidRecordError(f"{named(reader)}: it has 0 rollouts, expected at least 1; run `collect_rollouts` first.")
    if rows is None:
        return np.arange(len(reader))
    unique = np.unique(row_numbers(named(reader), rows))
    if not unique.size:
        raise InvalidRecordError(
            f"{named(reader)}: 0 rows were chosen, expected at least 1; look whether their prompts were sampled in that round."
        )
    for row in unique[(unique < 0) | (unique >= len(reader))][:1]:
        raise NoSuchRowError(f"{named(reader)}: row {row} was chosen, expected one of {len(reader)} rows.")
    return unique


def rows_of(reader: LogprobReader, prompts: Sequence[Prompt], generations: Iterable[int] | None = None) -> NDArray[np.int64]:
    """Return rows of all samples of these prompts that are in the store, in ascending order.

    Samples are found by their ids, as lopd numbers them: those of the manifest's `samples_per_prompt`, and what follows without a gap.  Of the other
    rows of the store at most 1,024, evenly spaced, are read.  Where one has a sample beyond that number, or an id of another form, as imported
    rollouts and those of your own may have, lengths are asked for and all other rows are read, and each belongs to the prompt in its id.  So samples
    behind a gap are all found in a store of few other rows, or many gaps; a rare gap in a larger one may be overlooked, depending on what is asked.

    Args:
        reader: the store.
        prompts: any, also such as were never sampled.
        generations: only of these rounds; None for all.

    Raises:
        ArgumentError: the store, the prompts or the rounds are something else.
        ConflictError: rows have other prompts under these ids, and are not turns of one conversation; 256 of all, evenly spaced, are looked at.
    """
    check_noun(reader, LogprobReader)
    if generations is not None and not isinstance(generations, Iterable):
        raise ArgumentError(
            f"Rounds: it was given {a_kind(generations)} ({generations}), expected a list of numbers; pass `[{generations}]`."
        )
    rows = samples_of(reader, [ids_of(prompts)], reader.generations if generations is None else generations)[0]
    check_same_prompts(reader, prompts, rows)
    return rows


def check_same_prompts(reader: LogprobReader, prompts: Sequence[Prompt], rows: NDArray[np.int64]) -> None:
    """Refuse rows that have other prompts under the ids of these; at most 256 of them, evenly spaced, are read.

    Raises:
        ConflictError: two prompts have one id, or the prompt was edited.
    """
    check_prompts_of(named(reader), reader, prompts, (record.rollout for record in walk(reader, evenly(rows, 256))))


def samples_of(reader: LogprobReader, groups: Sequence[Sequence[str]], generations: Iterable[int]) -> list[NDArray[np.int64]]:
    """Return rows of all samples in these rounds, ascending, for each group of ids of prompts; see `rows_of`."""
    numbers = {prompt_id: i for i, prompt_id in enumerate({*chain(*groups)})}
    rounds, usual, other = {*generations}, reader.manifest.sampling.samples_per_prompt, False
    whose = np.full(len(reader), -1)
    for generation in rounds:
        left = [*numbers]
        for sample in count():
            rows = reader.find([rollout_id(prompt_id, sample, generation) for prompt_id in left])
            # another process may append meanwhile
            known = (rows >= 0) & (rows < len(whose))
            whose[rows[known]] = np.array([numbers[prompt_id] for prompt_id in left], np.int64)[known]
            if sample + 1 >= usual:
                left = [prompt_id for prompt_id, is_known in zip(left, known.tolist(), strict=True) if is_known]
                other |= sample >= usual and bool(left)
                if not left or (whose >= 0).all():
                    break
    rest = np.flatnonzero(whose < 0) if numbers else np.zeros(0, np.int64)
    seen = (record.rollout.rollout_id for record in walk(reader, evenly(rest, _LOOKED_AT)))
    # imported rollouts, and a user's own, may be numbered with gaps: only their ids show whose they are
    if rest.size and (other or any(_is_other(name, usual) for name in seen)):
        for part in in_batches(rest, _LOOKED_AT, values_of(reader)[rest]):
            read = reader.read(part)
            pairs = zip(map(prompt_id_of, read.rollout_ids), read.generations.tolist(), strict=True)
            whose[part] = [numbers.get(prompt_id, -1) if generation in rounds else -1 for prompt_id, generation in pairs]
    return [np.flatnonzero(np.isin(whose, [numbers[prompt_id] for prompt_id in {*group}])) for group in groups]


def _is_other(name: str, usual: int) -> bool:
    """Return whether a rollout's id has a sample beyond the usual number, or is of another form than `rollout_id` makes."""
    return prompt_id_of(name) == name or int(name.rsplit("/", 2)[1][1:]) >= usual


def rounds_of(reader: LogprobReader, rows: NDArray[np.int64]) -> set[int]:
    """Return the rounds in which these rows were sampled; reads the rows where there are several rounds, and stops once each was seen."""
    every, found = set(reader.generations), set[int]()
    if len(every) == 1:
        return every
    for part in in_batches(rows, 1024):
        found.update(reader.read(part).generations.tolist())
        if found == every:
            break
    return found


def usual_end(reader: LogprobReader, rows: NDArray[np.int64], known: Collection[int]) -> int | None:
    """Return the token, beside those that are known, with which more than half of the responses end that were not cut; None if no token does."""
    ends, count = Counter[int](), 0
    for record in walk(reader, rows):
        taught = record.rollout.response_ids[record.rollout.loss_mask]
        if record.rollout.finish_reason == "stop":
            ends.update([] if np.isin(taught, [*known]).any() else taught[-1:].tolist())
            count += 1
    return next((token for token, times in ends.most_common(1) if 2 * times > count), None)


def way_to(reader: LogprobReader, column: str, more: str = "") -> str:
    """Return what gives rollouts a value in a column, and `more` about it, for messages; `score_rollouts` refuses what the policy itself reports."""
    if column in VIRTUAL_COLUMNS:
        return "sample with an engine that reports its log-probs, or score the policy into another column and pass `ref=`"
    kind = "label" if (known := reader.columns.get(column)) is not None and known.label else "score"
    return f"run `{kind}_rollouts(..., column={column!r})`{more}{elsewhere(reader)}"


def elsewhere(reader: LogprobReader) -> str:
    """Return how a store sees what was written elsewhere, for messages; nothing where a store is in memory, and has no elsewhere."""
    return ", or `store.refresh()` if another handle or process did" if hasattr(reader, "refresh") else ""


def named(reader: LogprobReader) -> str:
    """Return the name of a store in messages: in a few words if it has them, else its `repr`."""
    return reader.name if isinstance(reader, StatesName) else repr(reader)


def describe(reader: LogprobReader, scored: Mapping[str, int]) -> Glance:
    """Return what `repr` and notebooks show of ours; reads nothing.

    Args:
        reader: the store.
        scored: column -> how many rollouts have scores in it.
    """
    rounds = {"rounds": len(reader.generations)} if len(reader.generations) > 1 else {}
    columns = {f"column {name}": f"{scored.get(name, 0):,} of {len(reader):,} {_by(made)}" for name, made in reader.columns.items()}
    facts = {"rollouts": len(reader), **rounds, "policy": reader.manifest.policy, **(columns or {"columns": "none yet"})}
    return Glance(named(reader), facts)


def _by(made: Provenance) -> str:
    return f"{'labelled' if made.label else 'scored'} by {made.model}{f', top-{made.top_k}' * bool(made.top_k)}"
