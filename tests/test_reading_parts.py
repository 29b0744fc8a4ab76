"""Parts and samples of a store: every row once, with the columns that it has."""

import numpy as np
import pytest
from attrs import evolve
from test_doctor import rollout

from lopd import batches, label_rollouts
from lopd.backends.memory_store import MemoryStore
from lopd.errors import ConflictError
from lopd.guards.audit import audit
from lopd.protocols import reading
from lopd.protocols.reading import evenly, parts, rows_of, walk
from lopd.records import ModelId, Prompt, SamplingParams, Scores
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k


def test_parts_cover_every_row_once_with_all_columns_it_has_in_one_read_for_all_alike() -> None:
    store = MemoryStore(tiny_manifest())
    items = [rollout(i) for i in range(23)]
    store.append(items)
    for column, k, rows in (("a", 0, range(3, 20)), ("b", 2, [0, 1, 7, 8, 9, 22])):
        scores = [Scores.of(items[i], np.full(items[i].response_ids.size, -1.0)) for i in rows]
        scores = [evolve(s, top_k=tiny_top_k(s.logprobs.size)) for s in scores] if k else scores
        store.append_scores(column, tiny_provenance(column, k), scores)
    whole = parts(store, 4)
    assert [list(part.rows) for part in whole[:5]] == [[0, 1], [2], [3], [4, 5, 6], [7]]
    assert sorted(row for part in whole for row in part.rows) == list(range(23))
    assert max(len(part.rows) for part in whole) == 4
    assert [list(part.rows) for part in parts(store, 20)] == [[0, 1], [2], [3, 4, 5, 6, *range(10, 20)], [7, 8, 9], [20, 21], [22]]
    for part in whole:
        for row in part.rows:
            assert set(part.columns) == {name for name in "ab" if store.scored(name)[row]}
        assert part.top_k == tuple(name for name in part.columns if name == "b")
        assert [r.rollout.rollout_id for r in part.read(store)] == [items[i].rollout_id for i in part.rows]
    assert parts(MemoryStore(tiny_manifest())) == []


def test_fewer_rows_are_read_at_once_where_columns_and_supports_make_them_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    store, read, looked = MemoryStore(tiny_manifest()), MemoryStore.read, list[int]()
    items = [tiny_rollout(f"p{i}/s0/g0") for i in range(12)]
    store.append(items)
    for column in "abc":
        scores = [evolve(tiny_scores(item), top_k=tiny_top_k(3)) for item in items]
        store.append_scores(column, tiny_provenance(column, top_k=2), scores)
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **options: looked.append(len(rows)) or read(self, rows, **options))
    monkeypatch.setattr(reading, "VALUES_AT_ONCE", 4 * (1 + 3 * (4 + 3 * (1 + 2 * 2))))
    assert [len(part.rows) for part in parts(store)] == [4, 4, 4]
    audit(store, ["a", "b", "c"])
    assert looked == [4, 4, 4]
    assert len([*walk(store, np.arange(12), ("a", "b", "c"))]) == 12
    assert looked == [4, 4, 4, 12]


def test_rows_are_as_wide_as_their_own_columns_and_a_prompt_has_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(tiny_manifest())
    items = [evolve(tiny_rollout(f"p{i}/s0/g0"), prompt_ids=np.ones(100, np.int32)) for i in range(13)]
    store.append(items)
    for column, some in (("a", items[:12]), ("b", items[12:]), ("c", items[12:])):
        store.append_scores(column, tiny_provenance(column, top_k=2), [evolve(tiny_scores(item), top_k=tiny_top_k(3)) for item in some])
    each = 100 + 3 * (4 + 1 + 2 * 2)
    monkeypatch.setattr(reading, "VALUES_AT_ONCE", 6 * each)
    assert [(len(part.rows), part.values) for part in parts(store)] == [(6, 6 * each), (6, 6 * each), (1, each + 3 * (1 + 2 * 2))]
    read, looked = MemoryStore.read, list[int]()
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **options: looked.append(len(rows)) or read(self, rows, **options))
    assert len([*walk(store, np.arange(12), ("a",), ("a",))]) == 12
    assert looked == [6, 6]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 11])
def test_an_even_sample_has_no_row_twice(count: int) -> None:
    rows = evenly(np.arange(100, 110), count).tolist()
    assert len(set(rows)) == len(rows) == min(count, 10)
    assert set(rows) <= set(range(100, 110))


ROUND_0, ROUND_1 = ["a/s1/g0", "b/s0/g0", "a/s2/g0", "b/s3/g0", "a/s40/g0", "c/s0/g0", "mine"], ["a/s7/g1", "b/s0/g1"]


def numbered(*rounds: list[str], samples: int = 1) -> MemoryStore:
    store = MemoryStore(evolve(tiny_manifest(), sampling=SamplingParams(samples_per_prompt=samples)))
    for generation, names in enumerate(rounds):
        store.begin_generation(generation, store.manifest.policy if not generation else ModelId("policy", f"step-{generation}", "float32"))
        store.append([tiny_rollout(name, generation=generation) for name in names])
    return store


@pytest.mark.parametrize(
    ("asked", "rounds", "expected"),
    [
        ("a", None, [0, 2, 4, 7]),
        ("ab", None, [0, 1, 2, 3, 4, 7, 8]),
        ("a", [0], [0, 2, 4]),
        ("b", [1], [8]),
        ("c", [0], [5]),
        ("", None, []),
    ],
)
def test_samples_that_are_numbered_with_gaps_are_rows_of_their_prompts_where_all_rows_are_looked_at(asked, rounds, expected) -> None:
    store = numbered(ROUND_0, ROUND_1)
    assert rows_of(store, [Prompt(name, [4]) for name in asked], rounds).tolist() == expected
    assert rows_of(store, [Prompt("mine", [4])]).tolist() == [6], "an id of another form is its own prompt"


@pytest.mark.parametrize("samples", [1, 3])
def test_of_a_collected_store_a_few_rows_are_read_to_find_some(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"p{i}/s{s}/g0" for i in range(3000) for s in range(samples)]
    store, read, looked = numbered(names, samples=samples), MemoryStore.read, list[int]()
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **options: looked.append(len(rows)) or read(self, rows, **options))
    monkeypatch.setattr(MemoryStore, "lengths", lambda _: pytest.fail("a store on a disk looks at all rows for these"))
    assert rows_of(store, [Prompt("p7", [4])]).tolist() == [7 * samples + s for s in range(samples)]
    assert sum(looked) <= 1024 + samples
    assert max(looked) <= 64
    looked.clear()
    assert rows_of(store, [Prompt(f"p{i}", [4]) for i in range(3000)]).tolist() == [*range(3000 * samples)]
    more = numbered(["p0/s0/g0", "p1/s0/g0", "p1/s1/g0"])
    assert rows_of(more, [Prompt(name, [4]) for name in ("p0", "p1")]).tolist() == [0, 1, 2]
    assert sum(looked) == 256 + 3, "all were found, and a few have their prompts compared"


def test_a_rare_gap_in_a_store_of_many_rows_is_seen_or_not_with_what_else_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = numbered([*(f"p{i}/s0/g0" for i in range(8)), "q/s0/g0", "q/s2/g0", *(f"r{i}/s0/g0" for i in range(8))])
    monkeypatch.setattr(reading, "_LOOKED_AT", 4)
    rows = {
        others: rows_of(store, [Prompt(name, [4]) for name in ("q", *(f"{others}{i}" for i in range(8 * bool(others))))])
        for others in ("", "p")
    }
    assert rows[""].tolist() == [8], "the first, the last and two between are looked at"
    assert rows["p"].tolist() == [*range(10)], "the gap is the first of the rest"
    frequent = numbered([f"p{i}/s{s}/g0" for i in range(8) for s in (0, 2)])
    assert rows_of(frequent, [Prompt("p3", [4])]).tolist() == [6, 7], "one of four has a number beyond"


def test_rows_that_are_looked_at_are_read_in_parts_where_they_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    store, read, looked = numbered([f"p{i}/s{s}/g0" for i in range(9) for s in (0, 2)]), MemoryStore.read, list[int]()
    monkeypatch.setattr(MemoryStore, "read", lambda self, rows, **options: looked.append(len(rows)) or read(self, rows, **options))
    monkeypatch.setattr(reading.in_batches, "__defaults__", (64, None, 4 * int(reading.values_of(store)[0])))
    assert rows_of(store, [Prompt("p3", [4])]).tolist() == [6, 7]
    assert looked == [17, 4, 4, 4, 4, 1, 2], "a look, then all, and the prompts of what was found"


def test_rows_that_are_appended_while_samples_are_looked_for_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    store, find = numbered(["a/s0/g0"]), MemoryStore.find
    monkeypatch.setattr(MemoryStore, "find", lambda self, ids: (self.append([tiny_rollout("b/s0/g0")]), find(self, ids))[1])
    assert rows_of(store, [Prompt(name, [4]) for name in "ab"]).tolist() == [0]
    assert len(store) == 2


def of_two_files() -> tuple[MemoryStore, list[Prompt], list[Prompt]]:
    """Return a store of two prompt files that both count from 1, the second in a round of its own, and both files."""
    store, names = numbered([], []), [str(i) for i in range(1, 101)]
    math, code = ([Prompt(name, [4, kind, i]) for i, name in enumerate(names)] for kind in (5, 6))
    for generation, prompts in enumerate((math, code)):
        store.append([tiny_rollout(f"{p.prompt_id}/s0/g{generation}", generation=generation, prompt_ids=p.token_ids) for p in prompts])
    return store, math, code


def test_prompts_that_share_ids_do_not_claim_rows_of_each_other() -> None:
    store, math, code = of_two_files()
    for prompts in (math, code, math[7:8]):
        with pytest.raises(ConflictError, match=r"a prompt of 3 tokens other than those of prompt '\d+'; .*only rows of their rounds"):
            rows_of(store, prompts)
    with pytest.raises(ConflictError, match="other than those of prompt '1'"):
        rows_of(store, math, [1])
    with pytest.raises(ConflictError, match="other than those of prompt '1'"):
        batches(store, teacher={"math": math, "code": code})
    with pytest.raises(ConflictError, match="give another prompt another id, such as `math/1`"):
        store.append([tiny_rollout("1/s0/g0", prompt_ids=code[0].token_ids)])
    assert rows_of(store, math, [0]).tolist() == [*range(100)]
    assert rows_of(store, code, [1]).tolist() == [*range(100, 200)]
    assert rows_of(store, [*math, *code]).tolist() == [*range(200)]


def test_labels_are_not_given_to_other_prompts_of_the_same_ids() -> None:
    store, math, code = of_two_files()
    with pytest.raises(ConflictError, match="only rows of their rounds"):
        label_rollouts(store, lambda prompt, rollout: 1.0, math)
    assert not store.quarantined("label")
    for prompts, generation in ((math, 0), (code, 1)):
        label_rollouts(store, lambda prompt, rollout: 1.0, prompts, rows=rows_of(store, prompts, [generation]))
    assert store.scored("label").all()


def test_turns_of_a_conversation_that_share_its_id_are_rows_of_any_of_its_prompts() -> None:
    store = MemoryStore(tiny_manifest())
    store.append([tiny_rollout(f"task/s{i}/g0", prompt_ids=[4] * (i + 1)) for i in range(3)])
    for length in (1, 2, 3):
        assert rows_of(store, [Prompt("task", [4] * length)]).tolist() == [0, 1, 2]
    # a template that rewrites the history: only the first turn is as it was asked
    store.append([tiny_rollout("rewritten/s0/g0", prompt_ids=[4, 5, 9]), tiny_rollout("rewritten/s1/g0", prompt_ids=[4, 5, 6, 7, 9])])
    assert rows_of(store, [Prompt("rewritten", [4, 5, 9])]).tolist() == [3, 4]
    with pytest.raises(ConflictError, match="'rewritten/s0/g0' has a prompt of 3 tokens other than"):
        rows_of(store, [Prompt("rewritten", [4, 8, 9])])
