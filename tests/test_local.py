"""Engines in several processes of this machine."""

from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from attrs import evolve
from mortal import Forking, Mortal, Odd, Small, ids, make_but_the_second, make_nothing, make_slowly
from one_process import ENDLESS, KEPT, PROMPTS, SAMPLING, alone, assert_same, folders  # noqa: F401

from lopd import MemoryStore, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.local import LocalScorer, LocalSource
from lopd.engines.server import Servers
from lopd.engines.vllm import VLLMSettings
from lopd.errors import ArgumentError, EngineError, InvalidRecordError, RefusedPromptsWarning


def test_two_processes_of_which_one_is_killed_fill_the_store_that_one_process_fills(folders, alone, tmp_path):
    store = MemoryStore(alone.manifest)
    with (
        closing(LocalSource(Mortal(partial(HFSource.from_folder, folders["policy"], SAMPLING), "p6", 1, tmp_path))) as source,
        pytest.warns(RefusedPromptsWarning, match=r"1 prompts could not be sampled.*'endless'.*5000 tokens"),
    ):
        collect_rollouts(source, [*PROMPTS[:5], ENDLESS, *PROMPTS[5:]], store, prompts_per_batch=4, batches_at_once=2)
    assert len(list(tmp_path.glob("death*"))) == 1
    with closing(LocalScorer(Mortal(partial(HFScorer.from_folder, folders["teacher"], **KEPT), "p3/s1/g0", 2, tmp_path))) as scorer:
        score_rollouts(store, scorer, rollouts_per_batch=6, batches_at_once=2)
    assert len(list(tmp_path.glob("death*"))) == 2
    assert_same(store, alone)


def test_items_that_kill_every_process_end_the_call_and_a_process_that_cannot_be_replaced_too(tmp_path):
    plan = Mortal(Small, "fatal", 99, tmp_path)
    with closing(LocalScorer(plan, workers=1, attempts=2, environments=[{"FAREWELL": str(tmp_path / "end")}])) as scorer:
        with pytest.raises(EngineError, match=r"LocalScorer: 2 workers died over rollout 'fatal'; see its output above"):
            scorer.score(ids("a", "fatal"))
        assert len(scorer.score(ids("a", "b"))) == 2, "another process has taken its place"
    with closing(LocalScorer(evolve(plan, once=True), workers=1)) as scorer:
        with pytest.raises(EngineError, match=r"LocalScorer: all 1 workers failed, and none could be started again") as caught:
            scorer.score(ids("a", "fatal", "b"))
        assert "does not start" in str(caught.value.__cause__)


def test_a_process_that_died_is_noticed_although_one_that_it_started_lives():
    with (
        closing(LocalScorer(Forking, workers=1, attempts=1)) as scorer,
        pytest.raises(EngineError, match="1 workers died over rollout 'a'"),
    ):
        scorer.score(ids("a"))


def test_a_call_after_all_workers_were_lost_starts_them_again(tmp_path):
    with closing(LocalScorer(partial(make_but_the_second, tmp_path), workers=1, attempts=2)) as scorer:
        with pytest.raises(EngineError, match="none could be started again"):
            scorer.score(ids("die"))
        assert scorer.score(ids("a", "b")) == ["a", "b"]
        assert scorer.score([]) == []


def test_each_process_has_its_environment_and_ends_its_engine(tmp_path):
    environments = [{"CUDA_VISIBLE_DEVICES": str(i), "FAREWELL": str(tmp_path / str(i))} for i in range(2)]
    with closing(LocalScorer(Small, environments=environments)) as scorer:
        assert scorer.provenance == "small"
        assert set(scorer.score(ids("meet", "meet"))) == {"0", "1"}
    assert sorted(path.name for path in tmp_path.glob("?")) == ["0", "1"]
    with (
        closing(LocalScorer(Odd, environments=environments)) as scorer,
        pytest.raises(EngineError, match=r"LocalScorer: a worker's engine is [01], expected [01] as another's is"),
    ):
        scorer.provenance  # noqa: B018


def test_an_error_that_cannot_be_pickled_comes_in_words(tmp_path):
    with (
        closing(LocalScorer(Small, workers=1, attempts=1, environments=[{"FAREWELL": str(tmp_path / "end")}])) as scorer,
        pytest.raises(EngineError, match=r"UnpicklableError \(this and that\); see the worker's output"),
    ):
        scorer.score(ids("raise"))


@pytest.mark.parametrize(
    ("make", "patience_s", "says"),
    [
        (make_nothing, 60.0, r"a worker died while it started \(exit code 3\).*whether `make` can be imported there"),
        (make_slowly, 0.1, r"a worker did not start within 0.1 s"),
    ],
)
def test_a_process_that_does_not_start_is_an_error(make, patience_s, says):
    with closing(LocalScorer(make, workers=1, patience_s=patience_s)) as scorer, pytest.raises(EngineError, match=says):
        scorer.provenance  # noqa: B018


def test_what_a_process_cannot_import_is_named(monkeypatch):
    monkeypatch.setattr(Small, "__module__", "__main__")
    monkeypatch.setattr("__main__.Small", Small, raising=False)
    with (
        closing(LocalScorer(Small, workers=1)) as scorer,
        pytest.raises(EngineError, match=r"died while it started \(AttributeError: .*Small"),
    ):
        scorer.provenance  # noqa: B018


def test_an_engine_is_not_what_makes_one():
    for wrong in ("student", KEPT):
        with pytest.raises(ArgumentError, match=r"LocalScorer: make is .*, expected a function without arguments that returns an engine"):
            LocalScorer(wrong)


def test_what_may_be_a_secret_is_not_shown():
    make, environments = partial(Servers, "http://host", "model", api_key="hidden"), [{"HF_TOKEN": "hidden"}]
    for shown in (kind(make, workers=1, environments=environments) for kind in (LocalSource, LocalScorer)):
        assert "make=Servers, workers=1" in repr(shown)
        assert "hidden" not in repr(shown)
    assert "hidden" not in repr(VLLMSettings(options={"hf_token": "hidden"}))


@pytest.mark.parametrize(
    ("environments", "said"),
    [
        ({"HF_TOKEN": "hidden"}, "environments is a dict, expected a list; pass a dict for each worker"),
        (None, "environments is None, expected a list"),
        (["hidden", "hidden"], "environment 0 is a str, expected a dict"),
        ([{}, {"HF_TOKEN": 4711}], r"variable 'HF_TOKEN' of environment 1 is an int, expected text; pass `str\(i\)`"),
        ([{}, {4: "hidden"}], "variable 4 of environment 1 is an int, expected text"),
        (
            [{}, {"HF_TOKEN=hidden": ""}],
            "variable 'HF_TOKEN' of environment 1 has '=' in its name, .*which the system refuses; pass `{name",
        ),
        ([{b"HF_TOKEN": b"hidden\0"}, {}], "variable .*HF_TOKEN.* of environment 0 has .*a zero byte"),
        ([{"HF_TOKEN": "hidden\ud800"}, {}], "variable 'HF_TOKEN' of environment 0 has .*half a character"),
    ],
)
def test_what_is_not_an_environment_is_refused_without_its_values(environments, said):
    for kind in (LocalSource, LocalScorer):
        with pytest.raises(ArgumentError, match=f"{kind.__name__}: {said}") as caught:
            kind(Small, environments=environments)
        assert not {"hidden", "4711"} & set(str(caught.value).replace("'", " ").split())
    LocalSource(Small, environments=({}, {"HF_HOME": Path("cache"), b"HF_TOKEN": b"hidden=", "": ""}))


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InvalidRecordError, match="LocalSource: workers is 0"):
        LocalSource(partial(HFSource.from_folder, "policy", SAMPLING), workers=0)
    with pytest.raises(InvalidRecordError, match="number of environments is 1, expected 0 or 2, one per worker"):
        LocalScorer(Small, environments=[{}])
    with pytest.raises(InvalidRecordError, match="LocalScorer: make cannot be sent to another process"):
        LocalScorer(lambda: None)
