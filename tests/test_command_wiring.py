"""What each key of the file of `lopd run` becomes in the public API: that changes with it, and nothing else does."""

import copy
import json
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attrs import fields, has

import lopd
from lopd import ConsistencyPolicy, MemoryStore, SamplingParams
from lopd.engines import finding
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.server import ServerScorer
from lopd.engines.vllm import VLLMScorer, VLLMSettings, VLLMSource
from lopd.losses.divergences import forward_kl, reverse_kl
from lopd.records.stored import read_as
from lopd.testing import tiny_manifest, tiny_rollout
from lopd.tools.command import before, models, settings, whole_run
from lopd.tools.command.settings import RunSettings
from lopd.tools.phases import Run

PROMPTS = [lopd.Prompt(name, [index + 1], name, name) for index, name in enumerate("abcdef")]
FULL = {
    "out": "runs/a",
    "student": {"model": "student", "device": "cpu"},
    "teacher": {"model": "teacher", "device": "cpu"},
    "prompts": {"file": "prompts.jsonl"},
    "sft": {"steps": 4, "lr": 1.0},
    "opd": {"steps": 4, "lr": 1.0},
    "loss": {},
    "sampling": {},
    "evaluation": {"held_out": 2, "verifier": "checks.py:right"},
}
#: Tokens that a model can read: more than the longest rollout of the file has.
CONTEXT = 5000
#: What the command says of servers.
SERVERS = ("urls", "model", "context", "speaks", "key_variable", "first_contact_s")


class Steps(dict):
    """The arguments of `batches`, and the end of a slice."""

    lineage = "lineage"

    def __getitem__(self, steps):
        return Steps(self, start=steps.start, stop=steps.stop)


class Api(dict):
    """The public API without its work: phase -> function and argument -> what it was given."""

    def __init__(self):
        super().__init__()
        self.phase_name = "before"
        self.store = MemoryStore(tiny_manifest())
        self.store.append([tiny_rollout(prompt.prompt_id, prompt_ids=prompt.token_ids) for prompt in PROMPTS])
        tokenizer = SimpleNamespace(decode=lambda *_, **__: "text")
        self.source = SimpleNamespace(manifest=self.store.manifest, tokenizer=tokenizer, sample=lambda prompts: prompts)

    def note(self, function, **given):
        self.update({f"{self.phase_name}: {function}: {name}": value for name, value in given.items()})

    def call(self, function, names, result, *values, **named):
        self.note(function, **dict(zip(names.split(), values, strict=False)), **named)
        return result

    def phases(self, work):
        for name in work:
            self.phase_name = name
            yield {"name": name, "history": [], **work[name]()}

    def opened(self, url, *_manifest):
        return self.call("ZarrStore", "url", self.store, url)

    def text(self, file, tokenizer, *, store, **given):
        return self.call("import_text", "file tokenizer", store(None), file, tokenizer, **given)

    def collected(self, _source, prompts, _store, *, prompts_per_batch, progress):
        return self.call("collect_rollouts", "prompts", SimpleNamespace(refused=()), len(prompts), prompts_per_batch=prompts_per_batch)

    def batches(self, _store, *, rows, **given):
        return Steps(given, rows="all" if rows is None else len(rows))

    def student(self, _model, _tokenizer, **given):
        made = torch.nn.Linear(1, 1)
        made.export = partial(self.call, "export", "folder tokenizer lineage", None)
        self.note("CausalLMStudent", **given)
        return made

    def train(self, folder, _student, optimizer, steps, loss, *, rate):
        betas, decay = optimizer.defaults["betas"], optimizer.defaults["weight_decay"]
        self.note(
            "train", folder=folder.name.split("-")[0], loss=loss, rates=[rate(k) for k in range(4)], optimizer=(betas, decay), **steps
        )
        return {}

    def scorer(self, servers, tokenizer, identity, top_k, **given):
        kept = {name: getattr(servers, name) for name in SERVERS}
        return self.call("ServerScorer", "tokenizer identity top_k", None, tokenizer, identity, top_k, servers=kept, **given)

    def evaluate(self, _source, prompts, verify):
        self.note("evaluate", prompts=len(prompts))
        for prompt in prompts:
            verify(prompt, tiny_rollout("a"))
        return SimpleNamespace(avg_at_n=SimpleNamespace(mean=0.0, ci95=0.0))

    def reverse_kl(self, _source, _teacher, prompts, _samples):
        self.note("exact_reverse_kl", prompts=len(prompts))
        return {"sums": [1.0] * 2, "counts": [1.0] * 2}

    def verifier(self, place):
        return self.call("verifier", "place", lambda *_: 1.0, place)

    def put(self, patch):
        """Take the place of the API."""
        call = partial(partial, self.call)
        for owner, names in (
            (Run, {"phases": lambda _, work: [*self.phases(work)], "claim": lambda *_: None}),
            (
                models.Model,
                {"tokenizer": lambda model: f"tokenizer of {model.model}", "identity": lambda model: (model.model, model.revision)},
            ),
            (before, {"check_vocabulary": lambda *_: None, "fingerprint_tokenizer": str, "_check_writer": lambda *_: None}),
            (before, {"_unfit": lambda *_: {}, "_described": lambda _: None, "digest": str, "read_verifier": self.verifier}),
            (HFSource, {"from_folder": call("HFSource", "folder sampling dtype device", self.source)}),
            (HFScorer, {"from_folder": call("HFScorer", "folder dtype device", None)}),
            (VLLMSource, {"from_folder": call("VLLMSource", "folder sampling settings", self.source)}),
            (VLLMScorer, {"from_folder": call("VLLMScorer", "folder settings", None)}),
            (ServerScorer, {"__init__": lambda _, *given, **named: self.scorer(*given, **named)}),
            (lopd, {"read_prompts": call("read_prompts", "path tokenizer", PROMPTS)}),
            (lopd, {"make_prompts": call("make_prompts", "contents tokenizer", PROMPTS)}),
            (lopd, {"import_text": self.text, "collect_rollouts": self.collected, "score_rollouts": lambda *_, **__: None}),
            (lopd, {"batches": self.batches, "CausalLMStudent": self.student, "evaluate": self.evaluate}),
            (lopd.ZarrStore, {"open": self.opened, "open_or_create": self.opened}),
            (whole_run, {"load_model": call("load_model", "folder dtype device", ("model", "tokenizer")), "train_phase": self.train}),
            (whole_run, {"context_length": lambda _: CONTEXT}),
            (whole_run, {"_reverse_kl": self.reverse_kl, "read_verifier": self.verifier, "write_page": lambda *_: None}),
            (whole_run.console, {"print": lambda *_, **__: None}),
            (finding, {"described": lambda _: SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=CONTEXT))}),
            (whole_run, {"measure_start": lambda _: SimpleNamespace(verdict="", reason=""), "write_json": lambda *_: None}),
        ):
            for name, made in names.items():
                patch.setattr(owner, name, made)


@cache
def _received(file):
    api = Api()
    with pytest.MonkeyPatch.context() as patch:
        api.put(patch)
        whole_run.run_all(read_as(RunSettings, json.loads(file), "File"))
    return dict(api)


def received(file):
    """Return what the public API is given for this file."""
    return _received(json.dumps(file))


def changed(**changes):
    file = copy.deepcopy(FULL)
    for path, value in changes.items():
        *above, key = path.split("__")
        inner = file
        for name in above:
            inner = inner[name]
        inner[key] = copy.deepcopy(value)
    return file


def diff(file, base):
    """Return phase, function and argument -> what is received for the file, where it is something else than for the base."""
    found, before = received(file), received(base)
    return {key: found.get(key) for key in {**before, **found} if key not in before or key not in found or found[key] != before[key]}


SERVED = {
    "teacher": {"model": "teacher", "engine": "http://a:1", "revision": "abc", "dtype": "bfloat16"},
    "evaluation__reverse_kl": False,
    "text": {"file": "text.jsonl", "written_by": "teacher"},
}
VLLM_STUDENT = {"student": {"model": "student", "engine": "vllm"}}
VLLM_TEACHER = {"teacher": {"model": "teacher", "engine": "vllm"}, "evaluation__reverse_kl": False}
TEXT = {"text": {"file": "text.jsonl", "written_by": "teacher"}}
TOP_K = {"loss__top_k": 5}
#: Rollouts that fit into the smallest of the micro-batches.
SHORT = {"sampling__max_new_tokens": 77}
FIRST, LAST = "evaluation before OPD", "evaluation after OPD"
TEACHER = f"{FIRST}|{LAST}|scores: HFScorer"
STORES = "SFT text|SFT|rollouts|scores|OPD"


def drawn(seed=0, tokens=4096, samples=1, **given):
    return SamplingParams(tokens, samples_per_prompt=samples, seed=seed, **given)


def sampled(seed=0, *tokens, **given):
    """Return what the text of SFT and the rollouts are drawn with: never from the same random numbers."""
    seeds = {"SFT text": seed + 1_000_000, "rollouts": seed}
    return {f"{phase}: HFSource: sampling": drawn(own, *tokens, **given) for phase, own in seeds.items()}


def stores(at):
    return {f"{phase}: ZarrStore: url": f"{at}/{'text' if 'SFT' in phase else 'rollouts'}.zarr" for phase in (*STORES.split("|"), LAST)}


def students(at):
    start = dict.fromkeys((f"{FIRST}: HFSource: folder", "rollouts: HFSource: folder", "OPD: load_model: folder"), f"{at}/sft")
    return {
        **start,
        **{f"{name}: export: folder": Path(at, name.lower()) for name in ("SFT", "OPD")},
        f"{LAST}: HFSource: folder": f"{at}/opd",
    }


#: Path in the file, another value, what else the file has, and all that changes with the value.
CASES = [
    ("out", "runs/b", {}, stores("runs/b/seed-0") | students("runs/b/seed-0")),
    ("store", "s3://bucket/run/", {}, stores("s3://bucket/run/seed-0")),
    (
        "seeds",
        [3],
        {},
        stores("runs/a/seed-3")
        | students("runs/a/seed-3")
        | sampled(3)
        | {
            "SFT|OPD: train: seed": 3,
            f"{FIRST}|{LAST}: HFSource: sampling": drawn(1003),
        },
    ),
    ("consistency", "warn", {}, {"OPD: train: consistency": ConsistencyPolicy.WARN}),
    ("student__model", "other", {}, {"SFT: load_model: folder": "other", "before: read_prompts: tokenizer": "tokenizer of other"}),
    ("student__device", "cuda:1", {}, {f"{FIRST}|{LAST}|rollouts: HFSource: device": "cuda:1", "SFT|OPD: load_model: device": "cuda:1"}),
    ("student__dtype", "bfloat16", {}, {"rollouts: HFSource: dtype": torch.bfloat16}),
    (
        "student__dtype",
        "bfloat16",
        VLLM_STUDENT,
        {"rollouts: VLLMSource: settings": VLLMSettings(torch.bfloat16, 1 + 4096 + 1)},
    ),
    (
        "sampling__max_new_tokens",
        77,
        VLLM_TEACHER,
        {
            **dict.fromkeys(("SFT text: VLLMSource: settings", "scores: VLLMScorer: settings"), VLLMSettings(None, 1 + 77 + 1)),
            "SFT text: VLLMSource: sampling": drawn(1_000_000, 77),
            "rollouts: HFSource: sampling": drawn(0, 77),
            f"{FIRST}|{LAST}: HFSource: sampling": drawn(1000, 77),
        },
    ),
    ("student__context", 77, VLLM_STUDENT, {"rollouts: VLLMSource: settings": VLLMSettings(None, 77)}),
    ("teacher__model", "other", {}, {f"{TEACHER}: folder": "other", "SFT text: HFSource: folder": "other"}),
    ("teacher__device", "cuda:1", {}, {f"{TEACHER}: device": "cuda:1", "SFT text: HFSource: device": "cuda:1"}),
    ("teacher__dtype", "bfloat16", {}, {f"{TEACHER}: dtype": torch.bfloat16, "SFT text: HFSource: dtype": torch.bfloat16}),
    (
        "teacher__context",
        77,
        VLLM_TEACHER,
        dict.fromkeys(("SFT text: VLLMSource: settings", "scores: VLLMScorer: settings"), VLLMSettings(None, 77)),
    ),
    ("prompts__file", "b.jsonl", {}, {"before: read_prompts: path": "b.jsonl"}),
    ("prompts__field", "question", {}, {"before: read_prompts: field": "question"}),
    (
        "prompts__template",
        "Q: {prompt}",
        TEXT,
        dict.fromkeys(("before: read_prompts: template", "SFT text: import_text: template"), "Q: {prompt}"),
    ),
    (
        "prompts__chat_template_kwargs",
        {"thinking": False},
        TEXT,
        {f"{function}: chat_template_kwargs": {"thinking": False} for function in ("before: read_prompts", "SFT text: import_text")},
    ),
    ("text__file", "b.jsonl", TEXT, {"SFT text: import_text: file": "b.jsonl"}),
    ("text__written_by", "unknown", TEXT, {"SFT text: import_text: teacher": None}),
    ("text__written_by", "folder", TEXT, {"SFT text: import_text: teacher": "folder"}),
    ("text__field", "question", TEXT, {"SFT text: import_text: field": "question"}),
    ("text__response", "answer", TEXT, {"SFT text: import_text: response": "answer"}),
    ("text__template", "Q: {prompt}", TEXT, {"SFT text: import_text: template": "Q: {prompt}"}),
    ("text__chat_template_kwargs", {"thinking": False}, TEXT, {"SFT text: import_text: chat_template_kwargs": {"thinking": False}}),
    (
        "sampling__max_new_tokens",
        77,
        {},
        sampled(0, 77) | {f"{FIRST}|{LAST}: HFSource: sampling": drawn(1000, 77)},
    ),
    ("sampling__samples_per_prompt", 3, {}, sampled(samples=3)),
    (
        "sampling__samples_per_prompt",
        3,
        VLLM_STUDENT,
        {
            "SFT text: HFSource: sampling": drawn(1_000_000, samples=3),
            "rollouts: VLLMSource: sampling": drawn(samples=3),
            "rollouts: collect_rollouts: prompts_per_batch": 341,
        },
    ),
    ("sampling__temperature", 0.5, {}, sampled(temperature=0.5)),
    ("sampling__top_p", 0.5, {}, sampled(top_p=0.5)),
    (
        "sampling__stop_ids",
        [7, 9],
        {},
        sampled(stop_ids=[7, 9]) | {f"{FIRST}|{LAST}: HFSource: sampling": drawn(1000, stop_ids=[7, 9])},
    ),
    ("sampling__rows", 2, {}, {f"SFT text|rollouts|{FIRST}|{LAST}: HFSource: rows_per_batch": 2}),
    (
        "evaluation__held_out",
        3,
        {},
        {
            "SFT text|rollouts: collect_rollouts: prompts": 3,
            "SFT|OPD: train: rows": 3,
            f"{FIRST}|{LAST}: evaluate|exact_reverse_kl: prompts": 3,
        },
    ),
    ("evaluation__verifier", "b.py:r", {}, {f"before|{FIRST}|{LAST}: verifier: place": "b.py:r"}),
    ("evaluation__samples_per_prompt", 3, {}, {f"{FIRST}|{LAST}: HFSource: sampling": drawn(1000, samples=3)}),
    ("loss__clip", 3.0, {}, {"OPD: train: loss": lopd.FusedOPDLoss(clip=3.0, ratio_to_ref=True)}),
    ("loss__ratio", False, {}, {"OPD: train: loss": lopd.FusedOPDLoss()}),
    ("loss__top_k", 5, {}, {"scores: HFScorer: top_k": 5}),
    ("loss__kind", "reverse_kl", TOP_K, {"OPD: train: loss": lopd.FusedLoss(lopd.TopKObjective(reverse_kl)), "OPD: train: top_k": True}),
    ("loss__kind", "forward_kl", TOP_K, {"OPD: train: loss": lopd.FusedLoss(lopd.TopKObjective(forward_kl)), "OPD: train: top_k": True}),
    *(
        (f"{section}__{key}", value, SHORT, {f"{phase}: {argument}": became for argument, became in changes.items()})
        for section, phase in (("sft", "SFT"), ("opd", "OPD"))
        for key, value, changes in (
            ("steps", 3, {"train: stop": 3}),
            ("lr", 2.0, {"train: rates": [2.0] * 4}),
            ("warmup", 3, {"train: rates": [0.25, 0.5, 0.75, 1.0]}),
            ("decay", True, {"train: rates": [1.0, 0.75, 0.5, 0.25]}),
            ("rollouts_per_step", 3, {"train: rollouts_per_step": 3}),
            ("tokens_per_batch", 77, {"train: tokens_per_batch": 77}),
            ("weighting", "token", {"train: weighting": lopd.by_token}),
            ("autocast", "bfloat16", {"load_model|CausalLMStudent: autocast": torch.bfloat16}),
            ("gradient_checkpointing", True, {"CausalLMStudent: gradient_checkpointing": True}),
        )
    ),
]
#: Of a teacher on servers: key, another value, and the arguments of `Servers` that it changes.
OF_SERVERS = [
    ("engine", ["http://b:1", "http://c:1"], {"urls": ("http://b:1", "http://c:1")}),
    ("context", 77, {"context": 77}),
    ("served_as", "name", {"model": "name"}),
    ("speaks", "sglang", {"speaks": "sglang"}),
    ("key_variable", "HOME", {"key_variable": "HOME"}),
    ("wait", 77.0, {"first_contact_s": 77.0}),
]


def expanded(expected):
    """Return each entry for every combination of what stands between bars."""
    found = {"": None}
    for key, value in expected.items():
        names = [""]
        for part in key.split(": "):
            names = [f"{name}: {one}" if name else one for name in names for one in part.split("|")]
        found |= dict.fromkeys(names, value)
    return {key: value for key, value in found.items() if key}


@pytest.mark.parametrize(("path", "value", "base", "expected"), CASES, ids=[f"{path}={value}"[:40] for path, value, *_ in CASES])
def test_a_key_changes_what_the_public_api_receives_and_nothing_else(path, value, base, expected):
    assert diff(changed(**base, **{path: value}), changed(**base)) == expanded(expected)


@pytest.mark.parametrize(("key", "value", "expected"), OF_SERVERS)
def test_a_key_of_servers_is_an_argument_of_theirs(key, value, expected):
    before, found = changed(**SERVED), changed(**SERVED, **{f"teacher__{key}": value})
    (servers,) = diff(found, before).values()
    assert servers == received(before)["scores: ServerScorer: servers"] | expected


def test_the_revision_says_who_wrote_the_text_and_who_scores():
    found = diff(changed(**SERVED, teacher__revision="def"), changed(**SERVED))
    assert found == dict.fromkeys(("SFT text: import_text: teacher", "scores: ServerScorer: identity"), ("teacher", "def"))


@pytest.mark.parametrize(
    ("path", "value", "used", "unused"),
    [
        ("student__engine", "vllm", {"rollouts: VLLMSource", "rollouts: collect_rollouts"}, {"rollouts: HFSource"}),
        (
            "teacher__engine",
            "vllm",
            {"SFT text: VLLMSource", "SFT text: collect_rollouts", "scores: VLLMScorer"},
            {"SFT text: HFSource", "scores: HFScorer"},
        ),
        ("prompts", ["a"], {"before: make_prompts"}, {"before: read_prompts"}),
        ("text", TEXT["text"], {"SFT text: import_text"}, {"SFT text: HFSource", "SFT text: collect_rollouts"}),
        (
            "evaluation__reverse_kl",
            False,
            set(),
            {f"{phase}: {part}" for phase in (FIRST, LAST) for part in ("HFScorer", "exact_reverse_kl")},
        ),
    ],
)
def test_what_is_used_in_place_of_something_else(path, value, used, unused):
    base = {role: {"model": role} for role in ("student", "teacher")} | {"evaluation__reverse_kl": path == "evaluation__reverse_kl"}
    found = diff(changed(**{**base, path: value}), changed(**base))
    assert {key.rpartition(": ")[0] for key in found} == used | unused
    assert {key.rpartition(": ")[0] for key, given in found.items() if given is None} >= unused


@pytest.mark.parametrize(
    ("section", "phases", "others"),
    [
        (
            "sft",
            {"SFT text", "SFT"},
            dict.fromkeys([key for key in students("") if key[0] != "S" and "opd" not in key and LAST not in key], "student"),
        ),
        ("evaluation", {FIRST, LAST}, expanded({"SFT text|rollouts: collect_rollouts: prompts": 6, "SFT|OPD: train: rows": "all"})),
    ],
)
def test_a_section_that_is_left_out_takes_its_phases_along(section, phases, others):
    found = diff(changed(**{section: None}), changed())
    assert {key.split(": ")[0] for key, value in found.items() if value is None} - {"before"} == phases
    assert {key: value for key, value in found.items() if value is not None} == {
        key: value for key, value in others.items() if "export" not in key
    }


def test_where_nothing_is_held_out_no_row_is_read_to_choose_what_is_trained_on(monkeypatch):
    monkeypatch.setattr(MemoryStore, "read", lambda *_, **__: pytest.fail("rows were read"))
    found = _received.__wrapped__(json.dumps(changed(evaluation=None)))
    assert found["SFT: train: rows"] == found["OPD: train: rows"] == "all"


def test_every_key_of_the_file_is_tried():
    tried = {path for path, *_ in CASES} | {f"teacher__{key}" for key, *_ in OF_SERVERS}
    tried |= {"teacher__revision", "student__engine", "prompts", "text", "evaluation__reverse_kl", "sft", "evaluation"}
    sections = {"student": models.Model, "teacher": models.Model, "sft": settings.Training, "opd": settings.Training}
    sections |= {name: getattr(settings, name.capitalize()) for name in ("prompts", "text", "loss", "sampling", "evaluation")}
    keys = {f"{section}__{f.name}" for section, kind in sections.items() for f in fields(kind)}
    keys |= {f.name for f in fields(RunSettings)} - sections.keys()
    # a student is not on servers
    assert keys - tried == {f"student__{key}" for key in ("served_as", "revision", "speaks", "key_variable", "wait")}
    assert {f.name for f in fields(RunSettings) if f.name not in sections and has(f.type)} == set()
