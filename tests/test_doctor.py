"""The doctor: what it reports of a store, what it finds wrong, and the exit codes of its command line."""

import errno
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd import label_rollouts
from lopd.backends.lance.store import LanceStore
from lopd.backends.memory_store import MemoryStore
from lopd.backends.opening import open_store
from lopd.backends.zarr.store import ZarrStore
from lopd.errors import CorruptStoreError, InvalidRecordError, MissingScoresError, StoreNotFoundError, StoreReadError
from lopd.guards.consistency import verdict
from lopd.protocols import Counted
from lopd.records import AdvantageSummary, Commit, ModelId, Parity, Rollout, Scores, mixture_id
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores, tiny_top_k
from lopd.tools.command import main
from lopd.tools.doctor import check_store, compare_columns, describe_advantages, inspect_store

#: Runs the command; gives its exit code, and what it printed on both ways.
Call = Callable[..., tuple[int, str, str]]
POLICY, TEACHER = tiny_manifest().policy, tiny_provenance().model
RNG = np.random.default_rng(0)


def rollout(i: int, **fields: Any) -> Rollout:
    length = 3 + i % 5
    behavior = np.random.default_rng(i).uniform(-3, 0, length)
    return tiny_rollout(f"p{i}/s0/g0", (np.arange(length) + i) % 300, **({"behavior_logprobs": behavior} | fields))


def fill(store: Any, n: int = 40) -> list[Rollout]:
    """Fill a store with rollouts of all kinds in two appends, a teacher with a top-k support, and the policy scored again."""
    items = [rollout(i, finish_reason="length" if i % 4 == 0 else "stop") for i in range(n)]
    items[1] = rollout(1, loss_mask=[True, False, True, False])
    store.append(items[: n // 2])
    store.append(items[n // 2 :])
    random = np.random.default_rng(7)
    for column, provenance in (("teacher", tiny_provenance(top_k=2)), ("ref", evolve(tiny_provenance(), model=POLICY))):
        scores = [Scores.of(r, random.uniform(-14, 0, r.response_ids.size)) for r in items]
        if column == "teacher":
            scores = [evolve(s, top_k=tiny_top_k(s.logprobs.size)) for s in scores]
        store.append_scores(column, provenance, scores)
    return items


@pytest.fixture
def store(tmp_path: Path) -> ZarrStore:
    made = ZarrStore.create(tmp_path / "run.zarr", evolve(tiny_manifest(), sft_teacher=TEACHER))
    fill(made)
    return made


class Kept:
    """A `DurableStore` in memory whose rows a test can tamper with."""

    def __init__(self) -> None:
        self.store = MemoryStore(tiny_manifest())
        self.problems: list[str] = []
        self.commits: list[Commit] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def __len__(self) -> int:
        return len(self.store)

    def verify(self) -> Iterator[str]:
        return iter(self.problems)

    def history(self) -> Sequence[Commit]:
        return self.commits


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-W", "error", "-m", "lopd", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code and what was printed, without the seconds that a process of its own takes to begin."""

    def called(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(list(map(str, arguments))), *capsys.readouterr()

    return called


def words(text: str) -> str:
    """Return the words, without the lines that tables are broken into and drawn with."""
    return " ".join(text.replace("│", " ").split())


# info


def test_info_says_what_is_in_a_store_and_who_scored_it(store: ZarrStore, tmp_path: Path) -> None:
    done = run("info", tmp_path / "run.zarr", "--sample", 10)
    assert (done.returncode, done.stderr) == (0, "")
    for said in (
        "policy@rev-p",
        "teacher@rev-teacher",
        "consistent",
        "the policy itself",
        "in 10 of 40",
        "teacher - ref",
        "last 4 of 4 commits",
    ):
        assert said in words(done.stdout), said


def test_info_as_json_is_what_the_function_gives(store: ZarrStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "run.zarr"), "--json"]) == 0
    printed, info = json.loads(capsys.readouterr().out), inspect_store(store)
    assert printed["rollouts"] == info.rollouts == 40
    assert (printed["prompt_tokens"], printed["response_tokens"]) == (40, sum(3 + i % 5 for i in range(40)))
    assert printed["bytes_per_token"] == store.stored_bytes() / store.lengths().sum()
    assert printed["manifest"] == json.loads(json.dumps(store.manifest.to_json()))
    assert printed["finish_reasons"] == {"stop": 30, "length": 10}
    assert [(c["name"], c["scored"], c["of_policy"]) for c in printed["columns"]] == [("teacher", 40, False), ("ref", 40, True)]
    assert printed["advantages"][1]["summary"]["tail"] == info.advantages[1].summary.tail


def test_info_shows_what_is_in_quarantine_and_how_the_engine_compares(tmp_path: Path, call: Call) -> None:
    made = ZarrStore.create(tmp_path / "part.zarr", tiny_manifest())
    items = [rollout(i) for i in range(3)]
    made.append(items)
    parity = Parity("engine 1.0", "made-up 1.0", rollouts=2, tokens=6, mean=0.0123, p99=0.5, max=0.75, bias=0.001)
    made.append_scores("teacher", evolve(tiny_provenance(), parity=parity), [tiny_scores(item) for item in items[:2]])
    made.quarantine("teacher", tiny_provenance(), {items[2].rollout_id: "Rollout 'x': it has 9 tokens, expected at most 8."})
    shown = words(call("info", tmp_path / "part.zarr")[1])
    for said in ("2 of 3", "in quarantine 1", "0.012 (max 0.75)", "row 2 in quarantine: Rollout 'x': it has 9 tokens, expected at most 8."):
        assert said in shown, said
    printed = json.loads(call("info", tmp_path / "part.zarr", "--json")[1])
    assert printed["columns"][0]["quarantined"] == {"2": "Rollout 'x': it has 9 tokens, expected at most 8."}
    assert call("verify", tmp_path / "part.zarr")[0] == 0


def test_advantages_are_over_the_tokens_that_count_in_rollouts_that_have_both_scores() -> None:
    store = MemoryStore(tiny_manifest())
    items = fill(store)
    store.append([rollout(99), rollout(98, behavior_logprobs=None)])
    for student in ("ref", "behavior"):
        found = describe_advantages(store, "teacher", student)
        rows = store.read(range(len(items)), ("teacher", student))
        gaps = np.concatenate([(r.scores["teacher"].astype(float) - r.scores[student])[r.rollout.loss_mask] for r in rows])
        assert found is not None
        assert (found.rollouts, found.summary) == (40, AdvantageSummary.of(gaps))
        np.testing.assert_allclose(found.mean_abs, np.abs(gaps).mean())


def test_advantages_of_nothing_are_none_and_of_one_rollout_have_no_interval() -> None:
    store = MemoryStore(tiny_manifest())
    items = [rollout(0, loss_mask=[False] * 3), rollout(1)]
    store.append(items)
    assert describe_advantages(store, "teacher", "behavior") is None
    store.append_scores("teacher", tiny_provenance(), [Scores.of(items[0], [-1.0] * 3)])
    assert describe_advantages(store, "teacher", "behavior") is None
    store.append_scores("teacher", tiny_provenance(), [Scores.of(items[1], [-1.0] * 4)])
    found = describe_advantages(store, "teacher", "behavior")
    assert found is not None
    assert (found.summary.tokens, found.mean.ci95) == (4, math.inf)


def test_a_column_says_why_its_model_is_no_consistent_teacher(tmp_path: Path) -> None:
    objections = {}
    other = ModelId("other", "rev-o", "float32")
    for name, sft in (("same", TEACHER), ("one of two", mixture_id([TEACHER, other])), ("other", other), ("unknown", None)):
        store = ZarrStore.create(tmp_path / name, evolve(tiny_manifest(), sft_teacher=sft))
        fill(store, 4)
        objections[name] = inspect_store(store).columns[0].objection
    assert objections["same"] is objections["one of two"] is None
    assert "its SFT teacher is other@rev-o, and the scoring teacher is teacher@rev-teacher, expected" in str(objections["other"])
    assert "its SFT teacher is not recorded" in str(objections["unknown"])


def test_info_reads_no_more_rollouts_than_the_sample(store: ZarrStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = list[int](), ZarrStore.read
    monkeypatch.setattr(ZarrStore, "read", lambda self, rows, *a, **kw: read.extend(rows) or original(self, rows, *a, **kw))
    info = inspect_store(store, sample=5)
    assert (info.sampled, [pair.rollouts for pair in info.advantages]) == (5, [5, 5])
    assert read == [0, 10, 20, 29, 39] * 4


def test_info_of_an_empty_store_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ZarrStore.create(tmp_path / "empty", tiny_manifest())
    for arguments in ([], ["--json"]):
        assert main(["info", str(tmp_path / "empty"), *arguments]) == 0
    assert main(["verify", str(tmp_path / "empty")]) == 0
    assert "0 problems in 0 rollouts" in capsys.readouterr().out


# verify


def flip(path: Path, byte: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def test_a_sound_store_verifies_and_a_flipped_bit_is_a_problem(store: ZarrStore, tmp_path: Path, call: Call) -> None:
    code, printed, _ = call("verify", tmp_path / "run.zarr")
    assert (code, "0 problems in 40 rollouts" in printed) == (0, True)
    chunk = next(path for path in sorted(tmp_path.glob("run.zarr/scores/teacher/*/logprobs/c*")) if path.is_file())
    flip(chunk)
    code, printed, said = call("verify", tmp_path / "run.zarr")
    assert code == 1
    assert "logprobs" in printed
    assert "Traceback" not in printed + said


def test_a_flipped_bit_is_a_problem_in_every_data_file(store: ZarrStore, tmp_path: Path) -> None:
    for path in sorted(tmp_path.glob("run.zarr/s*/**/c.0*")):
        kept = path.read_bytes()
        flip(path, len(kept) // 2)
        assert list(check_store(open_store(tmp_path / "run.zarr"))), path
        path.write_bytes(kept)
    assert list(check_store(open_store(tmp_path / "run.zarr"))) == []


def test_what_a_store_finds_in_itself_comes_first_and_each_problem_once() -> None:
    store = Kept()
    fill(store)
    store.problems = ["a", "b", "a"]
    assert list(check_store(store, rows_per_read=3)) == ["a", "b"]


def tampered(store: Kept, row: int, **fields: Any) -> list[str]:
    stored = store.store._rollouts[row]
    values = {name: getattr(stored, name) for name in Rollout.__slots__ if name != "__weakref__"}
    store.store._rollouts[row] = Rollout.from_store(**{**values, **fields})
    return list(check_store(store, rows_per_read=3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"content_hash": b"\0" * 16}, "has content hash 00000000"),
        ({"prompt_ids": np.array([5], np.int32)}, "has content hash"),
        ({"prompt_ids": np.array([300], np.int32)}, r"prompt_ids\[0\] is 300"),
        ({"loss_mask": np.ones(2, bool)}, r"^Rows: loss_mask has shape \(2,\)"),
        ({"behavior_logprobs": np.array([0.5, -1, -1, -1, -1], np.float32)}, r"behavior_logprobs\[0\] is 0.5"),
        ({"generation": 4}, "its generation is 4"),
        ({"rollout_id": "another"}, "is found in row -1, expected row 7"),
    ],
)
def test_a_row_that_breaks_its_contract_is_a_problem_that_names_it(fields: dict[str, Any], message: str) -> None:
    store = Kept()
    fill(store)
    problems = tampered(store, 7, **fields)
    assert len(problems) == 1
    assert re.search(message, problems[0])
    assert "loss_mask" in fields or fields.get("rollout_id", "p7/s0/g0") in problems[0]


def test_rows_that_cannot_be_read_are_named_one_by_one_and_the_others_are_checked() -> None:
    store, progress = Kept(), []

    class Progress:
        def begin(self, what: str, total: int, done: int, tokens: int | None, counted: Counted, /) -> None:
            progress.append((total, done, tokens, counted))

        def advance(self, rollouts: int, tokens: int, quarantined: int, /) -> None:
            progress.append((rollouts, tokens))

        def end(self) -> None:
            progress.append("end")

    items = fill(store)
    original = store.store.read

    def read(rows: Sequence[int], **asked: Any) -> Any:
        if 3 in rows:
            raise CorruptStoreError("Store: row 3 is damaged.")
        if 8 in rows:
            raise StoreReadError("Store: row 8 is in a bad sector.") from OSError(errno.EIO, "bad")
        return original(rows, **asked)

    store.read = read
    *unread, broken = tampered(store, 9, content_hash=b"\0" * 16)
    assert unread == ["Store: row 3 is damaged.", "Store: row 8 is in a bad sector."]
    assert "has content hash 00000000" in broken
    assert list(check_store(store, progress=Progress())) == [*unread, broken]
    assert progress[0] == (40, 0, sum(map(len, items)), "read tokens")
    assert progress[-1] == "end"
    assert [sum(column) for column in zip(*progress[1:-1], strict=True)] == [40, sum(map(len, items))]


def test_a_storage_that_refuses_says_nothing_about_the_store() -> None:
    store = Kept()
    fill(store)
    store.read, store.problems = Mock(side_effect=StoreReadError("Store: the network is down.")), ["a"]
    checking = check_store(store)
    assert next(checking) == "a"
    with pytest.raises(StoreReadError, match="network"):
        next(checking)


# diff


def test_diff_of_two_columns_names_the_worst_token_and_exits_by_the_tolerance(store: ZarrStore, tmp_path: Path, call: Call) -> None:
    code, printed, _ = call("diff", tmp_path / "run.zarr", "--columns", "teacher", "ref")
    found = compare_columns(store, store, "teacher", "ref")
    assert found.worst is not None
    assert code == 1
    assert f"{found.worst.rollout_id!r}, response token {found.worst.position}" in words(printed)
    arguments = ["diff", str(tmp_path / "run.zarr"), "--columns", "teacher", "ref", "--json", "--tolerance"]
    assert main([*arguments, str(found.max)]) == 0
    assert main([*arguments, str(found.max * 0.999)]) == 1


def test_diff_says_of_each_column_what_its_model_is_to_the_policy(
    store: ZarrStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["diff", str(tmp_path / "run.zarr"), "--columns", "teacher", "ref"])
    said = " ".join(capsys.readouterr().out.split())
    for column in ("teacher", "ref"):
        assert f"{column}: {store.columns[column].model}: {verdict(store.manifest, store.columns[column])}." in said


def test_diff_of_two_stores_matches_rollouts_by_id(store: ZarrStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ZarrStore.create(tmp_path / "other.zarr", tiny_manifest())
    for row in reversed(store.read(range(40), ("teacher",))):
        other.append([row.rollout])
        other.append_scores("teacher", tiny_provenance(), [Scores.of(row.rollout, row.scores["teacher"])])
    both = ["diff", str(tmp_path / "run.zarr"), str(tmp_path / "other.zarr")]
    assert main(both) == 0
    assert "The manifests differ: sft_teacher" in capsys.readouterr().out
    other.append([rollout(100)])
    other.append_scores("teacher", tiny_provenance(), [Scores.of(rollout(100), [-1.0] * 3)])
    assert main(both) == 1


def test_rollouts_on_one_side_only_or_with_other_content_are_counted_and_not_compared() -> None:
    left, right = MemoryStore(tiny_manifest()), MemoryStore(tiny_manifest())
    fill(left, 6)
    right.append([tiny_rollout("p0/s0/g0", [9, 9]), *(rollout(i) for i in (3, 4, 5, 90, 91))])
    for i in (0, 3, 4, 90):
        r = right.read(right.find([f"p{i}/s0/g0"]).tolist())[0].rollout
        right.append_scores("other", tiny_provenance("other"), [Scores.of(r, np.full(r.response_ids.size, -1.0))])
    found = compare_columns(left, right, "teacher", "other")
    # p3 and p4 compare; p0 is another rollout; p1, p2 are not there, p5 is not scored; p90 is new
    assert (found.rollouts, found.only_left, found.only_right, found.other_content, found.first_other) == (1 + 1, 3, 1, 1, "p0/s0/g0")
    assert found.exceeds(1e9)


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(*[st.floats(-(2.0**127), 0, width=32)] * 2), min_size=1, max_size=40), split=st.integers(1, 40))
def test_statistics_of_a_difference_are_those_of_numpy(pairs: list[tuple[float, float]], split: int) -> None:
    store = MemoryStore(tiny_manifest())
    for i, part in enumerate(pairs[start : start + split] for start in range(0, len(pairs), split)):
        r = tiny_rollout(f"r{i}", [5] * len(part))
        store.append([r])
        for column, values in zip("ab", zip(*part, strict=True), strict=True):
            store.append_scores(column, tiny_provenance(column), [Scores.of(r, values)])
    found, gaps = compare_columns(store, store, "a", "b"), np.abs(np.diff(np.array(pairs, np.float64))[:, 0])
    assert (found.tokens, found.max) == (len(pairs), gaps.max())
    np.testing.assert_allclose(found.mean, gaps.mean(), rtol=1e-12)
    assert (found.worst is None) == (found.max == 0)
    if found.worst is not None:
        assert abs(found.worst.left - found.worst.right) == found.max
    exact = np.quantile(gaps, 0.99, method="inverted_cdf")
    assert exact * 0.999 - 1e-38 <= found.p99 <= exact * 1.001 + 1e-38


def test_a_column_equals_itself(store: ZarrStore) -> None:
    found = compare_columns(store, store, "teacher", "teacher")
    assert (found.rollouts, found.max, found.p99, found.mean) == (40, 0.0, 0.0, 0.0)
    assert not found.exceeds(0.0)


def test_diff_of_a_column_that_is_not_there_or_of_a_label_with_a_log_prob_is_refused(store: ZarrStore) -> None:
    with pytest.raises(MissingScoresError, match=r"'nobody' is absent, expected one of \['teacher', 'ref', 'behavior'\]"):
        compare_columns(store, store, "teacher", "nobody")
    label_rollouts(store, lambda _, rollout: float(rollout.response_ids[0] % 2), None, recheck=0)
    with pytest.raises(InvalidRecordError, match="column 'label' holds labels of"):
        compare_columns(store, store, "teacher", "label")


@pytest.mark.parametrize("columns", [[], ["teacher"], ["teacher", "teacher"], ["a", "b", "c"]])
def test_diff_of_one_store_needs_two_columns(columns: list[str], store: ZarrStore, tmp_path: Path) -> None:
    assert main(["diff", str(tmp_path / "run.zarr"), *(["--columns", *columns] if columns else [])]) == 2


# compact


def test_compact_merges_appends_and_says_what_it_changed(store: ZarrStore, tmp_path: Path, call: Call) -> None:
    before, size = store.read(range(40), ("teacher", "ref")), store.stored_bytes()
    code, printed, said = call("compact", tmp_path / "run.zarr")
    assert (code, said) == (0, "")
    assert f"{size:,}" in printed
    after = open_store(tmp_path / "run.zarr")
    assert after.stored_bytes() < size
    assert [row.rollout.content_hash for row in after.read(range(40))] == [row.rollout.content_hash for row in before]
    assert list(check_store(after)) == []


# opening, usage


def exit_code(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as leaving:
        return int(str(leaving.code))


def test_a_store_that_is_not_there_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    done = run("info", tmp_path / "none.zarr")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "none.zarr" in done.stderr


def test_a_damaged_store_is_one_sentence_and_exit_code_2(store: ZarrStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(tmp_path / "run.zarr/zarr.json", 5)
    for command in ("info", "verify", "compact"):
        assert exit_code(command, str(tmp_path / "run.zarr")) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["cure"], ["info"], ["info", "a", "b"], ["info", "a", "--sample", "0"], ["info", "a", "--sam", "5"]]
)
def test_bad_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert exit_code(*arguments) == 2


@pytest.mark.parametrize(
    "option",
    [
        ["--storage-option", "=hunter2"],
        ["--storage-options", "secret=hunter2"],
        ["--storage-optio=secret=hunter2"],
        ["--storage-option", "aws_secret_access_key=hunter2"],
    ],
)
def test_a_storage_option_is_never_printed(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("info", str(tmp_path / "none"), *option) == 2
    printed = capsys.readouterr()
    assert "hunter2" not in printed.out + printed.err


def test_storage_options_reach_the_store(store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("lopd.backends.opening.open_store", lambda url, options: seen.append(options) or open_store(url))
    assert main(["info", str(tmp_path / "run.zarr"), "--storage-option", "a=b=c", "--storage-option", "d=e"]) == 0
    assert seen == [{"a": "b=c", "d": "e"}]


def test_opening_finds_a_zarr_store_by_path_or_url(store: ZarrStore, tmp_path: Path) -> None:
    for path in (tmp_path / "run.zarr", str(tmp_path / "run.zarr"), f"file://{tmp_path}/run.zarr"):
        assert len(open_store(path)) == 40


def test_opening_finds_a_lance_store_and_the_doctor_reads_it(tmp_path: Path) -> None:
    fill(LanceStore.create(tmp_path / "run.lance", tiny_manifest()))
    store = open_store(tmp_path / "run.lance")
    assert list(check_store(store)) == []
    assert inspect_store(store).rollouts == 40
    assert not compare_columns(store, store, "teacher", "teacher").exceeds(0.0)


def test_opening_nothing_or_a_file_says_that_nothing_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no store")
    (tmp_path / "folder").mkdir()
    for name in ("none", "file", "folder"):
        with pytest.raises(StoreNotFoundError, match=name):
            open_store(tmp_path / name)


def test_without_rich_the_tables_are_refused_and_json_is_printed(
    store: ZarrStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["info", str(tmp_path / "run.zarr")]) == 2
    assert "lopd[hf]" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "run.zarr"), "--json"]) == 0


# walking over a store
