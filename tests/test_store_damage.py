"""Objects of a bucket that are damaged, lost or cut short."""

import errno
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash_worker import Place, check_rows
from fault_places import fill, place  # noqa: F401
from fault_proxy import ALWAYS, FaultProxy
from s3_server import S3Server

from lopd.backends.files.local import LocalFiles
from lopd.backends.lance import LanceStore
from lopd.backends.lance.snapshot import Snapshot
from lopd.backends.zarr import ZarrStore
from lopd.errors import CorruptStoreError, LopdError, StoreReadError
from lopd.testing import tiny_manifest, tiny_rollout
from lopd.tools.doctor import check_store


def _class_of(key: str) -> str:
    """Return the kind of an object: its key without the names that are drawn at random."""
    return re.sub(r"\d{10}", "#", re.sub(r"[0-9a-f]{32}", "*", key.split("/", 1)[1]))


def everything(place: Place) -> None:
    """Write eight rows and compact, so that the store holds no object that it does not need."""
    fill(place)
    store = fill(place, first=4)
    store.compact()
    store.sweep(older_than=-60)


def one_of_each_kind(s3: S3Server, place: Place) -> list[tuple[str, str]]:
    """Return the kinds of objects that are not empty, and the key of one of that kind."""
    kinds = {_class_of(key): key for key in s3.keys(place.url) if s3.read(key)}
    assert len(kinds) > 30
    return sorted(kinds.items())


def noticed(place: Place) -> bool:
    """Return whether a reader of everything, or `verify`, reports a problem; rows that are read must be right all the same."""
    try:
        store = place.open()
        check_rows(store, range(8))
        return list(store.verify()) != []
    except LopdError:
        return True


@pytest.mark.s3
def test_a_flipped_bit_in_any_kind_of_object_gives_the_right_rows_or_an_error_and_is_found_by_verify(s3: S3Server, place: Place) -> None:
    everything(place)
    rng, unnoticed = random.Random(3), []
    for kind, key in one_of_each_kind(s3, place):
        data = s3.read(key)
        for _ in range(3 if "LOPD_KILLS" in os.environ else 1):
            bit = rng.randrange(8 * len(data))
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            s3.write(key, bytes(flipped))
            if not noticed(place):
                unnoticed.append(kind)
        s3.write(key, data)
    assert not noticed(place)
    # Groups are for Zarr readers; lopd never looks at them.
    assert [kind for kind in unnoticed if not re.fullmatch(r"(segments|scores|scores/\w+)(/\*)?/zarr.json", kind)] == []


@pytest.mark.s3
def test_a_lost_object_of_any_kind_gives_the_right_rows_or_an_error(s3: S3Server, place: Place) -> None:
    everything(place)
    # Without the last record the store is what it was before it.
    last = max(key for key in s3.keys(place.url) if "/commits/" in key)
    for key in [key for _, key in one_of_each_kind(s3, place) if key != last]:
        data = s3.read(key)
        s3.delete([key])
        noticed(place)
        s3.write(key, data)
    assert not noticed(place)


@pytest.mark.s3
@pytest.mark.parametrize("size", ["all but one byte", "half"])
def test_an_object_cut_short_gives_the_right_rows_or_an_error(s3: S3Server, place: Place, size: str) -> None:
    everything(place)
    for _, key in one_of_each_kind(s3, place):
        data = s3.read(key)
        s3.write(key, data[: -1 if size == "all but one byte" else len(data) // 2])
        noticed(place)
        s3.write(key, data)
    key = next(key for key in s3.keys(place.url) if key.endswith("/token_ids/c.0"))
    s3.write(key, s3.read(key)[:-1])
    store = place.open()
    with pytest.raises(CorruptStoreError, match="token_ids"):
        store.read(range(8))


@pytest.mark.s3
def test_a_table_in_a_bucket_that_ends_before_bytes_that_are_asked_for_is_damaged(s3: S3Server) -> None:
    url, rng = s3.new_url(".lance"), np.random.default_rng(0)
    ids = rng.integers(0, 8, (300, 1000)).tolist()
    LanceStore.create(url, tiny_manifest(), storage_options=s3.storage_options).append(
        [tiny_rollout(f"r{i}", row, behavior_logprobs=(-rng.random(1000)).tolist()) for i, row in enumerate(ids)]
    )
    key = max((key for key in s3.keys(url) if key.endswith(".lance")), key=lambda key: len(s3.read(key)))
    data = s3.read(key)
    assert len(data) > 1 << 20
    for size in (10, len(data) // 2, len(data) - 1):
        s3.write(key, data[:size])
        store = LanceStore.open(url, storage_options=s3.storage_options)
        assert any("so a file is damaged or gone; restore it" in problem for problem in check_store(store)), size
        with pytest.raises(CorruptStoreError, match="so a file is damaged or gone; restore it"):
            store.read([299])


@pytest.mark.s3
@pytest.mark.parametrize("where", ["", "/commits/|/log/", "/token_ids/|/data/", "/lines/|/data/"])
@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
def test_a_storage_that_refuses_is_an_error_of_verify_at_once_and_no_problem_of_the_store(
    kind: Any, where: str, s3: S3Server, proxy: FaultProxy
) -> None:
    url = s3.new_url()
    kind.create(url, tiny_manifest(), storage_options=s3.storage_options).append([tiny_rollout(f"r{i}") for i in range(64)])
    store = kind.open(url, storage_options=proxy.storage_options)
    proxy.forget()
    proxy.refuse(ALWAYS, "GET", where, status=403)
    found: list[str] = []
    with pytest.raises(StoreReadError, match=re.escape(url)):
        found.extend(check_store(store))
    assert (found, proxy.count("GET", where) < 20) == ([], True)
    proxy.heal()
    assert list(check_store(store)) == []


def test_a_bad_sector_of_a_local_disk_is_a_problem_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zarr, lance = ZarrStore.create(tmp_path / "zarr", tiny_manifest()), LanceStore.create(tmp_path / "lance", tiny_manifest())
    for store in (zarr, lance):
        store.append([tiny_rollout(f"r{i}") for i in range(8)])
    read, read_rows, code = LocalFiles.read, Snapshot.read, errno.EIO

    def failing(files: LocalFiles, path: str, /) -> bytes:
        if "/token_ids/c" in path:
            raise OSError(code, os.strerror(code), path)
        return read(files, path)

    def failing_rows(snapshot: Snapshot, rows: Any, *asked: Any) -> Any:
        if 3 in rows:
            raise StoreReadError("Row 3 is in a bad sector.") from OSError(f"LanceError(IO): {os.strerror(code)} (os error {code})")
        return read_rows(snapshot, rows, *asked)

    monkeypatch.setattr(LocalFiles, "read", failing)
    monkeypatch.setattr(Snapshot, "read", failing_rows)
    for store, words in ((zarr, r"token_ids/c.*\[Errno 5\]"), (lance, "Row 3")):
        (problem,) = store.verify()
        first, *others = check_store(store)
        assert first == problem
        assert all(re.search(words, each) for each in [first, *others])
    code = errno.EACCES
    for store in (zarr, lance):
        with pytest.raises(StoreReadError):
            list(store.verify())
