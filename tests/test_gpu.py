"""`make gpu` at tiny size on a processor: every part runs, one that fails or takes too long stops no other, and the roofline by hand."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from attrs import evolve

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_step
import record
import roofline
from gpu_device import Device
from gpu_losses import LOSSES, broken_clauses

from lopd.testing import loss_cases

TINY = Device("cpu", tiny=True)

pytestmark = pytest.mark.filterwarnings("ignore::lopd.errors.LopdWarning")  # of random models


@pytest.mark.parametrize("name", [name for name in gpu.PARTS if "1.7B" not in name])
def test_a_part_runs_at_tiny_size_and_meets_its_goals(name, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(record.ROOT / "examples")
    monkeypatch.setattr(sys, "argv", sys.argv)
    found = gpu.here(name, TINY)
    assert found["rows"]
    assert all(goal["met"] for goal in found["goals"])
    assert json.loads(json.dumps(found)) == found


def test_a_part_that_fails_or_takes_too_long_stops_no_other(monkeypatch):
    def launch(name, device, limit_s):
        if name == "losses":
            return gpu.in_a_process("no such part", device, limit_s)
        if name == "engines":
            return gpu.in_a_process("engines", device, 0.01)
        return {"rows": [{"limit_s": limit_s}], "goals": []}

    rows, goals = gpu.run_all(TINY, launch)
    states = {row["part"]: row["state"] for row in rows if "state" in row}
    assert set(states) == set(gpu.PARTS)
    assert states["losses"].startswith("failed: ")
    assert states["engines"] == "failed: it took more than 0 s"
    assert {goal["name"] for goal in goals if not goal["met"]} == {"losses: the part ran", "engines: the part ran"}
    monkeypatch.setattr(gpu, "BUDGET_S", -1)
    rows, _ = gpu.run_all(TINY, launch)
    assert all(row["state"] == "failed: the -1 s were over" for row in rows)


def test_all_parts_together_end_within_the_time():
    assert sum(part.limit_s for part in gpu.PARTS.values()) < gpu.BUDGET_S


def test_waits_for_the_card_are_counted_from_the_first_forward_to_the_last_backward_alone(monkeypatch):
    modes, cpu = ["default"], torch.Tensor.cpu

    def waiting(values):
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return cpu(values)

    def set_mode(mode):
        modes.append(mode)
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations", stacklevel=2
        )

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.Tensor, "cpu", waiting)
    student, steps = gpu_step.begin(gpu_step.Size.of("Qwen3-0.6B", TINY), "sdpa", TINY)
    card = Device("cuda", tiny=True)
    assert gpu_step.waits(student, steps, card) == []
    assert modes[-1] == "default"
    student.model.model.layers[0].register_forward_hook(lambda _module, _inputs, hidden: hidden.cpu())
    places = gpu_step.waits(student, steps, card)
    assert places
    assert all(Path(__file__).name in place for place in places)


def test_the_share_of_the_cards_rate_counts_the_head_for_responses_alone():
    size = gpu_step.Size.of("Qwen3-0.6B", TINY)
    whole, half = (gpu_step.flops(size, 64.0, counted) for counted in (64.0, 32.0))
    assert whole - half == 6 * 32 * size.config["hidden_size"] * size.config["vocab_size"]
    assert gpu_step.flops(size, 64.0, 0.0) == roofline.layer_flops(size.config, 64, 16)


def test_without_a_card_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "sees no card" in capsys.readouterr().err


def test_a_loss_that_is_wrong_is_found():
    def doubled(*arguments):
        output = LOSSES["SFT"][0](*arguments)
        return evolve(output, loss_sum=2 * output.loss_sum)

    broken = broken_clauses(doubled, LOSSES["SFT"][1], torch.device("cpu"), lambda: loss_cases()[:1])
    assert any("as_exact_as_the_plain_ones" in clause for clause in broken)


def test_a_result_of_a_copy_without_history_names_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    path = record.result_file("x", {"machine": {}, "versions": {}}, [], [], tmp_path)
    assert json.loads(path.read_text())["commit"] is None


def test_the_roofline_by_hand():
    config = {
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 3,
    }
    # queries and output 4 * 6 each, keys and values 4 * 3 each, three products of 4 * 8
    assert roofline.layer_parameters(config) == 2 * (2 * 24 + 2 * 12 + 3 * 32)
    flops = 6 * 2 * 168 * 10 + 3 * 2 * 5 * 6 * 2 * 10
    assert roofline.layer_flops(config, 10, 5) == flops
    assert roofline.layer_flops(config, 10, 5, checkpointing=True) == pytest.approx(4 / 3 * flops)
    fast = roofline.Card(1.0, 0.5, 1e30, 1)
    assert roofline.head_seconds(32, 4, 100, fast, roofline.Head(2, 16)) == pytest.approx(3 * 2 * 32 * 4 * 100)
    assert roofline.head_seconds(32, 4, 100, fast, roofline.Head(4, 16)) == pytest.approx(2 * 3 * 2 * 32 * 4 * 100)
    slow = roofline.Card(1e30, 1e30, 1.0, 1)
    logits, gradient, weight, sums = 4 * 1600, 2 * 1600, 2 * 400, 8 * 400
    chunk = weight + logits + gradient + weight + gradient + sums + 2 * logits + gradient
    assert roofline.head_seconds(32, 4, 100, slow, roofline.Head(2, 16)) == pytest.approx(2 * chunk)
    # read in four bytes and written in two, for two of the products
    converted = 2 * (4 * 400 + 2 * 400)
    assert roofline.head_seconds(32, 4, 100, slow, roofline.Head(2, 16, weights=4)) == pytest.approx(2 * (chunk + converted))


def test_models_of_the_roofline_have_their_sizes():
    billions = [
        roofline.layer_parameters(config) + (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * config["hidden_size"]
        for config in roofline.MODELS.values()
    ]
    assert [size / 1e9 for size in billions] == pytest.approx([0.6, 1.72, 8.19], rel=0.01)
