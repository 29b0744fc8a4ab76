"""Arguments that are something else than a verb takes, and settings out of numpy, torch or a YAML file: one sentence each, or what was meant."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve
from small_runs import PARAMS, scored, small, source, teacher_model  # noqa: F401

from lopd import (
    CausalLMStudent,
    DriftLimits,
    FusedOPDLoss,
    MemoryStore,
    PrivilegedScorer,
    Prompt,
    ReferenceOPDLoss,
    Rollout,
    SamplingParams,
    TopKObjective,
    audit,
    batches,
    collect_rollouts,
    evaluate,
    evaluate_reverse_kl,
    label_rollouts,
    load_checkpoint,
    opd_steps,
    refresh_every,
    residualise,
    rows_of,
    sample_round,
    save_checkpoint,
    score_rollouts,
    stored_advantages,
    watch_drift,
)
from lopd.engines.hf import HFScorer, HFSource, exact_reverse_kl, load_model
from lopd.engines.server import Servers, ServerScorer, ServerSource
from lopd.errors import (
    ArgumentError,
    ContextOverflowError,
    EngineError,
    InvalidRecordError,
    LopdError,
    MissingScoresError,
    ModelError,
    TrainingWarning,
)
from lopd.losses.divergences import reverse_kl
from lopd.records import Lineage, ModelId, Ranks
from lopd.tools.doctor import check_store
from lopd.tools.interop import (
    TorchDataset,
    export_parquet,
    from_hf_dataset,
    import_authors_parquet,
    import_parquet,
    to_hf_dataset,
)

WRAP, OPEN = r"wrap it: `lopd.CausalLMStudent\(model, tokenizer\)`", r"open it: `lopd.open_store\(path\)`"


@pytest.fixture
def scorer(teacher_model, tokenizer):
    return HFScorer(teacher_model, tokenizer)


LOSS = ReferenceOPDLoss()
TRAINING = {
    "a model": (
        lambda s, o, steps: opd_steps(s.model, steps, LOSS, o),
        f"Student: it is a LlamaForCausalLM, which has no `tokenizer`; {WRAP}",
    ),
    "parallel": (
        lambda s, o, steps: opd_steps(torch.nn.DataParallel(s), steps, LOSS, o),
        "Student: it is a DataParallel, which has no `tokenizer`; leave that out, or put the student in DistributedDataParallel",
    ),
    "swapped": (lambda s, o, steps: opd_steps(o, steps, LOSS, s), f"Student: it is an AdamW, which has no `named_parameters`; {WRAP}"),
    "no optimizer": (lambda s, o, steps: opd_steps(s, steps, LOSS, 1e-3), "Optimizer: it is a float"),
    "a loss of other arguments": (
        lambda s, o, steps: opd_steps(s, steps, lambda logits, batch: 0, o),
        r"Loss: `__call__`: it is a function of \(logits, batch\), expected a function of \(hidden_ND, head, batch\)",
    ),
    "no loss": (lambda s, o, steps: opd_steps(s, steps, "opd", o), "Loss: it is a str"),
    "a class": (
        lambda s, o, steps: opd_steps(s, steps, ReferenceOPDLoss, o),
        r"Loss: it is the class ReferenceOPDLoss.*call it: ReferenceOPDLoss\(\)",
    ),
    "an objective": (
        lambda s, o, steps: opd_steps(s, steps, TopKObjective(reverse_kl), o),
        r"Loss: it is a TopKObjective, which is an objective; pass a loss on it: `FusedLoss\(...\)`",
    ),
    "a store for steps": (lambda s, o, steps: opd_steps(s, steps.store, LOSS, o), r"Steps: it is a MemoryStore.*pass `batches\(store\)"),
    "what is not a step": (lambda s, o, steps: next(opd_steps(s, [[1]], LOSS, o)), r"Step: it is a list.*pass `batches\(store\)"),
    "a step for a slice": (lambda s, o, steps: steps[5], r"the index is 5, expected a slice.*`\.step\(60\)`"),
    "save swapped": (lambda s, o, steps: save_checkpoint("x", o, s, next_step=1, lineage=Lineage()), "Student: it is an AdamW"),
    "save without a folder": (
        lambda s, o, steps: save_checkpoint(3, s, o, next_step=1, lineage=Lineage()),
        "Checkpoint: the path is of type int, expected text or a Path",
    ),
    "load swapped": (lambda s, o, steps: load_checkpoint("x", o, s), "Student: it is an AdamW"),
    "export swapped": (lambda s, o, steps: s.export("x", Lineage(), s.tokenizer), "Tokenizer to export: it is a Lineage"),
    "export of an identity": (lambda s, o, steps: s.export("x", s.tokenizer, Lineage()), "Tokenizer to export: it is a TokenizerId"),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_and_keeping_check_what_they_were_given_before_anything_is_done(case, small, scored, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    call, message = TRAINING[case]
    with pytest.raises(ArgumentError, match=message):
        call(*small, batches(scored, teacher=None))
    assert not list(tmp_path.iterdir())


class OldBar:
    """A progress as lopd 0.2 asked for."""

    def begin(self, what, total, done, tokens, /): ...

    def advance(self, rollouts, tokens, refused, /): ...

    def end(self): ...


DATA = {
    "a path for a store": (lambda source, scorer, store, prompts: batches("run.zarr"), f"Store: it is a str.*{OPEN}"),
    "collect swapped": (lambda source, scorer, store, prompts: collect_rollouts(store, prompts, source), "Source: it is a MemoryStore"),
    "collect into prompts": (lambda source, scorer, store, prompts: collect_rollouts(source, store, prompts), "Store: it is a list"),
    "one prompt": (
        lambda source, scorer, store, prompts: collect_rollouts(source, prompts[0], store),
        "Prompts: it is a Prompt, expected a list",
    ),
    "a generator": (lambda source, scorer, store, prompts: evaluate(source, iter(prompts), len), "Verifier|Prompts"),
    "a file of prompts": (
        lambda source, scorer, store, prompts: collect_rollouts(source, Path("p.jsonl"), store),
        r"Prompts: they are 'p.jsonl', expected a list; read a file with `lopd.read_prompts\(path, tokenizer\)`",
    ),
    "score swapped": (lambda source, scorer, store, prompts: score_rollouts(scorer, store), f"Store: it is a HFScorer.*{OPEN}"),
    "a model scores": (
        lambda source, scorer, store, prompts: score_rollouts(store, scorer.model),
        r"Scorer: it is a Llama.*HFScorer\(model",
    ),
    "a store is asked": (lambda source, scorer, store, prompts: evaluate(store, prompts, lambda p, r: 1.0), "Source: it is a MemoryStore"),
    "kl swapped": (lambda source, scorer, store, prompts: evaluate_reverse_kl(scorer, source, prompts), "Source: it is a HFScorer"),
    "a round swapped": (lambda source, scorer, store, prompts: sample_round(scorer, source, prompts, store), "Source: it is a HFScorer"),
    "audit of a path": (lambda source, scorer, store, prompts: audit("x", ["teacher"]), "Store: it is a str"),
    "residual of a path": (lambda source, scorer, store, prompts: residualise("x"), "Store: it is a str"),
    "export of a path": (lambda source, scorer, store, prompts: export_parquet("run.zarr", "run.parquet"), f"Store: it is a str.*{OPEN}"),
    "dataset of a path": (lambda source, scorer, store, prompts: to_hf_dataset("run.zarr"), f"Store: it is a str.*{OPEN}"),
    "rows of torch of a path": (lambda source, scorer, store, prompts: TorchDataset("run.zarr"), f"Store: it is a str.*{OPEN}"),
    "import into a maker": (
        lambda source, scorer, store, prompts: import_parquet("run.parquet", lambda manifest: store),
        f"Store: it is a function.*{OPEN}",
    ),
    "dataset into a path": (lambda source, scorer, store, prompts: from_hf_dataset(None, "run.zarr"), f"Store: it is a str.*{OPEN}"),
    "the paper's into a path": (
        lambda source, scorer, store, prompts: import_authors_parquet("opd.parquet", "run.zarr", None, scorer.provenance),
        f"Store: it is a str.*{OPEN}",
    ),
    "the paper's of a folder": (
        lambda source, scorer, store, prompts: import_authors_parquet("opd.parquet", store, None, "teacher"),
        "Teacher: it is a str.*`scorer.provenance`",
    ),
    "student swapped": (lambda source, scorer, store, prompts: CausalLMStudent(source.tokenizer, source.model), "Tokenizer: it is a Llama"),
    "scorer of a folder": (
        lambda source, scorer, store, prompts: HFScorer("folder", source.tokenizer),
        r"Model: it is str.*load_model",
    ),
    "rows of a path": (lambda source, scorer, store, prompts: rows_of("x", prompts), f"Store: it is a str.*{OPEN}"),
    "rows of a round": (lambda source, scorer, store, prompts: rows_of(store, prompts, 1), r"Rounds: it was given an int \(1\).*`\[1\]`"),
    "rows of one prompt": (lambda source, scorer, store, prompts: rows_of(store, prompts[0]), "Prompts: it is a Prompt, expected a list"),
    "rows of an iterator": (lambda source, scorer, store, prompts: rows_of(store, iter(prompts)), "Prompts: it is a list_iterator"),
    "rows of no prompts": (lambda source, scorer, store, prompts: rows_of(store, None), "Prompts: it is None, expected a list"),
    "a tuple for ranks": (lambda source, scorer, store, prompts: batches(store, ranks=(0, 2)), r"Ranks: it is a tuple.*`Ranks\(0, 2\)`"),
    "a number for ranks": (lambda source, scorer, store, prompts: batches(store, ranks=0), "Ranks: it is an int"),
    "advantages of a path": (lambda source, scorer, store, prompts: stored_advantages("x"), f"Store: it is a str.*{OPEN}"),
    "drift of steps": (lambda source, scorer, store, prompts: next(watch_drift([3])), "Metrics: it is an int"),
    "drift of a number": (lambda source, scorer, store, prompts: next(watch_drift(3)), "Metrics: it is an int"),
    "drift within a number": (lambda source, scorer, store, prompts: next(watch_drift([], 3)), "Limits: it is an int"),
    "a number for servers": (lambda source, scorer, store, prompts: Servers(3, "m"), "Servers: urls: it is an int"),
    "a number for a key": (lambda source, scorer, store, prompts: Servers("http://h", "m", api_key=3), "Servers: api_key: it is an int"),
    "a number for a round": (lambda source, scorer, store, prompts: next(refresh_every(3, 5)), "Refresh: make_round: it is an int"),
    "settings in a dict": (
        lambda source, scorer, store, prompts: HFSource(source.model, source.tokenizer, {"max_new_tokens": 4}),
        r"HFSource: sampling: it is a dict.*`SamplingParams\(",
    ),
    "a switch for the progress of collecting": (
        lambda source, scorer, store, prompts: collect_rollouts(source, prompts, store, progress=False),
        r"Progress: it is a bool, which has no `advance`; pass None for .*quiet=True",
    ),
    "of scoring": (lambda source, scorer, store, prompts: score_rollouts(store, scorer, progress=True), "Progress: it is a bool"),
    "of labels": (
        lambda source, scorer, store, prompts: label_rollouts(store, lambda p, r: 1.0, None, progress="bar"),
        "Progress: it is a str",
    ),
    "of verifying": (lambda source, scorer, store, prompts: next(check_store(store, progress=True)), "Progress: it is a bool"),
    "an old bar for collecting": (
        lambda source, scorer, store, prompts: collect_rollouts(source, prompts, store, progress=OldBar()),
        r"Progress: `begin`: it is a function of \(what, .*tokens, /\), expected a function of \(what, total, done, tokens, counted\)",
    ),
    "for verifying": (lambda source, scorer, store, prompts: next(check_store(store, progress=OldBar())), "Progress: `begin`: it is"),
    "a source of one prompt at a time": (
        lambda source, scorer, store, prompts: collect_rollouts(
            SimpleNamespace(manifest=0, sample=lambda prompt, seed: []), prompts, store
        ),
        r"Source: `sample`: .*expected a function of \(prompts\)",
    ),
    "source swapped": (lambda source, scorer, store, prompts: HFSource(source.tokenizer, source.model, PARAMS), "Tokenizer: it is a Llama"),
}


@pytest.mark.parametrize("case", DATA)
def test_collecting_scoring_and_evaluating_check_what_they_were_given(case, source, scorer, prompts):
    call, message = DATA[case]
    store = MemoryStore(source.manifest)
    with pytest.raises(ModelError if case == "scorer of a folder" else ArgumentError, match=message):
        call(source, scorer, store, prompts)
    assert len(store) == 0


def test_the_prompts_of_one_of_several_teachers_are_a_list(scored, prompts):
    for wrong, what in ((filter(lambda prompt: True, prompts), "a filter"), (prompts[0], "a Prompt"), (None, "None")):
        with pytest.raises(ArgumentError, match=f"Prompts: it is {what}, expected a list"):
            batches(scored, teacher={"teacher": wrong})
    assert rows_of(scored, []).tolist() == []


@pytest.mark.parametrize("rows", ["abc", [0.5], np.array([True, False]), [[0, 1]]])
def test_rows_that_are_not_numbers_are_refused_and_a_mask_is_not_taken_for_rows(rows, scored):
    with pytest.raises(InvalidRecordError, match=r"expected a vector of whole numbers; of a mask pass `np.flatnonzero"):
        batches(scored, teacher=None, rows=rows)


def test_rows_in_parts_of_unlike_lengths_are_to_be_joined(scored):
    for read in (lambda rows: batches(scored, teacher=None, rows=rows), scored.read):
        with pytest.raises(InvalidRecordError, match=r"rows are of unlike lengths; join them with `np.concatenate`"):
            read([np.array([0, 1]), np.array([2])])


def test_rows_that_are_named_again_are_trained_on_once_and_that_is_said(scored):
    with pytest.warns(TrainingWarning, match=r"2 of 4 rows are named again, and .* once an epoch; pass `np.unique\(rows\)`") as caught:
        steps = batches(scored, teacher=None, rows=[1, 0, 1, 1])
    assert (steps.rows.tolist(), caught[0].filename) == ([0, 1], __file__)


@pytest.mark.parametrize("verifier", [lambda rollout: 1.0, lambda: 1.0, lambda a, b, c: 1.0, None, 0.5])
def test_a_verifier_of_other_arguments_is_refused_before_anything_is_sampled(verifier, source, prompts, monkeypatch):
    monkeypatch.setattr(type(source), "sample", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(ArgumentError, match=r"Verifier: .*expected a function of \(prompt, rollout\)"):
        evaluate(source, prompts, verifier)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_said_before_weights_are_read(device, tmp_path):
    for load in (load_model, HFScorer.from_folder):
        with pytest.raises(EngineError, match=rf"device '{device}' cannot be used .*pass device='cpu'"):
            load(tmp_path / "none", device=device)


def test_forgotten_scores_are_not_offered_the_policys_own(source, prompts):
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store)
    with pytest.raises(
        MissingScoresError, match=r"'teacher' is absent and the rollouts have no scores yet; run `score_rollouts\(store, scorer"
    ) as error:
        batches(store)
    assert "behavior" not in str(error.value)
    assert "refresh" not in str(error.value), "a store in memory has one handle"


def test_numbers_of_numpy_and_torch_are_made_pythons_own(source, prompts):
    given = SamplingParams(np.int64(6), np.float32(0.5), torch.tensor(0.75), np.uint8(2), np.array(3), np.array([0, 5]))
    assert given == SamplingParams(6, 0.5, 0.75, 2, 3, (0, 5))
    assert {type(value) for value in (given.max_new_tokens, given.samples_per_prompt, given.seed)} == {int}
    assert {type(value) for value in (given.temperature, given.top_p)} == {float}
    json.dumps(given.stop_ids)
    assert type(DriftLimits(ess=np.float32(0.5), steps=np.int32(4)).steps) is int
    assert FusedOPDLoss(clip=np.float64(10), epsilon=torch.tensor(0.0)) == FusedOPDLoss(clip=10.0)
    store = MemoryStore(source.manifest)
    collect_rollouts(source, prompts, store, prompts_per_batch=np.int64(3))
    steps = batches(store, teacher=None, rollouts_per_step=np.int64(3), seed=np.int32(1), tokens_per_batch=torch.tensor(99))[
        np.int64(1) : np.int64(2)
    ]
    json.dumps(steps.settings)
    assert [type(value) for value in (steps.rollouts_per_step, steps.seed, steps.tokens_per_batch, steps.stop)] == [int] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingParams(temperature="2e-1"), "temperature is '2e-1', expected a number"),
        (lambda: SamplingParams(temperature=None), "temperature is None, expected a number"),
        (lambda: SamplingParams(seed=True), "seed is True, expected a whole number"),
        (lambda: SamplingParams(max_new_tokens=4.0), "max_new_tokens is 4.0, expected a whole number"),
        (lambda: SamplingParams(top_p=np.array([0.5, 0.6])), "top_p is .* expected a number"),
        (lambda: FusedOPDLoss(clip="10"), "clip is '10', expected a number"),
        (lambda: DriftLimits(ess="low"), "ess is 'low', expected a number"),
        (lambda: Ranks("0", "2"), "Ranks: rank is '0', expected a whole number"),
        (lambda: Ranks(0.5, 2), "Ranks: rank is 0.5, expected a whole number"),
    ],
)
def test_what_is_not_a_number_is_refused_by_name(make, message):
    with pytest.raises(InvalidRecordError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda name: Prompt(name, [1]), lambda name: Rollout(name, [1], [1], [True], "stop")])
@pytest.mark.parametrize("name", [3, None, b"a", ("a", 1)])
def test_an_id_that_is_not_text_is_refused_when_the_record_is_made(make, name):
    with pytest.raises(LopdError, match=r"_id is (an? \w+|None), expected a str; pass `str"):
        make(name)


TAKE = r"; for another (source|scorer) take `evaluate_reverse_kl`\.$"
SERVED = Servers("http://127.0.0.1:1", "m")
ENGINES = {
    "Prompt: it is a str, which has no `answer`": lambda source, scorer: source.sample(["What is 2 + 2?"]),
    "Rollout: it is a Prompt, which has no `behavior_logprobs`": lambda source, scorer: scorer.score([Prompt("p", [5])]),
    "HFSource: lineage: it is a dict, which has no `of`": lambda source, scorer: evolve(source, lineage={"sft_teacher": None}),
    "Model: identity: it is a str": lambda source, scorer: evolve(source, identity="org/student").manifest,
    f"^Teacher: it is a PrivilegedScorer, which has no `model`; pass an HFScorer{TAKE}": lambda source, scorer: exact_reverse_kl(
        source, PrivilegedScorer(scorer, [Prompt("p", [5])], [Prompt("p", [6])]), source.sample([Prompt("p", [5])])
    ),
    f"^Teacher: it is a ServerScorer, which has no `model`; pass an HFScorer{TAKE}": lambda source, scorer: exact_reverse_kl(
        source, ServerScorer(SERVED, scorer.tokenizer_id, ModelId("m", "1", "float32")), []
    ),
    f"^Teacher: it is a HFSource, which has no `rows_per_chunk`; pass an HFScorer{TAKE}": lambda source, scorer: exact_reverse_kl(
        source, source, []
    ),
    f"^Student: it is a ServerSource, which has no `model`; pass an HFSource{TAKE}": lambda source, scorer: exact_reverse_kl(
        ServerSource(SERVED, scorer.tokenizer_id, ModelId("m", "1", "float32"), PARAMS, (0,)), scorer, []
    ),
}


@pytest.mark.parametrize("message", ENGINES)
def test_engines_check_what_they_were_given(message, llama, tokenizer):
    source, scorer = HFSource(llama, tokenizer, PARAMS), HFScorer(llama, tokenizer)
    with pytest.raises(ArgumentError, match=message):
        ENGINES[message](source, scorer)


def test_the_exact_reverse_kl_refuses_a_rollout_beyond_the_teachers_context(llama, tokenizer):
    source = HFSource(llama, tokenizer, PARAMS)
    teacher = copy.deepcopy(llama)
    teacher.config.max_position_embeddings = 8
    with pytest.raises(ContextOverflowError, match="expected at most the context of 8"):
        exact_reverse_kl(source, HFScorer(teacher, tokenizer), source.sample([Prompt("p", [5] * 12)]))
