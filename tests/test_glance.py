"""What a person sees of a store, a record or a batch at a glance: on a line, and in a notebook."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve

import lopd
from lopd import LanceStore, MemoryStore, ZarrStore
from lopd.records import ModelId, Prompt, Rollout, Scores, TopK
from lopd.records.collate import collate
from lopd.records.steps import Step
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores

EVIL = "<script>alert('x')</script>\x1b[31m\u202e\n"
STORES: dict[str, Callable[[Path], Any]] = {
    "memory": lambda _: MemoryStore(tiny_manifest()),
    "Zarr": lambda path: ZarrStore.create(path / "run", tiny_manifest()),
    "Lance": lambda path: LanceStore.create(path / "run", tiny_manifest()),
}


def long_rollout(name: str = "p/s0/g0", tokens: int = 5000) -> Rollout:
    return Rollout(name, [4] * 3000, np.arange(tokens) % 300, np.arange(tokens) > 0, "length", behavior_logprobs=-np.ones(tokens))


@cache
def things(name: str) -> dict[str, Any]:
    """Make one of each, with as much in it as would fill a screen."""
    rollout = long_rollout(name)
    top_k = TopK(np.tile([1, 2], (5000, 1)), np.full((5000, 2), np.log(0.4)), np.full(5000, 0.2))
    scores = Scores.of(rollout, np.full(5000, -0.25), top_k=top_k)
    store = MemoryStore(evolve(tiny_manifest(), policy=ModelId(name, "r", "float32")))
    store.append([long_rollout(f"{name}{i}") for i in range(9)] + [rollout])
    store.append_scores("teacher", evolve(tiny_provenance(), model=ModelId(name, "r", "float32"), top_k=2), [scores])
    rows = store.read([9], ["teacher"], ["teacher"])
    batch = collate(rows, teacher="teacher", top_k="teacher")
    return {
        "prompt": Prompt(name, np.arange(5000), 900 * name, name),
        "prompt without text": Prompt(name, np.arange(5000)),
        "rollout": rollout,
        "scores": scores,
        "support": top_k,
        "scored rollout": rows[0],
        "rows": rows,
        "many rows": store.read(range(9), ["behavior"]),
        "batch": batch,
        "step": Step(3, (batch,) * 9),
        "manifest": store.manifest,
        "store": store,
    }


@pytest.mark.parametrize("kind", things("r"))
def test_what_is_shown_is_short_harmless_and_not_thousands_of_numbers(kind: str) -> None:
    thing = things(EVIL)[kind]
    line, page = repr(thing), thing._repr_html_()
    assert len(line) < 2500
    assert max(map(len, line.splitlines())) < 500
    assert len(page) < 7000
    assert str(thing) == line
    for said in (line, page):
        assert not set("\x1b\u202e") & set(said)
        assert not re.search(r"(\d+[ ,\[\]]+){20}", said)
    assert "<script" not in page
    if kind not in {"support", "batch", "step"}:
        assert "&lt;script&gt;" in page


def test_text_comes_first_and_ids_stand_for_it_where_there_is_none() -> None:
    prompt = Prompt("p", [5, 6, 1], "What is 3 + 4?", "7")
    assert repr(prompt) == "Prompt 'p': text 'What is 3 + 4?'; tokens 3; answer '7'"
    assert repr(Prompt("p", [5, 6, 1])) == "Prompt 'p': ids 5 6 1; tokens 3"
    long = repr(Prompt("p", [5], f"{'a' * 60} and {'b' * 60}"))
    assert f"'{'a' * 50}…{'b' * 30}'" in long


def test_rollouts_say_what_counts_and_rows_decode_with_a_tokenizer_at_hand(tokenizer: Any) -> None:
    rollout = tiny_rollout(
        "p/s0/g0", tokenizer("hi 7")["input_ids"], loss_mask=[True, *[False] * (len(tokenizer("hi 7")["input_ids"]) - 1)]
    )
    shown = repr(rollout)
    assert f"prompt tokens 1; response tokens {rollout.response_ids.size}; masked {rollout.response_ids.size - 1}; ended by stop" in shown
    store = MemoryStore(tiny_manifest())
    store.append([rollout])
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout)])
    rows = store.read([0], ["teacher"])
    decoded = rows.decoded(tokenizer)
    for said in (repr(decoded), decoded._repr_html_()):
        assert "hi 7" in said
        assert "-1.000" in said
    assert "response ids" in repr(rows)


@pytest.mark.parametrize("kind", ["Zarr", "Lance"])
def test_a_store_shows_its_columns_without_reading_a_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = [tiny_rollout(f"p{i}/s0/g0") for i in range(3)]
    made = STORES[kind](tmp_path)
    made.append(rollouts)
    made.append_scores("teacher", tiny_provenance(), [tiny_scores(rollouts[2]), tiny_scores(rollouts[0])])
    made.append_scores("teacher", tiny_provenance(), [tiny_scores(rollouts[0])])
    store = type(made).open(tmp_path / "run")
    for name in ("read", "run", "names", "read_ranges"):
        monkeypatch.setattr(type(store._files), name, lambda *_: pytest.fail("it reads"), raising=False)
    monkeypatch.setattr("lopd.backends.lance.table.LanceTable.take", lambda *_: pytest.fail("it reads"))
    expected = f"{store.name}: rollouts 3; policy policy@rev-p; column teacher 2 of 3 scored by teacher@rev-teacher"
    assert repr(store) == expected
    assert "<td" in store._repr_html_()


@pytest.mark.parametrize("kind", STORES)
def test_a_store_is_true_and_messages_name_it_in_a_few_words(kind: str, tmp_path: Path) -> None:
    store = STORES[kind](tmp_path)
    assert store
    assert not len(store)
    with pytest.raises(lopd.errors.InvalidRecordError, match=rf"^{re.escape(store.name)}: it has 0 rollouts"):
        lopd.batches(store)


def test_messages_never_name_a_store_by_its_repr() -> None:
    for path in Path(lopd.__path__[0]).rglob("*.py"):
        assert not re.search(r"\b(store|reader|left|right)!r|repr\((store|self\.reader)\)", path.read_text()), path
