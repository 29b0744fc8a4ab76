"""The lines and arrays of segments -> rows; every value that leaves here has been compared with its checksum."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from lopd.backends.files import Piece, Run
from lopd.backends.id_index import decode_id, hash_ids
from lopd.backends.zarr.columns import BOUND_BY, ID_HALVES, LENGTHS, REASONS, REPORTED, TOP_K_ARRAYS, R, S
from lopd.backends.zarr.segment import Segment, checksums
from lopd.records.rows import Rows
from lopd.records.support import TopK

_Int64 = NDArray[np.int64]
# Bits of `has_behavior` -> the arrays that such a row has values in.
_REPORTED = {bits: tuple(name for bit, name in enumerate(REPORTED) if bits >> bit & 1) for bits in range(1, 1 << len(REPORTED))}


@frozen(eq=False)
class Group:
    """Rows of a call that are in one segment.

    Args:
        segment: where they are.
        places: (n,), their places in the call.
        indices: (n,), their lines in the segment.
    """

    segment: Segment
    places: _Int64
    indices: _Int64

    def lines(self) -> _Int64:
        """Return (n, fields), verified."""
        return self.segment.lines(self.indices)


@frozen(eq=False)
class _Pieces:
    """Where some rows of a call have their values.

    Args:
        group: the rows.
        names: arrays; the checksum goes over one after the other.
        starts, lengths: (n,), along the first dimension of each array.
        expected: (n,), checksums.
    """

    group: Group
    names: tuple[str, ...]
    starts: _Int64
    lengths: _Int64
    expected: _Int64

    def read(self) -> list[Sequence[Piece]]:
        """Return, for each array, the bytes of each row."""
        found = [self.group.segment.pieces(name, self.starts, self.starts + self.lengths) for name in self.names]
        bad = np.flatnonzero(checksums(*found) != self.expected)
        if bad.size:
            what = f"what belongs to line {bad[0]} of those that were asked for does not match its checksum"
            raise self.group.segment.damaged(self.names[0], what)
        return found


def read(rollouts: Sequence[Group], scores: Mapping[str, Sequence[Group]], top_k: Sequence[str], run: Run) -> Rows:
    """Read rows with their scores in these columns, and the supports of some: first all lines, then all values.

    Raises:
        CorruptStoreError: a value does not match its checksum, or scores were computed on other tokens.
        StoreReadError: the storage does not answer.
    """
    groups = [*rollouts, *(group for column in scores.values() for group in column)]
    parts = iter(run([group.lines for group in groups]))
    own = [(group, next(parts)) for group in rollouts]
    columns = {name: [(group, next(parts)) for group in column] for name, column in scores.items()}
    lines = np.empty((sum(len(part) for _, part in own), len(R)), np.int64)
    for group, part in own:
        lines[group.places] = part
    prompts, responses = lines[:, LENGTHS].T
    wanted = {
        "token_ids": [
            _Pieces(group, ("token_ids",), part[:, R["token_start"]], part[:, LENGTHS].sum(axis=1), part[:, R["token_checksum"]])
            for group, part in own
        ],
        "loss_mask": _some(own, ("loss_mask",), "masked", "mask_checksum"),
        **{f"reported {bits}": _some(own, names, "has_behavior", "behavior_checksum", bits) for bits, names in _REPORTED.items()},
    }
    for name, column in columns.items():
        for group, part in column:
            _check_bound(group, part, lines)
        wanted[f"scores {name}"] = _scored(column, ("logprobs",), "logprobs_checksum")
        wanted[f"top_k {name}"] = _scored(column, TOP_K_ARRAYS, "top_k_checksum") if name in top_k else []
    calls = [pieces.read for several in wanted.values() for pieces in several]
    answers = iter(run([*calls, *(lambda g=group, p=part: _names(g, p) for group, part in own)]))
    found = {name: [(pieces, next(answers)) for pieces in several] for name, several in wanted.items()}
    masks = found["loss_mask"]
    reported = {name: [part for bits in _REPORTED for part in _only(name, found[f"reported {bits}"])] for name in REPORTED}
    return Rows(
        rollout_ids=_scattered(len(lines), [(group.places, next(answers)) for group, _ in own]),
        prompt_lengths=prompts,
        response_lengths=responses,
        token_ids=_joined(found["token_ids"], prompts)[0],
        loss_mask=_joined(masks, responses, 1)[0].view(np.bool_) if masks else None,
        **{name: _joined(p, responses, np.nan)[0].astype(np.float32, copy=False) if p else None for name, p in reported.items()},
        finish_reasons=[REASONS[i] for i in lines[:, R["finish_reason"]].tolist()],
        generations=lines[:, R["generation"]],
        content_hashes=contents(lines),
        scores={name: _joined(found[f"scores {name}"], responses)[0].astype(np.float32, copy=False) for name in scores},
        top_k={
            name: TopK.from_store(ids, ranked, tail) for name in top_k for ids, ranked, tail in [_joined(found[f"top_k {name}"], responses)]
        },
    )


def contents(lines: _Int64) -> list[bytes]:
    """Return the content hash of each rollout."""
    first = R["content_hash_0"]
    hashes = np.ascontiguousarray(lines[:, first : first + 2]).tobytes()
    return [hashes[i : i + 16] for i in range(0, len(hashes), 16)]


def _some(own: Sequence[tuple[Group, _Int64]], names: tuple[str, ...], flag: str, checksum: str, value: int = 1) -> list[_Pieces]:
    """Find one value a response token in each of these arrays, of the rows whose flag is this."""
    found = []
    for group, part in own:
        having = np.flatnonzero(part[:, R[flag]] == value)
        if having.size:
            some, lines = Group(group.segment, group.places[having], group.indices[having]), part[having]
            found.append(_Pieces(some, names, *lines[:, [R["response_start"], R["response_length"], R[checksum]]].T))
    return found


def _only(name: str, found: Sequence[tuple[_Pieces, list[Sequence[Piece]]]]) -> list[tuple[_Pieces, list[Sequence[Piece]]]]:
    return [(evolve(pieces, names=(name,)), [read[pieces.names.index(name)]]) for pieces, read in found if name in pieces.names]


def _scored(column: Sequence[tuple[Group, _Int64]], names: tuple[str, ...], checksum: str) -> list[_Pieces]:
    return [_Pieces(group, names, *part[:, [S["start"], S["length"], S[checksum]]].T) for group, part in column]


def joined_scores(column: Sequence[tuple[Group, _Int64]], lengths: _Int64, run: Run) -> dict[str, NDArray[Any]]:
    """Return all arrays of the scores that these lines name, in the order of the call; verified."""
    arrays: dict[str, NDArray[Any]] = {}
    for names, checksum in ((("logprobs",), "logprobs_checksum"), (TOP_K_ARRAYS, "top_k_checksum")):
        if names[0] in column[0][0].segment:
            wanted = _scored(column, names, checksum)
            found = zip(wanted, run([pieces.read for pieces in wanted]), strict=True)
            arrays |= zip(names, _joined([*found], lengths), strict=True)
    return arrays


def _check_bound(group: Group, part: _Int64, lines: _Int64) -> None:
    """Refuse scores that were computed on other tokens than those they are read with."""
    strange = np.flatnonzero((part[:, BOUND_BY[1]] != lines[group.places][:, BOUND_BY[0]]).any(axis=1))
    if strange.size:
        raise group.segment.damaged("logprobs", f"the scores of row {part[strange[0], S['row']]} were computed on other tokens")


def _names(group: Group, lines: _Int64) -> list[str]:
    starts = lines[:, R["id_start"]]
    ends = starts + lines[:, R["id_length"]]
    data = group.segment.pieces("rollout_ids", starts, ends)
    if (hash_ids(data).view("<i8").reshape(-1, 2) != lines[:, ID_HALVES]).any():
        raise group.segment.damaged("rollout_ids", "an id is not the one that its line names")
    return [decode_id(bytes(raw)) for raw in data]


def _scattered(count: int, parts: Sequence[tuple[_Int64, Sequence[Any]]]) -> list[Any]:
    """Put one value a row in the order of the call; None where there is none."""
    whole: list[Any] = [None] * count
    for places, part in parts:
        for place, value in zip(places.tolist(), part, strict=True):
            whole[place] = value
    return whole


def _joined(found: Sequence[tuple[_Pieces, list[Sequence[Piece]]]], lengths_B: _Int64, filler: float = 0) -> list[NDArray[Any]]:
    """Put the values of all rows end to end, in the order of the call, an array for each name; rows without values get the filler."""
    arrays = []
    for k, name in enumerate(found[0][0].names):
        meta = found[0][0].group.segment.meta.arrays[name]
        if len(found) == 1 and len(found[0][1][k]) == len(lengths_B) and isinstance(first := found[0][1][k][0], memoryview):
            # all rows from one read, in this order: what they are views of is what is wanted
            arrays.append(meta.values(cast("bytes", first.obj)))
            continue
        rows = _scattered(len(lengths_B), [(pieces.group.places, read[k]) for pieces, read in found])
        if None in rows:
            rows = [
                np.full(n, filler, meta.dtype).tobytes() if row is None else row for row, n in zip(rows, lengths_B.tolist(), strict=True)
            ]
        arrays.append(meta.values(b"".join(rows)))
    return arrays
