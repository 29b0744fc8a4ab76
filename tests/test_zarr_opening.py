"""Opening a `ZarrStore`: places, manifests, many commits, and records that do not fit."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from s3_server import S3Server
from zarr_stores import _quick_disk, filled, many, place  # noqa: F401

from lopd.backends.files import open_files
from lopd.backends.files.local import LocalFiles
from lopd.backends.lance.store import LanceStore
from lopd.backends.opening import open_store
from lopd.backends.sealing import seal, unseal
from lopd.backends.zarr.commit_log import CommitLog
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import (
    ConflictError,
    CorruptStoreError,
    InvalidRecordError,
    LopdError,
    ManifestMismatchError,
    StoreExistsError,
    StoreNotFoundError,
    StorePathError,
)
from lopd.records import Manifest, ModelId, Scores
from lopd.testing import assert_holds, tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores

# Opening


def test_creating_over_anything_is_refused(filled: ZarrStore, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    for path in (place(filled), tmp_path / "other", tmp_path / "other/file"):
        with pytest.raises(StoreExistsError, match=path.name):
            ZarrStore.create(path, tiny_manifest())
    with pytest.raises(StoreExistsError, match="not a store"):
        ZarrStore.open_or_create(tmp_path / "other", tiny_manifest())
    assert len(ZarrStore.open_or_create(place(filled), tiny_manifest())) == 4


def test_an_empty_folder_will_do_and_so_will_what_a_killed_creator_left(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1").touch()
    assert len(ZarrStore.open_or_create(str(tmp_path), tiny_manifest())) == 0
    assert len(ZarrStore.open_or_create(tmp_path / "deep/er/run.zarr", tiny_manifest())) == 0


def test_opening_what_is_no_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/zarr.json").write_text('{"zarr_format":3,"node_type":"group","attributes":{"mine":1}}')
    (tmp_path / "file").touch()
    for name, words in (
        ("missing", "is not there"),
        ("foreign", "without a lopd manifest"),
        ("file", "is not a store"),
        (".", "is not a store"),
    ):
        with pytest.raises(StoreNotFoundError, match=words):
            ZarrStore.open(tmp_path / name)
    with pytest.raises(StoreNotFoundError, match="without a lopd manifest"):
        ZarrStore.open_or_create(tmp_path / "foreign", tiny_manifest())


@pytest.mark.s3
@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
def test_a_folder_that_a_console_made_in_a_bucket_is_empty(kind: type[ZarrStore] | type[LanceStore], s3: S3Server) -> None:
    url = s3.new_url("")
    s3.write(f"{url}/", b"")
    assert s3.keys(url) == [f"{s3.key(url)}/"]
    assert open_files(url, s3.storage_options).names("") == []
    kind.create(url, tiny_manifest(), storage_options=s3.storage_options).append(many(0, 2))
    assert_holds(kind.open(url, storage_options=s3.storage_options), many(0, 2))


@pytest.mark.parametrize("make", [ZarrStore.create, ZarrStore.open, ZarrStore.open_or_create])
def test_a_url_that_nobody_can_open_is_refused(make: Callable[[str, Manifest], ZarrStore]) -> None:
    with pytest.raises(StorePathError, match=r"nonsense://bucket/run.zarr.*expected a URL it knows"):
        make("nonsense://bucket/run.zarr", tiny_manifest())


def test_another_manifest_is_refused_and_the_field_is_named(filled: ZarrStore) -> None:
    other = evolve(tiny_manifest(), policy=ModelId("policy", "rev-q", "float32"))
    for make in (ZarrStore.open, ZarrStore.open_or_create):
        with pytest.raises(ManifestMismatchError, match=r"run.zarr: policy.revision is .*rev-p.*, expected .*rev-q.*;"):
            make(place(filled), other)


def test_another_schema_version_is_refused(filled: ZarrStore) -> None:
    path = place(filled) / "zarr.json"
    path.write_text(path.read_text().replace('"schema_version":2', '"schema_version":3'))
    with pytest.raises(CorruptStoreError, match="schema_version is 3, expected 1 or 2"):
        ZarrStore.open(place(filled))


def test_a_relative_path_keeps_its_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = ZarrStore.create("run.zarr", tiny_manifest())
    monkeypatch.chdir("/")
    store.append(many(0, 1))
    assert len(ZarrStore.open(tmp_path / "run.zarr")) == 1
    assert store.name == f"Store {tmp_path}/run.zarr"


def test_the_message_for_a_second_model_is_the_one_we_promise(filled: ZarrStore) -> None:
    old, new = (evolve(tiny_provenance(), model=ModelId(name, "main", "bf16")) for name in ("Qwen3-8B", "Qwen3-32B"))
    scores = [tiny_scores(filled.read([0])[0].rollout)]
    filled.append_scores("t", old, scores)
    with pytest.raises(ConflictError) as caught:
        filled.append_scores("t", new, scores)
    words = "column 't' was scored by Qwen3-8B@main, expected Qwen3-32B@main; write another column or score with the same model."
    assert str(caught.value) == f"{filled.name}: {words}"
    with pytest.raises(ConflictError, match="float32"):
        filled.append_scores("t", evolve(old, model=evolve(old.model, dtype="float32")), scores)
    with pytest.raises(ConflictError, match=r"was scored with logprobs_mode 'raw', expected 'other'"):
        filled.append_scores("t", evolve(old, logprobs_mode="other"), scores)
    filled.append_scores("t", evolve(old, engine="other"), scores)
    assert filled.columns["t"].engine == old.engine, "what the first append said stays"
    assert isinstance(caught.value, LopdError)


def test_half_the_bytes_cost_a_rounding_that_each_commit_reports(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest(), logprob_dtype="float16")
    full = np.array([-0.1, -1e-9, -77.7], np.float32)
    store.append([tiny_rollout("r", behavior_logprobs=full)])
    store.append_scores("teacher", tiny_provenance(), [Scores.of(tiny_rollout("r"), full / 2)])
    row = ZarrStore.open(store._files.url).read([0], ("teacher", "behavior"))[0]
    for commit, column, values in zip(store.history(), ("behavior", "teacher"), (full, full / 2), strict=True):
        np.testing.assert_array_equal(row.scores[column], values.astype(np.float16).astype(np.float32))
        assert commit.rounding == np.abs(row.scores[column] - values).max() > 0
    assert (row.scores["teacher"] <= 0).all()
    with pytest.raises(InvalidRecordError, match=r"'low'.*-70000.*at least -65504"):
        store.append([tiny_rollout("low", [1], behavior_logprobs=[-70000.0])])
    assert len(ZarrStore.open(store._files.url)) == 1


def test_a_storage_type_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecordError, match="bfloat16"):
        ZarrStore.create(tmp_path / "run.zarr", tiny_manifest(), logprob_dtype="bfloat16")
    assert not (tmp_path / "run.zarr").exists()


# Many commits


def test_opening_reads_the_latest_checkpoint_and_the_records_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())
    for i in range(130):
        store.append(many(i, 1))
    names = sorted(path.name for path in (tmp_path / "run.zarr/checkpoints").iterdir())
    assert names == [f"{number:010d}.json" for number in range(16, 129, 16)]
    asked: list[str] = []
    real = LocalFiles.read
    monkeypatch.setattr(LocalFiles, "read", lambda self, path: asked.append(path) or real(self, path))
    again = ZarrStore.open(tmp_path / "run.zarr")
    # of 130 appends each sixteenth was followed by a merge; what comes after the last record is asked for too
    assert asked == ["zarr.json", "checkpoints/0000000128.json", *(f"commits/{number:010d}.json" for number in range(128, 139))]
    assert_holds(again, many(0, 130))
    assert [commit.number for commit in again.history()] == list(range(138))


@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
def test_a_place_is_listed_once_and_its_root_read_once(
    kind: type[ZarrStore | LanceStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, listed = LocalFiles.read, LocalFiles.names
    asked: list[str] = []
    monkeypatch.setattr(LocalFiles, "read", lambda self, path: asked.append(path) or read(self, path))
    monkeypatch.setattr(LocalFiles, "names", lambda self, folder: asked.append(folder) or listed(self, folder))
    root = "zarr.json" if kind is ZarrStore else "lopd.json"
    # The catalog of a LanceStore is a listing of its own, of the same folder.
    # And its first record follows the root, which is read for that.
    lists, reads = (1, 0) if kind is ZarrStore else (2, 1)
    kind.create(tmp_path / "run", tiny_manifest())
    assert (asked.count(""), asked.count(root)) == (lists, reads)
    for attempt in (lambda: open_store(tmp_path / "run"), lambda: kind.open_or_create(tmp_path / "run", tiny_manifest())):
        asked.clear()
        attempt()
        assert (asked.count(""), asked.count(root)) == (lists, 1 + reads)
    asked.clear()
    kind.open(tmp_path / "run", tiny_manifest())
    assert (asked.count(""), asked.count(root)) == (lists - 1, 1 + reads)


def test_a_copy_sees_the_snapshot_of_its_original_also_behind_later_checkpoints(tmp_path: Path) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", tiny_manifest())
    for i in range(70):
        store.append(many(i, 1))
        if i == 10:
            early = pickle.dumps(store)
    assert_holds(pickle.loads(early), many(0, 11))  # noqa: S301
    checkpoint = tmp_path / "run.zarr/checkpoints/0000000032.json"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole.replace(b"rev-p", b"rev-q"))
    (problem,) = ZarrStore.open(tmp_path / "run.zarr").verify()
    assert "checkpoints/0000000032.json is damaged" in problem
    checkpoint.write_bytes(whole)
    (tmp_path / "run.zarr/commits/0000000003.json").unlink()
    with pytest.raises(CorruptStoreError, match="a commit record is missing"):
        pickle.loads(early)  # noqa: S301
    (problem,) = ZarrStore.open(tmp_path / "run.zarr").verify()
    assert "a commit record is missing" in problem


@pytest.mark.parametrize("there", ["another store", "put back and gone on with"])
def test_a_copy_is_of_the_store_that_was_copied(there: str, filled: ZarrStore, tmp_path: Path) -> None:
    shutil.copytree(place(filled), tmp_path / "kept")
    filled.begin_generation(1, ModelId("later", "rev", "float32"))
    copy = pickle.dumps(filled)
    assert pickle.loads(copy).generations == filled.generations  # noqa: S301
    shutil.rmtree(place(filled))
    if there == "another store":
        other = ZarrStore.create(place(filled), tiny_manifest())
    else:
        shutil.copytree(tmp_path / "kept", place(filled))
        other = ZarrStore.open(place(filled))
    for i in range(20):
        other.append(many(50 + i, 1))
    for call in (lambda: pickle.loads(copy), filled.history, filled.sweep):  # noqa: S301
        with pytest.raises(CorruptStoreError, match=r"another place or store|another store's|as it was when it was read"):
            call()
    assert any("another place or store" in problem or "as it was when it was read" in problem for problem in filled.verify())


@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
@pytest.mark.parametrize("commits", [0, 1])
def test_a_copy_whose_store_is_not_there_is_told_apart_from_one_in_whose_place_another_is(
    commits: int, kind: type[ZarrStore | LanceStore], tmp_path: Path
) -> None:
    store = kind.create(tmp_path / "run", tiny_manifest())
    for i in range(commits):
        store.append(many(i, 1))
    copy = pickle.dumps(store)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StoreNotFoundError, match="the folder is not there, expected a store; check the path"):
        pickle.loads(copy)  # noqa: S301
    kind.create(tmp_path / "run", tiny_manifest())
    with pytest.raises(CorruptStoreError, match=r"zarr.json is gone or another store's|json is not what it was when it was read"):
        pickle.loads(copy)  # noqa: S301


def test_a_record_that_a_listing_has_overlooked_is_not_missing(filled: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, overlooked = LocalFiles.names, "0000000001.json"
    monkeypatch.setattr(LocalFiles, "names", lambda self, folder: [name for name in real(self, folder) if name != overlooked])
    assert list(filled.verify()) == []


def test_a_record_that_a_file_server_was_asked_for_too_early_is_not_missing(filled: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of NFS that has looked in vain answers so for up to a minute, until the folder is opened."""
    reader, real, commits, unseen = ZarrStore.open(place(filled)), os.open, place(filled) / "commits", set[Path]()

    def opened(path: str | Path, flags: int) -> int:
        if Path(path) in unseen:
            raise FileNotFoundError(errno.ENOENT, "it was not there", path)
        if path == commits:
            unseen.clear()
        return real(path, flags)

    filled.append(many(9, 1))
    monkeypatch.setattr(os, "open", opened)
    unseen.add(commits / "0000000003.json")
    reader.refresh()
    assert len(reader) == 5
    unseen.update(commits / f"{number:010d}.json" for number in (1, 2))
    assert len(ZarrStore.open(place(filled))) == 5
    assert not unseen


def test_a_copy_that_was_made_while_somebody_wrote_is_told_to_be_made_again(filled: ZarrStore, tmp_path: Path) -> None:
    shutil.copytree(place(filled), tmp_path / "copy")
    filled.append(many(9, 1))
    shutil.copytree(place(filled) / "head", tmp_path / "copy/head", dirs_exist_ok=True)
    with pytest.raises(CorruptStoreError, match="or copy the store again, if it was copied while somebody wrote"):
        ZarrStore.open(tmp_path / "copy")


def test_a_checkpoint_that_cannot_be_written_does_not_fail_the_append(filled: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CommitLog, "put_checkpoint", refuse)
    filled.compact()
    assert len(filled.history()) == 4
    assert_holds(ZarrStore.open(place(filled)), [row.rollout for row in filled.read(range(4))])


# Strange records


def test_a_record_that_leads_out_of_the_store_is_refused(filled: ZarrStore) -> None:
    path = place(filled) / "commits/0000000000.json"
    record = unseal(path.read_bytes())
    for strange in ("../../elsewhere", "/etc", "segments/../../x", "scores/../x/" + "0" * 32, "scores/.x/" + "0" * 32):
        record["segment"]["path"] = strange
        path.write_bytes(seal(record))
        with pytest.raises(CorruptStoreError, match=r"path is .*, expected text like \(segments\|scores/"):
            ZarrStore.open(place(filled))


def test_records_that_do_not_fit_together_are_refused(filled: ZarrStore) -> None:
    path = place(filled) / "commits/0000000001.json"
    record = unseal(path.read_bytes())
    path.write_bytes(seal({**record, "segment": {**record["segment"], "first_row": 3, "last_row": 4}}))
    with pytest.raises(CorruptStoreError, match="begins with row 3, expected 2"):
        ZarrStore.open(place(filled))
    path.write_bytes(seal({**record, "kind": "surprise"}))
    with pytest.raises(CorruptStoreError, match="commit 1: it is of kind 'surprise'"):
        ZarrStore.open(place(filled))
