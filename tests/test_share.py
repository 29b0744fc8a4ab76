"""Students and stores go to a hub and come back: nothing else leaves, others do not see them, and no message repeats the token."""

import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from attrs import evolve
from exchanged import assert_equal_stores, fill
from hub_stub import READER, WRITER, Hub, hub  # noqa: F401
from safetensors.torch import save_file

from lopd import CausalLMStudent, Lineage, MemoryStore, ModelId, SamplingParams, ZarrStore
from lopd.engines.hf import HFSource
from lopd.engines.identity import folder_model_id
from lopd.errors import (
    ArgumentError,
    ConflictError,
    CorruptStoreError,
    HubError,
    InvalidRecordError,
    LopdError,
    ManifestMismatchError,
    MissingDependencyError,
    StoreExistsError,
)
from lopd.records import StoreId
from lopd.records.estimates import Estimate
from lopd.testing import tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores
from lopd.tools.interop import export_parquet, import_parquet
from lopd.tools.share import About, dataset_card, model_card, pull_store, push_store, push_student

# huggingface_hub passes `data=` to its own HTTP client where it uploads by LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TEACHER = tiny_provenance().model
LICENSED = About(licence="apache-2.0", base_model="org/base", datasets=["org/prompts"], language="en")


@pytest.fixture
def store() -> MemoryStore:
    return fill(MemoryStore(tiny_manifest()))


@pytest.fixture
def export(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Path:
    """Export a student, and leave beside it what training leaves there."""
    folder = tmp_path / "opd-student"
    CausalLMStudent(make_model("llama_tied"), tokenizer).export(folder, tokenizer, Lineage(None, TEACHER))
    (folder / "checkpoints").mkdir()
    for name in ("optimizer.safetensors", "checkpoints/parameters.safetensors", "notes.txt", ".env", "README.md"):
        (folder / name).write_text("stays at home")
    return folder


def head(card: Any) -> dict[str, Any]:
    return dict(yaml.safe_load(str(card).split("---\n")[1]))


# a student


def test_a_student_is_pushed_as_its_export_and_nothing_else(hub: Hub, export: Path) -> None:
    commit = push_student(export, "me/student", LICENSED)
    pushed = hub.repositories["models/me/student"]
    listed = json.loads((export / "lopd.json").read_text())["files"]
    assert pushed.head == commit
    assert pushed.files.keys() == {*listed, "lopd.json", "README.md", ".gitattributes"}
    assert [name for name in (*listed, "lopd.json") if pushed.files[name] != (export / name).read_bytes()] == []
    assert pushed.files["README.md"].decode() == str(model_card(export, LICENSED))
    assert pushed.private
    assert not any(b"stays at home" in body for body in hub.bodies)


@pytest.mark.filterwarnings("ignore::lopd.errors.ModelWarning")
def test_a_student_that_was_pushed_is_loaded_by_its_name_with_its_lineage(hub: Hub, export: Path) -> None:
    push_student(export, "me/student")
    source = HFSource.from_folder("me/student", SamplingParams())
    assert source.lineage == Lineage.read(export)
    assert source.manifest.policy == folder_model_id(export, torch.float32)


def test_a_push_makes_a_private_repository_unless_it_is_told_otherwise(hub: Hub, store: MemoryStore) -> None:
    push_store(store, "me/closed")
    push_store(store, "me/open", private=False)
    assert [hub.repositories[f"datasets/me/{name}"].private for name in ("closed", "open")] == [True, False]


def test_nothing_is_sent_to_a_public_repository_that_was_meant_to_be_private(hub: Hub, store: MemoryStore) -> None:
    there = hub.add("datasets/me/rollouts", private=False)
    with pytest.raises(HubError, match=r"it is public, and this is meant to be private; pass `private=False`"):
        push_store(store, "me/rollouts")
    assert there.files.keys() == {".gitattributes"}
    assert not hub.large
    push_store(store, "me/rollouts", private=False)


def test_a_repository_that_has_files_is_written_to_only_if_it_is_meant(hub: Hub, export: Path) -> None:
    first = push_student(export, "me/student")
    with pytest.raises(StoreExistsError, match=r"it has \d+ files already, for example 'README.md'; pass `exist_ok=True`"):
        push_student(export, "me/student")
    assert push_student(export, "me/student", exist_ok=True) == first  # nothing is new
    second = push_student(export, "me/student", About(notes="Better."), exist_ok=True)
    assert list(hub.repositories["models/me/student"].commits)[1:] == [first, second]


def test_weights_that_an_export_would_not_replace_stop_it(hub: Hub, export: Path) -> None:
    hub.add("models/me/student", files={"adapter_model.safetensors": b"x"})
    with pytest.raises(StoreExistsError, match=r"it has 'adapter_model.safetensors', which this commit does not replace"):
        push_student(export, "me/student", exist_ok=True)


@pytest.mark.parametrize(
    ("listed", "refusal"),
    [
        (["/etc/hostname"], "'/etc/hostname' of its list is not a file of the folder"),
        (["../secret.txt"], r"'../secret.txt' of its list"),
        (["checkpoints"], "'checkpoints' of its list"),
        (["link"], "'link' of its list"),
        (["gone"], "'gone' of its list"),
        ([], "its lopd.json lists 0 files; write it with"),
    ],
)
def test_a_list_of_files_that_is_not_of_an_export_is_refused(hub: Hub, export: Path, listed: list[str], refusal: str) -> None:
    (export.parent / "secret.txt").write_text("private")
    (export / "link").symlink_to(export.parent / "secret.txt")
    record = json.loads((export / "lopd.json").read_text())
    (export / "lopd.json").write_text(json.dumps({**record, "files": listed}))
    with pytest.raises((CorruptStoreError, InvalidRecordError), match=refusal):
        push_student(export, "me/student")
    assert hub.requests == []


def test_a_folder_that_is_not_an_export_is_refused(hub: Hub, tmp_path: Path, store: MemoryStore) -> None:
    ZarrStore.create(str(tmp_path / "run.zarr"), tiny_manifest())
    with pytest.raises(InvalidRecordError, match="the folder is a store"):
        push_student(tmp_path / "run.zarr", "me/student")
    for work in (lambda: push_student(tmp_path / "nothing", "me/student"), lambda: model_card(tmp_path / "nothing")):
        with pytest.raises(InvalidRecordError, match="there is no such folder"):
            work()
    assert hub.requests == []


BASE = "base_model_name_or_path"


@pytest.mark.parametrize(
    ("file", "key", "path"),
    [
        ("generation_config.json", BASE, "{folder}"),
        ("processor.json", BASE, "./here"),
        ("processor.json", "vocabulary", "file://{folder}"),
        ("extra.safetensors", BASE, "runs/tiny/student"),
        ("tokenizer.json", BASE, r"C:\models\base"),
    ],
)
def test_a_path_of_this_machine_in_a_file_is_refused(hub: Hub, export: Path, file: str, key: str, path: str) -> None:
    told = {key: path.format(folder=export)}
    if file.endswith(".safetensors"):
        save_file({"x": torch.zeros(1)}, export / file, told)
    else:
        (export / file).write_text(json.dumps({"a": [told]}))
    record = json.loads((export / "lopd.json").read_text())
    (export / "lopd.json").write_text(json.dumps({**record, "files": sorted({*record["files"], file})}))
    with pytest.raises(InvalidRecordError, match=rf"{key!r} of {file} is a path of this machine"):
        push_student(export, "me/student")
    assert hub.requests == []


def test_a_teacher_that_is_named_by_its_path_here_is_pushed_under_that_name(hub: Hub, export: Path, store: MemoryStore) -> None:
    teacher = ModelId(str(export.parent), "1", "float32")
    store.append_scores("here", evolve(tiny_provenance(), model=teacher), [tiny_scores(store.read([0])[0].rollout)])
    Lineage(None, teacher).write(export)
    push_student(export, "me/student", store=store)
    pushed = hub.repositories["models/me/student"].files.items()
    assert [name for name, data in pushed if teacher.name.encode() in data] == ["lopd.json"]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_file_of_an_export_is_one_sentence(hub: Hub, export: Path, file: str) -> None:
    (export / file).write_text('{"a": NaN}')
    with pytest.raises(CorruptStoreError, match=rf"Export .*: {file} cannot be read \(.*\); export the student again"):
        push_student(export, "me/student")


# a store


def test_a_store_is_pushed_and_comes_back_equal(hub: Hub, store: MemoryStore, tmp_path: Path) -> None:
    commit = push_store(store, "me/rollouts", LICENSED)
    store.append([tiny_rollout("later")])
    assert push_store(store, "me/rollouts", LICENSED, exist_ok=True) != commit
    assert_equal_stores(pull_store("me/rollouts"), store)
    kept = pull_store("me/rollouts", revision=commit, store=lambda manifest: ZarrStore.open_or_create(str(tmp_path / "a.zarr"), manifest))
    assert len(kept) == len(store) - 1
    assert pull_store("me/rollouts", revision=commit, store=lambda _: kept) is kept
    assert hub.repositories["datasets/me/rollouts"].files.keys() == {"README.md", "rollouts.parquet", ".gitattributes"}


def test_datasets_reads_what_was_pushed(hub: Hub, store: MemoryStore, tmp_path: Path) -> None:
    push_store(store, "me/rollouts")
    for name, content in hub.repositories["datasets/me/rollouts"].files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.parquet").write_bytes(b"not of the dataset")
    rows = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "datasets"))
    assert rows["rollout_id"] == [record.rollout.rollout_id for record in store.read(range(len(store)))]


def test_a_store_that_was_damaged_at_the_hub_is_an_error(hub: Hub, store: MemoryStore) -> None:
    push_store(store, "me/rollouts")
    files = hub.repositories["datasets/me/rollouts"].files
    files["rollouts.parquet"] = files["rollouts.parquet"][:-300]
    with pytest.raises(CorruptStoreError):
        pull_store("me/rollouts")


def test_a_store_is_not_pulled_into_one_of_other_content(hub: Hub, store: MemoryStore) -> None:
    push_store(store, "me/rollouts")
    other = MemoryStore(tiny_manifest())
    other.append([tiny_rollout("masked", [9, 1])])
    with pytest.raises(ConflictError):
        pull_store("me/rollouts", store=lambda _: other)


# the hub


@pytest.mark.parametrize("what", ["create", "info", "validate", "preupload", "batch", "put", "commit", "lost"])
def test_a_hub_that_is_busy_twice_is_asked_again(hub: Hub, store: MemoryStore, what: str) -> None:
    hub.fail(what, 503, 2)
    commit = push_store(store, "me/rollouts")
    assert hub.repositories["datasets/me/rollouts"].head == commit
    assert len(hub.repositories["datasets/me/rollouts"].commits) == 2, "one of ours"
    assert_equal_stores(pull_store("me/rollouts"), store)


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("create", 401, "answers 401; use a token that may do this"),
        ("create", 403, "answers 403; use a token that may do this"),
        ("preupload", 403, "answers 403; use a token that may do this"),
        ("commit", 401, "answers 401; use a token that may do this"),
        ("commit", 409, "answers 409, somebody else commits to it; run this again"),
        ("commit", 500, "answers 500, also when asked again"),
        ("commit", 418, "it failed with HfHubHTTPError, status 418; check what is pushed"),
        ("resolve", 403, "answers 403; use a token that may do this"),
    ],
)
def test_a_hub_that_refuses_is_one_sentence_without_the_token(
    hub: Hub, store: MemoryStore, what: str, status: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    if what == "resolve":
        push_store(store, "me/rollouts")
    hub.fail(what, status, 99)
    with pytest.raises(HubError, match=said) as caught:
        pull_store("me/rollouts") if what == "resolve" else push_store(store, "me/rollouts")
    assert str(caught.value).count("\n") == 0
    assert WRITER not in "".join(traceback.format_exception(caught.value)) + caplog.text
    if what != "resolve":
        assert all(one.files.keys() == {".gitattributes"} for one in hub.repositories.values())


def test_a_commit_of_somebody_else_meanwhile_is_not_written_over(hub: Hub, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    there = hub.add("datasets/me/rollouts")
    create = huggingface_hub.HfApi.create_commit

    def after_another(*args: Any, **options: Any) -> Any:
        there.commit({**there.files, "another.txt": b""})
        return create(*args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", after_another)
    with pytest.raises(HubError, match="answers 412, somebody else commits to it"):
        push_store(store, "me/rollouts")


def test_a_push_without_a_token_that_may_write_sends_nothing(hub: Hub, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match="the token may not write there; use one that may"):
        push_store(store, "me/rollouts")
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    with pytest.raises(HubError, match="there is no token that may write; run `hf auth login`, or set HF_TOKEN"):
        push_store(store, "me/rollouts")
    assert hub.requests == []


def test_offline_mode_is_said_and_nothing_is_sent(hub: Hub, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for work in (lambda: push_store(store, "me/rollouts"), lambda: pull_store("me/rollouts")):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so the hub is not asked; unset it"):
            work()
    assert hub.requests == []


def test_a_hub_that_does_not_take_xet_is_one_sentence(hub: Hub, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"it failed with ConnectionError \(.*xet-write-token"):
        push_store(store, "me/rollouts")


@pytest.mark.parametrize("there", [False, True])
def test_a_url_with_a_password_is_not_repeated(hub: Hub, store: MemoryStore, there: bool) -> None:
    secret = "SEC" + "RET"
    place = hub.url.removeprefix("http://") if there else "127.0.0.1:1"
    hub.fail("info", 418)
    with pytest.raises(HubError, match=rf"Repository me/rollouts \(dataset\) at http://{place}: it failed with \w+Error") as caught:
        push_store(store, "me/rollouts", endpoint=f"http://user:{secret}@{place}")
    assert secret not in "".join(traceback.format_exception(caught.value))


def test_a_card_that_the_hub_refuses_is_said_in_its_words(hub: Hub, store: MemoryStore) -> None:
    with pytest.raises(HubError, match=r'Invalid metadata in README.md. - "license" must be one of \[apache-2.0, ...\]'):
        push_store(store, "me/rollouts", About(licence="my own"))
    assert hub.repositories["datasets/me/rollouts"].files.keys() == {".gitattributes"}


@pytest.mark.parametrize("pushed", [None, {"other.txt": b""}])
def test_what_is_not_there_is_one_sentence(hub: Hub, pushed: dict[str, bytes] | None) -> None:
    if pushed is not None:
        hub.add("datasets/me/rollouts", files=pushed)
    with pytest.raises(HubError, match=r"the hub answers 404 \(\w+NotFoundError\); check the names"):
        pull_store("me/rollouts")


@pytest.mark.parametrize("name", ["rollouts", "a/b/c", "me/..", "", "https://huggingface.co/me/x", "me/" + "x" * 120])
def test_a_name_that_is_not_one_of_a_repository_is_refused(hub: Hub, store: MemoryStore, name: str) -> None:
    for work in (lambda: push_store(store, name), lambda: pull_store(name)):
        with pytest.raises(InvalidRecordError, match="expected `owner/name`"):
            work()
    assert hub.requests == []


# the cards


def test_the_card_of_a_student_says_how_it_was_made(export: Path, store: MemoryStore) -> None:
    about = About(
        licence="other",
        licence_name="its-own",
        licence_link="https://example.com/licence",
        base_model="org/base",
        datasets="org/prompts",
        training={"steps": 150},
        metrics={"openai/gsm8k": {"avg@8": Estimate(0.51234, 0.4, 0.6, 100, 800)}},
        notes="Not for medicine.",
    )
    card = model_card(export, about, store)
    data = head(card)
    assert {name: data[name] for name in ("license", "license_name", "license_link", "base_model", "library_name", "pipeline_tag")} == {
        "license": "other",
        "license_name": "its-own",
        "license_link": "https://example.com/licence",
        "base_model": "org/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert data["datasets"] == ["org/prompts"]
    assert {"lopd", "lightning-opd"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert (result["dataset"]["type"], result["metrics"][0]["value"]) == ("openai/gsm8k", 0.51234)
    for part in (
        "# opd-student",
        "https://arxiv.org/abs/2604.13010",
        f"| teacher whose log-probs it learnt from | {TEACHER.name}@{TEACHER.revision}, {TEACHER.dtype} |",
        "| teacher that wrote its SFT text | not recorded |",
        f"| identity of these weights | opd-student@{folder_model_id(export).revision}",
        "| steps | 150 |",
        "| openai/gsm8k | avg@8 | 0.512 | 0.4 to 0.6 | 100 |",
        f"| rollouts | {len(store)}, ",
        "temperature 1, top-p 1, at most 8 tokens",
        "[its-own](https://example.com/licence)",
        "Not for medicine.",
    ):
        assert part in str(card), part


def test_a_card_says_what_is_not_known_and_no_path(hub: Hub, export: Path, store: MemoryStore) -> None:
    cards = [model_card(export), dataset_card(store, "rollouts")]
    assert [card for card in cards if str(export.parent) in str(card) or str(Path.home()) in str(card)] == []
    assert all("None is stated." in str(card) and "license" not in head(card) for card in cards)
    assert "None were given." in str(cards[0])
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    push_student(export, "me/own-code")
    assert b"| identity of these weights | not known |" in hub.repositories["models/me/own-code"].files["README.md"]


def test_the_card_of_adapters_and_of_a_student_before_opd_say_so(export: Path) -> None:
    (export / "adapter_config.json").write_text("{}")
    Lineage(TEACHER).write(export)
    card = model_card(export)
    assert head(card)["library_name"] == "peft"
    assert "lightning-opd" not in head(card)["tags"]
    assert "before on-policy distillation" in str(card)
    assert "identity of these weights" not in str(card)


def test_the_card_of_a_store_is_one_that_datasets_reads(store: MemoryStore) -> None:
    card = dataset_card(store, "rollouts", LICENSED)
    assert head(card)["configs"] == [{"config_name": "default", "data_files": "rollouts.parquet"}]
    assert head(card)["source_datasets"] == ["org/prompts"]
    assert "| teacher | teacher@rev-teacher, float32 | made-up 1.0 | raw | 4 (2 drawn) | 27 of 30 | not known: " in str(card)


def test_markup_in_a_name_or_a_store_stays_text_on_its_card(export: Path, store: MemoryStore) -> None:
    Lineage(opd_teacher=ModelId("a | b\n# c <script>", "1", "float32")).write(export)
    assert "| a \\| b # c &lt;script>@1, float32 |" in str(model_card(export))
    engine = r"![x](http://evil.example/t.png) [click](http://evil.example) \[a](b) `c` **d**"
    store.append_scores("other", evolve(tiny_provenance(), engine=engine), [tiny_scores(store.read([0])[0].rollout)])
    (line,) = (line for line in str(dataset_card(store, "rollouts")).splitlines() if "evil" in line)
    assert r"!\[x\](http://evil.example/t.png) \[click\](http://evil.example) \\\[a\](b) \`c\` \*\*d\*\* |" in line


PLACES = ["/m/of/", "~/", "~bob/", "file:///home/bob/", "C:\\Users\\bob\\", "./", "../runs/", "/home/bob/my models/", r"\\server\share\\"]


def test_of_a_model_that_is_named_by_its_path_a_card_shows_the_name(export: Path) -> None:
    for place in PLACES:
        Lineage(opd_teacher=ModelId(f"{place}Qwen3-32B", "weights:ab/cd", "float32")).write(export)
        card = str(model_card(export, About(training={"prompts": f"{place}prompts.jsonl", "both": f"{place}x and {place}y"})))
        assert "| Qwen3-32B@weights:ab/cd, float32 |" in card, place
        assert "| prompts | prompts.jsonl |" in card, place
        assert "| both | x and y |" in card, place
        assert "https://arxiv.org/abs/2604.13010" in card


def test_what_is_not_a_path_stays_on_a_card(export: Path) -> None:
    kept = {"rate / step": "1e-6 / 2", "from": "org/base@main, s3://bucket/run", "share": "1/2, and/or ~0.5 ... x"}
    card = str(model_card(export, About(training=kept)))
    assert [value for value in kept.values() if f"| {value} |" not in card] == []


def test_a_long_text_in_which_no_beginning_leads_to_a_path_is_read_once(export: Path) -> None:
    texts = ["~-" * 10**6, "-" + "\\" * 10**6, "~,-" * 10**6 + ".// x"]
    card = str(model_card(export, About(training={text[:3]: text for text in texts})))
    assert all(text.replace("\\", "\\\\") in card for text in texts)


def test_a_store_that_the_student_was_not_trained_on_is_refused(export: Path, store: MemoryStore) -> None:
    Lineage(TEACHER, TEACHER).write(export)
    with pytest.raises(ManifestMismatchError, match="its SFT teacher is teacher@rev-teacher, expected None, the store's"):
        model_card(export, store=store)
    Lineage(None, ModelId("unseen", "1", "float32")).write(export)
    with pytest.raises(ManifestMismatchError, match="its teacher is unseen@1, which no column of the store is of"):
        model_card(export, store=store)


@pytest.mark.parametrize("sft", [True, False])
def test_the_rollouts_that_the_student_was_trained_on_are_recognised(export: Path, store: MemoryStore, sft: bool, tmp_path: Path) -> None:
    known, zarr = StoreId.of(store.manifest, store.lengths()), ZarrStore.create(tmp_path / "run", store.manifest)
    Lineage(store.manifest.policy, None, known).write(export) if sft else Lineage(None, TEACHER, known).write(export)
    export_parquet(store, tmp_path / "run.parquet")
    import_parquet(tmp_path / "run.parquet", zarr)
    store.append([tiny_rollout("later")])
    for same in (store, zarr):
        assert "Its lineage records these rollouts." in str(model_card(export, store=same))
    reseeded = fill(MemoryStore(evolve(store.manifest, sampling=evolve(store.manifest.sampling, seed=7))))
    said = r"it was trained on 30 other rollouts than those of the store, which has [23]0, of policy@"
    for other in (fill(MemoryStore(store.manifest), n=20), reseeded):
        with pytest.raises(ManifestMismatchError, match=said):
            push_student(export, "me/student", store=other)


def test_a_lineage_without_a_store_is_said_not_to_record_it(export: Path, store: MemoryStore) -> None:
    record = json.loads((export / "lopd.json").read_text())
    assert record.pop("store") is None
    (export / "lopd.json").write_text(json.dumps(record))
    assert Lineage.read(export).store is None
    assert "does not record on which rollouts it was trained" in str(model_card(export, store=store))


def test_arguments_that_are_something_else_are_refused(export: Path, store: MemoryStore) -> None:
    wrong: list[tuple[type[LopdError], str, Callable[[], Any]]] = [
        (ArgumentError, "about is a dict", lambda: model_card(export, {})),  # type: ignore[arg-type]
        (ArgumentError, "expected an Estimate", lambda: About(metrics={"d": {"m": 0.5}})),  # type: ignore[dict-item]
        (ArgumentError, "datasets", lambda: About(datasets=[3])),  # type: ignore[list-item]
        (InvalidRecordError, "'~/base' is a path, expected a name in the hub", lambda: About(base_model="~/base")),
        (InvalidRecordError, "'./prompts' is a path", lambda: About(datasets="./prompts")),
        (InvalidRecordError, "without its name or link", lambda: About(licence="other")),
        (ArgumentError, "it is a str", lambda: dataset_card("run.zarr", "x")),  # type: ignore[arg-type]
    ]
    for kind, said, work in wrong:
        with pytest.raises(kind, match=said):
            work()


def test_without_huggingface_hub_the_line_to_install_is_said(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lopd\[hub\]'"):
        push_store(store, "me/rollouts")
