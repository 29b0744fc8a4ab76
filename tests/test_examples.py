"""The pages of examples/ run as a user runs them, and do what they say."""

import json
import re
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve
from exchanged import assert_equal_stores
from hub_stub import hub  # noqa: F401
from safetensors.torch import load_file

from lopd import CausalLMStudent, FusedOPDLoss, MemoryStore, ZarrStore, batches, by_token, collect_rollouts, opd_steps, score_rollouts
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.errors import ArgumentError, StoreWriteError, TeacherConsistencyWarning, TokenizerMismatchError
from lopd.protocols.reading import rows_of
from lopd.records import Lineage, LossOutput, SamplingParams, fingerprint_tokenizer, make_prompts
from lopd.testing import ScorerConformance, StoreConformance, tiny_manifest, tiny_rollout, tiny_scores

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGES = sorted(path.stem for path in EXAMPLES.glob("[0-9]*.py"))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def run(monkeypatch, capsys):
    """Return `run(name, *arguments)`: what the page printed, and its names."""

    def run(name, *arguments, as_main=True):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__" if as_main else name)
        return capsys.readouterr().out, names

    return run


def numbers(pattern, text):
    """Return what the groups of a pattern caught, as floats, once for each place where it is found."""
    return [tuple(map(float, found)) if isinstance(found, tuple) else float(found) for found in re.findall(pattern, text)]


def reverse_kl(text):
    return numbers(r"(?:gap to the teacher|reverse KL) ([+-][\d.]+)", text)


def test_the_table_lists_every_example():
    text = (EXAMPLES / "README.md").read_text()
    there = {path.name for path in EXAMPLES.glob("*.py")} | {"recipes"}
    assert set(re.findall(r"\]\(([^)]+)\)", text)) == there
    assert re.findall(r"^\| \[(\d\w+)\.py\]", text, re.MULTILINE) == PAGES, "in the order of their numbers"


@pytest.mark.parametrize("name", PAGES)
def test_every_page_says_what_it_shows_and_where_to_put_your_own(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.startswith('"""')
    assert "from tiny import" in text
    assert re.search(r"# [Rr]eplace these .*by your own", text)


def test_01_the_gradient_by_hand_is_lopds(run):
    out, names = run("01_bare_loop")
    assert names["metrics"].rollouts == len(names["rollouts"]) == 16
    assert names["metrics"].clip_fraction < 0.05
    assert all(float(gradient.abs().max()) > 0 for gradient in names["by_hand"].values())
    assert numbers(r"differ by at most (\S+)", out)[0] < 1e-5


def test_02_what_is_wired_learns(run):
    out, names = run("02_wire_it")
    curve = reverse_kl(out)
    assert len(curve) == 16
    assert np.mean(curve[-4:]) < 0.5 * np.mean(curve[:4])
    assert names["after"].mean < names["before"].mean
    lineage = Lineage.read(Path("runs/02/student"))
    assert lineage.sft_teacher == lineage.opd_teacher == names["scorer"].provenance.model


def test_03_the_second_run_samples_nothing_and_trains_on(run):
    first, _ = run("03_zarr")
    second, _ = run("03_zarr")
    assert "sampled 16 and scored 16 of 16" in first
    assert "sampled 0 and scored 0 of 16" in second
    assert numbers(r"step (\d+)", first) == [0, 1, 2, 3]
    assert numbers(r"step (\d+)", second) == [4, 5, 6, 7]
    assert reverse_kl(second)[-1] < reverse_kl(first)[0]
    assert list(ZarrStore.open("runs/03/store.zarr").verify()) == []


def test_04_queries_agree_with_the_store(run):
    _, names = run("04_lancedb")
    records = names["store"].read(range(len(names["store"])), columns=("teacher",))
    cut = [record.rollout.rollout_id for record in records if record.rollout.finish_reason == "length"]
    assert sorted(name.decode() for name in names["cut"]["rollout_id"].to_pylist()) == sorted(cut)
    assert len(names["first"]) == len(records)
    assert names["least"] == int(np.argmin([record.scores["teacher"].mean() for record in records]))


@pytest.mark.s3
def test_05_only_the_path_is_another(run, s3, monkeypatch):
    for name, value in s3.storage_options.items():
        monkeypatch.setenv(name.upper() if name.startswith("aws") else f"AWS_{name.upper()}", value)
    url = s3.new_url()
    in_a_bucket, names = run("05_s3", url)
    on_a_disk, _ = run("05_s3", "store.zarr")
    assert s3.keys(url)
    assert names["store"].scored("teacher").all()
    assert in_a_bucket == on_a_disk
    assert len(reverse_kl(on_a_disk)) == 4


def test_06_adapters_alone_are_trained_and_saved(run):
    _, names = run("06_lora")
    trained = {name for name, parameter in names["student"].named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert Path("runs/06/adapters/adapter_model.safetensors").exists()
    assert not Path("runs/06/adapters/model.safetensors").exists()
    assert names["after"].mean < names["before"].mean
    assert HFSource.from_folder("runs/06/merged", SamplingParams()).lineage == names["steps"].lineage
    rollouts = [record.rollout for record in names["store"].read(range(4))]
    with torch.no_grad():
        names["student"].model.merge_adapter()
    try:
        pairs = zip(*(HFScorer(model, names["tokenizer"]).score(rollouts) for model in (names["base"], names["merged"])), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
    finally:
        names["student"].model.unmerge_adapter()


def sqlite_store():
    sys.path.insert(0, str(EXAMPLES))
    try:
        return runpy.run_path(str(EXAMPLES / "07_your_own_store.py"))["SqliteStore"]
    finally:
        sys.path.remove(str(EXAMPLES))


SqliteStore = sqlite_store()


class TestSqliteStore(StoreConformance):
    """07: the suite that the page names."""

    @pytest.fixture(autouse=True)
    def _paths(self, tmp_path):
        self.new_path = (tmp_path / f"{i}.sqlite" for i in range(10**6)).__next__

    def make(self, manifest):
        return SqliteStore(self.new_path(), manifest)

    def reopen(self, store):
        return SqliteStore(store.path, store.manifest)


def test_07_the_store_is_filled_and_found_again(run):
    for _ in range(2):
        out, names = run("07_your_own_store")
        assert "holds 16 rollouts, 16 of them scored by teacher@" in out
        assert len(names["again"]) == 16


def test_07_two_who_write_see_each_other(tmp_path):
    one, two = (SqliteStore(tmp_path / "store.sqlite", tiny_manifest()) for _ in range(2))
    one.append([tiny_rollout("a")])
    two.append([tiny_rollout("b")])
    one.append([])
    assert one.find(["a", "b"]).tolist() == two.find(["a", "b"]).tolist() == [0, 1]


def test_07_a_write_that_fails_commits_nothing(tmp_path, monkeypatch):
    store = SqliteStore(tmp_path / "store.sqlite", tiny_manifest())
    store.append([tiny_rollout("a")])
    connect = SqliteStore._connect

    def connect_to_a_full_disk(self):
        log = connect(self)
        log.execute("PRAGMA max_page_count = 1")
        return log

    with monkeypatch.context() as full:
        full.setattr(SqliteStore, "_connect", connect_to_a_full_disk)
        with pytest.raises(StoreWriteError, match="full"):
            store.append([tiny_rollout("b", [5] * 10_000)])
    for seen in (store, SqliteStore(store.path, store.manifest)):
        assert seen.find(["a", "b"]).tolist() == [0, -1]
    store.append([tiny_rollout("b")])
    assert len(store) == 2


def test_08_an_ensemble_scores_between_its_members_and_is_nobodys_sft_teacher(run):
    with pytest.warns(TeacherConsistencyWarning, match="and the scoring teacher is"):
        _, names = run("08_your_own_scorer")
    store = names["store"]
    assert store.scored("teacher").all()
    for record in store.read(range(len(store)), columns=("teacher", "one", "two")):
        mean = (np.exp(record.scores["one"].astype(float)) + np.exp(record.scores["two"].astype(float))) / 2
        np.testing.assert_allclose(np.exp(record.scores["teacher"]), mean, rtol=1e-5, atol=1e-12)
    assert names["steps"].lineage.opd_teacher not in {scorer.provenance.model for scorer in names["scorers"]}


@pytest.fixture(scope="class")
def page_08(tmp_path_factory):
    """Return the names of the page, which was run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("08"))
        patch.syspath_prepend(EXAMPLES)
        with pytest.warns(TeacherConsistencyWarning):
            return runpy.run_path(str(EXAMPLES / "08_your_own_scorer.py"))


class TestEnsemble(ScorerConformance):
    """08: the suite that the page names."""

    @pytest.fixture(autouse=True)
    def _page(self, page_08):
        self.page = page_08

    def make(self):
        return self.page["Ensemble"](*self.page["scorers"])

    def tokenizer(self):
        return self.page["source"].manifest.tokenizer

    def rollouts(self):
        random, size = np.random.default_rng(0), self.tokenizer().vocab_size
        lengths = {"one": 1, "six": 6, "twelve": 12}
        return [tiny_rollout(name, random.integers(0, size, length), prompt_ids=[4, 7]) for name, length in lengths.items()]

    def too_long(self):
        return tiny_rollout("too long", [2] * 128)


def test_08_two_certain_teachers_have_a_certain_mean(page_08):
    rollout = tiny_rollout("certain")

    class Certain:
        def score(self, rollouts):
            return [tiny_scores(one, 0.0) for one in rollouts]

    (scores,) = page_08["Ensemble"](Certain(), Certain()).score([rollout])
    assert scores.logprobs.tolist() == [0.0, 0.0, 0.0]


def test_09_a_killed_run_ends_like_one_that_was_not(run):
    out, _ = run("09_resume_after_a_kill")
    assert "ended with -9; runs/09/killed holds ['step-00000004.0']" in out
    assert numbers(r"killed: step (\d+)", out) == list(range(4, 12)), "those of this process: it went on from the checkpoint"
    assert numbers(r"unbroken: step (\d+)", out) == list(range(12))
    assert "equal, bit for bit" in out
    killed, unbroken = (
        load_file(next(Path("runs/09", name).glob("checkpoints/*/parameters.safetensors"))) for name in ("killed", "unbroken")
    )
    assert killed.keys() == unbroken.keys()
    assert all(torch.equal(killed[name], weights) for name, weights in unbroken.items())


def test_10_rounds_are_begun_when_they_should_be(run):
    out, names = run("10_refresh")
    assert numbers(r"round (\d+) from step (\d+)", out)[:3] == [(0, 0), (1, 3), (2, 6)]
    assert numbers(r"  step (\d+)", out) == list(range(12))
    assert len(set(names["store"].generations.values())) == len(names["store"].generations)
    assert len(names["store"]) == 16 * len(names["store"].generations)
    drift = dict(zip(range(12), numbers(r"sampled ([+-][\d.]+)", out), strict=True))
    assert all(drift[int(start)] == 0 for _, start in numbers(r"round (\d+) from step (\d+)", out))
    assert min(drift[int(start) - 1] for _, start in numbers(r"round (\d+) from step (\d+)", out)[3:]) > 0.02


def test_11_each_rollout_learns_from_the_teacher_of_its_prompt(run):
    out, names = run("11_two_teachers")
    curve = reverse_kl(out)
    assert np.mean(curve[-2:]) < np.mean(curve[:2])
    store, steps, teachers = names["store"], names["steps"], names["teachers"]
    rows = {column: rows_of(store, prompts).tolist() for column, prompts in teachers.items()}
    assert {column: np.flatnonzero(store.scored(column)).tolist() for column in teachers} == rows
    wanted = {tuple(r.scores[column].tolist()) for column, own in rows.items() for r in store.read(own, columns=(column,))}
    for batch in steps.step(0).batches:
        for segment in batch.segment_ids.unique():
            assert tuple(batch.teacher_logprobs[(batch.segment_ids == segment) & (batch.weight > 0)].tolist()) in wanted
    lineage = Lineage.read(Path("runs/11/student"))
    assert lineage.opd_teacher == lineage.sft_teacher
    assert {part.name for part in lineage.opd_teacher.parts} == {"teacher", "teacher2"}


def test_13_one_step_of_trainer_is_one_of_opd_steps(run):
    _, names = run("13_transformers_trainer", as_main=False)
    from tiny import QUESTIONS, model_folders

    student_dir, teacher_dir = model_folders()
    source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12))
    store = MemoryStore(source.manifest)
    collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), store)
    for column, folder in {"teacher": student_dir, "better": teacher_dir}.items():
        score_rollouts(store, HFScorer.from_folder(folder), column=column)
    loss, trained, losses = FusedOPDLoss(ratio_to_ref=True), [], []
    for _ in range(2):
        model, tokenizer = load_model(student_dir, torch.float32)
        trained.append(CausalLMStudent(model, fingerprint_tokenizer(tokenizer)))

    steps = batches(store, rollouts_per_step=16, teacher="better", ref="behavior", weighting=by_token)[:1]
    optimizer = torch.optim.SGD(trained[0].parameters(), lr=0.1)
    losses += [metrics.loss for metrics in opd_steps(trained[0], steps, loss, optimizer)]

    # micro-batches of three, and a last one of one: their tokens are counted together
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 6, "learning_rate": 0.1, "optim": "sgd"}
    trainer = names["make_trainer"](
        trained[1], steps, loss, output_dir="out", max_steps=1, logging_steps=1, lr_scheduler_type="constant", **options
    )
    assert trainer.args.ddp_find_unused_parameters is False, "the default is a raw error on several ranks"
    trainer.train()
    losses.append(trainer.state.log_history[0]["loss"])

    start = load_model(student_dir, torch.float32)[0].parameters()
    ours, theirs = (torch.cat([parameter.detach().flatten() for parameter in student.parameters()]) for student in trained)
    moved = float((ours - torch.cat([parameter.detach().flatten() for parameter in start])).abs().max())
    assert moved > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * moved)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_13_what_to_do_with_a_student_in_place_of_an_option_is_said(run):
    _, names = run("13_transformers_trainer", as_main=False)
    for option, value in {"save_strategy": "steps", "gradient_checkpointing": True, "eval_strategy": "steps", "eval_dataset": [0]}.items():
        with pytest.raises(ArgumentError, match=f"its option {option} is not for a student; leave it out, and .*`"):
            names["make_trainer"](None, None, None, output_dir="out", **{option: value})


def test_13_one_of_several_gpus_is_taken(run, monkeypatch):
    _, names = run("13_transformers_trainer", as_main=False)
    make, arguments = names["make_trainer"], names["TrainingArguments"]

    def with_two_gpus(**options):
        args = arguments(**options)
        args._n_gpu = 2
        return args

    monkeypatch.setitem(make.__globals__, "TrainingArguments", with_two_gpus)
    monkeypatch.setitem(make.__globals__, "Trainer", SimpleNamespace)
    store = MemoryStore(tiny_manifest())
    student, steps = SimpleNamespace(tokenizer=store.manifest.tokenizer), SimpleNamespace(rows=np.arange(2), store=store)
    assert make(student, steps, None, output_dir="out").args.n_gpu == 1
    student.tokenizer = evolve(student.tokenizer, vocab_hash="another")
    with pytest.raises(TokenizerMismatchError, match="expected the student's another"):
        make(student, steps, None, output_dir="out")


def test_13_a_step_in_which_no_token_counts_has_a_loss_of_0(run):
    _, names = run("13_transformers_trainer", as_main=False)
    assert names["mean_over_step"](LossOutput(*torch.zeros(3)), None, torch.tensor(0)) == 0


def test_13_as_a_page(run):
    out, names = run("13_transformers_trainer")
    history = [row["loss"] for row in names["trainer"].state.log_history if "loss" in row]
    assert len(history) == 8
    assert np.mean(history[-2:]) < 0.5 * np.mean(history[:2])
    assert "8 steps" in out
    assert Lineage.read(Path("runs/13/student")).opd_teacher == names["store"].columns["teacher"].model


def test_15_the_text_is_learnt_and_its_writer_is_remembered(run):
    out, _ = run("15_text_you_have")
    losses = numbers(r"loss ([\d.]+)", out)
    assert losses[-1] < 0.2 * losses[0]
    assert "the student remembers its teacher: True" in out
    # 16 answers of one digit, and their ends
    assert "16 texts by teacher, 32 tokens to learn" in out
    assert run("15_text_you_have")[0] == out, "the second run adds nothing to the store"


def test_16_a_student_that_is_told_teaches_itself(run):
    out, names = run("16_privileged_context")
    curve = reverse_kl(out)
    assert np.mean(curve[-4:]) < 0.6 * np.mean(curve[:4])
    assert names["after"].mean < names["before"].mean
    assert names["fresh"].seed != names["store"].manifest.sampling.seed
    assert names["store"].columns["teacher"].is_of(names["store"].manifest.policy) is False
    assert Lineage.read(Path("runs/16/student")).opd_teacher == names["store"].manifest.policy


def test_17_what_the_policy_drew_is_learnt_and_what_a_tool_said_is_not(run):
    out, names = run("17_trajectories")
    curve = reverse_kl(out)
    assert np.mean(curve[-4:]) < 0.5 * curve[0]
    assert numbers(r"differ by at most (\S+)", out)[0] < 1e-4
    for row, record in zip(names["store"].read(range(16)), names["records"], strict=True):
        assert row.rollout.response_ids.tolist() == record["response_ids"]
        assert row.rollout.loss_mask.tolist() == list(map(bool, record["response_mask"]))
    assert Lineage.read(Path("runs/17/student")).opd_teacher == names["store"].columns["teacher"].model
    again, _ = run("17_trajectories")
    assert again == out, "the second run adds nothing to the store"


def test_18_labels_are_filtered_gated_and_mixed(run):
    out, names = run("18_labels")
    assert names["report"].rollouts == len(names["store"]) == 128
    assert 0.1 < names["labels"].mean() < 0.9, "there is something to choose"
    start, *ended = (found.mean for found in names["accuracy"].values())
    assert all(accuracy > start for accuracy in ended), "on the questions that were trained"
    # the page's own labels are the verifier's values of the stored text
    by_hand = [
        float(names["tokenizer"].decode(row.rollout.response_ids, skip_special_tokens=True) == names["answers"][i // 8])
        for i, row in enumerate(names["store"].read(range(128)))
    ]
    assert names["labels"].tolist() == by_hand
    assert "128 rollouts labelled in this run" in out


def test_19_a_file_is_a_whole_run(run):
    out, _ = run("19_command")
    assert out.count("exit code 0") == 3
    assert len(numbers(r"step +(\d+) ", out)) == 8 + 16
    assert "0 problems in 80 rollouts" in out
    assert Path("runs/command/seed-0/report.html").exists()
    again, _ = run("19_command")
    assert "step" not in again.split("$ lopd info")[0]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own client
def test_20_nothing_is_pushed_without_a_name_and_what_is_pushed_comes_back(run, hub):
    out, _ = run("20_share")
    assert "pushed nothing" in out
    assert hub.requests == []
    assert all(Path(f"runs/20/{name}.md").read_text().startswith("---\n") for name in ("student", "rollouts"))
    out, names = run("20_share", "me/student", "me/rollouts")
    assert "32 rollouts came back" in out
    assert_equal_stores(names["again"], names["store"])
    assert all(repository.private for repository in hub.repositories.values())


def test_21_a_server_gives_what_the_same_weights_give_here(run):
    out, names = run("21_served_teacher")
    store = names["store"]
    assert all(store.scored(column).all() for column in ("teacher", "hosted", "here"))
    assert {provenance.model for provenance in store.columns.values()} == {store.manifest.sft_teacher}
    assert max(numbers(r"at most (\S+) nats", out)) < 1e-5


class Logger(ModuleType):
    """A stand-in with the few names that the page calls."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.rows, self.rows_when_finished = [], None

    def init(self, **_):
        return self

    def log(self, row, *, step):
        self.rows.append((step, row))

    def finish(self):
        self.rows_when_finished = len(self.rows)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.finish()


def rows_of_14():
    return [json.loads(line) for line in Path("runs/14/metrics.jsonl").read_text().splitlines()]


def test_14_every_step_is_a_row_of_plain_numbers(run, monkeypatch):
    # test_loggers.py has the real ones, where they are installed
    for name in ("trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, Logger(name))
    out, _ = run("14_loggers")
    rows = rows_of_14()
    assert [row.pop("step") for row in rows] == list(range(8))
    assert {"loss", "reverse_kl", "drift/ess", "drift/advantages/mean", "drift/advantages/q50", "drift/gain/fifth1"} <= rows[0].keys()
    assert all(np.isfinite(value) for row in rows for value in row.values())
    for name in ("trackio", "wandb"):
        assert sys.modules[name].rows == list(enumerate(rows))
        assert sys.modules[name].rows_when_finished == 8
    assert "trackio, wandb: loss, reverse_kl" in out


def test_14_no_logger_is_needed(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out, names = run("14_loggers")
    assert names["logs"] == {}
    assert "numbers a step to JSON lines: loss, reverse_kl" in out
    assert len(rows_of_14()) == 8
