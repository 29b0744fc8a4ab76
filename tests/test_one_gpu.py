"""The recipe for one GPU: its plan, what it refuses, and the whole of it at tiny size, killed and resumed."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from attrs import evolve

from lopd import Lineage, ZarrStore
from lopd.engines.hf import load_model
from lopd.errors import TokenizerMismatchError
from lopd.records import Prompt

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from recipes import one_gpu
from recipes.cards import CARDS, PER_SEED, check_fit, describe, make_plan, room_of
from recipes.compare import Arm, compare, ratio

pytestmark = pytest.mark.filterwarnings("ignore:.*does not read 'enable_thinking'")

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
    """Save two models, and problems with working before the answer, as GSM8K has them."""
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


def test_a_teacher_of_another_vocabulary_is_refused_before_it_writes_anything(monkeypatch, folder, swapped_tokenizer):
    swapped_tokenizer.save_pretrained(folder / "teacher")
    with pytest.raises(TokenizerMismatchError, match=r"Teacher '.*/teacher': the hash of its vocabulary is .* expected the student's"):
        start(monkeypatch, folder, "24gb")
    assert not (folder / "run").exists()


RANDOM = pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning", "ignore::lopd.errors.DriftWarning")


@RANDOM
def test_adapters_from_the_base_model_to_the_table_with_a_kill_between(monkeypatch, folder, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(one_gpu, "train_online", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start(patch, folder, "24gb", dtype="bfloat16")
    out = folder / "run"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    start(monkeypatch, folder, "24gb", dtype="bfloat16")
    assert "OPD - online OPD" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is done stays done"
    found = json.loads((out / "table.json").read_text())
    assert found["online_over_offline_s"] is None, "a resumed phase is not timed"
    arms = {"teacher", "start", "OPD", "online OPD"}
    assert set(found["accuracy"]) == arms | {"OPD - start", "online OPD - start", "OPD - online OPD"}
    assert all(set(of_test) == {"sums", "more"} for of_test in found["accuracy"].values())
    for seed in (42, 43):
        store = ZarrStore.open(str(out / f"seed-{seed}" / "opd.zarr"))
        assert (len(store), store.manifest.sampling.seed) == (6, seed)
        for arm in ("opd", "online"):
            lineage = Lineage.read(out / f"seed-{seed}" / arm)
            assert lineage.sft_teacher.same_weights(lineage.opd_teacher)
    history = json.loads((out / "seed-43" / "phases" / "online-opd.json").read_text())["history"]
    assert [m["step"] for m in history] == [0, 1, 2]


@RANDOM
def test_all_weights_in_one_seed_without_a_kill(monkeypatch, folder):
    start(monkeypatch, folder, "80gb", seeds=1)
    found = json.loads((folder / "run" / "table.json").read_text())
    assert found["online_over_offline_s"]["mean"] > 0
    assert found["online_over_offline_s"]["ci95"] is None, "one seed does not measure others"
    histories = [json.loads((folder / "run/seed-42/phases" / f"{name}.json").read_text())["history"] for name in ("opd", "online-opd")]
    assert all(history[0]["drift"]["ratio_mean"] == pytest.approx(1, abs=1e-4) for history in histories), "both begin where they sampled"


@pytest.fixture(scope="module")
def plans():
    """Return the plans of both cards, as they are."""
    return {name: make_plan(card, 2 * card.test_problems) for name, card in CARDS.items()}


@pytest.mark.parametrize("card", CARDS)
def test_the_plan_of_each_card_fits_it_and_takes_an_evening(plans, card):
    plan = plans[card]
    check_fit(plan, room_of(plan.recipe))
    assert 2 < plan.all_hours < 8
    assert set(PER_SEED) < set(plan.hours) == set(plan.memory)
    assert plan.hours["evaluation of teacher"] > plan.hours["evaluation of start"], "it is the larger one"
    assert plan.hours["online OPD"] > plan.hours["rollouts"] + plan.hours["scores"] + plan.hours["OPD"]


def test_the_page_of_examples_has_the_plans(plans):
    page = (Path(one_gpu.__file__).parents[1] / "README.md").read_text()
    for plan in plans.values():
        assert "\n".join(describe(plan, room_of(plan.recipe))) in page, "print it with --only-estimate"


@pytest.mark.parametrize(
    ("card", "room_gb", "message"),
    [
        ("80gb", 36, "evaluation of start: it takes 39.1 GB .*lower --rows"),
        ("80gb", 0.85 * 24, "SFT: it takes .*expected at most 20.4 GB, 0.85 of the card; .*--lora-rank 64"),
        ("24gb", 14.5, "online OPD: .*--student.*--no-with-online"),
    ],
)
def test_a_card_that_is_too_small_is_refused_with_what_to_do(plans, card, room_gb, message):
    with pytest.raises(SystemExit, match=message):
        check_fit(plans[card], room_gb)


def test_what_does_not_fit_starts_nothing(monkeypatch, folder):
    with pytest.raises(SystemExit, match=r"0\.85 of the card"):
        start(monkeypatch, folder, "24gb", **{"card-gb": 1e-5})
    assert not (folder / "run").exists()
    start(monkeypatch, folder, "24gb", "--only-estimate")
    assert not (folder / "run").exists()


def test_files_that_are_missing_and_tests_that_are_trained_on_are_refused(monkeypatch, folder, capsys):
    monkeypatch.setattr(sys, "argv", ["one_gpu", "24gb", "--out", str(folder / "run")])
    with pytest.raises(SystemExit):
        one_gpu.main()
    assert "--prompts and --test and --sft-prompts are missing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"Test sums: 5 of its 5 problems are trained on"):
        start(monkeypatch, folder, "24gb", prompts=folder / "sums.jsonl")
    with pytest.raises(SystemExit, match=r"Prompts: there are 6, expected at least 8"):
        start(monkeypatch, folder, "24gb", **{"opd-rollouts-per-step": 8})
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([Prompt("0", [9], answer="1")], "Problem '0': tests aime and amc have unlike problems of this id"),
        ([Prompt("0", [1], answer="2")], "Problem '0': tests aime and amc have unlike problems of this id"),
        ([Prompt("1", [2], answer="1")] * 2, "Problem '1': test amc has two problems of this id"),
    ],
)
def test_an_id_of_two_problems_is_refused_and_a_problem_of_two_tests_is_not(more, says):
    recipe, shared = evolve(CARDS["24gb"], opd_rollouts_per_step=1), Prompt("0", [1], answer="1")
    check = partial(one_gpu.check_prompts, recipe, [], [Prompt("p", [7])])
    check({"aime": [shared], "amc": [Prompt("0", [1], answer="1")]})
    with pytest.raises(SystemExit, match=says):
        check({"aime": [shared], "amc": more})


def test_activations_of_a_student_with_adapters_are_computed_again(folder):
    recipe = evolve(CARDS["24gb"], device="cpu", dtype="float32")
    student, _ = one_gpu.make_student(str(folder / "base"), recipe)
    assert all(layer.training and layer.gradient_checkpointing for layer in student.model.get_base_model().model.layers)


def test_an_export_has_the_small_updates_of_adapters_on_16_bit_weights(folder):
    base, tokenizer = load_model(str(folder / "base"), torch.bfloat16)
    base.save_pretrained(folder / "coarse")
    tokenizer.save_pretrained(folder / "coarse")
    student, tokenizer = one_gpu.make_student(str(folder / "coarse"), evolve(CARDS["24gb"], device="cpu"))
    name = "model.layers.0.self_attn.q_proj"
    layer = student.model.get_base_model().get_submodule(name)
    torch.nn.init.constant_(layer.lora_B["default"].weight, 1e-4)
    update = layer.get_delta_weight("default").detach()
    one_gpu.export(student, tokenizer, Lineage(), folder / "merged")
    exported, _ = load_model(str(folder / "merged"), torch.float32)
    change = exported.get_submodule(name).weight - base.get_submodule(name).weight
    assert (change - update).norm() < 0.01 * update.norm()


def arm(name, seed, scores, seconds=(), attempts=1):
    grades = {str(i): {"score": score, "tokens": 3.0, "cut": 0.0} for i, score in enumerate(scores)}
    return Arm(name, seed, {"grades": grades}, [{"wall_s": s, "attempts": attempts} for s in seconds])


def test_differences_are_paired_and_have_both_intervals():
    problems = [Prompt(str(i), [1]) for i in range(4)]
    arms = [
        arm("start", 0, [0, 0, 1, 1]),
        *(arm("OPD", seed, [0, 1, 1, right], [1, 1, 2]) for seed, right in ((0, 1), (1, 0))),
        *(arm("online OPD", seed, [0, 1, 1, 0], [8 + 4 * seed]) for seed in (0, 1)),
    ]
    found = compare(arms, {"sums": problems})
    accuracy = found["OPD"]["sums"]
    assert accuracy.problems.mean == pytest.approx(5 / 8)
    assert accuracy.seeds.ci95 == pytest.approx(12.706 * 0.125, rel=1e-3)  # t of one degree of freedom
    gain = found["OPD - online OPD"]["sums"]
    assert gain.numbers["mean"] == pytest.approx(0.125)
    assert gain.problems.ci95 == pytest.approx(3.182 * 0.125, rel=1e-3)  # of 0, 0, 0 and 0.5
    assert found["start"]["sums"].widths[1] is None
    assert str(found["start"]["sums"]).endswith("± -")
    assert found["online OPD - start"]["sums"].widths[1] is None, "two seeds that agree say nothing of a third"
    assert ratio(arms).mean == pytest.approx((2 + 3) / 2)
    assert ratio([arm("OPD", 0, [1], [1], attempts=2), arm("online OPD", 0, [1], [1])]) is None
    assert ratio(arms[:3]) is None
