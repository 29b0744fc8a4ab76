"""Stores with something in them, and a machine that compares a store with a dict."""

import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lopd.backends.sealing import seal, unseal
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import ConflictError, MissingScoresError
from lopd.protocols import LogprobStore
from lopd.records import Rollout, Scores
from lopd.testing import (
    assert_holds,
    assert_same_rollout,
    rollouts,
    scores_for,
    tiny_manifest,
    tiny_provenance,
    tiny_rollout,
    tiny_scores,
    tiny_top_k,
)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing cuts the power here, and flushing would be most of the time.  Whether it happens, and when, has tests of its own.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def place(store: Any) -> Path:
    """Return the folder of a local store."""
    return Path(store._files.url)


class StoreMachine(RuleBasedStateMachine):
    """A store against a dict of rollouts and a dict of scores per column."""

    def __init__(
        self,
        make: Callable[[], LogprobStore],
        reopen: Callable[[LogprobStore], LogprobStore],
        compact: Callable[[Any], None] = lambda store: None,
    ) -> None:
        super().__init__()
        self.store, self.reopen_store, self.compact_store = make(), reopen, compact
        self.rollouts: dict[str, Rollout] = {}
        self.columns: dict[str, tuple[str, dict[str, Scores]]] = {}
        self.reasons: dict[str, dict[str, str]] = {}

    @rule(items=st.lists(rollouts(ids=st.sampled_from("abcdef"), max_tokens=3), max_size=3), again=st.booleans())
    def append(self, items: list[Rollout], again: bool) -> None:
        items = [*items, *self.rollouts.values()] if again else items
        after = dict(self.rollouts)
        for item in items:
            if after.setdefault(item.rollout_id, item).content_hash != item.content_hash:
                with pytest.raises(ConflictError):
                    self.store.append(items)
                return
        self.store.append(items)
        self.rollouts = after

    @precondition(lambda self: self.rollouts)
    @rule(data=st.data(), column=st.sampled_from(["teacher", "ref"]), model=st.sampled_from(["A", "A", "B"]))
    def append_scores(self, data: st.DataObject, column: str, model: str) -> None:
        chosen = data.draw(st.lists(st.sampled_from(list(self.rollouts.values())), min_size=1, max_size=3))
        scores = [data.draw(scores_for(rollout)) for rollout in chosen]
        owner, held = self.columns.get(column, (model, {}))
        if owner != model:
            with pytest.raises(ConflictError):
                self.store.append_scores(column, tiny_provenance(model), scores)
            return
        self.store.append_scores(column, tiny_provenance(model), scores)
        self.columns[column] = owner, {**{score.rollout_id: score for score in reversed(scores)}, **held}

    @precondition(lambda self: self.rollouts)
    @rule(data=st.data(), column=st.sampled_from(["teacher", "ref"]), model=st.sampled_from(["A", "A", "B"]))
    def quarantine(self, data: st.DataObject, column: str, model: str) -> None:
        chosen = data.draw(st.dictionaries(st.sampled_from(list(self.rollouts)), st.text(max_size=3), min_size=1, max_size=3))
        owner, held = self.columns.get(column, (model, {}))
        if owner != model:
            with pytest.raises(ConflictError):
                self.store.quarantine(column, tiny_provenance(model), chosen)
            return
        self.store.quarantine(column, tiny_provenance(model), chosen)
        new = {rollout_id: reason for rollout_id, reason in chosen.items() if rollout_id not in held}
        if new:
            self.columns.setdefault(column, (model, {}))
            self.reasons.setdefault(column, {}).update(new)

    @rule()
    def reopen(self) -> None:
        self.store = self.reopen_store(self.store)

    @rule()
    def compact(self) -> None:
        self.compact_store(self.store)

    @precondition(lambda self: self.rollouts)
    @rule(data=st.data(), column=st.sampled_from(["teacher", "ref"]))
    def read(self, data: st.DataObject, column: str) -> None:
        indices = data.draw(st.lists(st.integers(0, len(self.rollouts) - 1), max_size=4))
        held = self.columns.get(column, ("", {}))[1]
        asked = [list(self.rollouts)[index] for index in indices]
        if not all(rollout_id in held for rollout_id in asked):
            with pytest.raises(MissingScoresError):
                self.store.read(indices, (column,))
            return
        for rollout_id, row in zip(asked, self.store.read(indices, (column,)), strict=True):
            assert_same_rollout(row.rollout, self.rollouts[rollout_id])
            np.testing.assert_array_equal(row.scores[column], held[rollout_id].logprobs)

    @invariant()
    def holds_what_the_dicts_hold(self) -> None:
        assert_holds(self.store, list(self.rollouts.values()))
        assert {name: provenance.model.name for name, provenance in self.store.columns.items()} == {
            name: owner for name, (owner, _) in self.columns.items()
        }
        for name, (_, held) in self.columns.items():
            np.testing.assert_array_equal(self.store.scored(name), [rollout_id in held for rollout_id in self.rollouts])
            waiting = {rollout_id: reason for rollout_id, reason in self.reasons.get(name, {}).items() if rollout_id not in held}
            rows = list(self.rollouts)
            assert {rows[row]: reason for row, reason in self.store.quarantined(name).items()} == waiting


MACHINE = settings(max_examples=12, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def many(start: int, n: int, length: int = 3) -> list[Rollout]:
    """Make rollouts that can be made again from their number."""
    return [tiny_rollout(f"r{i}", (np.arange(length) + i) % 300) for i in range(start, start + n)]


def fill(store: ZarrStore) -> ZarrStore:
    """Fill a store with two segments of rollouts of all kinds, one of scores with top-k."""
    reported = {"behavior_logprobs": [0, -1, -2], "sampler_logprobs": [0, -0.5, -1]}
    store.append([tiny_rollout("m", loss_mask=[True, False, True]), tiny_rollout("b", finish_reason="length", **reported)])
    store.append(many(0, 2))
    scores = [evolve(tiny_scores(row.rollout), top_k=tiny_top_k(3)) for row in store.read([1, 3])]
    store.append_scores("teacher", tiny_provenance(top_k=2), scores)
    return store


@pytest.fixture
def filled(tmp_path: Path) -> ZarrStore:
    """See `fill`."""
    return fill(ZarrStore.create(tmp_path / "run.zarr", tiny_manifest()))


def forge(path: Path, **changes: object) -> None:
    """Change the content of a sealed document, and seal it again."""
    path.write_bytes(seal({**(unseal(path.read_bytes()) or {}), **changes}))


def rows_of(store: ZarrStore) -> list[str]:
    return [row.rollout.rollout_id for row in store.read(range(len(store)))]


def start(work: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    """Run it in a forked process: a fresh interpreter would spend its life importing torch."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    with warnings.catch_warnings():
        # numpy's idle threads; nothing the child needs is in their hands.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    return process


class Rows(torch.utils.data.Dataset):
    def __init__(self, store: ZarrStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, row: int) -> tuple[int, list[int]]:
        return os.getpid(), self.store.read([row])[0].rollout.response_ids.tolist()
