"""Small mistakes, each of which is one sentence that names what is wrong."""

import json
import os
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from attrs import asdict, evolve
from chat_tokenizers import byte_tokenizer
from fsspec.implementations.memory import MemoryFileSystem
from table_engines import WORK, TableScorer, TableSource
from test_drift import metrics_of

from lopd import MemoryStore, collate, collect_rollouts, label_rollouts, load_checkpoint, score_rollouts
from lopd.backends.files import open_files
from lopd.backends.lance import LanceStore
from lopd.backends.opening import open_store
from lopd.backends.zarr import ZarrStore
from lopd.engines.finding import find_model, local_folder
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.engines.identity import folder_model_id
from lopd.errors import (
    ArgumentError,
    CheckpointError,
    EngineError,
    InvalidRecordError,
    LopdError,
    ModelError,
    PromptError,
    StoreExistsError,
    StoreNotFoundError,
    StorePathError,
    StoreWriteError,
    TokenizerMismatchError,
)
from lopd.records import Lineage, Prompt, SamplingParams, read_prompts
from lopd.testing import assert_holds, tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores
from lopd.tools.command import main
from lopd.tools.command_line import show
from lopd.tools.interop import export_parquet, import_parquet
from lopd.tools.report import RunHistory, write_run_report

STORES: dict[str, Callable[[Any], Any]] = {
    "memory": lambda _: MemoryStore(tiny_manifest()),
    "Zarr": lambda path: ZarrStore.create(path, tiny_manifest()),
    "Lance": lambda path: LanceStore.create(path, tiny_manifest()),
}


# What a store is


@pytest.mark.parametrize("kind", STORES)
def test_an_empty_store_is_true_and_its_repr_says_what_is_in_it(kind: str, tmp_path: Path) -> None:
    store = STORES[kind](tmp_path / "run")
    assert store
    assert str(store) == repr(store) == f"{store.name}: rollouts 0; policy policy@rev-p; columns none yet"
    store.append([tiny_rollout("a"), tiny_rollout("b")])
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(tiny_rollout("a"))])
    assert repr(store) == f"{store.name}: rollouts 2; policy policy@rev-p; column teacher 1 of 2 scored by teacher@rev-teacher"


@pytest.mark.parametrize("kind", STORES)
def test_what_a_store_is_asked_for_is_several_rows_and_several_texts(kind: str, tmp_path: Path) -> None:
    store, rollouts = STORES[kind](tmp_path / "run"), [tiny_rollout(f"r{i}") for i in range(4)]
    store.append(rollouts)
    store.append_scores("teacher", tiny_provenance(), [tiny_scores(rollout) for rollout in rollouts[2:]])
    for rows in (store.scored("teacher"), [True, False], [1.7], "12", ["r1"], 2, None, slice(0, 2), [slice(0, 2)], {0}):
        with pytest.raises(InvalidRecordError, match=r"rows have dtype .*, expected a vector of whole numbers; of a mask pass"):
            store.read(rows)
    scored = np.flatnonzero(store.scored("teacher"))
    for rows in ([], range(0), scored[:0], range(2, 4), (2, 3), scored.astype(np.int32), [*scored], scored, torch.tensor([2, 3])):
        assert list(store.read(rows, ["teacher"]).rollout_ids) == ["r2", "r3"][: len(rows)]
    for names, shown in (("teacher", r"a str \('teacher'\)"), (None, r"None \(None\)")):
        for ask in (lambda n: store.read([2], n), lambda n: store.read([2], top_k=n), store.find):
            with pytest.raises(ArgumentError, match=rf": it was given {shown}, expected a list of texts; pass"):
                ask(names)


# What a folder is


def model_folder(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    Lineage().write(path)


def lineage_folder(path: Path) -> None:
    path.mkdir()
    (path / "lopd.json").write_text('{"sft_teacher": null}')


def checkpoints(path: Path) -> None:
    (path / "step-00000001.0").mkdir(parents=True)


def hidden_file(path: Path) -> None:
    path.mkdir()
    (path / ".DS_Store").touch()


OTHERS = {
    "a model": model_folder,
    "the lineage of a trained model": lineage_folder,
    "a folder of checkpoints": checkpoints,
    r"something that is not a store \('.DS_Store'\)": hidden_file,
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_that_is_something_else_is_no_damaged_store(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    OTHERS[what](folder)
    for open_it in (open_store, ZarrStore.open, LanceStore.open):
        with pytest.raises(StoreNotFoundError, match=f"the folder holds {what}, expected a store"):
            open_it(folder)
    for kind in (ZarrStore, LanceStore):
        for make in (kind.create, kind.open_or_create):
            with pytest.raises((StoreExistsError, StoreNotFoundError), match=what):
                make(folder, tiny_manifest())


@pytest.mark.parametrize("kind", ["Zarr", "Lance"])
def test_a_store_is_no_damaged_model(kind: str, tmp_path: Path) -> None:
    STORES[kind](tmp_path / "run")
    with pytest.raises(InvalidRecordError, match=r"Lineage .*run: the folder is a store, expected a model's"):
        Lineage.read(tmp_path / "run")
    for read in (load_model, folder_model_id, lambda path: HFSource.from_folder(path, SamplingParams())):
        with pytest.raises(EngineError, match="the folder is a store, expected a model's"):
            read(tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["./runs/studnt", "/nowhere/student", "~/.nowhere/student", "runs/of/mine", "there/studnt", Path("studnt")]
)
def test_a_model_folder_that_is_not_there_is_said_without_asking_the_hub(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for read in (load_model, folder_model_id, local_folder, HFScorer.from_folder):
        with pytest.raises(EngineError, match=r"there is no such folder, seen from .*; check the path") as caught:
            read(name)
        assert str(name) in str(caught.value)


def test_a_name_in_the_hub_is_not_taken_for_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [str(find_model(name)) for name in ("gpt2", "Qwen/Qwen3-0.6B")] == ["gpt2", "Qwen/Qwen3-0.6B"]


NOT_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file": (lambda at: at.write_text("{}"), "it is a file.*pass the folder that it is in"),
    "an empty folder": (lambda at: at.mkdir(), "neither config.json nor adapter_config.json, expected a model;.*there is nothing"),
    "a folder of models": (lambda at: (at / "student").mkdir(parents=True), "neither config.json nor.*there is 'student'"),
}


@pytest.mark.parametrize("what", NOT_MODELS)
def test_what_is_not_a_models_folder_is_said_with_what_it_is(what: str, tmp_path: Path) -> None:
    make, said = NOT_MODELS[what]
    make(tmp_path / "it")
    for read in (load_model, folder_model_id, HFScorer.from_folder):
        with pytest.raises((EngineError, ModelError), match=said):
            read(tmp_path / "it")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "expected the name of a file"),
        (" ", "expected the name of a file"),
        ("a\0b", "expected the name of a file"),
        ("x" * 300, "which the system refuses (File name too long); check the path"),
    ],
)
def test_a_path_that_names_nothing_is_one_sentence(path: str, said: str) -> None:
    for read in (load_model, open_store, Lineage.read, lambda path: read_prompts(path, None)):
        with pytest.raises(LopdError, match=rf"the path is '.*{re.escape(said)}"):
            read(path)


@pytest.mark.parametrize("give", [lambda one: one, lambda one: iter([one])], ids=["one", "an iterator"])
def test_an_engine_takes_lists_alone(give: Any, llama: Any, tokenizer: Any) -> None:
    with pytest.raises(ArgumentError, match=r"Prompts: it is .*, expected a list; pass"):
        HFSource(llama, tokenizer, SamplingParams(max_new_tokens=2)).sample(give(Prompt("p", [3, 4])))
    with pytest.raises(ArgumentError, match=r"Rollouts: it is .*, expected a list; pass"):
        HFScorer(llama, tokenizer).score(give(tiny_rollout("p/0")))


def test_weights_that_are_text_are_one_sentence() -> None:
    store = MemoryStore(tiny_manifest())
    store.append([tiny_rollout("p/0")])
    with pytest.raises(InvalidRecordError, match=r"its weights are 'heavy', expected an array of numbers; fix the weighting function"):
        collate(store.read([0], columns=()), lambda _: "heavy")


def test_a_tokenizer_that_is_not_there_or_is_damaged_is_named_before_weights_are_read(
    llama: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama.save_pretrained(tmp_path)
    monkeypatch.setattr("lopd.engines.hf.loading.load_whole", lambda *_: pytest.fail("weights were read"))
    lacks = r"its tokenizer cannot be loaded \(the folder has neither tokenizer.json nor.*tokenizer.save_pretrained"
    with pytest.raises(EngineError, match=lacks):
        load_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineError, match=rf"Model '{tmp_path}': its tokenizer cannot be loaded \(.+\), expected its files"):
        load_model(tmp_path)


SPOILED: dict[str, tuple[str, bytes, str]] = {
    "a pointer": ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", r"its weights are not all there.*`git lfs pull`"),
    "another config": ("config.json", b"", "its weights have other shapes than its config.json states"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_weights_that_are_not_those_of_the_folder_are_one_sentence(what: str, llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    name, data, said = SPOILED[what]
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / name).write_bytes(data or json.dumps({**described, "intermediate_size": 64}).encode())
    with pytest.raises((EngineError, ModelError), match=said):
        load_model(tmp_path)


def test_a_tokenizer_of_another_model_is_named_with_the_folder(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"Model {tmp_path}: its head has 96 rows, .*261 ids; load the tokenizer that belongs to it"):
        HFScorer.from_folder(tmp_path)


# Paths


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working directory, which is home too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


PLACES: dict[str, tuple[Callable[[Any], Any], type[LopdError]]] = {
    "a store": (lambda path: ZarrStore.create(path, tiny_manifest()), StorePathError),
    "a Lance store": (lambda path: LanceStore.create(path, tiny_manifest()), StorePathError),
    "any store": (open_store, StorePathError),
    "a checkpoint": (lambda path: load_checkpoint(path, types.SimpleNamespace()), CheckpointError),
    "prompts": (lambda path: read_prompts(path, None), PromptError),
    "a report": (lambda path: write_run_report(path, MemoryStore(tiny_manifest())), InvalidRecordError),
    "a history": (RunHistory.read, InvalidRecordError),
    "a table": (lambda path: export_parquet(MemoryStore(tiny_manifest()), path), StorePathError),
    "a lineage": (lambda path: Lineage().write(path), InvalidRecordError),
    "a model": (load_model, EngineError),
}


@pytest.mark.parametrize("what", PLACES)
def test_a_url_that_went_through_path_is_refused_by_name_and_nothing_is_made(what: str, here: Path) -> None:
    call, refusal = PLACES[what]
    with pytest.raises(refusal, match=r"the path is a URL without its second slash \('s3:/...'\), .*pass URLs as strings"):
        call(Path("s3://bucket/SECRET"))
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("what", ["a checkpoint", "a report", "a lineage", "a model"])
def test_a_url_where_only_a_folder_can_be_is_refused_and_nothing_is_made(what: str, here: Path) -> None:
    call, refusal = PLACES[what]
    with pytest.raises(refusal, match=r"the path is a URL \('s3://...'\), expected one of this machine"):
        call("s3://bucket/x")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("form", [str, Path])
def test_a_tilde_is_home(form: Any, here: Path) -> None:
    for store in (ZarrStore, LanceStore):
        store.create(form(f"~/{store.__name__}"), tiny_manifest())
        open_store(form(f"~/{store.__name__}"))
    (here / "home/model").mkdir()
    Lineage().write(form("~/model"))
    assert Lineage.read(form("~/model")) == Lineage()
    export_parquet(MemoryStore(tiny_manifest()), form("~/run.parquet"))
    write_run_report(form("~/run.html"), MemoryStore(tiny_manifest()))
    assert sorted(path.name for path in (here / "home").iterdir()) == ["LanceStore", "ZarrStore", "model", "run.html", "run.parquet"]
    with pytest.raises(StorePathError, match="expected a user of this machine behind '~'"):
        ZarrStore.create(form("~no-such-user/run"), tiny_manifest())
    assert [path.name for path in here.iterdir()] == ["home"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://user:SECRET@run/x", "memory://run/x"),
        ("memory://user:SEC/RET@run/x", "memory://run/x"),
        ("memory://SECRET@run/x", "memory://run/x"),
        ("memory://run/x?sig=SECRET", "memory://run/x"),
        ("memory://run/x?token=SECRET#a", "memory://run/x"),
        ("memory://run/x@2", "memory://run/x@2"),
    ],
)
def test_messages_show_a_url_without_its_secrets(url: str, shown: str) -> None:
    assert open_files(url).url == shown
    with pytest.raises(StoreNotFoundError) as caught:
        open_store(url)
    assert "SEC" not in str(caught.value)


def test_a_prompt_file_or_table_is_named_without_its_secrets() -> None:
    for call in (lambda url: read_prompts(url, None), lambda url: import_parquet(url, MemoryStore(tiny_manifest()))):
        for url in ("memory://a/x.jsonl?token=SECRET", "http://user:SECRET@127.0.0.1:1/x.parquet"):
            with pytest.raises(LopdError) as caught:
                call(url)
            assert "SECRET" not in str(caught.value)


# Puts whose answer is an error


class Forgetful(MemoryFileSystem):
    """Does what it is asked, and answers with an error where `lose` is part of the path."""

    protocol = "forgetful"
    cachable = False
    lose = "commits"
    does = True

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **options: Any) -> None:
        if self.does or self.lose not in path:
            super().pipe_file(path, value, mode=mode, **options)
        if self.lose in path:
            raise ConnectionResetError("the answer was lost")


@pytest.fixture
def forgetful(tmp_path: Path) -> str:
    fsspec.register_implementation("forgetful", Forgetful, clobber=True)
    return f"forgetful://{tmp_path.name}/run"


def test_a_commit_that_was_put_but_answered_with_an_error_keeps_its_rows(forgetful: str) -> None:
    store = ZarrStore.create(forgetful, tiny_manifest())
    store.append([tiny_rollout("a")])
    again = ZarrStore.open(forgetful)
    assert len(store) == len(again) == 1
    assert_holds(again, [tiny_rollout("a")])
    assert list(again.verify()) == []


def test_a_commit_that_was_not_put_leaves_nothing_and_may_be_repeated(forgetful: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ZarrStore.create(forgetful, tiny_manifest())
    monkeypatch.setattr(Forgetful, "does", False)
    with pytest.raises(LopdError, match="nothing of this call was committed"):
        store.append([tiny_rollout("a")])
    monkeypatch.undo()
    assert [name for name in store._files.names("segments") if name != "zarr.json"] == []
    store.append([tiny_rollout("a")])
    assert list(ZarrStore.open(forgetful).verify()) == []


@pytest.mark.parametrize("error", [OSError(5, "I/O"), FileExistsError("there already")])
def test_a_link_that_was_made_but_answered_with_an_error_is_a_commit(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, link = ZarrStore.create(tmp_path / "run", tiny_manifest()), os.link

    def link_and_fail(source: Any, target: Any) -> None:
        link(source, target)
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(os, "link", link_and_fail)
        store.append([tiny_rollout("a")])
    assert len(ZarrStore.open(tmp_path / "run")) == 1
    assert list(store.verify()) == []


# Scoring


def test_an_empty_store_is_not_scored_with_success(tokenizer: Any, llama: Any) -> None:
    scorer = HFScorer(llama, tokenizer)
    store = MemoryStore(evolve(tiny_manifest(), tokenizer=scorer.tokenizer_id))
    with pytest.raises(InvalidRecordError, match="it has 0 rollouts, expected at least 1; run `collect_rollouts` first"):
        score_rollouts(store, scorer)


def test_a_teacher_with_two_more_tokens_is_told_how_many_and_what_to_do(tokenizer: Any, llama: Any) -> None:
    scorer = HFScorer(llama, tokenizer)
    size = scorer.tokenizer_id.vocab_size
    smaller = evolve(scorer.tokenizer_id, vocab_hash="other", vocab_size=size - 2)
    store = MemoryStore(evolve(tiny_manifest(), tokenizer=smaller))
    with pytest.raises(
        TokenizerMismatchError,
        match=rf"\({size} ids\), expected the store's other \({size - 2} ids\); .*from {size - 2} on .*smaller tokenizer .* in process\.",
    ):
        score_rollouts(store, scorer)


@pytest.mark.parametrize("kind", [ZarrStore, LanceStore])
def test_a_store_that_cannot_be_written_to_is_refused_before_anything_is_paid_for(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, scorer = TableSource(SamplingParams(max_new_tokens=4)), TableScorer()
    prompts = [Prompt(f"p{i}", [1 + i]) for i in range(4)]
    store = kind.create(tmp_path / "run", source.manifest)
    collect_rollouts(source, prompts[:2], store)
    score_rollouts(store, scorer, column="done")
    # root may write whatever the mode of a folder is
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    WORK.clear()
    for pay in (
        lambda: collect_rollouts(source, prompts, store),
        lambda: score_rollouts(store, scorer),
        lambda: label_rollouts(store, lambda _, rollout: WORK.append(rollout.rollout_id) or 1.0, prompts[:2]),
    ):
        with pytest.raises(
            StoreWriteError, match=r"Store .*run: the write failed with .*Permission denied.*check the path, its permissions"
        ):
            pay()
    assert WORK == []
    # what is complete is not written to
    assert collect_rollouts(source, prompts[:2], store).rollouts == score_rollouts(store, scorer, column="done").rollouts == 0


def test_a_lineage_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "lopd.json").symlink_to(tmp_path / "nowhere/lopd.json")
    with pytest.raises(StoreWriteError, match=r"Lineage .*lopd.json: it cannot be written \(.*\); free space or mend permissions"):
        Lineage().write(tmp_path)


# Tools


def test_the_doctor_reads_the_json_lines_of_a_logger(tmp_path: Path) -> None:
    steps = [evolve(metrics_of(1.0), step=3), evolve(metrics_of(2.0), step=4, drift=None)]
    lines = [json.dumps({"step": m.step, **m.numbers()}) for m in steps]
    for count in (1, 2):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:count]) + "\n")
        assert RunHistory.read(tmp_path / "metrics.jsonl").steps == tuple(steps[:count])
    ZarrStore.create(tmp_path / "run", tiny_manifest())
    arguments = ["report", str(tmp_path / "run"), "--history", str(tmp_path / "metrics.jsonl"), "--out", str(tmp_path / "run.html")]
    assert main(arguments) == 0
    assert "2 steps" in (tmp_path / "run.html").read_text()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:20]]))
    with pytest.raises(InvalidRecordError, match="line 3"):
        RunHistory.read(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InvalidRecordError, match="cannot be read"):
        RunHistory.read(tmp_path / "metrics.jsonl")
    (tmp_path / "history.json").write_text(json.dumps([asdict(m) for m in steps]))
    assert RunHistory.read(tmp_path / "history.json").steps == tuple(steps)


def test_a_report_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StoreWriteError, match=r"Report .*run.html: it cannot be written .*; check the folder"):
        write_run_report(tmp_path / "nowhere/run.html", MemoryStore(tiny_manifest()))


def test_escape_sequences_of_a_store_do_not_reach_the_terminal(tmp_path: Path, capsys: Any) -> None:
    red = "\x1b[31mred\x1b]0;title\x07"
    store = ZarrStore.create(tmp_path / "run", tiny_manifest())
    store.append([tiny_rollout(red), tiny_rollout("b")])
    store.append_scores("teacher", evolve(tiny_provenance(), engine=red), [tiny_scores(tiny_rollout("b"))])
    store.quarantine("teacher", evolve(tiny_provenance(), engine=red), {red: f"refused {red}"})
    for command in (["info"], ["verify"], ["diff", "--columns", "teacher", red]):
        main([command[0], str(tmp_path / "run"), *command[1:]])
    show(("\x1b[31m", ["\x1b[32m"], [["\x1b[33m"]]), "\x1b[34m\u202e\ud800")
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\\x1b[31mred" in said.out


def test_every_report_counts_prompts_and_responses(tokenizer: Any, llama: Any, prompts: Any) -> None:
    source = HFSource(llama, tokenizer, SamplingParams(max_new_tokens=4))
    store = MemoryStore(source.manifest)
    collected, scored = collect_rollouts(source, prompts, store), score_rollouts(store, HFScorer(llama, tokenizer))
    lengths = store.lengths()
    assert collected.read_tokens == scored.read_tokens == lengths.sum()
    assert collected.response_tokens == scored.response_tokens == lengths[:, 1].sum()
    assert np.all(lengths > 0)
