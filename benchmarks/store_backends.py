"""What `bench_store` compares: each backend writes the same rows, opens them, and gives batches of them as contiguous arrays."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from lopd.backends.files.local import LocalFiles
from lopd.backends.lance.store import LanceStore
from lopd.backends.zarr.store import ZarrStore
from lopd.records import Rollout, Scores
from lopd.testing import tiny_manifest, tiny_provenance

VOCABULARY, APPEND = 151_936, 1024
Batch = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


@frozen(eq=False)
class Rows:
    """Rollouts end to end: the first token of each is its prompt."""

    lengths: NDArray[np.int64]
    ids: NDArray[np.uint32]
    teacher: NDArray[np.float32]
    ref: NDArray[np.float32]

    @property
    def bounds(self) -> NDArray[np.int64]:
        """Where each begins, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def batches(self, size: int) -> list[tuple[int, int]]:
        """Return (first, last + 1) of consecutive batches."""
        return [(i, min(i + size, len(self.lengths))) for i in range(0, len(self.lengths), size)]


class Reader(Protocol):
    """Gives ids and both columns of rows, end to end."""

    def __call__(self, rows: NDArray[np.int64], /) -> Batch:
        """Read one batch."""
        ...


@frozen(eq=False)
class Store:
    """An open store.

    Args:
        read: one batch.
        skipped: log-probs are there for response tokens only (all but the first).
        ordered: a batch has the rows that were asked for.
        read_group: set for a backend that reads a group of blocks in one call, and hands out its shuffled batches from memory.
    """

    read: Reader
    skipped: bool = False
    ordered: bool = True
    read_group: Callable[[Sequence[NDArray[np.int64]]], list[Batch]] | None = None

    def tokens_of(self, rows: NDArray[np.int64]) -> int:
        """Read a batch; how many tokens it had."""
        ids, teacher, ref = self.read(rows)
        assert teacher.size == ref.size  # noqa: S101
        return int(ids.size)

    def tokens_of_group(self, batches: Sequence[NDArray[np.int64]]) -> int:
        """Read some batches; how many tokens they had."""
        found = [self.read(rows) for rows in batches] if self.read_group is None else self.read_group(batches)
        assert len(found) == len(batches)  # noqa: S101
        return sum(int(ids.size) for ids, _, _ in found)

    def check(self, rows: Rows) -> None:
        """Check that a few rows are what was written: a fast backend that returns other data is useless."""
        bounds = rows.bounds
        asked = np.array([5, 0, len(rows.lengths) - 1, 1])
        if not self.ordered:
            return
        ids, teacher, ref = self.read(asked)
        if self.read_group is not None:
            # In two batches: end to end they are the same.
            parts = zip(*self.read_group([asked[:3], asked[3:]]), strict=True)
            for part, whole in zip(parts, (ids, teacher, ref), strict=True):
                np.testing.assert_array_equal(np.concatenate(part), whole)
        skip = 1 if self.skipped else 0
        for found, whole, first in ((ids, rows.ids, 0), (teacher, rows.teacher, skip), (ref, rows.ref, skip)):
            np.testing.assert_array_equal(found, np.concatenate([whole[bounds[i] + first : bounds[i + 1]] for i in asked]))


@frozen(eq=False)
class Backend:
    """How to write, finish, open and weigh one kind of store; `open` is None of one that is only written."""

    write: Callable[[Any, Path, int], None]
    open: Callable[[Path], Store] | None = None
    prepare: Callable[[Rows], Any] = lambda rows: rows
    finish: Callable[[Path], None] | None = None
    stored_bytes: Callable[[Path], int] = field(default=lambda folder: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))
    needs: str = "numpy"

    def available(self) -> bool:
        """Return whether its package is installed."""
        return importlib.util.find_spec(self.needs) is not None


def write_memmap(rows: Rows, folder: Path, size: int, *, flushed: bool = False) -> None:
    """Append to three flat files; they are flushed to disk after each append, or not."""
    bounds = rows.bounds
    with (folder / "ids").open("wb") as ids, (folder / "teacher").open("wb") as teacher, (folder / "ref").open("wb") as ref:
        for first, last in rows.batches(size):
            for file, values in ((ids, rows.ids), (teacher, rows.teacher), (ref, rows.ref)):
                file.write(values[bounds[first] : bounds[last]].data)
                if flushed:
                    file.flush()
                    os.fsync(file.fileno())
    np.save(folder / "bounds.npy", bounds)


def open_memmap(folder: Path) -> Store:
    """Open a store of slices of three maps."""
    bounds = np.load(folder / "bounds.npy")
    maps = [np.memmap(folder / name, dtype, "r") for name, dtype in (("ids", "u4"), ("teacher", "f4"), ("ref", "f4"))]

    def read(rows: NDArray[np.int64]) -> Batch:
        ids, teacher, ref = (np.concatenate([whole[bounds[i] : bounds[i + 1]] for i in rows]) for whole in maps)
        return ids, teacher, ref

    return Store(read)


@frozen(eq=False)
class Records:
    """The rows as lopd's records, made beforehand: a source and a scorer make them in any case."""

    rollouts: list[Rollout]
    teacher: list[Scores]
    ref: list[Scores]


def records(rows: Rows, prompt: int = 1) -> Records:
    """Return rollouts and scores; the first tokens of each, so many and at most half, are its prompt, and have no log-probs."""
    bounds = rows.bounds.tolist()
    spans = [(a, a + min(prompt, (b - a) // 2), b) for a, b in pairwise(bounds)]
    rollouts = [
        Rollout(f"prompt-{i}/s0/g0", rows.ids[a:m], rows.ids[m:b], np.ones(b - m, np.bool_), "stop") for i, (a, m, b) in enumerate(spans)
    ]
    teacher, ref = (
        [Scores.of(r, values[m:b]) for r, (_, m, b) in zip(rollouts, spans, strict=True)] for values in (rows.teacher, rows.ref)
    )
    return Records(rollouts, teacher, ref)


def append_all(store: Any, made: Records, size: int) -> None:
    """Append as a run would: rollouts first, then one column after the other."""
    for i in range(0, len(made.rollouts), size):
        store.append(made.rollouts[i : i + size])
    for name, scores in (("teacher", made.teacher), ("ref", made.ref)):
        for i in range(0, len(scores), size):
            store.append_scores(name, tiny_provenance(name), scores[i : i + size])


def zarr_writer(**options: Any) -> Callable[[Records, Path, int], None]:
    """Return a function that appends to a new store with these options."""
    return lambda made, folder, size: append_all(ZarrStore.create(folder / "s.zarr", tiny_manifest(VOCABULARY), **options), made, size)


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def zarr_calls(rows: Rows) -> list[Call]:
    """Return what a store asks of its folder when these rows are appended: whole files in their order, and which are flushed together."""
    calls: list[Call] = []

    def noting(name: str) -> Any:
        asked = getattr(LocalFiles, name)

        def call(files: LocalFiles, *given: Any) -> Any:
            calls.append((asked, given))
            return asked(files, *given)

        return patch.object(LocalFiles, name, call)

    with TemporaryDirectory() as folder, noting("write"), noting("put_if_absent"), noting("mark"):
        zarr_writer()(records(rows), Path(folder), APPEND)
    return calls


def write_calls(calls: list[Call], folder: Path, size: int) -> None:  # noqa: ARG001 (they were made with it)
    """Ask the same of another folder, and do nothing else: this is what the storage takes of a durable append."""
    files = LocalFiles(folder / "s.zarr")
    for asked, given in calls:
        asked(files, *given)


def open_zarr(folder: Path) -> Store:
    """Open a store that reads whole columns."""
    store = ZarrStore.open(folder / "s.zarr")

    def read(rows: NDArray[np.int64]) -> Batch:
        found = store.read(rows.tolist(), ("teacher", "ref"))
        return found.token_ids, found.scores["teacher"], found.scores["ref"]

    return Store(read, skipped=True)


def open_zarr_rounded(folder: Path) -> Store:
    """Open the same without a comparison of values, which were rounded."""
    return Store(open_zarr(folder).read, skipped=True, ordered=False)


def compact_zarr(folder: Path) -> None:
    """Merge, and remove what was merged."""
    store = ZarrStore.open(folder / "s.zarr")
    store.compact()
    store.sweep(older_than=-1.0)


def table_of(rows: Rows, first: int, last: int) -> Any:
    """Return some rows as an Arrow table of lists."""
    import pyarrow as pa

    bounds = rows.bounds[first : last + 1]
    offsets = pa.array((bounds - bounds[0]).astype(np.int32))
    columns = {n: getattr(rows, n)[bounds[0] : bounds[-1]] for n in ("ids", "teacher", "ref")}
    return pa.table({name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()})


def flat(table: Any) -> Batch:
    """Return contiguous arrays of a table of lists."""
    ids, teacher, ref = (table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in ("ids", "teacher", "ref"))
    return ids, teacher, ref


def write_parquet(rows: Rows, folder: Path, size: int) -> None:
    """Write a zstd row group for each append."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(folder / "rows.parquet", table_of(rows, 0, 1).schema, compression="zstd") as writer:
        for first, last in rows.batches(size):
            writer.write_table(table_of(rows, first, last))


def open_parquet(folder: Path) -> Store:
    """Open a store that reads whole row groups, and keeps the latest ones."""
    import functools

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(folder / "rows.parquet")
    starts = np.concatenate([[0], np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])])
    group = functools.lru_cache(maxsize=4)(file.read_row_group)

    def read(rows: NDArray[np.int64]) -> Batch:
        places = np.searchsorted(starts, rows, "right") - 1
        parts = [group(int(g)).slice(int(r - starts[g]), 1) for g, r in zip(places, rows, strict=True)]
        return flat(pa.concat_tables(parts))

    return Store(read)


def write_arrow(rows: Rows, folder: Path, size: int) -> None:
    """Write with Hugging Face's own writer."""
    import datasets

    datasets.disable_progress_bars()
    tables = [table_of(rows, first, last) for first, last in rows.batches(size)]
    datasets.concatenate_datasets([datasets.Dataset(t) for t in tables]).save_to_disk(folder / "hf")


def open_arrow(folder: Path) -> Store:
    """Open memory-mapped Arrow."""
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.load_from_disk(folder / "hf").with_format("arrow")
    return Store(lambda rows: flat(dataset[rows.tolist()]))


def write_lance(made: Records, folder: Path, size: int) -> None:
    """Write lopd's own store on LanceDB."""
    append_all(LanceStore.create(folder / "s.lance", tiny_manifest(VOCABULARY)), made, size)


def open_lance(folder: Path) -> Store:
    """Open a store that reads whole columns, and a group of blocks in one call."""
    store = LanceStore.open(folder / "s.lance")

    def read(rows: NDArray[np.int64]) -> Batch:
        found = store.read(rows.tolist(), ("teacher", "ref"))
        return found.token_ids, found.scores["teacher"], found.scores["ref"]

    def read_group(batches: Sequence[NDArray[np.int64]]) -> list[Batch]:
        found = store.read(np.concatenate(batches).tolist(), ("teacher", "ref"))
        last = np.cumsum([len(rows) for rows in batches])[:-1] - 1
        responses = np.cumsum(found.response_lengths)
        tokens = np.cumsum(found.prompt_lengths) + responses
        arrays = (found.token_ids, tokens), (found.scores["teacher"], responses), (found.scores["ref"], responses)
        return list(zip(*(np.split(values, ends[last]) for values, ends in arrays), strict=True))

    return Store(read, skipped=True, read_group=read_group)


def open_lance_alone(folder: Path) -> Store:
    """Open what Lance's own `take` gives of the same rows and columns, of which nothing is verified: after a compaction row i is at place i."""
    store = LanceStore.open(folder / "s.lance")
    columns = {None: "token_ids", "teacher": "logprobs", "ref": "logprobs"}
    tables = [(store.table(column).to_lance(), name) for column, name in columns.items()]

    def read(rows: NDArray[np.int64]) -> Batch:
        found = [table.take(rows.tolist(), columns=[name]).column(name).combine_chunks() for table, name in tables]
        ids, teacher, ref = (values.flatten().to_numpy(zero_copy_only=False) for values in found)
        return ids, teacher, ref

    return Store(read, skipped=True)


def compact_lance(folder: Path) -> None:
    """Merge fragments, and drop the versions before."""
    LanceStore.open(folder / "s.lance").compact(older_than=0.0)


def write_lancedb(rows: Rows, folder: Path, size: int) -> None:
    """Write a plain LanceDB table, as its StreamingDataset needs it."""
    import lancedb

    table = None
    for first, last in rows.batches(size):
        data, database = table_of(rows, first, last), lancedb.connect(folder / "db")
        table = database.create_table("rows", data) if table is None else table
        if first:
            table.add(data)


def optimize_lancedb(folder: Path) -> None:
    """Merge fragments, and drop the versions before, as LanceDB does it itself."""
    import lancedb

    lancedb.connect(folder / "db").open_table("rows").optimize(cleanup_older_than=timedelta(milliseconds=1))


def rows_of(batch: Any) -> list[Batch]:
    """Return a record batch as one triple of arrays a row, without a copy."""
    columns = [batch.column(name) for name in ("ids", "teacher", "ref")]
    bounds = columns[0].offsets.to_numpy()
    values = [column.values.to_numpy(zero_copy_only=False) for column in columns]
    return [(values[0][a:b], values[1][a:b], values[2][a:b]) for a, b in pairwise(bounds.tolist())]


def open_lancedb(folder: Path) -> Store:
    """Open LanceDB's own loader, which decides the order: clumps of 64 rows, shuffled.  A batch has as many rows as were asked for."""
    import lancedb
    from lancedb.streaming import StreamingDataset

    table = lancedb.connect(folder / "db").open_table("rows")
    options = {"shuffle": True, "shuffle_clump_size": 64, "read_batch_size": 256, "transform": rows_of}

    def forever() -> Iterator[Batch]:
        for epoch in count():
            yield from StreamingDataset(table, epoch=epoch, **options)

    stream = forever()

    def read(rows: NDArray[np.int64]) -> Batch:
        ids, teacher, ref = zip(*islice(stream, len(rows)), strict=True)
        return np.concatenate(ids), np.concatenate(teacher), np.concatenate(ref)

    return Store(read, ordered=False)


write_zarr = zarr_writer()
#: Those that write with the same function append alike, whatever follows.
BACKENDS = {
    "memmap": Backend(write_memmap, open_memmap),
    "memmap, flushed": Backend(partial(write_memmap, flushed=True), open_memmap),
    "zarr": Backend(write_zarr, open_zarr, records),
    "zarr, its files alone": Backend(write_calls, prepare=zarr_calls),
    "zarr, compacted": Backend(write_zarr, open_zarr, records, compact_zarr),
    "zarr, float16": Backend(zarr_writer(logprob_dtype="float16"), open_zarr_rounded, records),
    "lance, compacted": Backend(write_lance, open_lance, records, compact_lance, needs="lancedb"),
    "lance, its take alone": Backend(write_lance, open_lance_alone, records, compact_lance, needs="lancedb"),
    "parquet": Backend(write_parquet, open_parquet, needs="pyarrow"),
    "hugging face arrow": Backend(write_arrow, open_arrow, needs="datasets"),
    "lancedb StreamingDataset": Backend(write_lancedb, open_lancedb, finish=optimize_lancedb, needs="lancedb"),
}
