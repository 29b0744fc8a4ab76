"""`torch.compile` of a student and of its layers: the same numbers, and a graph for each kind of shape, not for each shape."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import TOKENIZER_ID
from flash_stub import take_flash
from test_no_waiting import a_batch
from torch._dynamo.utils import counters

from lopd import CausalLMStudent, FusedOPDLoss
from lopd.engines.causal_lm import decoder_of
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import ModelError, ModelWarning

# Dynamo looks at the gradients of whatever it meets
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
LOSS = FusedOPDLoss(ratio_to_ref=True)
SHAPES = [(9, 1, 17), (5, 30)]
MORE = [(20, 20), (7, 9, 33)]


def gradients(student: Any, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Return the gradients of each batch, flat."""
    found = []
    for seed, lengths in enumerate(shapes):
        student.zero_grad()
        student(a_batch(seed, lengths), LOSS).loss_sum.backward()
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    return found


def compile_layers(student: CausalLMStudent, backend: str) -> None:
    for layer in decoder_of(student.model).layers:
        layer.compile(backend=backend)


def compile_all(student: CausalLMStudent, backend: str) -> None:
    student.compile(backend=backend)


@pytest.mark.parametrize(
    ("make", "recomputing"),
    [
        pytest.param(partial(compile_all, backend="aot_eager"), False, marks=pytest.mark.slow, id="all"),
        pytest.param(partial(compile_layers, backend="eager"), True, id="layers, recomputed"),
    ],
)
def test_what_is_compiled_has_the_same_gradients_and_few_graphs(llama, make: Callable[[CausalLMStudent], None], recomputing):
    expected = gradients(CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID), [*SHAPES, *MORE])
    torch._dynamo.reset()
    counters.clear()
    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID, gradient_checkpointing=recomputing)
    make(student)
    found = gradients(student, SHAPES)
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 3
    found += gradients(student, [*SHAPES, *MORE])[len(SHAPES) :]
    assert counters["stats"]["unique_graphs"] == graphs, "another size of the same kind is the same graph"
    assert not counters["graph_break"]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_packed_rollouts_are_compiled_too(llama):
    model = copy.deepcopy(llama)
    expected = gradients(CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID), SHAPES)
    with take_flash(model):
        student = CausalLMStudent(model, TOKENIZER_ID)
        compile_layers(student, "eager")
        for ours, theirs in zip(gradients(student, SHAPES), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_a_student_within_torch_compile_computes_the_same(llama):
    expected = gradients(CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID), SHAPES)
    compiled = torch.compile(CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID), backend="eager")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(compiled, SHAPES), expected, strict=True))


def test_a_compiled_model_of_which_nothing_is_used_is_warned_of(llama):
    model = copy.deepcopy(llama)
    for compiled in (torch.compile(model, backend="eager"), model):
        with (
            torch.compiler.set_stance("force_eager"),
            pytest.warns(ModelWarning, match=r"torch.compile is passed by.*`student.compile\(\)`"),
        ):
            CausalLMStudent(compiled, TOKENIZER_ID)
        model.compile(backend="eager")


def test_torch_compile_in_the_place_of_a_layer_is_refused_as_it_renames_weights(llama):
    model = copy.deepcopy(llama)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with torch.compiler.set_stance("force_eager"), pytest.raises(ModelError, match=r"_orig_mod.*compile in place"):
        CausalLMStudent(model, TOKENIZER_ID)


def heated(model):
    model.generation_config.update(do_sample=False, temperature=0.9)


def tied_unsaid(model):
    model.lm_head.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize("run", [partial(torch.compile, backend="eager"), torch.nn.DataParallel], ids=["compile", "parallel"])
@pytest.mark.parametrize(
    ("spoil", "said"), [(heated, "its generation_config cannot be saved .*before training"), (tied_unsaid, "are one tensor")]
)
def test_what_runs_a_model_does_not_hide_that_it_could_not_be_exported(spoil, said, run, make_model):
    model = make_model("qwen3_padded")
    spoil(model)
    with torch.compiler.set_stance("force_eager"), pytest.raises(ModelError, match=said):
        CausalLMStudent(run(model), TOKENIZER_ID)


def test_the_export_of_a_model_in_data_parallelism_is_that_of_the_model(llama, tokenizer, tmp_path):
    from lopd.engines.hf import folder_model_id, model_id
    from lopd.records import Lineage

    CausalLMStudent(torch.nn.DataParallel(copy.deepcopy(llama)), TOKENIZER_ID).export(tmp_path / "made", tokenizer, Lineage())
    assert folder_model_id(tmp_path / "made").revision == model_id(llama).revision


@pytest.mark.parametrize("make", [HFScorer, HFSource, CausalLMStudent])
def test_cards_of_data_parallelism_that_are_passed_by_are_warned_of(make, llama, tokenizer):
    parallel = torch.nn.DataParallel(copy.deepcopy(llama))
    make(parallel, tokenizer)
    parallel.device_ids = [0, 1, 2]
    said = r"Model LlamaForCausalLM: its DataParallel over 3 cards is passed by.*so one of them computes; .*DistributedDataParallel.*`LocalScorer`"
    with pytest.warns(ModelWarning, match=said) as caught:
        make(parallel, tokenizer)
    assert [warning.filename for warning in caught] == [__file__]


def test_what_is_compiled_is_exported_under_the_same_names(llama, tokenizer, tmp_path):
    from lopd.engines.hf import load_model
    from lopd.records import Lineage

    student = CausalLMStudent(copy.deepcopy(llama), TOKENIZER_ID)
    student.compile(backend="eager")
    compile_layers(student, "eager")
    student.export(tmp_path / "made", tokenizer, Lineage())
    loaded = load_model(tmp_path / "made")[0].state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in llama.state_dict().items())
