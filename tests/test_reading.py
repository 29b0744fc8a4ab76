"""What the durable stores read: the columns and records that a store in memory gives, whichever rows are asked for, all verified."""

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pytest
from s3_server import S3Server

from lopd.backends.lance import decode as chunks
from lopd.backends.lance.store import LanceStore
from lopd.backends.memory_store import MemoryStore
from lopd.backends.ragged import LogprobDtype
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import CorruptStoreError, InvalidRecordError, MissingScoresError, NoSuchRowError
from lopd.records import ModelId, Rollout, Rows, Scores
from lopd.testing import assert_same_rollout, tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores

Store = ZarrStore | LanceStore
CREATE: dict[str, Callable[..., Store]] = {
    "zarr": ZarrStore.create,
    "lance": LanceStore.create,
}


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing cuts the power here.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=CREATE)
def create(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Store]:
    """Return a function that makes a new store of each kind."""
    return lambda **options: CREATE[request.param](tmp_path / "run", tiny_manifest(), **options)


def random_rollout(number: int, rng: np.random.Generator) -> Rollout:
    """Make a rollout of any kind: masked or not, with the engine's log-probs or without, of either round."""
    length = int(rng.integers(1, 9))
    return tiny_rollout(
        f"r{number}",
        rng.integers(0, 300, length),
        prompt_ids=rng.integers(0, 300, rng.integers(1, 4)),
        loss_mask=rng.random(length) < 0.7 if rng.random() < 0.3 else np.ones(length, np.bool_),
        behavior_logprobs=-rng.random(length, np.float32) if number % 3 else None,
        finish_reason=str(rng.choice(["stop", "length"])),
        generation=number % 2,
    )


def fill(store: Any, count: int = 700) -> Any:
    """Fill a store with several commits of rollouts, of two rounds; `teacher` has scored all, in another order, and `ref` the even ones."""
    rng = np.random.default_rng(0)
    rollouts = [random_rollout(i, rng) for i in range(count)]
    store.begin_generation(1, ModelId("policy", "rev-1", "float32"))
    for start in range(0, count, count // 3):
        store.append(rollouts[start : start + count // 3])
    shuffled = [rollouts[i] for i in rng.permutation(count)]
    for name, chosen in (("teacher", shuffled), ("ref", rollouts[::2])):
        scores = [Scores.of(r, -rng.random(r.response_ids.size, np.float32)) for r in chosen]
        for start in range(0, len(scores), count // 2):
            store.append_scores(name, tiny_provenance(name), scores[start : start + count // 2])
    return store


def expect(store: Any, memory: MemoryStore, rows: Sequence[int], columns: Sequence[str] = (), dtype: str = "float32") -> Rows:
    """Read these rows, and check that they are what is in memory, as columns and as records."""
    found, wanted = store.read(rows, columns), memory.read(rows, columns)
    for name in ("rollout_ids", "finish_reasons", "content_hashes"):
        assert list(getattr(found, name)) == list(getattr(wanted, name))
    for name in ("prompt_lengths", "response_lengths", "token_ids", "loss_mask", "generations", "token_ends", "response_ends"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert list(found.scores) == list(wanted.scores) == list(columns)
    for name, values in wanted.scores.items():
        assert found.scores[name].dtype == np.float32
        np.testing.assert_array_equal(found.scores[name], values.astype(dtype).astype(np.float32))
    for i in range(0, len(rows), 50) if dtype == "float32" else ():
        assert_same_rollout(found[i].rollout, memory.read([rows[i]])[0].rollout)
    return found


def reopened(store: Store) -> Store:
    """Open the store as a new process would."""
    return type(store).open(store._files.url)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_store_reads_what_memory_reads_before_and_after_a_compaction(
    create: Callable[..., Store], dtype: LogprobDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, memory, rng = fill(create(logprob_dtype=dtype)), fill(MemoryStore(tiny_manifest())), np.random.default_rng(1)
    selections = [range(700), range(40, 640), range(230, 240), [699], rng.permutation(700), rng.integers(0, 700, 90), [5, 5, 4, 5], []]
    for _ in range(2):
        for rows in selections:
            expect(store, memory, [int(row) for row in rows], ("teacher",), dtype)
        for parity in (0, 1):
            even = [int(row) for row in rng.permutation(700) if row % 2 == parity and row % 3]
            read = expect(store, memory, even, ("behavior", "ref", "teacher") if parity == 0 else ("teacher", "behavior"), dtype)
            assert (read.token_ids.dtype, read.loss_mask is not None) == (np.uint16, True)
        store.compact()
        store = reopened(store)
        # In many small pieces too.
        monkeypatch.setattr(chunks, "_TOKENS_AT_ONCE", 50)


@pytest.mark.s3
@pytest.mark.parametrize(("kind", "suffix"), [(ZarrStore, ".zarr"), (LanceStore, ".lance")])
def test_a_bucket_gives_what_memory_gives(s3: S3Server, kind: type[Store], suffix: str) -> None:
    store = fill(kind.create(s3.new_url(suffix), tiny_manifest(), storage_options=s3.storage_options), 60)
    memory = fill(MemoryStore(tiny_manifest()), 60)
    for _ in range(2):
        for rows in (range(60), [59, 3, 3, 20], []):
            expect(store, memory, list(rows), ("teacher",))
        expect(store, memory, [58, 4, 10], ("ref", "behavior"))
        store.compact()


def test_a_part_of_rows_is_what_a_read_of_these_rows_gives(create: Callable[..., Store]) -> None:
    store = fill(create(), 60)
    whole = store.read(range(59, -1, -1), ("teacher",))
    for part in (slice(0, 60), slice(7, 31), slice(59, None), slice(-3, None), slice(8, 8), slice(9, 4)):
        rows = list(range(59, -1, -1))[part]
        read = store.read(rows, ("teacher",))
        for name in ("token_ids", "prompt_lengths", "generations", "token_ends", "response_ends"):
            np.testing.assert_array_equal(getattr(whole[part], name), getattr(read, name))
        np.testing.assert_array_equal(whole[part].scores["teacher"], read.scores["teacher"])
        assert [record.rollout.rollout_id for record in whole[part]] == [f"r{row}" for row in rows]
    with pytest.raises(InvalidRecordError, match="a step of 2, expected neighbours"):
        whole[::2]


def test_a_long_rollout_among_short_ones_is_read_whole(create: Callable[..., Store]) -> None:
    store, memory = create(), MemoryStore(tiny_manifest())
    for one in (store, memory):
        one.append([tiny_rollout("a"), tiny_rollout("huge", np.arange(100_000) % 300), tiny_rollout("b", loss_mask=[True, False, True])])
    for rows in ([0, 1, 2], [2, 1, 0], [1]):
        expect(store, memory, rows)


def test_an_empty_selection_or_store_has_every_column_and_nothing_in_it(create: Callable[..., Store]) -> None:
    store = create()
    for one in (store, MemoryStore(tiny_manifest())):
        for _ in range(2):
            read = one.read([], ("teacher", "behavior"))
            assert (read.token_ids.size, read.loss_mask, read.prompt_lengths.dtype, len(read), list(read)) == (0, None, np.int64, 0, [])
            assert {name: values.size for name, values in read.scores.items()} == {"teacher": 0, "behavior": 0}
            one.append([tiny_rollout("a")])


def test_every_store_refuses_a_support_that_is_not_kept_also_of_no_rows(create: Callable[..., Store]) -> None:
    for store in (fill(create(), 12), fill(MemoryStore(tiny_manifest()), 12)):
        for rows in ([], [1]):
            for name in ("teacher", "behavior"):
                with pytest.raises(MissingScoresError, match=f"column '{name}' has no top-k support"):
                    store.read(rows, (), (name,))
        assert len(store.read([], (), ("nothing",))) == 0
        with pytest.raises(MissingScoresError, match="'r1' has no scores in column 'nothing'"):
            store.read([1], (), ("nothing",))
        with pytest.raises(MissingScoresError, match="column 'x' was not read"):
            store.read([1], ("teacher",)).named(teacher="x")


def test_a_record_does_not_keep_what_else_was_read(create: Callable[..., Store]) -> None:
    record = fill(create(), 12).read(range(12), ("teacher",))[4]
    for values in (record.rollout.response_ids, record.rollout.loss_mask, record.rollout.behavior_logprobs, record.scores["teacher"]):
        whole = values if values.base is None else values.base
        assert whole.nbytes <= values.nbytes
        assert not values.flags.writeable


def test_rows_without_scores_are_refused_and_named(create: Callable[..., Store]) -> None:
    store = fill(create(), 12)
    for rows, column, name in (([2, 5, 4], "ref", "r5"), ([1, 2, 0], "behavior", "r0"), ([7], "nothing", "r7")):
        with pytest.raises(MissingScoresError, match=f"'{name}'"):
            store.read(rows, ("teacher", column))
    for row in (12, -1):
        with pytest.raises(NoSuchRowError, match="expected 0 to 11"):
            store.read([0, row])


def test_a_flipped_bit_is_an_error_or_changes_nothing(create: Callable[..., Store], capfd: pytest.CaptureFixture[str]) -> None:
    store, rng, noticed = fill(create(), 30), random.Random(0), 0
    rows, root = [row for row in range(29, -1, -1) if row % 3], Path(store._files.url)
    wanted = store.read(rows, ("teacher", "behavior"))
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and (path.parent.name == "data" or path.name.startswith("c."))]
    assert files
    for path in files:
        data = path.read_bytes()
        for _ in range(10):
            bit = rng.randrange(8 * len(data))
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            try:
                found = reopened(store).read(rows, ("teacher", "behavior"))
                for name in ("token_ids", "loss_mask", "prompt_lengths", "response_lengths"):
                    np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=f"{path}: bit {bit}")
                for name, values in found.scores.items():
                    np.testing.assert_array_equal(values, wanted.scores[name], err_msg=f"{path}: bit {bit}")
            except CorruptStoreError:
                noticed += 1
        path.write_bytes(data)
    assert noticed >= 20
    # Rust's panics are printed where they happen.
    capfd.readouterr()


@pytest.mark.parametrize(
    ("values", "what"), [(np.array([4, 2, 3], np.uint16), "rollout 'r4'"), (np.array([-7, -7], np.float32), "'teacher': scores of row 4")]
)
def test_a_damaged_value_in_lance_is_an_error_that_names_its_row(tmp_path: Path, values: np.ndarray, what: str) -> None:
    store = LanceStore.create(tmp_path / "run", tiny_manifest())
    rollouts = [tiny_rollout(f"r{i}", [7, 8 + i]) for i in range(4)]
    rollouts.append(tiny_rollout("r4", [2, 3]))
    store.append(rollouts)
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(r, -7.0 if r.rollout_id == "r4" else -1.0) for r in rollouts])
    (path,) = [path for path in (tmp_path / "run").rglob("data/*") if values.tobytes() in path.read_bytes()]
    path.write_bytes(path.read_bytes().replace(values.tobytes(), values[::-1].tobytes() if values[0] > 0 else (values * 2).tobytes()))
    with pytest.raises(CorruptStoreError, match=f"{what}: the checksum of its values"):
        reopened(store).read([4, 0], ("teacher",))
    assert reopened(store).read([3, 0], ("teacher",)).token_ids.tolist() == [4, 7, 11, 4, 7, 8]


def test_scores_of_other_tokens_are_refused(tmp_path: Path) -> None:
    stores = [LanceStore.create(tmp_path / name, tiny_manifest()) for name in ("x", "y")]
    for store, response in zip(stores, ([7, 8], [8, 7]), strict=True):
        store.append([tiny_rollout("r", response)])
        store.append_scores("teacher", tiny_provenance(), [tiny_scores(tiny_rollout("r", response))])
    part = stores[0]._snapshot.columns["teacher"]
    stores[0]._snapshot.columns["teacher"] = stores[1]._snapshot.columns["teacher"]
    assert part is not stores[0]._snapshot.columns["teacher"]
    with pytest.raises(CorruptStoreError, match="column 'teacher': scores of rollout 'r' were computed on other tokens"):
        stores[0].read([0], ("teacher",))


def test_rows_that_lance_has_moved_are_found_again(tmp_path: Path) -> None:
    store: Any = fill(LanceStore.create(tmp_path / "run", tiny_manifest()))
    rows = list(range(699, -1, -1))
    wanted, database = store.read(rows, ("teacher",)), lancedb.connect(tmp_path / "run")
    for part in store._snapshot.parts().values():
        table = database.open_table(part.table.name).to_arrow()
        database.create_table(part.table.name, table.take(list(reversed(range(len(table))))), mode="overwrite")
    for moved in (reopened(store), store):
        moved.refresh()
        np.testing.assert_array_equal(moved.read(rows, ("teacher",)).token_ids, wanted.token_ids)
        np.testing.assert_array_equal(moved.read(rows, ("teacher",)).scores["teacher"], wanted.scores["teacher"])
