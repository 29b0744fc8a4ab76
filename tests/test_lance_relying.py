"""Rows of a `LanceStore` that are not acknowledged: who may take them back, and who relies on them, at each moment."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from lance_stores import filled, reopened  # noqa: F401
from test_lance_safety import misled, unacknowledged  # noqa: F401
from zarr_stores import _quick_disk, many, place, rows_of  # noqa: F401

from lopd.backends.lance import tiers, writer, written
from lopd.backends.lance.store import LanceStore
from lopd.backends.lance.table import COMMIT
from lopd.errors import StoreWriteError
from lopd.testing import tiny_provenance, tiny_scores


@pytest.mark.parametrize(("owner", "name"), [(writer, "check_unmarked"), (written, "hold_rows")])
def test_a_mark_of_rows_that_came_in_the_place_of_others_is_not_theirs(
    owner: Any, name: str, filled: LanceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, third, mine, real = reopened(filled), reopened(filled), filled._snapshot.rollouts, getattr(owner, name)
    assert mine is not None
    unacknowledged(filled, many(10, 2))

    def act(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        assert written.take_back(mine.table, 2)
        third.append(many(20, 3))
        return real(*args, **options)

    monkeypatch.setattr(owner, name, act)
    with pytest.raises(StoreWriteError, match="it was not acknowledged"):
        other.append_scores("ref", tiny_provenance("ref"), [tiny_scores(many(10, 1)[0])])
    other.append(many(20, 1))
    for store in (other, reopened(filled)):
        assert rows_of(store) == ["m", "b", "r0", "r1", "r20", "r21", "r22"]
        assert list(store.verify()) == []


def test_the_first_rows_that_follow_those_of_an_older_lopd_are_taken_back_only_where_nobody_relies_on_them(
    filled: LanceStore,
    misled: Any,
) -> None:
    for marks in place(filled).glob("rollouts-*.head"):
        shutil.rmtree(marks)
    first, other = reopened(filled), reopened(filled)
    misled(lambda: other.append_scores("ref", tiny_provenance("ref"), [tiny_scores(many(10, 1)[0])]))
    with pytest.raises(StoreWriteError, match="its rows could not be taken back"):
        first.append(many(10, 2))
    assert rows_of(reopened(filled)) == ["m", "b", "r0", "r1", "r10", "r11"]
    assert list(reopened(filled).verify()) == []


def test_a_table_without_a_mark_gets_one_before_rows_are_added_to_it(filled: LanceStore, misled: Any) -> None:
    for marks in place(filled).glob("rollouts-*.head"):
        shutil.rmtree(marks)
    seen = list[str]()
    misled(lambda: seen.extend(path.name for path in place(filled).glob("rollouts-*.head/*")))
    with pytest.raises(StoreWriteError, match="nothing of this call was committed"):
        reopened(filled).append(many(10, 2))
    assert [int(name) for name in seen] == [4], "the rows before, which others may rely on at any moment"


@pytest.mark.parametrize("what", ["an insert whose number was taken", "a merge of other rows"])
def test_rows_are_taken_back_behind_commits_that_rely_on_none(what: str, filled: LanceStore, misled: Any) -> None:
    def act() -> None:
        rollouts = reopened(filled)._snapshot.rollouts
        assert rollouts is not None
        dataset = rollouts.table.dataset()
        before, calls = dataset.version, dict[str, Callable[[], object]]()
        calls["an insert whose number was taken"] = lambda: (
            dataset.merge_insert(COMMIT).when_not_matched_insert_all().execute(dataset.to_table())
        )
        calls["a merge of other rows"] = lambda: tiers.compact(dataset, 4, lambda _: None)
        calls[what]()
        assert rollouts.table.dataset().version > before

    misled(act)
    with pytest.raises(StoreWriteError, match="nothing of this call was committed"):
        filled.append(many(10, 2))
    for store in (reopened(filled), filled):
        assert rows_of(store) == ["m", "b", "r0", "r1"]
    filled.append(many(10, 2))
    assert rows_of(reopened(filled))[4:] == ["r10", "r11"]
    assert list(reopened(filled).verify()) == []
