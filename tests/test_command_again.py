"""`lopd run` called again with something changed, and what it says of a training."""

import datetime
import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_models import save_model
from test_command_run import example, here, models, written  # noqa: F401
from test_vllm_life import fake  # noqa: F401
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

import lopd
from lopd import ZarrStore
from lopd.engines.vllm import VLLMScorer
from lopd.errors import (
    ConflictError,
    ContextWarning,
    InvalidRecordError,
    PromptWarning,
    QuarantineWarning,
    RefusedPromptsWarning,
    SamplerWarning,
    TrainingWarning,
)
from lopd.tools import phases
from lopd.tools.command import before, main
from lopd.tools.command.before import fixed_by, read_verifier
from lopd.tools.command.settings import read_settings
from lopd.tools.command.whole_run import _AFTER, _BEFORE, _changes, _Seeded
from lopd.tools.command_line import print_json

pytestmark = [
    pytest.mark.filterwarnings("ignore::lopd.errors.DriftWarning"),
    pytest.mark.filterwarnings("ignore::lopd.errors.AdvantageWarning"),
]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("opd.lr", "opd.json"),
        ("loss.clip", "opd.json"),
        ("loss.top_k", "scores.json*"),
        ("sft.steps", "sft.json*"),
        # the section itself: with it or without it, another student samples
        ("sft", "*.json"),
        ("evaluation.verifier, the content of checks.py", "evaluation-before-opd.json"),
        ("evaluation.held_out", "*.json"),
        ("teacher.model, the content of models/teacher", "*.json"),
        ("sampling.top_p", "*.json"),
        ("prompts", "*.attempts"),
        ("prompts.file, the content of prompts.jsonl", "*.attempts"),
    ],
)
def test_what_fixes_a_setting(name, file):
    assert fixed_by(name) == file


def weights(out):
    return (out / "seed-0/opd/model.safetensors").read_bytes()


def test_a_setting_may_change_until_a_phase_has_used_it(here, tmp_path, capsys, monkeypatch):
    def stopped(steps):
        for metrics in steps:
            yield metrics
            if metrics.step == 5:
                raise KeyboardInterrupt

    def run(name, lr):
        small = {"sampling": {"max_new_tokens": 4}, "sft": None, "opd": {"steps": 7, "lr": lr}, "evaluation": {"held_out": 2}}
        return main(["run", written(here, example(**small, out=str(tmp_path / name)))])

    with monkeypatch.context() as patch:
        patch.setattr("lopd.tools.phases.watch_drift", stopped)
        assert run("changed", 1e-3) == 130
    assert list((tmp_path / "changed/seed-0/checkpoints").glob("opd-*/step-*"))
    # a checkpoint of the other rate is there, and nothing is trained from it
    assert run("changed", 2e-3) == run("fresh", 2e-3) == 0
    assert weights(tmp_path / "changed") == weights(tmp_path / "fresh")
    capsys.readouterr()
    assert run("changed", 1e-3) == 2
    done = tmp_path / "changed/seed-0/phases/opd.json"
    assert f"opd.lr is 0.001 now, and was 0.002 when {done} was written; " in (said := capsys.readouterr().err)
    assert f"or remove {done} to do that phase and those after it again" in said
    done.unlink()
    assert run("changed", 1e-3) == 0
    assert "attempts" in capsys.readouterr().out
    assert weights(tmp_path / "changed") != weights(tmp_path / "fresh")
    evaluations = [json.loads((tmp_path / f"{name}/seed-0/phases/evaluation-after-opd.json").read_text()) for name in ("changed", "fresh")]
    assert evaluations[0]["held_out_reverse_kl"] != evaluations[1]["held_out_reverse_kl"]


@pytest.mark.filterwarnings("ignore:.*drop values at random:lopd.errors.ModelWarning")
def test_dropout_gives_the_same_student_whichever_seeds_and_phases_ran_before(here, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained("runs/tiny/student")
    shape = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")

    def run(name, seeds):
        training = {"steps": 2, "lr": 1e-3}
        short = {"sampling": {"max_new_tokens": 4}, "sft": training, "opd": training, "evaluation": None, "seeds": seeds}
        return main(["run", written(here, example(**short, student=str(tmp_path / "gpt2"), out=str(tmp_path / name)))])

    assert run("both", [0, 1]) == run("one", [1]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("lopd.score_rollouts", interrupt)
        assert run("killed", [1]) == 130
    torch.rand(1)
    assert run("killed", [1]) == 0
    for phase in ("sft", "opd"):
        assert len({(tmp_path / f"{name}/seed-1/{phase}/model.safetensors").read_bytes() for name in ("both", "one", "killed")}) == 1
    assert (tmp_path / "both/seed-0/opd/model.safetensors").read_bytes() != (tmp_path / "both/seed-1/opd/model.safetensors").read_bytes()


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "removable"), [("opd.lr", True), ("sft.lr", False), ("loss.top_k", False), ("sampling.seed", False)])
def test_a_file_is_to_be_removed_only_where_its_phase_can_be_done_again(name, removable, tmp_path):
    run = phases.Run(tmp_path)
    run.claim({name: 1}, {}, fixed_by)
    for phase in ("sft", "rollouts", "scores", "opd"):
        phases.write_json(tmp_path / f"seed-0/phases/{phase}.json", {})
    with pytest.raises(ConflictError, match=r"go back to that, or choose another folder") as found:
        run.claim({name: 2}, {}, fixed_by)
    assert ("or remove" in str(found.value)) == removable


def test_a_phase_begins_after_the_card_has_back_what_the_one_before_held(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append("given back"))
    phases.Run(tmp_path).phase("scores", lambda: done.append("worked") or {})
    assert done == ["given back", "worked"]


def test_a_vllm_starts_after_the_card_has_back_what_models_before_held(fake, rollouts, tmp_path, monkeypatch):
    done, start = [], fake.LLM
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append("given back"))
    monkeypatch.setattr(fake, "LLM", lambda **arguments: done.append("started") or start(**arguments))
    VLLMScorer.from_folder(save_model(tmp_path / "tied", "llama_tied")).score(rollouts)
    assert done == ["given back", "started"]


def test_each_seed_notes_a_warning_of_its_own():
    def warn_twice():
        for _ in range(2):
            warnings.warn("the same", TrainingWarning, stacklevel=1)

    noted = []
    with warnings.catch_warnings(record=True):
        # as outside of tests
        warnings.simplefilter("default")
        for _ in range(2):
            with phases.noting() as said:
                warn_twice()
            noted.append(said)
    assert noted == [["TrainingWarning: the same"]] * 2


def test_a_student_stops_where_the_text_of_sft_ends(here, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree("runs/tiny/teacher", teacher)
    for name, ends in (("tokenizer_config.json", {"eos_token": "e"}), ("generation_config.json", {"eos_token_id": 5})):
        (teacher / name).write_text(json.dumps(json.loads((teacher / name).read_text()) | ends))
    small = {"sampling": {"max_new_tokens": 40}, "sft": {"steps": 1, "lr": 1e-3}, "opd": {"steps": 1, "lr": 1e-3}, "evaluation": None}
    file = written(here, example(**small, teacher=str(teacher), out=str(tmp_path / "run")))
    assert main(["run", file]) == 0
    said = "the text ends with token 5, so the student stops there, too"
    assert capsys.readouterr().out.replace("\n", " ").count(said) == 1
    rollouts = [record.rollout for record in ZarrStore.open(tmp_path / "run/seed-0/rollouts.zarr").read(range(16))]
    assert any(rollout.response_ids[-1] == 5 for rollout in rollouts)
    assert not any(5 in rollout.response_ids[:-1] for rollout in rollouts)
    for name in ("sft", "opd"):
        assert GenerationConfig.from_pretrained(tmp_path / "run/seed-0" / name).eos_token_id == [0, 5]


def test_a_gpu_whose_memory_is_full_is_one_sentence(here, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nMore.")

    monkeypatch.setattr("lopd.tools.command.whole_run.run_all", full)
    assert main(["run", written(here, example(out=str(tmp_path / "run")))]) == 2
    said = capsys.readouterr().err
    assert "is too small (CUDA out of memory. Tried to allocate 20 MiB.); lower `rows` where it samples" in said


def test_what_was_warned_of_stands_at_the_end_also_where_all_was_done_before(here, tmp_path, capsys):
    small = {"sampling": {"max_new_tokens": 4}, "sft": None, "evaluation": None}
    opd = {"steps": 4, "lr": 1e-3, "rollouts_per_step": 2}
    # with advantages of up to so many nats every gradient is rounding
    file = written(here, example(**small, opd=opd, loss={"clip": 1e-9}, out=str(tmp_path / "run")))
    with pytest.warns(TrainingWarning):
        assert main(["run", file]) == 0
    printed = capsys.readouterr().out
    last = printed[printed.index("Students, metrics and pages") :].splitlines()[1:]
    assert re.fullmatch(r"seed 0, OPD: TrainingWarning: Training: the gradient was 0 in \d of 4 steps, the first of them step .*", last[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["run", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == last


def test_a_verifier_imports_what_stands_beside_it_whenever_it_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path.parent)  # puts back what is put in front of it
    monkeypatch.chdir(tmp_path)
    Path("beside_the_checks.py").write_text("def right(text):\n    return float(text == 'yes')\n")
    Path("checks.py").write_text("def right(prompt, text):\n    import beside_the_checks\n    return beside_the_checks.right(text)\n")
    verify = [read_verifier("checks.py:right") for _ in range(2)][1]
    monkeypatch.chdir("/")
    assert [verify(lopd.Prompt("a", [1]), text) for text in ("yes", "no")] == [1, 0]
    assert sys.path.count(str(tmp_path.resolve())) == 1


@pytest.mark.parametrize(("total", "printed"), [(16, 16), (45, 24), (300, 21)])
def test_a_long_training_prints_some_twenty_lines(total, printed, capsys):
    assert len([*phases._follow((SimpleNamespace(step=step) for step in range(total)), total)]) == total
    lines = "".join(capsys.readouterr()).splitlines()
    assert len(lines) == printed
    assert lines[-1].endswith(f"({total} of {total})")


def test_a_gradient_that_will_be_biased_is_said_before_anything_is_done(here, tmp_path):
    changes = {"sampling__temperature": 0.7, "evaluation": {"held_out": 2, "verifier": "none.py:right"}, "out": str(tmp_path / "run")}
    with pytest.warns(SamplerWarning, match=r"loss.ratio is false, and sampling has temperature 0.7 .* set it to true"):
        assert main(["run", written(here, example(**changes, loss={"ratio": False}))]) == 2
    assert main(["run", written(here, example(**changes, loss={"ratio": True}))]) == 2, "and nothing is said of this one"


# --- contexts -------------------------------------------------------------------------------------------------------------------------


def seed_that_trains_on(wanted, count):
    """Return a seed that holds out all of so many prompts but these."""
    for seed in range(1000):
        np.random.default_rng(seed).shuffle(order := [*range(count)])
        if {*order[-len(wanted) :]} == wanted:
            return seed
    raise AssertionError


def test_a_prompt_that_does_not_fit_is_said_before_anything_is_done_and_is_not_held_out(here, tmp_path, capsys):
    prompts = ["what is 2 + 1?", "what is 2 + 2?", "what is 2 + 3?", "2 +" * 43 + "?"]
    small = {"sampling": {"max_new_tokens": 4}, "sft": None, "opd": {"steps": 1, "lr": 1e-3}, "prompts": prompts}
    seed = seed_that_trains_on({0, 1}, 4)
    changes = {**small, "evaluation": {"held_out": 2}, "seeds": [seed], "out": str(tmp_path / "run")}
    with pytest.warns(RefusedPromptsWarning):
        assert main(["run", written(here, example(**changes)), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    said = r"RefusedPromptsWarning: Run: 1 of 4 prompts do not fit, .* 130 tokens, expected fewer than the model's context of 128;"
    assert re.match(said, found["warnings"][0])
    assert found["seeds"][str(seed)]["reverse_kl"]["ci95"] > 0
    with pytest.warns(RefusedPromptsWarning):
        assert main(["run", written(here, example(**{**changes, "evaluation": {"held_out": 3}, "out": str(tmp_path / "other")}))]) == 2
    assert "there are 3 that fit, expected more than evaluation.held_out" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_copies_of_a_prompt_are_held_out_as_one_and_an_id_that_is_there_twice_is_refused_at_once(here, tmp_path, capsys):
    texts = ["what is 2 + 1?"] * 5 + ["what is 2 + 2?"] * 2 + ["what is 2 + 3?", "what is 2 + 4?"]

    def prepared(prompts, held_out=3):
        found = read_settings(written(tmp_path, example(prompts=prompts, evaluation={"held_out": held_out}, out=str(tmp_path / "run"))))
        return found, *before.prepare(found)

    with pytest.warns(PromptWarning, match=r"Run: 5 of 9 prompts have the tokens of another, .* drop them"):
        found, prompts, unfit = prepared(texts)
    for seed in range(4):
        run = _Seeded.of(found, seed, prompts, unfit)
        held_out, sampled = ([prompt.text for prompt in part] for part in (run.held_out, run.prompts))
        assert len({*held_out}) == len(held_out) == 3
        assert sorted(sampled) == sorted(text for text in texts if text not in held_out)

    def row(name):
        return run.run.folder / "phases" / f"{name.replace(' ', '-').lower()}.json"

    for name in run._work():
        phases.write_json(row(name), {})
    assert _Seeded.of(found, 3, prompts, unfit) == run, "which has all of its phases"
    row("OPD").unlink()  # so that it and the evaluation after it are done again
    phases.write_json(row(_BEFORE), {"held_out": [prompt.prompt_id for prompt in run.held_out]})
    assert _Seeded.of(found, 3, prompts, unfit) == run
    for others in ({"held_out": ["a", "b", "c"]}, {}):  # nothing was kept of which when copies were several
        phases.write_json(row(_BEFORE), others)
        with pytest.raises(ConflictError, match=r"before-opd.json: other prompts were held out when .* remove it, to do"):
            _Seeded.of(found, 3, prompts, unfit)
    row("SFT").unlink()
    assert _Seeded.of(found, 3, prompts, unfit) == run, "which evaluates before OPD again, too"
    shutil.rmtree(tmp_path / "run/seed-3")
    with pytest.warns(PromptWarning), pytest.raises(InvalidRecordError, match="there are 4 of other tokens each, expected more than"):
        prepared(texts, held_out=4)
    np.random.default_rng(1).shuffle(order := [*range(4)])
    found, prompts, unfit = prepared([f"what is {i} + 1?" for i in range(4)])
    run = _Seeded.of(found, 1, prompts, unfit)
    for name in ("SFT text", "SFT", _BEFORE):
        phases.write_json(row(name), {})
    assert _Seeded.of(found, 1, prompts, unfit) == run
    assert [*run.held_out, *run.prompts] == [prompts[i] for i in order], "what a run did before copies were looked for"
    twice = [{"prompt": f"what is {i} + 1?", "id": "same" if i < 2 else str(i)} for i in range(9)]
    assert main(["run", written(here, example(prompts=twice, out=str(tmp_path / "other")))]) == 2
    assert "Prompt 'same': its id occurs twice" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_rollout_that_may_not_fit_into_a_micro_batch_is_warned_of_before_it_is_drawn(here, tmp_path):
    """By models that read 128 tokens, so that no prompt can get as many new ones as are asked for."""

    def prepared(sft, opd, tokens=500, **changes):
        plans = {"sft__tokens_per_batch": sft, "opd__tokens_per_batch": opd, "sampling__max_new_tokens": tokens, **changes}
        prompts, unfit = before.prepare(read_settings(written(tmp_path, example(**plans, out=str(out), evaluation=None))))
        return max(prompt.token_ids.size for prompt in prompts if prompt.prompt_id not in unfit)

    out = tmp_path / "run"
    for section, plans in (("sft", (126, 127)), ("opd", (127, 126))):
        with pytest.warns(
            TrainingWarning, match=rf"{section}.tokens_per_batch is 126, and a rollout may have 127 positions; .* so raise it"
        ):
            prepared(*plans)
    longest = prepared(127, 127)
    with pytest.warns(TrainingWarning, match=f"and a rollout may have {longest + 3} positions"):
        prepared(longest + 2, 127, tokens=4)
    # a text that is there, and what is drawn, are as long as they are
    text = {"file": written(tmp_path, '{"prompt": "a", "response": "b"}', "text.jsonl"), "written_by": "teacher"}
    prepared(1, 127, text=text)
    prepared(127, 127)
    phases.Run(out / "seed-0").phase("SFT text", dict)
    prepared(1, 127)
    with pytest.warns(TrainingWarning, match=r"sft\.tokens_per_batch is 1, "):
        prepared(1, 127, seeds=[0, 1])
    with pytest.warns(TrainingWarning, match=r"opd\.tokens_per_batch is 1, "):
        prepared(1, 1)
    phases.Run(out / "seed-0").phase("rollouts", dict)
    prepared(1, 1)


def test_a_text_that_the_student_cannot_read_is_left_out_of_sft(here, tmp_path, capsys):
    long, *short = [{"prompt": f"what is {a} + 1?", "response": "2 +" * 70 if a == 0 else str(a + 1)} for a in range(9)]
    changes = {"sampling": {"max_new_tokens": 4}, "opd": {"steps": 1, "lr": 1e-3}, "prompts": [text["prompt"] for text in short]}
    changes |= {"sft": {"steps": 1, "lr": 1e-3, "rollouts_per_step": 8}, "evaluation": None}
    runs = {}
    for name, texts in (("some", [long, *short]), ("all", [long])):
        text = {"file": written(here, "\n".join(map(json.dumps, texts)), f"{name}.jsonl"), "written_by": "teacher"}
        runs[name] = written(here, example(**changes, text=text, out=str(tmp_path / name)), f"{name}.yaml")
    with pytest.warns(ContextWarning, match=r"1 of 9 responses, with their prompts, are longer than the student's context of 128, so they"):
        assert main(["run", runs["some"]]) == 0
    assert main(["run", runs["all"]]) == 2
    assert "1 of 1 responses, with their prompts, are longer than the student's context of 128, so none is left;" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::lopd.errors.TeacherConsistencyWarning")
def test_a_held_out_response_that_the_teacher_cannot_read_is_left_out_before_opd_and_after_it(here, tmp_path, capsys):
    shutil.copytree("runs/tiny/teacher", tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    (tmp_path / "teacher/config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    prompts = [text for i in range(4) for text in (f"2 + {i}?", f"what is 2 + {i}?")]
    small = {"sampling": {"max_new_tokens": 12}, "sft": None, "opd": {"steps": 1, "lr": 1e-3}, "evaluation": {"held_out": 6}}
    changes = {**small, "teacher": str(tmp_path / "teacher"), "prompts": prompts, "seeds": [seed_that_trains_on({0, 1}, 8)]}
    with pytest.warns(ContextWarning), pytest.warns(QuarantineWarning):
        assert main(["run", written(here, example(**changes, consistency="warn", out=str(tmp_path / "run"))), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (change,) = (seed["reverse_kl"] for seed in found["seeds"].values())
    assert change["change"] == pytest.approx(change["after"] - change["before"])
    said = [text.split(": ", 1)[0].split(", ")[1] for text in found["warnings"] if "longer than the teacher's context of 20" in text]
    assert said == [_BEFORE, _AFTER]


def test_a_change_is_over_the_prompts_that_were_measured_before_and_after():
    before, after = {"sums": [2.0, 4.0, 0.0], "counts": [1.0, 2.0, 0.0]}, {"sums": [1.0, 4.0, 9.0], "counts": [1.0, 1.0, 1.0]}
    found = _changes({_BEFORE: {"per_prompt": before}, _AFTER: {"per_prompt": after}})["reverse_kl"]
    assert (found["before"], found["after"], found["change"]) == (2.0, 2.5, 0.5)
    one = {"sums": [2.0, 0.0, 0.0], "counts": [1.0, 0.0, 0.0]}
    assert _changes({_BEFORE: {"per_prompt": one}, _AFTER: {"per_prompt": after}}) == {}, "one prompt has no interval"


def test_an_infinite_kl_is_null_in_json(capsys):
    """A student has a token that its teacher's head lacks."""
    before, after = ({"sums": [1.0, end, 2.0], "counts": [1.0] * 3} for end in (np.inf, 3.0))
    print_json({"seeds": {0: _changes({_BEFORE: {"per_prompt": before}, _AFTER: {"per_prompt": after}})}, "kls": (before["sums"],)})
    found = json.loads(capsys.readouterr().out)
    assert found["seeds"]["0"]["reverse_kl"] == {"before": None, "after": 2.0, "change": None, "ci95": None}
    assert found["kls"] == [[1.0, None, 2.0]]


def with_template(folder, template):
    """Give the example's models this chat template, in a folder of their own; return the settings that name them, and the tokenizer."""
    for role in ("student", "teacher"):
        tokenizer = AutoTokenizer.from_pretrained(f"runs/tiny/{role}")
        tokenizer.chat_template = template
        shutil.copytree(f"runs/tiny/{role}", folder / role)
        tokenizer.save_pretrained(folder / role)
    return {"student": str(folder / "student"), "teacher__model": str(folder / "teacher"), "out": str(folder / "out")}, tokenizer


@pytest.mark.filterwarnings("error::lopd.errors.PromptWarning")
def test_variables_of_the_chat_template_are_those_of_all_prompts_and_stay(here, tmp_path, capsys):
    """Of Qwen3 one switches thinking off."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}{{ ' 7' if enable_thinking is false else '' }}"
    changes, tokenizer = with_template(tmp_path, template)
    file = written(tmp_path, "".join(f'{{"prompt": "what is {i} + 1?"}}\n' for i in range(9)), "p.jsonl")

    def prepared(**prompts):
        made, _ = before.prepare(read_settings(written(tmp_path, example(**changes, prompts={"file": file, **prompts}))))
        return [prompt.token_ids.tolist() for prompt in made]

    found = prepared(chat_template_kwargs={"enable_thinking": False})
    assert all(tokenizer.decode(ids).replace(" ", "").endswith("1?7") for ids in found)
    phases.Run(tmp_path / "out/seed-0").phase("SFT text", dict)
    assert prepared(chat_template_kwargs={"enable_thinking": False}) == found
    with pytest.raises(
        ConflictError, match=r"prompts.chat_template_kwargs is None now, and was {'enable_thinking': False} when .*attempts"
    ):
        prepared()
    sample = ["sample", str(tmp_path / "run.zarr"), "--student", changes["student"], "--prompts", file, "--max-new-tokens", "2"]
    assert main([*sample, "--chat-template-kwargs", '{"enable_thinking": false}']) == 0
    store = ZarrStore.open(tmp_path / "run.zarr")
    assert [record.rollout.prompt_ids.tolist() for record in store.read(range(9))] == found
    capsys.readouterr()
    for wrong, says in (("enable_thinking", "is text that is not JSON"), ("[1]", r"is \[1\], expected a mapping")):
        assert main([*sample, "--chat-template-kwargs", wrong]) == 2
        assert re.search(says, capsys.readouterr().err)


@pytest.mark.filterwarnings("error::lopd.errors.PromptWarning")
def test_a_run_goes_on_with_the_day_on_which_it_was_begun(here, tmp_path, monkeypatch):
    """The chat template of Llama 3.2 writes it: other prompts were sampled the day after, and texts of those that are held out trained on."""
    changes, tokenizer = with_template(tmp_path, "{{ strftime_now('%d') }}{% for message in messages %}{{ message.content }}{% endfor %}")
    settings, found = read_settings(written(tmp_path, example(**changes))), []
    for day in (7, 8):
        monkeypatch.setattr(before, "datetime", SimpleNamespace(now=lambda day=day: datetime.datetime(2026, 1, day)))
        found.append([prompt.token_ids.tolist() for prompt in before.prepare(settings)[0]])
        assert before.day_of(settings, tokenizer) == datetime.date(2026, 1, 7)
    assert found[0] == found[1]
    assert tokenizer.decode(found[1][0]).replace(" ", "").startswith("07what")
    assert before.day_of(settings, AutoTokenizer.from_pretrained(here / "runs/tiny/student")) is None
