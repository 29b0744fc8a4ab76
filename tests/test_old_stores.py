"""Stores on disk outlive the code: those of tests/data were written by an earlier version, and are read, verified and gone on with.

Each holds what `ROLLOUTS`, `SCORES` and `REASONS` say, in several commits of which a compaction merged the first.  `zstd` was written when
arrays could still be compressed; it is float16.
"""

import shutil
import tarfile
from pathlib import Path
from unittest.mock import Mock

import lancedb
import numpy as np
import pytest

from lopd import LanceStore, ZarrStore, open_store
from lopd.backends.files.local import LocalFiles
from lopd.backends.lance import encode as lance_encode
from lopd.backends.lance.catalog import Catalog
from lopd.backends.sealing import unseal
from lopd.backends.zarr import encode as zarr_encode
from lopd.backends.zarr.segment import encode_segment
from lopd.errors import CorruptStoreError
from lopd.protocols import DurableStore
from lopd.records import Manifest, ModelId, Provenance, Rollout, SamplingParams, Scores, TokenizerId, TopK
from lopd.testing import assert_same_rollout, tiny_rollout

DATA = Path(__file__).parent / "data"
KINDS: dict[str, type[ZarrStore] | type[LanceStore]] = {"zarr": ZarrStore, "zstd": ZarrStore, "lance": LanceStore}
LATER = ModelId("student", "rev-1", "bfloat16")
MANIFEST = Manifest(
    TokenizerId("vocab-hash", 300, eos_id=1, bos_id=None, pad_id=0, template_hash="template"),
    ModelId("policy", "rev-0", "float32"),
    SamplingParams(max_new_tokens=8, temperature=0.5, stop_ids=(1, 2)),
    sft_teacher=ModelId("author", "rev-a", "float32"),
)


def provenance(name: str, top_k: int = 0) -> Provenance:
    return Provenance(ModelId(name, f"rev-{name}", "float32"), "vocab-hash", "made-up 1.0", top_k=top_k, eos_id=1)


def rollout(number: int) -> Rollout:
    """Make a rollout: masked or not, with the engine's log-probs or without, of either round; ids are any text."""
    length = number % 5 + 1
    return Rollout(
        rollout_id=["plain", "with/slash", "ünï", "\ud800"][number] if number < 4 else f"r{number}",
        prompt_ids=[(7 * number + i) % 300 for i in range(number % 3 + 1)],
        response_ids=[(11 * number + 29 * i) % 300 for i in range(length)],
        loss_mask=[i != 1 for i in range(length)] if number % 4 == 1 else [True] * length,
        finish_reason="length" if number % 3 else "stop",
        behavior_logprobs=[-i / 4 for i in range(length)] if number % 2 else None,
        generation=int(number >= 6),
    )


def scores(number: int, top_k: int = 0) -> Scores:
    """Make scores with values that float16 holds exactly."""
    of = ROLLOUTS[number]
    length = of.response_ids.size
    ids = [[(number + 3 * i + j) % 300 for j in range(top_k)] for i in range(length)]
    support = TopK(ids, np.full((length, top_k), -2.0), np.full(length, 1 - top_k * np.exp(-2.0))) if top_k else None
    return Scores.of(of, [-number - i / 8 for i in range(length)], number % 2, support)


ROLLOUTS = [rollout(number) for number in range(12)]
#: Column -> rows that are scored, in the order in which they were.
SCORES = {"teacher": [3, 0, 1, 2, 4, 6, 5, 10, 8], "ref": [0, 2, 4]}
TOP_K = {"teacher": 2, "ref": 0}
REASONS = {"teacher": {7: "too long", 9: "also too long"}, "spare": {0: "refused"}}
EXTRA = 11  # not in the store yet


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(kind: str, tmp_path: Path) -> Path:
    with tarfile.open(DATA / f"{kind}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / kind


def assert_whole(store: DurableStore, extra: bool = False) -> None:
    """Check that the store holds what it was given, and with `extra` also what was added here."""
    count, scored = len(ROLLOUTS) - (not extra), {**SCORES, "teacher": [*SCORES["teacher"], *([EXTRA] if extra else [])]}
    assert (len(store), list(store.find([r.rollout_id for r in ROLLOUTS[:count]]))) == (count, list(range(count)))
    assert store.lengths().tolist() == [[r.prompt_ids.size, r.response_ids.size] for r in ROLLOUTS[:count]]
    assert dict(store.generations) == {0: MANIFEST.policy, 1: LATER}
    assert dict(store.columns) == {name: provenance(name, TOP_K.get(name, 0)) for name in ("teacher", "ref", "spare")}
    assert {record.eos_id for record in store.columns.values()} == {1}
    for name, rows in scored.items():
        assert np.flatnonzero(store.scored(name)).tolist() == sorted(rows)
        ranked = [name] if TOP_K[name] else []
        for row, record in zip(rows, store.read(rows, [name], ranked), strict=True):
            wanted = scores(row, TOP_K[name])
            assert record.scores[name].tolist() == wanted.logprobs.tolist()
            for support in record.top_k.values():
                assert wanted.top_k is not None
                np.testing.assert_array_equal(support.ids, wanted.top_k.ids)
                np.testing.assert_array_equal(support.logprobs, wanted.top_k.logprobs)
    for row, record in enumerate(store.read(range(count))):
        assert_same_rollout(record.rollout, ROLLOUTS[row])
    having = np.flatnonzero(store.scored("behavior")).tolist()
    assert having == [row for row in range(count) if row % 2]
    for row, record in zip(having, store.read(having, ["behavior"]), strict=True):
        assert record.scores["behavior"].tolist() == np.asarray(ROLLOUTS[row].behavior_logprobs).tolist()
    assert {name: dict(store.quarantined(name)) for name in REASONS} == REASONS
    assert list(store.verify()) == []


def test_an_old_store_holds_what_it_was_given_and_says_how_it_came_about(place: Path, kind: str) -> None:
    store = open_store(place)
    assert (type(store), store.manifest) == (KINDS[kind], MANIFEST)
    assert_whole(store)
    history = store.history()
    kinds = [commit.kind for commit in history]
    assert (kinds.count("rollouts"), kinds.count("scores"), kinds.count("generation"), kinds.count("quarantine")) == (3, 4, 1, 2)
    assert "compaction" in kinds
    assert sum(commit.rows for commit in history if commit.kind == "scores") == sum(map(len, SCORES.values()))


def test_what_a_mac_puts_beside_the_files_of_an_old_store_changes_nothing(place: Path, kind: str) -> None:
    for path in list(place.rglob("*.json")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert_whole(open_store(place))
    open_store(place).append(ROLLOUTS[EXTRA:])
    assert list(open_store(place).verify()) == []


def test_an_old_store_is_gone_on_with(place: Path, kind: str) -> None:
    store = KINDS[kind].open(place, MANIFEST)
    store.append(ROLLOUTS)
    store.append_scores("teacher", provenance("teacher", 2), [scores(row, 2) for row in [EXTRA, *SCORES["teacher"]]])
    assert_whole(store, extra=True)
    assert_whole(open_store(place), extra=True)
    store.compact()
    assert_whole(store, extra=True)
    assert_whole(open_store(place), extra=True)


def test_an_old_store_takes_log_probs_of_the_sampler(place: Path, kind: str) -> None:
    # two writers, of which each finds a store that has none yet
    stores = [KINDS[kind].open(place, MANIFEST) for _ in range(2)]
    drawn = [tiny_rollout(f"drawn{i}", behavior_logprobs=[-1.0, -2.0, -3.0], sampler_logprobs=[-0.5 - i, -1.0, 0.0]) for i in range(2)]
    for store, rollout in zip(stores, drawn, strict=True):
        store.append([rollout])
    stores[0].append([tiny_rollout("plain again", behavior_logprobs=[-1.0] * 3)])
    for seen in (stores[0], KINDS[kind].open(place)):
        assert np.flatnonzero(seen.scored("behavior/sampler")).tolist() == [EXTRA, EXTRA + 1]
        for row, (rollout, record) in enumerate(zip([*ROLLOUTS[:EXTRA], *drawn], seen.read(range(EXTRA + 2)), strict=True)):
            assert_same_rollout(record.rollout, rollout)
            assert bool(seen.scored("behavior")[row]) == (rollout.behavior_logprobs is not None)
        assert seen.read([EXTRA], ["behavior/sampler"])[0].scores["behavior/sampler"].tolist() == [-0.5, -1.0, 0.0]
        assert list(seen.verify()) == []
        stores[0].compact()


def refused(path: Path) -> list[str]:
    """Return names of files that lopd 0.2 reads whenever it opens a store on LanceDB or writes to it, and takes for damaged."""
    files = [file for folder in ("columns", "generations", "compactions", "quarantine", ".") for file in (path / folder).glob("*.json")]
    return [file.name for file in files if unseal(file.read_bytes()) is None]


@pytest.mark.parametrize("empty", [False, True])
def test_an_older_lopd_refuses_a_store_on_lancedb_that_was_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: bool
) -> None:
    with tarfile.open(DATA / "lance.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    path, late = tmp_path / "lance", tmp_path / "late.json"
    (path / "columns/spare.json").rename(late)
    if empty:
        root = (path / "lopd.json").read_bytes()
        shutil.rmtree(path)
        path.mkdir()
        (path / "lopd.json").write_bytes(root)
    before = sorted(path.rglob("*"))
    store, stale, killed = (LanceStore.open(path, MANIFEST) for _ in range(3))
    assert (len(killed), list(killed.verify()), sorted(path.rglob("*"))) == (0 if empty else EXTRA, [], before)
    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "_put", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            killed.begin_generation(2, LATER)
    assert refused(path) == ["update-lopd.json"]
    assert set(LanceStore.open(path).columns) == (set() if empty else {"teacher", "ref"})
    if not empty:  # an older lopd, which had looked before that
        late.rename(path / "columns/spare.json")
    for i, writer in enumerate((store, stale)):
        writer.begin_generation(1, LATER)
        writer.append([*ROLLOUTS[:EXTRA], tiny_rollout(f"after {i}")])
        writer.append_scores(f"late-{i}", provenance("late"), [scores(row) for row in range(5)])
    assert refused(path) == ["update-lopd.json"]
    for seen in (stale, LanceStore.open(path, MANIFEST)):
        assert set(seen.columns) == {"late-0", "late-1"} | (set() if empty else {"teacher", "ref", "spare"})
        assert (len(seen), list(seen.verify())) == (EXTRA + 2, [])


def test_what_an_older_lopd_may_have_added_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(DATA / "lance.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    path, late, asked = tmp_path / "lance", tmp_path / "late.json", list[str]()
    (path / "columns/spare.json").rename(late)
    store, reader = LanceStore.open(path), LanceStore.open(path)
    late.rename(path / "columns/spare.json")
    names, put = LocalFiles.names, LocalFiles.put_if_absent
    monkeypatch.setattr(LocalFiles, "names", lambda files, folder: asked.append(folder) or names(files, folder))
    monkeypatch.setattr(LocalFiles, "put_if_absent", lambda files, file, data: asked.append(file) or put(files, file, data))
    store.append(ROLLOUTS)
    reader.refresh()
    assert (len(reader), set(reader.columns)) == (EXTRA + 1, {"teacher", "ref"})
    assert {"", "columns", "generations", "quarantine", "compactions"}.isdisjoint(asked)
    for generation in (7, 8):
        store.begin_generation(generation, LATER)
    assert asked.count("generations/update-lopd.json") == 1
    reader.refresh()
    for seen in (store, reader, LanceStore.open(path)):
        assert set(seen.columns) == {"teacher", "ref", "spare"}


def test_without_log_probs_of_the_sampler_a_store_is_written_as_before(tmp_path: Path) -> None:
    for kind in ("zarr", "lance"):
        with tarfile.open(DATA / f"{kind}.tar.gz") as archive:
            archive.extractall(tmp_path, filter="data")
    # the two largest hold all rows; those that a compaction merged are there too
    segments = sorted(tmp_path.glob("zarr/segments/*/lines/c*"), key=lambda path: path.stat().st_size, reverse=True)
    for chunk, (first, last) in zip(segments, ((0, 6), (6, EXTRA)), strict=False):
        files, _ = encode_segment("new", zarr_encode.encode_rollouts(ROLLOUTS[first:last], first, 300, "float32"), "store")
        for name in ("lines", "token_ids", "rollout_ids", "loss_mask", "behavior_logprobs"):
            (old,) = (chunk.parents[1] / name).glob("c*")
            assert bytes(files[f"new/{name}/{old.name}"]) == old.read_bytes(), name
        # and an index of ids, which older segments lack
        assert len(files) == 1 + 2 * 6
    table = lance_encode.encode_rollouts(ROLLOUTS[:EXTRA], 0, 300, "float32", commit=0, when=0.0, seed=0)
    (folder,) = tmp_path.glob("lance/rollouts-*.lance")
    assert table.schema == lancedb.connect(tmp_path / "lance").open_table(folder.stem).schema


def test_damage_to_a_compressed_array_is_noticed(tmp_path: Path) -> None:
    with tarfile.open(DATA / "zstd.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    store = ZarrStore.open(tmp_path / "zstd")
    for chunk in (tmp_path / "zstd").glob("segments/*/token_ids/c*"):
        chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(CorruptStoreError, match="cannot be decompressed"):
        store.read([0])
    assert len(list(store.verify())) == len(list((tmp_path / "zstd").glob("segments/*/")))
