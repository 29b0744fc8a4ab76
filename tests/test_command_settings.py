"""The file of `lopd run`: values that are refused, and what is kept of it."""

import datetime
import json
import re
from contextlib import nullcontext

import pytest
from chat_tokenizers import byte_tokenizer
from test_command_run import example, here, models, written  # noqa: F401

from lopd import make_prompts
from lopd.errors import ConflictError, InvalidRecordError
from lopd.tools.command import main, settings
from lopd.tools.command.before import prepare
from lopd.tools.command.models import Model
from lopd.tools.command.settings import read_settings
from lopd.tools.phases import Run, digest


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"top_p": 3.0}},
        {"sampling": {"max_new_tokens": -5}},
        {"opd__tokens_per_batch": 0},
        {"opd__autocast": "float16"},
        {"loss": {"clip": -1.0}},
        {"evaluation__samples_per_prompt": 0},
        {"teacher": {"model": "runs/tiny/teacher", "context": 3}},
        {"teacher": {"model": "runs/tiny/teacher", "served_as": "zzz"}},
        {"student": {"model": "runs/tiny/student", "revision": "abc", "dtype": "float32"}},
    ],
    ids=str,
)
def test_values_that_make_no_sense_and_keys_that_nothing_reads_are_refused_at_once(here, tmp_path, capsys, changes):
    assert main(["run", written(here, example(**changes, out=str(tmp_path / "run")))]) == 2
    assert "lopd run --example" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seeds", [[1000, 2000, 3000], [7, 1_000_007]])
def test_seeds_may_be_far_apart_as_each_has_a_student_and_stores_of_its_own(seeds, tmp_path):
    assert read_settings(written(tmp_path, example(seeds=seeds))).seeds == tuple(seeds)


def test_urls_of_several_servers_are_kept_without_their_secrets():
    found = settings.RunSettings(
        "out", Model("a"), Model("b", engine=["https://u:hunter2@h1", "https://h2"]), ["x"], settings.Training(1, 1e-3)
    ).flat()
    assert "hunter2" not in str(found)


def test_variables_of_the_chat_template_are_kept_as_json_and_only_where_there_are_some():
    given = {"day": datetime.date(2026, 1, 7), "urls": ["https://u:hunter2@h"], "none": None}
    for variables, kept in ((None, None), ({}, {}), (given, {"day": "2026-01-07", "urls": ["https://h"]})):
        prompts = settings.Prompts("p.jsonl", chat_template_kwargs=variables)
        found = settings.RunSettings("out", Model("a"), Model("b"), prompts, settings.Training(1, 1e-3)).flat()
        assert (found.get("prompts.chat_template_kwargs"), "prompts.chat_template_kwargs" in found) == (kept, variables is not None)


def test_the_folder_of_a_run_is_one_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_settings(written(tmp_path, example(out="~/run"))).out == str(tmp_path / "run")
    assert read_settings(written(tmp_path, example(out="runs/a"))).out == "runs/a", "as it was written, which the summary shows"
    with pytest.raises(InvalidRecordError, match=r"Run: out: the path is a URL \('s3://...'\), expected one of this machine"):
        read_settings(written(tmp_path, example(out="s3://bucket/run")))


def test_prompts_models_and_a_verifier_may_be_under_home(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "p.jsonl").write_text("".join(f'{{"prompt": "what is {i} + 1?"}}\n' for i in range(9)))
    (here / "home.py").write_text("def right(prompt, text):\n    return 0.0\n")
    evaluation = {"held_out": 2, "verifier": "~/home.py:right"}
    changes = {"prompts": "~/p.jsonl", "teacher": "~/runs/tiny/teacher", "evaluation": evaluation, "out": str(tmp_path / "run")}
    prompts, _ = prepare(read_settings(written(tmp_path, example(**changes))))
    assert len(prompts) == 9
    read = json.loads((tmp_path / "run/inputs.json").read_text())
    there = "runs/tiny/teacher"
    assert read[f"teacher.model, the content of ~/{there}"] == digest(there), "so that another teacher under this name is noticed"
    assert Model(f"~/{there}", "http://host").identity() == Model(there).identity()


@pytest.mark.s3
def test_prompts_of_a_run_may_be_in_a_bucket(here, s3, tmp_path, monkeypatch):
    for name, value in s3.storage_options.items():
        monkeypatch.setenv(name.upper() if name.startswith("aws_") else f"AWS_{name.upper()}", value)
    lines = [json.dumps({"prompt": f"what is {i} + 1?"}) + "\n" for i in range(9)]
    s3.write("run/p.jsonl", "".join(lines).encode())
    found = read_settings(written(tmp_path, example(out=str(tmp_path / "run"), prompts=s3.url("run/p.jsonl"))))
    assert len(prepare(found)[0]) == 9
    Run(tmp_path / "run" / "seed-0").phase("SFT text", dict)
    s3.write("run/p.jsonl", "".join(lines[1:]).encode())
    with pytest.raises(ConflictError, match=r"prompts.file, the content of s3://.* is .* now, and was"):
        prepare(found)


def test_a_run_goes_on_wherever_it_and_its_models_are(here, tmp_path):
    def run(name, engine, **given):
        teacher = {"model": "runs/tiny/teacher", "engine": engine, **given}
        student = {"model": "runs/tiny/student", "device": f"cuda:{len(name)}"}
        return read_settings(written(tmp_path, example(out=str(tmp_path / name), teacher=teacher, student=student, evaluation=None)))

    prepare(run("a", "http://a"))
    Run(tmp_path / "a/seed-0").phase("scores", dict)
    (tmp_path / "a").rename(tmp_path / "other")
    prepare(run("other", ["http://b:1", "http://c:1"], served_as="theirs", key_variable="HOME", wait=5))
    kept = json.loads((tmp_path / "other/settings.json").read_text())
    assert (kept["out"], kept["teacher.engine"]) == (str(tmp_path / "other"), ["http://b:1", "http://c:1"])
    with pytest.raises(ConflictError, match=r"teacher.engine is 'hf' now, and was 'server' when .*scores.json was written; go back"):
        prepare(run("other", "hf", device="cpu"))


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a": 1}\n{"a": 2}', "[1]", "{}"])
@pytest.mark.parametrize("file", ["settings.json", "inputs.json"])
def test_a_file_that_no_run_wrote_is_not_replaced(file, text, tmp_path):
    (tmp_path / file).write_text(text)
    empty = (file, text) == ("inputs.json", "{}")
    with nullcontext() if empty else pytest.raises(ConflictError, match=rf"{file}.* expected .*; choose another folder\.$"):
        Run(tmp_path).claim({"out": "a"}, {})
    assert (tmp_path / file).read_text().strip() == text


def test_a_folder_that_cannot_be_taken_is_one_sentence(here, tmp_path, capsys, monkeypatch):
    def run(out, says):
        assert main(["run", written(here, example(out=str(out)))]) == 2
        assert re.fullmatch(f"{says}\n", capsys.readouterr().err)

    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").touch()
    cannot = "File .*json: it cannot be written .*{}.*; free space or mend permissions, or choose another folder."
    run(tmp_path / "file", cannot.format("Errno 17"))
    (tmp_path / "settings.json").write_text('{"a": 1}')
    run(tmp_path, "Run .* it has a settings.json without the inputs.json of a run, .*; choose another folder.")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == ["settings.json"]
    monkeypatch.setattr("pathlib.Path.replace", full)
    run(tmp_path / "run", cannot.format("Errno 28"))


@pytest.mark.parametrize("scalar", ["2024-13-45", "0b_", "!!int foo", "!!timestamp foo"])
def test_a_scalar_that_yaml_cannot_make_is_one_sentence(scalar, tmp_path):
    with pytest.raises(InvalidRecordError, match="it cannot be read"):
        read_settings(written(tmp_path, f"out: {scalar}\n"))


def test_answers_and_ids_in_the_file_are_as_they_are_written(tmp_path):
    """YAML 1.1 reads no as false, 1:30 as 90 and 010 as 8; a verifier would compare with another answer."""
    words = ["no", "1:30", "0777", "2e5", "1_000", "1.50", "2024-1-5", "2024-13-45", "True", ".nan", "9" * 5000, "4", "-0.5", "true", "1/2"]
    lines = [f"- {{prompt: a, id: {word if word != 'true' else 'b'}, answer: {word}}}" for word in words]
    lines += [
        "- {prompt: a, answer: ~}",
        "- {prompt: a, answer: &w 010}",
        "- {prompt: a, answer: *w, chat_template_kwargs: {n: *w, think: no}}",
        "- {prompt: a, answer: &l [no, 1:30, 1.50, 4, {x: 010, no: [[no]], 1.0: 1.0, n: 1e5}]}",
        "- &m {prompt: a, answer: no, chat_template_kwargs: {n: *l}}",
        "- {<<: *m, prompt: b}",
        "- {<<: [{id: 010}, *m], answer: {<<: {y: no}, x: no}}",
    ]
    rest = {key: value for key, value in example(out="a").items() if key != "prompts"}
    prompts = read_settings(
        written(tmp_path, "\n".join([*(f"{key}: {json.dumps(rest[key])}" for key in rest), "prompts:", *lines]))
    ).prompts
    made = make_prompts(prompts[: len(words) + 2], byte_tokenizer(None))
    below, one, merged, both = prompts[-4:]
    assert below["answer"] == ["no", "1:30", 1.5, 4, {"x": "010", "no": [["no"]], "1.0": 1.0, "n": 1e5}]
    assert one["answer"] == merged["answer"] == "no"
    assert (merged["prompt"], both["id"], both["answer"]) == ("b", "010", {"x": "no", "y": "no"})
    assert both["chat_template_kwargs"] == {"n": [False, 90, 1.5, 4, {"x": 8, False: [[False]], 1.0: 1.0, "n": 1e5}]}
    assert [prompt.answer for prompt in made] == [*words, None, "010"]
    assert [prompt.prompt_id for prompt in made[: len(words) - 2]] == words[:-2]
    assert [prompts[words.index(word)]["answer"] for word in ("4", "-0.5", "true")] == [4, -0.5, True], "a run is known by what they were"
    assert (prompts[-5]["answer"], prompts[-5]["chat_template_kwargs"]) == ("010", {"n": 8, "think": False})


def test_answers_and_ids_of_a_file_of_json_are_those_of_its_records(tmp_path):
    """pandas writes a column of ints with a gap as floats."""
    records = [
        {"prompt": "a", "id": 7.0, "answer": 4.0},
        {"prompt": "b", "answer": 1e22},
        {"prompt": "c", "answer": {"x": 0.5, "y": [1e-5]}},
    ]
    found = read_settings(written(tmp_path, json.dumps(example(out="a", prompts=records)))).prompts
    assert found == records
    assert make_prompts(found, byte_tokenizer(None))[0].answer == "4"


@pytest.mark.parametrize("record", ['{"prompt": "a", "answer": 1e400}', '{prompt: a, "answer": 1.50}', 'prompt: a\n  "answer": 1.50'])
def test_what_no_float_holds_and_what_is_not_json_keep_their_digits(record, tmp_path):
    rest = {key: value for key, value in example(out="a").items() if key != "prompts"}
    text = "\n".join([*(f"{key}: {json.dumps(rest[key])}" for key in rest), "prompts:", f"- {record}"])
    (prompt,) = read_settings(written(tmp_path, text)).prompts
    assert prompt["answer"] == record.rpartition(": ")[2].rstrip("}")
    assert read_settings(written(tmp_path, text.replace(prompt["answer"], "[1e400, 1.5]"))).prompts[0]["answer"] == ["1e400", 1.5]


def test_prompts_that_are_merged_into_the_file_are_as_they_are_written(tmp_path):
    rest = json.dumps({key: value for key, value in example(out="a").items() if key != "prompts"})
    for merged in ("{prompts: [{prompt: a, answer: no}]}", "[{out: b}, {prompts: [{prompt: a, answer: no}]}]"):
        assert read_settings(written(tmp_path, f"{rest[:-1]}, <<: {merged}}}")).prompts == [{"prompt": "a", "answer": "no"}]


@pytest.mark.parametrize(
    ("twice", "count"), [("{{<<: [*a{0}, *a{0}]}}", 200), ("{{k: [*a{0}, *a{0}]}}", 200), (f"[{', '.join(['*a{0}'] * 10)}]", 4400)]
)
def test_anchors_that_double_with_each_line_are_refused_at_once(twice, count, tmp_path):
    lines = [f"a{i}: &a{i} {twice.format(i - 1)}" for i in range(1, count)]
    with pytest.raises(
        InvalidRecordError, match=r"it cannot be read \(its anchors make [\d,]+ values of [\d,]+ that are written in line 1\)"
    ):
        read_settings(written(tmp_path, "\n".join(["a0: &a0 {k: 1}", *lines])))
    merged = json.dumps(example(out="a")).replace('"opd": {', '"opd": {<<: &sft {"lr": 1}, ')
    assert read_settings(written(tmp_path, merged)).out == "a", "a value that is merged is not a fault"
