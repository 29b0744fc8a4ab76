"""The phases of a run: what they ask of a GPU, what is kept of them, and how often a training is saved."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TOKENIZER_ID
from small_runs import adamw, scored, small, teacher_model  # noqa: F401

from lopd import CausalLMStudent, FusedOPDLoss, MemoryStore, batches, by_token, label_rollouts, save_checkpoint
from lopd.errors import ConflictError, StoreWriteError
from lopd.losses.reference import SFTLoss
from lopd.losses.variants import add_labels
from lopd.records import Lineage, Ranks, StepMetrics
from lopd.tools import phases
from lopd.tools.phases import Run, digest, resumably, set_rate, train_phase, write_json


def test_a_phase_does_not_ask_whether_there_is_a_gpu(tmp_path, monkeypatch):
    """In a process that has asked, vLLM is forked without a way to CUDA."""

    def ask():
        pytest.fail("it asked")

    monkeypatch.setattr(torch.cuda, "is_available", ask)
    assert Run(tmp_path).phase("rollouts", lambda: {"refused": 0})["refused"] == 0


def test_what_tools_leave_in_a_models_folder_is_none_of_its_content(tmp_path):
    folder = tmp_path / ".cache/model"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts/model.safetensors").write_bytes(b"weights")
    before = digest(str(folder))
    for name in (".DS_Store", ".git/HEAD", ".cache/huggingface/download/config.json.metadata", "parts/.gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of now")
    assert digest(str(folder)) == before
    (folder / "parts/model.safetensors").write_bytes(b"others")
    assert digest(str(folder)) != before


@pytest.mark.parametrize(
    ("step_s", "save_s", "saved"), [(0.1, 0.9, [*range(5, 101, 5)]), (1.0, 3.0, [5, 35, 65, 95]), (1.0, 0.3, [*range(5, 101, 5)])]
)
def test_saving_takes_a_small_share_of_a_training(tmp_path, monkeypatch, small, step_s, save_s, saved):
    clock, made = SimpleNamespace(now=0.0), []

    def train(done):
        for step in range(done, 100):
            clock.now += step_s
            yield StepMetrics(step, 0.0, 0.0, 0.0, 0.0, 4, 48, 1.0, None)

    def save(*_, next_step, **__):
        clock.now += save_s
        made.append(next_step)

    monkeypatch.setattr(phases, "monotonic", lambda: clock.now)
    monkeypatch.setattr(phases, "load_checkpoint", lambda *_, **__: 0)
    monkeypatch.setattr(phases, "save_checkpoint", save)
    assert len(resumably(tmp_path, *small, Lineage(), train, total=100, seed=0)) == 100
    assert made == saved


def test_no_rank_waits_for_one_whose_disk_is_full(tmp_path, monkeypatch, small):
    full = StoreWriteError("Metrics: the disk is full, expected space; free some.")
    monkeypatch.setattr(Ranks, "current", lambda: Ranks(1, 2))
    monkeypatch.setattr(Ranks, "gather", lambda _, mine: [full, *mine])
    monkeypatch.setattr(phases, "load_checkpoint", lambda *_, **__: 0)
    monkeypatch.setattr(phases, "save_checkpoint", lambda *_, **__: pytest.fail("it waits for rank 0"))
    with pytest.raises(StoreWriteError, match="the disk is full"):
        resumably(tmp_path, *small, Lineage(), lambda _: [StepMetrics(4, 0.0, 0.0, 0.0, 0.0, 4, 48, 1.0, None)], total=5, seed=0)


def test_what_a_run_keeps_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name))
    write_json(tmp_path / "phases/sft.json", {})
    assert flushed == ["sft.json", "phases"]


def test_of_two_processes_that_write_one_file_at_once_the_later_one_is_there_whole(tmp_path, monkeypatch):
    path, flush = tmp_path / "phases/sft.json", phases.flush

    def between(*paths):
        monkeypatch.undo()
        write_json(path, ["the other"] * 9)
        assert json.loads(path.read_text()) == ["the other"] * 9
        flush(*paths)

    monkeypatch.setattr(phases, "flush", between)
    write_json(path, ["mine"])
    assert json.loads(path.read_text()) == ["mine"]
    assert [path.name for path in path.parent.iterdir()] == ["sft.json"]


@pytest.mark.parametrize("file", ["sft.json", "sft.attempts"])
def test_what_is_kept_of_a_phase_and_cannot_be_read_is_named(tmp_path, file):
    write_json(tmp_path / "phases" / file, 1)
    (tmp_path / "phases" / file).write_bytes(b"")
    with pytest.raises(ConflictError, match=rf"File .*phases/{file}: it cannot be read .*, expected what a run wrote; remove it"):
        Run(tmp_path).phase("SFT", dict)


def test_a_checkpoint_without_the_metrics_of_its_steps_is_not_gone_on_with(tmp_path, small):
    save_checkpoint(tmp_path, *small, next_step=5, lineage=Lineage())
    for damage in (lambda path: None, Path.touch):
        damage(tmp_path / "history.json")
        with pytest.raises(ConflictError, match=rf"File .*history.json: it cannot be read .*; restore it, or remove {tmp_path}\.$"):
            resumably(tmp_path, *small, Lineage(), lambda _: [], total=9, seed=0)


def test_a_rate_that_a_decay_made_low_is_not_told_to_be_raised(tmp_path, small, scored):
    steps = batches(scored, teacher=None, rollouts_per_step=7)[:10_000]
    set_rate(small[1], 1e-11, 1e-8)
    save_checkpoint(tmp_path, *small, next_step=9_999, steps=steps)
    write_json(tmp_path / "history.json", [])
    found = train_phase(tmp_path, *small, steps, SFTLoss(), rate=lambda step: 1e-8 * (1 - step / 10_000))
    assert [metrics["step"] for metrics in found["history"]] == [9_999]
    # a run may be killed between its last step and its export
    assert train_phase(tmp_path, *small, steps, SFTLoss(), rate=lambda _: 1e-8)["history"] == found["history"]


def test_rewards_alone_are_trained_on_without_a_watch_of_drift(tmp_path, small, scored):
    store = MemoryStore(scored.manifest)
    store.append([record.rollout for record in scored.read(range(len(scored)))])
    label_rollouts(store, lambda _, rollout: float(rollout.response_ids[0] % 2), None)
    steps = batches(store, rollouts_per_step=14, teacher=None, label="label", ref="behavior", weighting=by_token)[:1]
    loss = FusedOPDLoss(advantage=0.0, ratio_to_ref=True, transforms=(add_labels,))
    assert len(train_phase(tmp_path, *small, steps, loss, rate=lambda _: 1e-3)["history"]) == 1


def test_what_dropout_draws_follows_from_the_seed_and_not_from_the_caller(tmp_path, make_model, scored):
    def train(name, seed=0):
        student = CausalLMStudent(make_model("gpt2_dropout"), TOKENIZER_ID)
        steps = batches(scored, teacher=None, rollouts_per_step=len(scored), seed=seed)[:2]
        torch.manual_seed(len(name))
        state = torch.get_rng_state()
        found = train_phase(tmp_path / name, student, adamw(student), steps, SFTLoss(), rate=lambda _: 1e-3)
        assert torch.equal(torch.get_rng_state(), state)
        return [step["loss"] for step in found["history"]]

    assert (first := train("first")) == train("a second time")
    # by the order of rollouts alone, a step that has all of them would be rounded otherwise
    assert train("another seed", 1)[0] != pytest.approx(first[0], rel=1e-4)


def test_what_is_drawn_in_a_run_that_samples_as_it_trains_follows_from_its_seed(tmp_path, small):
    def train(name, seed, callers, stop=6):
        drawn = []

        def begin(done):
            for step in range(done, stop):
                drawn.append(float(torch.rand(1)))
                yield StepMetrics(step, 0.0, 0.0, 0.0, 0.0, 4, 48, 1.0, None)

        torch.manual_seed(callers)
        state = torch.get_rng_state()
        resumably(tmp_path / name, *small, Lineage(), begin, total=6, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return drawn

    first = train("first", 0, 1)
    assert train("second", 0, 2) == first != train("another seed", 1, 1)
    assert train("killed", 0, 3, stop=5) + train("killed", 0, 4) == first
