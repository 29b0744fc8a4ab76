"""How the files of a table stay few: neighbours are merged, without a change in the order of the rows.

Each merge takes files of about one size and gives one of the next size, so a row is rewritten once for each size, and a table of n commits
has in the order of log n files.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

from lopd.errors import StoreWriteError
from lopd.records.optional import need

#: What makes a file durable, by its name in the table's folder of data.
Flush = Callable[[str], None]

#: So many files of one size are merged, which makes one of the next.
FAN = 16
# Larger files are left to `compact`: a merge of them would be felt.
_LARGEST = 1 << 30
_BATCH = 1 << 24
# What `compact` makes: files of at most so many rows and bytes, except where one was larger already.
_ROWS, _BYTES = 1 << 20, 1 << 32
#: So many versions are kept, 70 kB each: a writer reads those that were committed since it began, and other tools may stand at one.
VERSIONS = 128
# Longer ago than any version, in seconds; a `timedelta` of much more is refused.
_EVER = 1e10


def tidy(dataset: Any, rows: int, flush: Flush) -> None:
    """Merge the newest files of a table once they are many; only those of its first rows, as the writers of others may take them back."""
    fragments = _of_rows(dataset, rows)
    count = crowd([_bytes_of(fragment) for fragment in fragments])
    if count:
        _merge(dataset, fragments[-count:], flush)


def compact(dataset: Any, rows: int, flush: Flush) -> bool:
    """Merge all small files of the first rows of a table that are neighbours; gives whether there were any."""
    groups: list[list[Any]] = [[]]
    for fragment in _of_rows(dataset, rows):
        group = [*groups[-1], fragment]
        if sum(other.physical_rows for other in group) > _ROWS or sum(map(_bytes_of, group)) > _BYTES:
            groups.append([])
        groups[-1].append(fragment)
    small = [group for group in groups if len(group) > 1]
    for group in small:
        _merge(dataset, group, flush)
    return bool(small)


def drop_versions(dataset: Any, older_than: float | None = None) -> None:
    """Remove versions older than this many seconds; None for all but the newest few, however old they are.  Those with a tag stay."""
    if older_than is not None and older_than > _EVER:
        return
    kept = {"retain_versions": VERSIONS} if older_than is None else {"older_than": timedelta(seconds=older_than)}
    dataset.cleanup_old_versions(**kept, error_if_tagged_old_versions=False)


def crowd(sizes: Sequence[int]) -> int:
    """Count the files at the end that should be one: many, and together of a larger class than any of them; 0 if there are not so many.

    Args:
        sizes: bytes of each file, in the order of the rows.
    """
    # Largest first: what is small comes at each call, and would always be before it.
    for limit in (_LARGEST // FAN**step for step in range(1, 7)):
        count = next((i for i, size in enumerate(reversed(sizes)) if size >= limit), len(sizes))
        if count >= FAN and sum(sizes[-count:]) >= limit:
            # An older store may have any number of them.
            return bisect_right(list(accumulate(reversed(sizes[-count:]))), _LARGEST)
    return 0


def _of_rows(dataset: Any, rows: int) -> list[Any]:
    """Return the entries of the files in which the first rows of a table are, and no others."""
    fragments = [fragment.metadata for fragment in dataset.get_fragments()]
    return fragments[: bisect_right(list(accumulate(fragment.num_rows for fragment in fragments)), rows)]


def _bytes_of(fragment: Any) -> int:
    """Return bytes of the files of one fragment, as its manifest has them."""
    return sum(file.file_size_bytes or 0 for file in fragment.files)


def _merge(dataset: Any, fragments: Sequence[Any], flush: Flush) -> None:
    """Put one file in the place of some neighbours.  Readers of older versions are not disturbed; nor are those who add rows meanwhile.

    Args:
        dataset: at a version that has the fragments.
        fragments: its entries for them.
        flush: flushes the written file before it is committed.

    Raises:
        StoreWriteError: what was written is not what was read, or another tool has made an index; nothing is changed then.
    """
    if others := dataset.describe_indices():
        # It finds rows by the numbers of their fragments, and a merge keeps one of these for other rows.
        raise StoreWriteError(
            f"Table {dataset.uri}: it has an index {others[0].name!r} of another tool, which a merge would make wrong, expected none; drop it, "
            "compact the store, and make it again."
        )
    lance, optimize = (need(name, f"Table {dataset.uri}", "lance") for name in ("lance", "lance.optimize"))
    merged, rows = {fragment.id for fragment in fragments}, sum(fragment.physical_rows for fragment in fragments)
    step = min(rows, _BATCH * rows // max(sum(map(_bytes_of, fragments)), 1) + 1)
    plan = optimize.Compaction.plan(
        dataset,
        {
            "target_rows_per_fragment": rows + 1,
            "excluded_fragment_ids": [other.fragment_id for other in dataset.get_fragments() if other.fragment_id not in merged],
            "batch_size": step,
            "num_threads": 1,
        },
    )
    for task in plan.tasks:
        (written,) = task.execute(dataset).new_fragments
        (file,) = written.files
        flush(file.path)
        _check(dataset, fragments, f"{dataset.uri}/data/{file.path}", step)
        # Lance keeps fragments in the order of their numbers.  The number that it would give, a new one, is behind those of rows that other
        # writers add before this merge is committed.
        placed = lance.FragmentMetadata.from_json(json.dumps({**written.to_json(), "id": fragments[-1].id}))
        group = lance.LanceOperation.RewriteGroup(old_fragments=list(fragments), new_fragments=[placed])
        lance.LanceDataset.commit(dataset, lance.LanceOperation.Rewrite([group], []), read_version=dataset.version)


def _check(dataset: Any, fragments: Sequence[Any], path: str, step: int) -> None:
    """Compare a file with the fragments that it will replace, so many rows at once: Lance drops the error of a write that fails."""
    file = need("lance.file", f"Table {dataset.uri}", "lance")
    reader, start = file.LanceFileReader(path, storage_options=dataset.latest_storage_options()), 0
    for fragment in map(dataset.get_fragment, [fragment.id for fragment in fragments]):
        for offset in range(0, fragment.physical_rows, step):
            wanted = fragment.to_table(offset=offset, limit=step)
            found = reader.read_range(start, len(wanted)).to_table()
            if any(found[name] != wanted[name] and _text(found[name]) != _text(wanted[name]) for name in wanted.column_names):
                raise StoreWriteError(
                    f"File {path}: rows from {start} on are not those that were merged; check the disk and repeat the call."
                )
            start += len(wanted)


def _text(column: Any) -> str:
    """Return all values of a column: Arrow takes no NaN for equal to another, and columns of other tools may have some, in lists too."""
    return repr(column.to_pylist())
