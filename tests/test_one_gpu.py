"""The recipe for one GPU: its plan, what it refuses, and the whole of it at tiny size, killed and resumed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve

from lopd import Lineage, ZarrStore
from lopd.records import Prompt

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from recipes import one_gpu
from recipes.cards import CARDS, PER_SEED, check_fit, describe, make_plan, room_of
from recipes.compare import Arm, compare, ratio

TINY = {
    "template": "what is {prompt}?",
    "sft-texts": 8,
    "sft-tokens": 8,
    "sft-steps": 5,
    "sft-rollouts-per-step": 4,
    "rollouts": 6,
    "max-new-tokens": 6,
    "opd-steps": 3,
    "opd-rollouts-per-step": 4,
    "tokens-per-batch": 128,
    "prompt-tokens": 24,
    "test-prompt-tokens": 24,
    "test-tokens": 6,
    "test-samples": 2,
    "test-problems": 5,
    "seeds": 2,
    "device": "cpu",
    "dtype": "float32",
}


@pytest.fixture
def folder(tmp_path, tokenizer, make_model):
    """Two models, and problems with working before the answer, as GSM8K has them."""
    for name, seed in (("teacher", 1), ("base", 2)):
        make_model("qwen3_padded", seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, start in (("sft", 0), ("opd", 20), ("sums", 40), ("more", 60)):
        records = [{"prompt": f"{i} + {i}", "answer": f"{i} twice\n#### {2 * i}"} for i in range(start, start + 12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def start(monkeypatch, folder, card, *flags, **given):
    """Run the recipe in this process."""
    files = {"sft-prompts": folder / "sft.jsonl", "prompts": folder / "opd.jsonl", "out": folder / "run"}
    options = {"teacher": folder / "teacher", "student": folder / "base", "engine": "hf", **files, **TINY, **given}
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    tests = ["--test", str(folder / "sums.jsonl"), str(folder / "more.jsonl")]
    monkeypatch.setattr(sys, "argv", ["one_gpu", card, *words, *tests, *flags])
    one_gpu.main()


@pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning", "ignore::lopd.errors.DriftWarning")  # the models are random
@pytest.mark.filterwarnings(r"ignore:.*does not read 'enable_thinking'")
@pytest.mark.parametrize("card", ["24gb", "80gb"])
def test_both_cards_from_the_base_model_to_the_table_with_a_kill_between(monkeypatch, folder, capsys, card):
    train_online = one_gpu.train_online
    with monkeypatch.context() as patch:
        patch.setattr(one_gpu, "train_online", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start(patch, folder, card)
    out = folder / "run"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    monkeypatch.setattr(one_gpu, "train_online", train_online)
    start(monkeypatch, folder, card)
    printed = capsys.readouterr().out
    assert "OPD - online OPD" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is done stays done"
    found = json.loads((out / "table.json").read_text())
    assert found["online_over_offline_s"] is None, "a resumed phase is not timed"
    assert set(found["accuracy"]) == {
        *("teacher", "start", "OPD", "online OPD"),
        *("OPD - start", "online OPD - start", "OPD - online OPD"),
    }
    assert all(set(of_test) == {"sums", "more"} for of_test in found["accuracy"].values())
    for seed in (42, 43):
        store = ZarrStore.open(str(out / f"seed-{seed}" / "opd.zarr"))
        assert (len(store), store.manifest.sampling.seed) == (6, seed)
        for arm in ("opd", "online"):
            lineage = Lineage.read(out / f"seed-{seed}" / arm)
            assert lineage.sft_teacher.same_weights(lineage.opd_teacher)
    history = json.loads((out / "seed-43" / "phases" / "online-opd.json").read_text())["history"]
    assert [m["step"] for m in history] == [0, 1, 2]


def test_the_plan_of_each_card_fits_it_and_takes_an_evening():
    for card in CARDS.values():
        plan = make_plan(card, 2 * card.test_problems)
        check_fit(plan, room_of(card))
        assert 2 < plan.all_hours < 8
        assert set(PER_SEED) < set(plan.hours)
