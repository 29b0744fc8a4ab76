"""`lopd run`, `lopd sample` and `lopd score`: files that are refused, runs that are killed, servers."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import yaml
from attrs import fields
from other_stubs import CompletionsStub
from served_table import MODEL, make_rollouts, truth
from vllm_stub import Stub

import lopd
from lopd import FusedOPDLoss, Lineage, Manifest, ModelId, SamplingParams, ZarrStore, open_store
from lopd.engines.hf import HFSource
from lopd.errors import InvalidRecordError
from lopd.records import fingerprint_tokenizer
from lopd.testing import tiny_manifest
from lopd.tools.command import COMMANDS, main, settings
from lopd.tools.command.models import Model
from lopd.tools.command.settings import read_settings
from lopd.tools.command.whole_run import _Seeded

EXAMPLES = Path(__file__).parents[1] / "examples"
PHASES = ["SFT text", "SFT", "evaluation before OPD", "rollouts", "scores", "OPD", "evaluation after OPD"]
EXAMPLE = (Path(settings.__file__).with_name("example.yaml")).read_text()

pytestmark = pytest.mark.filterwarnings("ignore::lopd.errors.DriftWarning", "ignore::lopd.errors.AdvantageWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folder in which the example's models are, as it names them."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path(str(EXAMPLES / "tiny.py"), run_name="__main__")
    return folder


@pytest.fixture
def here(models, monkeypatch):
    monkeypatch.chdir(models)
    monkeypatch.syspath_prepend(models)
    return models


def example(**changes):
    """Return the example with other values at these paths, written with two underscores; None takes a key away."""
    data = yaml.safe_load(EXAMPLE)
    # PyYAML by itself takes these for text
    data["sft"]["lr"], data["opd"]["lr"] = float(data["sft"]["lr"]), float(data["opd"]["lr"])
    for path, value in changes.items():
        *above, key = path.split("__")
        inner = data
        for name in above:
            inner = inner[name]
        inner[key] = value
        if value is None:
            del inner[key]
    return data


def written(folder, text, name="run.yaml"):
    (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))
    return str(folder / name)


# --- the file -------------------------------------------------------------------------------------------------------------------------


def test_the_example_shows_every_key_and_the_defaults_of_the_code(tmp_path, capsys):
    assert main(["run", "--example"]) == 0
    assert capsys.readouterr().out == EXAMPLE
    # what None stands for
    other = {"clip": FusedOPDLoss().clip, "rollouts_per_step": 256, "ratio": True, "wait": 10}
    for kind in (
        Model,
        *(getattr(settings, name) for name in ("Sampling", "Training", "Loss", "Prompts", "Text", "Evaluation", "RunSettings")),
    ):
        assert [f.name for f in fields(kind) if f"{f.name}:" not in EXAMPLE] == []
        for name, default in ((f.name, other.get(f.name, f.default)) for f in fields(kind)):
            if isinstance(default, int | float | str):
                word = re.escape(str(default).lower())
                assert re.search(rf"# +{name}: \"?{word}\"?\s|{name}: .*# (by default {word}\b|{word} \(by default)", EXAMPLE + " "), (
                    name,
                    default,
                )
    read = read_settings(written(tmp_path, EXAMPLE))
    assert (read.sft.lr, read.opd.lr) == (1e-3, 3e-4)
    assert read_settings(written(tmp_path, example(), "run.json")) == read


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"techer": "a"}, r"it has 'techer', which this version of lopd does not know \(is it 'teacher'\?\)"),
        ({"opd__stepz": 3}, r"opd has 'stepz', .* \(is it 'steps'\?\)"),
        ({"opd__learning_rate": 1e-3}, r"opd has 'learning_rate', .* \(is it 'lr'\?\)"),
        ({"teacher__api_key": "sesame"}, r"teacher has 'api_key', which .* know"),
        ({"student": None}, "it lacks 'student'"),
        ({"opd__lr": None}, "opd lacks 'lr'"),
        ({"opd__steps": "many"}, "opd.steps is 'many', expected a whole number"),
        ({"opd__steps": True}, "opd.steps is True, expected a whole number"),
        ({"opd__steps": 0}, "opd does not fit: Training: steps is 0, expected at least 1"),
        ({"opd__lr": "fast"}, "opd.lr is 'fast', expected a finite number"),
        ({"opd__lr": -1.0}, "opd does not fit: Training: lr is -1.0, expected more than 0"),
        ({"opd__weighting": "word"}, "opd.weighting is 'word', expected 'rollout' or 'token'"),
        ({"seeds": 3}, "seeds is 3, expected a list"),
        ({"seeds": [1, 1]}, r"seeds are \[1, 1\], expected one or several"),
        ({"prompts": {"a": 1}}, "prompts has 'a', which"),
        ({"prompts": 3}, "prompts is 3, expected an object"),
        ({"prompts": ["a", 3]}, "prompts.1 is 3, expected text"),
        ({"teacher__engine": "warp"}, "teacher does not fit: Model: engine is 'warp', expected 'hf', 'vllm' or the URLs"),
        ({"student": {"model": "a", "engine": "http://b"}}, "student.engine is a server"),
        ({"teacher__engine": ["http://b"]}, "evaluation.reverse_kl needs the teacher here"),
        ({"teacher__wait": 5}, "teacher does not fit: Model: wait is given, and this engine does not read it"),
        ({"teacher": {"model": "a", "engine": "http://b", "wait": 0}}, "teacher does not fit: Model: wait is 0, expected more than 0"),
        ({"teacher__revision": "abc"}, "teacher does not fit: Model: revision is given without dtype"),
        ({"loss__kind": "reverse_kl"}, "loss does not fit: Loss: 'reverse_kl' needs top_k"),
        ({"sft": None, "text": {"file": "a", "written_by": "teacher"}}, "text is given without sft"),
        ({"text": {"file": "a.jsonl"}}, "text lacks 'written_by'"),
        ({"evaluation__held_out": 1}, "held_out is 1, expected at least 2"),
        ({"evaluation__verifier": "checks"}, "verifier is 'checks', expected FILE.py:FUNCTION"),
    ],
)
def test_a_key_that_makes_no_sense_is_named_with_its_path(changes, says, tmp_path):
    with pytest.raises(InvalidRecordError, match=rf"Run file .*run.yaml: .*{says}.*; correct it") as caught:
        read_settings(written(tmp_path, example(**changes)))
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("out: [", "expected the node content, but found .* in line 1"),
        ("out: a\nout: b", "the key 'out' is there twice in line 1"),
        ("", "it is None, expected an object"),
        (b"\xff", "it cannot be read"),
    ],
)
def test_what_is_not_yaml_is_one_sentence(text, says, tmp_path, capsys):
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["run", str(tmp_path / "run.yaml")]) == 2
    with pytest.raises(InvalidRecordError, match=says):
        read_settings(tmp_path / "run.yaml")
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["run", "a.yaml"],
        ["sample", "s", "--student", "a", "--prompts", "b"],
        ["score", "s", "--teacher", "a"],
        ["plan", "--card", "24", "--student", "a"],
    ],
)
def test_a_package_that_is_missing_is_one_sentence(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    ZarrStore.create("s", tiny_manifest())
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "lopd.engines.finding", raising=False)
    assert main(words) == 2
    assert capsys.readouterr().err.endswith("transformers is not installed; pip install 'lopd[hf]'.\n")


def test_a_call_without_a_file_and_a_file_that_is_not_there_are_unusable(tmp_path, capsys):
    assert main(["run"]) == 2
    assert "`lopd run --example` prints one" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_the_page_and_the_words_of_the_help_agree_with_the_code(tmp_path):
    page = (EXAMPLES.parent / "docs/howto/command.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert read_settings(written(tmp_path, block)).sft.lr == 1e-5
    assert [phase for phase in PHASES if f"| {phase} |" not in page] == []
    assert [word for word in COMMANDS if f"`lopd {word} " not in page and f"\nlopd {word} " not in page] == []


# --- the run --------------------------------------------------------------------------------------------------------------------------


def results(out):
    """Return what the phases of a run found, and the weights of its student; not when, nor how often they were begun."""
    found = {}
    for path in sorted((out / "seed-0/phases").glob("*.json")):
        row = json.loads(path.read_text())
        found[row["name"]] = {
            key: value for key, value in row.items() if key not in {"wall_s", "attempts", "peak_rss_gib", "history", "warnings"}
        }
        found[row["name"]]["losses"] = [step["loss"] for step in row.get("history", ())]
    rows = ZarrStore.open(out / "seed-0/rollouts.zarr")
    hashes = [row.rollout.content_hash for row in rows.read(range(len(rows)))]
    return found, hashes, (out / "seed-0/opd/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(models):
    """Run the example as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        assert main(["run", written(models, EXAMPLE)]) == 0
    return models / "runs/command"


def test_the_example_does_every_phase_and_the_student_knows_its_teacher(unbroken):
    found, hashes, _ = results(unbroken)
    assert sorted(found) == sorted(PHASES)
    assert (len(hashes), len(found["OPD"]["losses"])) == (80, 16)
    assert [ZarrStore.open(unbroken / f"seed-0/{name}.zarr").manifest.sampling.seed for name in ("text", "rollouts")] == [1_000_000, 0]
    lineage = Lineage.read(unbroken / "seed-0/opd")
    assert lineage.sft_teacher == lineage.opd_teacher == Lineage.of(unbroken.parent / "tiny/teacher").sft_teacher
    page = (unbroken / "seed-0/report.html").read_text()
    assert all(name in page for name in [*PHASES, "Lightning OPD, seed 0"])


def test_a_second_call_finds_everything_done_and_json_is_the_summary(unbroken, here, capsys):
    before = results(unbroken)
    capsys.readouterr()
    assert main(["run", "run.yaml", "--json"]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    change = summary["seeds"]["0"]["reverse_kl"]
    assert change["change"] == pytest.approx(change["after"] - change["before"])
    assert change["ci95"] > 0
    assert (summary["refused"], summary["over_seeds"]) == (0, {})
    assert "evaluation after OPD" in printed.err
    assert results(unbroken) == before


def test_other_settings_or_other_content_in_the_same_folder_are_refused(unbroken, here, capsys):
    assert main(["run", written(here, example(opd__steps=13), "other.yaml")]) == 2
    assert "opd.steps is 13 now, and was 16 when runs/command/seed-0/phases/opd.json was written; go back" in capsys.readouterr().err
    assert main(["run", written(here, example(prompts=[f"a{i}" for i in range(20)]), "other.yaml")]) == 2
    said = capsys.readouterr().err
    assert "prompts is '" in said
    assert "phases/sft-text.attempts was written; go back to that, or choose another folder.\n" in said
    config = here / "runs/tiny/teacher/config.json"
    before = config.read_bytes()
    config.write_bytes(before + b"\n")
    try:
        assert main(["run", "run.yaml"]) == 2
    finally:
        config.write_bytes(before)
    assert "the content of runs/tiny/teacher is" in capsys.readouterr().err


def run_there(folder, file):
    """Run a file in a process of its own."""
    os.chdir(folder)
    raise SystemExit(main(["run", file]))


def test_a_run_that_is_killed_in_every_phase_equals_one_that_was_not(unbroken, here, tmp_path):
    os.mkfifo(printed := tmp_path / "printed")
    file, out = written(here, example(out=str(tmp_path / "run")), "killed.yaml"), tmp_path / "run"
    killed = []
    # a line that begins so is printed in the phase: its rule, or a step after a checkpoint
    for phase, moment in zip(PHASES, ("", "step    6", "", "", "", "step    6", ""), strict=True):
        process = forked.start(run_there, printed, here, file)
        with printed.open() as lines:
            seen = any(line.startswith(f"{phase} ─") for line in lines) and any(line.startswith(moment) for line in lines)
            process.kill()
        process.join()
        assert seen
        killed.append(process.exitcode)
    last = forked.start(run_there, tmp_path / "last", here, file)
    last.join(100)
    assert last.exitcode == 0, (tmp_path / "last").read_text()
    assert results(out) == results(unbroken)
    # on a busy machine a signal may come when the phase, or the last one, has just ended
    again = [path.stem for path in (out / "seed-0/phases").glob("*.attempts") if json.loads(path.read_text()) == 2]
    assert killed == [-9] * len(PHASES)
    assert again, "no phase was killed before its end"


def test_seeds_and_texts_and_a_verifier_and_a_loss_on_the_top_k(here, tmp_path, capsys):
    lines = [{"prompt": f"what is {a} + 1?", "response": str(a + 1)} for a in range(8)]
    text = written(here, "\n".join(map(json.dumps, lines)), "text.jsonl")
    (here / "checks.py").write_text("def right(prompt, text):\n    return float(prompt.answer in text)\n")
    changes = {
        "out": str(tmp_path / "run"),
        "store": str(tmp_path / "stores"),
        "seeds": [3, 4],
        "prompts": [{"prompt": line["prompt"], "answer": line["response"]} for line in lines],
        "text": {"file": text, "written_by": "teacher"},
        "loss": {"kind": "reverse_kl", "top_k": 4},
        "evaluation": {"held_out": 3, "verifier": "checks.py:right", "reverse_kl": False},
        "sampling__samples_per_prompt": 1,
        "sft": {"steps": 2, "lr": 1e-3, "rollouts_per_step": 4, "warmup": 1, "decay": True, "weighting": "token"},
        "opd": {"steps": 2, "lr": 1e-3, "rollouts_per_step": 4},
    }
    assert main(["run", written(here, example(**changes)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    gains = [found["seeds"][seed]["score"]["change"] for seed in ("3", "4")]
    assert found["over_seeds"]["score"]["mean"] == pytest.approx(np.mean(gains))
    stores = [open_store(tmp_path / f"stores/seed-{seed}/rollouts.zarr") for seed in (3, 4)]
    assert [store.columns["teacher"].top_k for store in stores] == [4, 4]
    assert [row.rollout.content_hash for row in stores[0].read(range(5))] != [row.rollout.content_hash for row in stores[1].read(range(5))]
    texts = ZarrStore.open(tmp_path / "stores/seed-3/text.zarr")
    assert (len(texts), texts.manifest.policy) == (8, Lineage.of(here / "runs/tiny/teacher").sft_teacher)
    # a seed more is not another run
    assert main(["run", written(here, example(**changes) | {"seeds": [3]}), "--json"]) == 0


@pytest.fixture
def trained(monkeypatch):
    """Return how many rollouts each training has to choose from, in their order."""
    counts, made = [], lopd.batches

    def counted(*arguments, **options):
        steps = made(*arguments, **options)
        counts.append(len(steps.rows))
        return steps

    monkeypatch.setattr(lopd, "batches", counted)
    return counts


def test_texts_that_answer_held_out_prompts_are_not_trained_on(here, tmp_path, capsys, trained):
    """The template of the prompts is theirs too: without it no prompt would be known again."""
    lines = [{"prompt": f"what is {a} + 1?", "response": str(a + 1)} for a in range(8)]
    prompts = written(here, "\n".join(json.dumps({"prompt": line["prompt"]}) for line in lines), "prompts.jsonl")
    changes = {
        "out": str(tmp_path / "run"),
        "prompts": {"file": prompts, "template": "Q: {prompt}"},
        "text": {"file": written(here, "\n".join(map(json.dumps, lines)), "all.jsonl"), "written_by": "teacher"},
        "evaluation": {"held_out": 3},
        "sampling__samples_per_prompt": 1,
        "sft": {"steps": 1, "lr": 1e-3, "rollouts_per_step": 5},
        "opd": {"steps": 1, "lr": 1e-3, "rollouts_per_step": 4},
    }
    assert main(["run", written(here, example(**changes))]) == 0
    assert "3 of 8 responses answer prompts that are held out" in capsys.readouterr().out
    phases = {phase["name"]: phase for phase in json.loads((tmp_path / "run/seed-0/metrics.json").read_text())["phases"]}
    assert phases["SFT text"]["rollouts"] == 8
    assert trained == [5, 5], "texts, and then rollouts"


def test_a_student_that_is_stored_in_bfloat16_is_evaluated_in_float32_before_opd_as_after_it(here, monkeypatch):
    def stop(folder, sampling, dtype=None, device="cpu", **_):
        raise RuntimeError(f"{folder} in {dtype}")

    monkeypatch.setattr(HFSource, "from_folder", stop)
    s = read_settings(written(here, example()))
    with pytest.raises(RuntimeError, match=r"student in torch\.float32"):
        _Seeded.of(s, 0, [], set())._evaluate(s.evaluation, "student")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def right(prompt, rollout):\n    return rollout.response_ids", r"it raised AttributeError\(.*; it takes a prompt and the text"),
        ("def right(prompt, text):\n    exit('http://me:w@host/v1?w')", r"it raised SystemExit\('http://host/v1 for prompt"),
        ("def right(prompt, text):\n    return 3", "it gave 3 for prompt .*; it takes .* and gives a number from 0 to 1"),
        ("def right(prompt, text):\n    return float('nan')", "it gave nan for prompt"),
        ("def right(prompt, text)\n    return 1", r"the file cannot be run \(SyntaxError\("),
        ("import sys; sys.exit(0)", r"the file cannot be run \(SystemExit\("),
        ("{}['right']", r"the file cannot be run \(KeyError\('right'\)\)"),
        ("", "there is no such function; correct it"),
    ],
)
def test_a_verifier_that_fails_is_said_before_anything_is_done(code, says, here, tmp_path, capsys):
    (here / "broken.py").write_text(code)
    assert main(["run", written(here, example(out=str(tmp_path / "run"), evaluation={"held_out": 2, "verifier": "broken.py:right"}))]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(f"broken.py:right(: |, and ){says}", said), said
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_did_not_write_the_text_of_sft_is_refused_before_anything_is_done(here, tmp_path, capsys):
    text = written(here, json.dumps({"prompt": "what is 1 + 1?", "response": "2"}), "one.jsonl")
    out = {"out": str(tmp_path / "run")}
    for writer, remedy in (("unknown", "state who wrote it in `text.written_by`"), ("runs/tiny/student", "score with the SFT teacher")):
        assert main(["run", written(here, example(text={"file": text, "written_by": writer}, **out))]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(f"and the scoring teacher is [^;]+; {remedy}[^;]*, or set `consistency: warn`.$", said), said
        assert "residual" not in said, "no run can do that"
    # without SFT the student's folder records who wrote its text
    swapped = {"student": "runs/tiny/teacher", "teacher": "runs/tiny/student", "sft": None}
    assert main(["run", written(here, example(**swapped, **out))]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"its SFT teacher is not recorded, [^;]+; add `sft`, or write `Lineage[^;]*, or set `consistency: warn`.$", said), said
    assert not (tmp_path / "run").exists()


def test_without_sft_the_student_is_the_policy_that_samples(here, tmp_path):
    small = {"opd": {"steps": 1, "lr": 1e-3}, "sampling": {"max_new_tokens": 4}, "evaluation": None}
    assert main(["run", written(here, example(sft=None, out=str(tmp_path / "run"), **small))]) == 0
    store = ZarrStore.open(tmp_path / "run/seed-0/rollouts.zarr")
    assert store.manifest.policy == Model("runs/tiny/student").identity()
    assert len(store) == 16


def test_too_few_prompts_are_refused_before_anything_is_done(here, tmp_path, capsys):
    assert main(["run", written(here, example(prompts=["a", "b"], out=str(tmp_path / "few")))]) == 2
    assert "there are 2, expected more than evaluation.held_out" in capsys.readouterr().err
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluation__verifier": "none.py:right"}, "evaluation.verifier is none.py, which cannot be read"),
        ({"prompts": "none.jsonl"}, "Prompt file none.jsonl: it cannot be read"),
        ({"text": {"file": "none.jsonl", "written_by": "teacher"}}, "text.file is none.jsonl, which cannot be read"),
        ({"text": {"file": "foo://a?key=sesame", "written_by": "teacher"}}, r"text.file is foo://a, which cannot be read \(ValueError\)"),
    ],
    ids=str,
)
def test_a_file_that_is_not_there_is_said_before_anything_is_done(changes, says, here, tmp_path, capsys):
    assert main(["run", written(here, example(out=str(tmp_path / "run"), **changes))]) == 2
    assert re.search(says, said := capsys.readouterr().err), said
    assert "sesame" not in said
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_other_tokens_is_refused_before_anything_is_done(here, tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "teacher")
    assert main(["run", written(here, example(teacher=str(tmp_path / "teacher"), out=str(tmp_path / "run")))]) == 2
    assert "the hash of its vocabulary is" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- sample and score -----------------------------------------------------------------------------------------------------------------


def test_sample_and_score_fill_a_store_and_go_on(here, tmp_path, capsys):
    prompts = written(tmp_path, "\n".join(json.dumps({"prompt": f"what is {a} + 1?"}) for a in range(4)), "prompts.jsonl")
    sample = ["sample", str(tmp_path / "run.lance"), "--student", "runs/tiny/student", "--prompts", prompts, "--max-new-tokens", "6"]
    score = ["score", str(tmp_path / "run.lance"), "--teacher", "runs/tiny/teacher", "--top-k", "3", "--json"]
    assert main([*sample, "--samples-per-prompt", "2", "--seed", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rollouts"] == 8
    for share, there in (("9/99", 0), ("1/2", 4), ("0/2", 8)):
        assert main([*score, "--share", share]) == 0
        assert json.loads(capsys.readouterr().out)["in_column"] == there
    assert main([*sample, "--samples-per-prompt", "2", "--seed", "7"]) == 0
    assert "0 rollouts sampled, 8 were there, 0 prompts refused" in capsys.readouterr().out
    assert main(score) == 0
    assert json.loads(capsys.readouterr().out)["rollouts"] == 0
    store = open_store(tmp_path / "run.lance")
    assert type(store).__name__ == "LanceStore"
    assert (store.manifest.sampling.seed, store.columns["teacher"].top_k) == (7, 3)
    assert main([*sample, "--seed", "8"]) == 2  # other settings are another store


@pytest.mark.parametrize(("kind", "spoken"), [(Stub, []), (CompletionsStub, ["--speaks", "openai", "--context", "64"])])
def test_score_asks_servers_and_takes_no_key_from_the_command_line(kind, spoken, tmp_path, tokenizer, monkeypatch, capsys, request):
    stubs = [kind(), kind()]
    request.addfinalizer(lambda: [each.close() for each in stubs])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    store = ZarrStore.create(tmp_path / "run.zarr", Manifest(fingerprint_tokenizer(tokenizer), MODEL, SamplingParams()))
    store.append(make_rollouts())
    monkeypatch.setenv("MY_KEY", "sesame")
    engines = [word for each in stubs for word in ("--engine", each.url)]
    call = ["score", str(tmp_path / "run.zarr"), "--teacher", str(tmp_path / "tokenizer"), "--served-as", "table", *engines, *spoken]
    stated = ["--revision", "abc", "--dtype", "bfloat16"]
    assert main([*call, *stated, "--key-variable", "MY_KEY"]) == 0
    said = capsys.readouterr()
    assert "in 'teacher', 0 in quarantine; 0 log-probs were -inf" in said.out
    assert f"Costs(requests={sum(len(stub.requests) for stub in stubs)}, " in said.out
    assert "sesame" not in said.out + said.err
    store.refresh()
    assert store.columns["teacher"].model == ModelId(str(tmp_path / "tokenizer"), "abc", "bfloat16")
    for record in store.read(range(len(store)), ["teacher"]):
        np.testing.assert_allclose(record.scores["teacher"], truth(record.rollout), atol=1e-6)
    with pytest.raises(SystemExit):
        main([*call, *stated, "--api-key", "sesame"])
    assert "sesame" not in capsys.readouterr().err


def test_a_served_model_that_is_not_a_folder_needs_its_revision():
    with pytest.raises(InvalidRecordError, match="revision is missing, expected a commit or a hash"):
        Model("Some/Model", "http://127.0.0.1:1").identity()


def test_a_section_that_was_dropped_is_another_run(here, tmp_path, capsys):
    small = {"opd": {"steps": 1, "lr": 1e-3}, "sampling": {"max_new_tokens": 4}, "out": str(tmp_path / "run")}
    assert main(["run", written(here, example(**small))]) == 0
    capsys.readouterr()
    for gone in ("sft", "evaluation"):
        assert main(["run", written(here, example(**small, **{gone: None}))]) == 2
        assert f"{gone}" in capsys.readouterr().err


def test_rollouts_of_a_store_that_answer_held_out_prompts_are_not_trained_on(here, tmp_path, capsys, trained):
    small = {"opd": {"steps": 1, "lr": 1e-3}, "sampling": {"max_new_tokens": 4}, "sft": None, "store": str(tmp_path / "stores")}
    assert main(["run", written(here, example(**small, out=str(tmp_path / "one"), evaluation=None))]) == 0
    assert main(["run", written(here, example(**small, out=str(tmp_path / "two"), evaluation={"held_out": 6}))]) == 0
    assert "6 of 16 responses answer prompts that are held out" in capsys.readouterr().out
    assert trained == [16, 10]
