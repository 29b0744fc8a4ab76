"""The lines and arrays of a segment -> rollouts and scores; every value that leaves here has been compared with its checksum."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from lopd.backends.zarr.encode import BOUND_BY, LENGTHS, REASONS, R, S
from lopd.backends.zarr.segment import Segment, checksum_of
from lopd.records.arrays import Float32Array, read_only
from lopd.records.rollouts import Rollout, TopK

_Int64 = NDArray[np.int64]


@frozen(eq=False)
class Pieces:
    """Where some rows have their values in one array.

    Args:
        segment, name: of the array.
        starts, ends: (n,), of each row's piece.
        expected: (n,), their checksums.
    """

    segment: Segment
    name: str
    starts: _Int64
    ends: _Int64
    expected: _Int64

    def read(self) -> list[NDArray[Any]]:
        """One array a row."""
        pieces = self.segment.ranges(self.name, self.starts.tolist(), self.ends.tolist())
        self._compare([xxh3_64_intdigest(piece.data) for piece in pieces])
        return pieces

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        return np.dtype(self.segment.meta.arrays[self.name].dtype)

    @property
    def neighbours(self) -> bool:
        """Whether they lie end to end, in the order in which they are asked for."""
        return bool((self.starts[1:] == self.ends[:-1]).all())

    def read_whole(self) -> NDArray[Any]:
        """Neighbours end to end, as they lie; not even copied from a local file."""
        first = int(self.starts[0])
        (whole,) = self.segment.ranges(self.name, [first], [int(self.ends[-1])])
        size, data = whole.itemsize, whole.view(np.uint8).data
        bounds = zip(((self.starts - first) * size).tolist(), ((self.ends - first) * size).tolist(), strict=True)
        self._compare([xxh3_64_intdigest(data[start:end]) for start, end in bounds])
        return whole

    def read_bytes(self) -> list[memoryview]:
        """The bytes of each row: slices of views cost half of what slices of arrays do."""
        source = self.segment.whole(self.name)
        if source is None:
            pieces = [piece.view(np.uint8).data for piece in self.segment.ranges(self.name, self.starts.tolist(), self.ends.tolist())]
        else:
            size, data = source.itemsize, source.view(np.uint8).data
            bounds = zip((self.starts * size).tolist(), (self.ends * size).tolist(), strict=True)
            pieces = [data[start:end] for start, end in bounds]
        self._compare([xxh3_64_intdigest(piece) for piece in pieces])
        return pieces

    def _compare(self, sums: list[int]) -> None:
        bad = np.flatnonzero(np.array(sums, np.uint64).view(np.int64) != self.expected)
        if bad.size:
            raise self.segment.damaged(self.name, f"what belongs to line {bad[0]} of those that were asked for does not match its checksum")


def contents(lines: _Int64) -> list[bytes]:
    """The content hash of each rollout."""
    first = R["content_hash_0"]
    hashes = np.ascontiguousarray(lines[:, first : first + 2]).tobytes()
    return [hashes[i : i + 16] for i in range(0, len(hashes), 16)]


def tokens(segment: Segment, lines: _Int64) -> Pieces:
    """Prompt and response ids."""
    starts = lines[:, R["token_start"]]
    return Pieces(segment, "token_ids", starts, starts + lines[:, LENGTHS].sum(axis=1), lines[:, R["token_checksum"]])


def responses(segment: Segment, lines: _Int64, name: str, flag: str, checksum: str) -> list[NDArray[Any] | None]:
    """One value a response token for the rows that have them, None for the others."""
    having = np.flatnonzero(lines[:, R[flag]])
    found: list[NDArray[Any] | None] = [None] * len(lines)
    if having.size:
        chosen = lines[having]
        starts = chosen[:, R["response_start"]]
        pieces = Pieces(segment, name, starts, starts + chosen[:, R["response_length"]], chosen[:, R[checksum]]).read()
        for place, piece in zip(having.tolist(), pieces, strict=True):
            found[place] = piece
    return found


def masks(segment: Segment, lines: _Int64) -> list[NDArray[Any] | None]:
    """Loss masks; None where every token counts."""
    return responses(segment, lines, "loss_mask", "masked", "mask_checksum")


def behaviors(segment: Segment, lines: _Int64) -> list[NDArray[Any] | None]:
    """What the sampling engine reported, if it did."""
    return responses(segment, lines, "behavior_logprobs", "has_behavior", "behavior_checksum")


def rollouts(segment: Segment, indices: Sequence[int]) -> list[Rollout]:
    """These rollouts of a segment."""
    lines = segment.lines(indices)
    columns = masks(segment, lines), behaviors(segment, lines), contents(lines)
    parts = zip(_ids(segment, lines), lines.tolist(), tokens(segment, lines).read(), *columns, strict=True)
    decoded = []
    for name, line, token_ids, mask, behavior, content_hash in parts:
        ids = read_only(token_ids.astype(np.int32))
        middle, length = line[R["prompt_length"]], line[R["response_length"]]
        decoded.append(
            Rollout.from_store(
                rollout_id=name,
                prompt_ids=ids[:middle],
                response_ids=ids[middle:],
                loss_mask=read_only(np.ones(length, np.bool_) if mask is None else mask.astype(np.bool_)),
                finish_reason=REASONS[line[R["finish_reason"]]],
                # A copy: a view would keep its map, and the file behind it, open for as long as the caller keeps the rollout.
                behavior_logprobs=None if behavior is None else read_only(behavior.astype(np.float32)),
                generation=line[R["generation"]],
                content_hash=content_hash,
            )
        )
    return decoded


def _ids(segment: Segment, lines: _Int64) -> list[str]:
    starts = lines[:, R["id_start"]]
    data = [piece.tobytes() for piece in segment.ranges("rollout_ids", starts.tolist(), (starts + lines[:, R["id_length"]]).tolist())]
    hashes = np.frombuffer(b"".join(map(xxh3_128_digest, data)), "<i8").reshape(-1, 2)
    if (hashes != lines[:, R["id_hash_0"] : R["id_hash_1"] + 1]).any():
        raise segment.damaged("rollout_ids", "an id is not the one that its line names")
    return [raw.decode("utf-8", "surrogatepass") for raw in data]


def bound_to(rollouts: Sequence[Rollout]) -> _Int64:
    """(n, 3): what the scores of these rollouts must say of the tokens that they were computed on."""
    hashes = np.frombuffer(b"".join(rollout.content_hash for rollout in rollouts), "<i8").reshape(-1, 2)
    return np.column_stack([np.array([rollout.response_ids.size for rollout in rollouts], np.int64), hashes])


def logprobs(segment: Segment, lines: _Int64, bound: _Int64) -> Pieces:
    """Log-probs of these lines of scores, if they were computed on the rollouts that they are read with."""
    strange = np.flatnonzero((lines[:, BOUND_BY[1]] != bound).any(axis=1))
    if strange.size:
        raise segment.damaged("logprobs", f"the scores of row {lines[strange[0], S['row']]} were computed on other tokens")
    starts = lines[:, S["start"]]
    return Pieces(segment, "logprobs", starts, starts + lines[:, S["length"]], lines[:, S["logprobs_checksum"]])


def scores(segment: Segment, indices: Sequence[int], bound: _Int64, *, top_k: bool) -> list[tuple[Float32Array, TopK | None]]:
    """Log-probs, and the top-k supports if they are wanted."""
    lines = segment.lines(indices)
    values = [read_only(piece.astype(np.float32)) for piece in logprobs(segment, lines, bound).read()]
    return list(zip(values, _top_k(segment, lines) if top_k else [None] * len(lines), strict=True))


def _top_k(segment: Segment, lines: _Int64) -> list[TopK]:
    starts = lines[:, S["start"]]
    ends = (starts + lines[:, S["length"]]).tolist()
    parts = [segment.ranges(name, starts.tolist(), ends) for name in ("top_k_ids", "top_k_logprobs", "top_k_tail")]
    supports = []
    for expected, *three in zip(lines[:, S["top_k_checksum"]].tolist(), *parts, strict=True):
        if checksum_of(*three) != expected:
            raise segment.damaged("top_k", "a support does not match its checksum")
        supports.append(TopK.from_store(*three))
    return supports
