"""Storage that loses what writers were told is kept is refused by name, before anything is written."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fault_proxy import FaultProxy
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import S3Server

from lopd.backends.files import proving
from lopd.backends.lance import LanceStore
from lopd.backends.opening import open_store
from lopd.backends.zarr import ZarrStore
from lopd.errors import StorePathError, StoreWriteError
from lopd.protocols import DurableStore
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores

STORES = [ZarrStore, LanceStore]
UNCONDITIONAL = r"Store \S+: 4 of 4 writers created the same object, expected 1; .*heed `If-None-Match: \*`.*local disk"
#: All that changes a store.
CHANGES: dict[str, Callable[[DurableStore], object]] = {
    "append": lambda store: store.append([tiny_rollout("b")]),
    "append_scores": lambda store: store.append_scores("teacher", tiny_provenance("teacher"), [tiny_scores(tiny_rollout("a"))]),
    "quarantine": lambda store: store.quarantine("teacher", tiny_provenance("teacher"), {"a": "too long"}),
    "begin_generation": lambda store: store.begin_generation(1, tiny_manifest().policy),
    "compact": lambda store: store.compact(),
}


@pytest.fixture(autouse=True)
def _nothing_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "_PROVEN", set())


@pytest.mark.s3
@pytest.mark.parametrize("kind", STORES)
def test_a_server_that_ignores_if_none_match_gets_no_store(kind: Any, s3: S3Server, proxy: FaultProxy) -> None:
    url = s3.new_url()
    proxy.deaf("if-none-match")
    for make in (kind.create, kind.open_or_create):
        with pytest.raises(StorePathError, match=UNCONDITIONAL):
            make(url, tiny_manifest(), storage_options=proxy.storage_options)
    assert s3.keys(url) == []


@pytest.mark.s3
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", STORES)
def test_a_store_that_is_there_is_read_from_such_a_server_and_not_written(kind: Any, change: str, s3: S3Server, proxy: FaultProxy) -> None:
    url = s3.new_url()
    kind.create(url, tiny_manifest(), storage_options=s3.storage_options).append([tiny_rollout("a")])
    there = s3.keys(url)
    proxy.deaf("if-none-match")
    store = open_store(url, proxy.storage_options)
    store.read([0])
    assert proxy.count("PUT|POST|DELETE") == 0
    for _ in range(2):
        with pytest.raises(StorePathError, match=UNCONDITIONAL):
            CHANGES[change](store)
    assert s3.keys(url) == there


@pytest.mark.s3
@pytest.mark.parametrize("kind", STORES)
def test_a_server_that_ignores_ranges_gets_no_store(kind: Any, s3: S3Server, proxy: FaultProxy) -> None:
    url = s3.new_url()
    proxy.deaf("range")
    with pytest.raises(StorePathError, match=r"Store \S+: reading ranges fails \(.*heed .*`Range`"):
        kind.create(url, tiny_manifest(), storage_options=proxy.storage_options)
    assert s3.keys(url) == []


@pytest.mark.s3
@pytest.mark.timeout(60)
def test_a_server_that_cannot_write_conditionally_gets_no_store(s3: S3Server, proxy: FaultProxy) -> None:
    url = s3.new_url()
    proxy.refuse(1000, "PUT", "/object$", status=501)
    with pytest.raises(StorePathError, match=r"Store \S+: creating an object where there is none fails \(.*heed `If-None-Match"):
        ZarrStore.create(url, tiny_manifest(), storage_options=proxy.storage_options)
    assert s3.keys(url) == []


@pytest.mark.s3
def test_a_server_is_asked_once_by_a_process_and_nothing_stays(s3: S3Server, proxy: FaultProxy) -> None:
    url = s3.new_url()
    store = ZarrStore.create(url, tiny_manifest(), storage_options=proxy.storage_options)
    assert proxy.count("", r"\.probes/") <= 12
    assert [key for key in s3.keys(url) if ".probes" in key] == []
    proxy.forget()
    store.append([tiny_rollout("a")])
    ZarrStore.open(url, storage_options=proxy.storage_options).append([tiny_rollout("b")])
    assert proxy.count("", r"\.probes/") == 0


@pytest.mark.s3
def test_what_a_killed_process_left_of_asking_hides_no_place(s3: S3Server) -> None:
    url = s3.new_url()
    s3.write(f"{s3.key(url)}/.probes/1/object", b"left")
    ZarrStore.open_or_create(url, tiny_manifest(), storage_options=s3.storage_options)
    assert len(ZarrStore.open(url, storage_options=s3.storage_options)) == 0


@pytest.mark.s3
@pytest.mark.parametrize("kind", STORES)
def test_who_may_not_remove_may_write(kind: Any, s3: S3Server, proxy: FaultProxy) -> None:
    proxy.refuse(1000, "POST|DELETE", status=403)
    url, rollouts = s3.new_url(), [*map(tiny_rollout, "ab")]
    store = kind.create(url, tiny_manifest(), storage_options=proxy.storage_options)
    for row in rollouts:
        store.append([row])
    store.append_scores("teacher", tiny_provenance("teacher"), [tiny_scores(row) for row in rollouts])
    found = open_store(url, s3.storage_options)
    assert found.scored("teacher").tolist() == [True, True]
    assert [commit.rows for commit in found.history()] == [1, 1, 2]
    assert list(found.verify()) == []


@pytest.mark.parametrize("kind", STORES)
def test_who_may_not_remove_what_others_wrote_into_a_folder_may_write(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(errno.EPERM, "refused", path)

    store = kind.create(tmp_path / "run", tiny_manifest())
    monkeypatch.setattr(Path, "unlink", refuse)
    for row in map(tiny_rollout, "ab"):
        store.append([row])
    assert len(open_store(tmp_path / "run")) == 2


@pytest.mark.s3
def test_who_may_not_write_is_told_so(s3: S3Server, proxy: FaultProxy) -> None:
    proxy.refuse(1000, "PUT", status=403)
    with pytest.raises(StoreWriteError, match=r"Store \S+: trying its storage failed with .*expected a place that can be written to"):
        ZarrStore.create(s3.new_url(), tiny_manifest(), storage_options=proxy.storage_options)


class _Overwriting(MemoryFileSystem):
    """Creates a file whether there is one or not, as fsspec's ftp does."""

    protocol = "overwriting"
    cachable = False

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value, **options)


class _Whole(MemoryFileSystem):
    """Gives whole files, as a web server may."""

    protocol = "whole"
    cachable = False

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        return bytes(super().cat_file(path, **options))


@pytest.fixture(params=[(_Overwriting, UNCONDITIONAL), (_Whole, "ranges of an object are answered with other bytes")])
def unfit(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Yield a scheme, and the problem that is found of it."""
    kind, said = request.param
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
    yield kind.protocol, said
    kind.store.clear()


def test_a_file_system_that_keeps_less_gets_no_store(unfit: tuple[str, str]) -> None:
    scheme, said = unfit
    with pytest.raises(StorePathError, match=said):
        ZarrStore.create(f"{scheme}://here/run", tiny_manifest())
    assert MemoryFileSystem().find("/here") == []


NO_LINKS = r"Folder .*: its file system has no hard links \(refused\), .*; use a local disk and copy"


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def refuse_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what takes hard links from the file system."""

    def refuse(source: Path, target: Path) -> None:
        raise FileExistsError(errno.EEXIST, "there", target) if target.exists() else OSError(request.param, "refused", source)

    return lambda: monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("kind", STORES)
def test_a_file_system_without_hard_links_gets_no_store(kind: Any, refuse_links: Callable[[], None], tmp_path: Path) -> None:
    refuse_links()
    with pytest.raises(StorePathError, match=NO_LINKS):
        kind.create(tmp_path / "run", tiny_manifest())
    assert [*(tmp_path / "run").iterdir()] == []


def test_a_store_that_was_copied_to_one_is_read_there_and_not_written(refuse_links: Callable[[], None], tmp_path: Path) -> None:
    ZarrStore.create(tmp_path / "run", tiny_manifest()).append([tiny_rollout("a")])
    before, store = sorted((tmp_path / "run").rglob("*")), ZarrStore.open(tmp_path / "run")
    refuse_links()
    with pytest.raises(StorePathError, match=NO_LINKS):
        store.append([tiny_rollout("b")])
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert store.read([0]).rollout_ids[0] == "a"


def test_memory_is_fit() -> None:
    store = ZarrStore.create("memory://fit/run", tiny_manifest())
    store.append([tiny_rollout("a")])
    assert len(ZarrStore.open("memory://fit/run")) == 1
    assert [path for path in MemoryFileSystem().find("/fit") if ".probes" in path] == []
    MemoryFileSystem().rm("/fit", recursive=True)
