"""What would go wrong where no test runs: on two cards, with TF32, without a compiler, on a Mac.  Tensors on other devices are made up."""

import copy
import errno
import fcntl
import logging
import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import peft
import pytest
import torch
from attrs import evolve
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lopd import (
    CausalLMStudent,
    FusedLoss,
    FusedOPDLoss,
    FusedSFTLoss,
    LanceStore,
    MemoryStore,
    SamplingParams,
    ZarrStore,
    selected_logprobs,
)
from lopd.backends.files import local
from lopd.engines import conditions
from lopd.engines.effective import _merged
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.engines.hf.decoding import draw
from lopd.engines.hf.scorer import _kl
from lopd.engines.structure import uses_tf32
from lopd.engines.vllm.engine import VLLMEngine
from lopd.errors import InvalidRecordError, ModelError, ModelWarning, TrainingWarning
from lopd.guards.first_step import judge_baseline
from lopd.losses import chunked
from lopd.losses.divergences import reverse_kl
from lopd.losses.rows import TorchRows
from lopd.losses.top_k import TopKObjective
from lopd.records.devices import check_device, has_bfloat16, has_flash_3, running_sums
from lopd.records.flush import flush
from lopd.testing import loss_case, tiny_manifest, tiny_provenance, tiny_rollout, tiny_scores


@pytest.fixture
def made_up():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.usefixtures("made_up")
def test_a_teacher_may_have_a_card_of_its_own():
    student, teacher = torch.empty(3, 7, device="cuda:0"), torch.empty(3, 5, device="cuda:1")
    assert _kl(student, teacher).device == student.device


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_adapters_are_merged_on_the_cpu_as_cards_round_in_another_way(settings, monkeypatch):
    base = nn.Sequential(nn.Linear(6, 6))
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], **settings)).base_model.model[0]
    moved, move = list[int](), torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(tensor.numel()) or move(tensor))
    _merged(adapted)
    assert sorted(moved) == sorted(tensor.numel() for tensor in [*adapted.parameters(), *adapted.buffers()])


@pytest.fixture(params=[torch.backends, torch.backends.cuda.matmul], ids=["all", "products"])
def tf32(request):
    """Ask for TF32 by the newer name of the setting: of all, or of products."""
    products, before = torch.backends.cuda.matmul, torch.backends.fp32_precision
    products.fp32_precision = "none"
    request.param.fp32_precision = "tf32"
    yield
    torch.backends.fp32_precision = before
    products.fp32_precision = "none"


@pytest.mark.usefixtures("tf32")
def test_tf32_by_the_newer_name_of_its_setting_is_seen(llama, tokenizer):
    with pytest.raises(RuntimeError):
        _ = torch.backends.cuda.matmul.allow_tf32
    assert uses_tf32()
    CausalLMStudent(llama, tokenizer)


@pytest.mark.filterwarnings("ignore:Please use the new API settings:UserWarning")  # of torch 2.9
def test_tf32_is_not_seen_where_nobody_asked_for_it():
    assert not uses_tf32()
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_student_that_was_moved_to_an_apple_gpu_is_told_so(llama, tokenizer, monkeypatch):
    """Trainer of transformers moves it to whatever device there is."""
    student = CausalLMStudent(llama, tokenizer)
    monkeypatch.setattr("lopd.engines.student.evolve", lambda *_, **__: SimpleNamespace(weight=SimpleNamespace(device=torch.device("mps"))))
    with pytest.raises(ModelError, match=r"its device is 'mps', which has no float64, expected a CPU or CUDA; move it there"):
        student(None, None)


@pytest.mark.parametrize("error", [RuntimeError("Required aspect fp64 is not supported on the device"), TypeError("no float64")])
def test_a_device_without_float64_is_refused_before_weights_are_read(error, monkeypatch, tmp_path):
    def refuse(*_, dtype, device):
        assert (dtype, device.type) == (torch.float64, "xpu")
        raise error

    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(ModelError, match=r"its device is 'xpu', which has no float64, expected a CPU or CUDA; move it there"):
        load_model(tmp_path, device="xpu")
    check_device("Model", torch.device("cuda"))


class OnApple(torch.Tensor):
    device = torch.device("mps")


@pytest.mark.parametrize("loss", [FusedOPDLoss(), FusedSFTLoss(), FusedLoss(TopKObjective(reverse_kl)), "log-probs"])
def test_a_loss_of_hidden_states_on_an_apple_gpu_is_refused_as_a_student_there_is(loss):
    case = loss_case("any")
    hidden = case.hidden.as_subclass(OnApple)
    with pytest.raises(ModelError, match=r"Loss: its device is 'mps', which has no float64, expected a CPU or CUDA; move it there"):
        selected_logprobs(hidden, case.head, case.batch.targets) if loss == "log-probs" else loss(hidden, case.head, case.batch)


def test_a_vllm_that_is_closed_does_not_ask_for_cards_which_could_keep_the_next_one_from_starting(monkeypatch):
    stopped = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("it was asked"))
    core = SimpleNamespace(shutdown=lambda: stopped.append(True))
    VLLMEngine.close(SimpleNamespace(_llm=SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))))
    assert stopped


class OnTheNext(nn.Parameter):
    device = torch.device("cuda", 1)


@pytest.mark.parametrize("make", [HFScorer, HFSource, CausalLMStudent])
def test_a_model_that_was_spread_over_devices_is_refused_by_their_names(make, llama, tokenizer):
    """`device_map` does so: its hooks bring outputs back from the whole model alone."""
    spread = copy.deepcopy(llama)
    projection = spread.model.layers[-1].mlp.down_proj
    projection.weight = OnTheNext(projection.weight.data)
    with pytest.raises(ModelError, match=r"its weights are on several devices \(cpu, cuda:1\); load it on one card") as error:
        make(spread, tokenizer)
    assert "train another model" not in str(error.value)


def test_on_macos_what_is_flushed_leaves_the_cache_of_the_drive(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *given: asked.append(given[1]))
    flush(tmp_path)
    flush(tmp_path, tmp_path)
    assert asked == [51] * 3


def test_on_macos_which_refuses_to_read_2_gib_at_once_files_are_read_in_parts(tmp_path, monkeypatch):
    assert local._MOST < 2**31
    real, data = os.pread, bytes(range(100))

    def pread(descriptor, size, start):
        if size > 7:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, min(size, 5), start)

    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr(local, "_MOST", 7)
    monkeypatch.setattr(os, "pread", pread)
    files = local.LocalFiles(tmp_path)
    assert files.read("file") == data
    assert [bytes(part) for part in files.read_ranges("file", [0, 50, 98], [3, 90, 120])] == [data[:3], data[50:90], data[98:]]


@pytest.mark.parametrize(("code", "ends"), [(errno.EIO, True), (errno.ENOTSUP, False)])
def test_on_macos_a_disk_that_fails_is_not_taken_for_one_that_cannot_be_asked(code, ends, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, "refused")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="refused") if ends else nullcontext():
        flush(tmp_path)


@pytest.mark.parametrize("kind", [MemoryStore, ZarrStore, LanceStore])
def test_two_columns_do_not_differ_in_capitals_alone(kind, tmp_path):
    """A file system that ignores them would keep both in one folder."""
    store = kind(tiny_manifest()) if kind is MemoryStore else kind.create(tmp_path / "store", tiny_manifest())
    rollout = tiny_rollout("a")
    store.append([rollout])
    store.append_scores("qwen", tiny_provenance("qwen"), [tiny_scores(rollout)])
    refused = pytest.raises(InvalidRecordError, match=r"the column name is 'Qwen', and 'qwen' is there, which differs in capitals alone")
    with refused:
        store.append_scores("Qwen", tiny_provenance("Qwen"), [tiny_scores(rollout)])
    with refused:
        store.quarantine("Qwen", tiny_provenance("Qwen"), {"a": "too long"})
    store.append_scores("qwen", tiny_provenance("qwen"), [tiny_scores(rollout)])
    assert [*store.columns] == ["qwen"]


@pytest.fixture
def kernels(monkeypatch):
    """Return `kernels(error, *dtypes)`: Triton's rows are there, and the second kernel raises this, or for gradients of these dtypes alone."""
    chunked._triton_rows.cache_clear()

    def put(error, *dtypes):
        def rows(_buffer, _softcap, dtype):
            def gradients(*_):
                if error is not None and dtype in (dtypes or (dtype,)):
                    raise error

            return SimpleNamespace(logprobs=lambda *_: None, gradients=gradients)

        monkeypatch.setattr(chunked, "find_spec", lambda _: "there")
        monkeypatch.setitem(sys.modules, "lopd.losses.triton_rows", SimpleNamespace(TritonRows=rows))
        return rows

    yield put
    chunked._triton_rows.cache_clear()


def test_without_a_compiler_losses_are_computed_in_plain_torch(kernels, caplog):
    kernels(RuntimeError("Failed to find C compiler"))
    with caplog.at_level(logging.WARNING):
        assert [chunked._triton_rows(torch.device("cpu"), torch.float32) for _ in range(2)] == [None, None]
    (said,) = caplog.messages
    assert "plain torch, since Triton does not start (Failed to find C compiler); it needs a C compiler and Python's headers" in said


def test_triton_that_starts_is_taken_and_a_card_that_is_full_says_nothing_of_it(kernels):
    kernels(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        chunked._triton_rows(torch.device("cpu"), torch.float32)
    rows = kernels(None)
    assert chunked._triton_rows(torch.device("cpu"), torch.float32) is rows


class OnACard(torch.Tensor):
    is_cuda = True

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def cumsum(self, *_):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    def bincount(self, *_):
        raise RuntimeError("_bincount_cuda does not have a deterministic implementation")


def test_both_kernels_are_tried_in_the_dtype_of_the_gradients(kernels):
    kernels(Exception("ptxas: feature 'cvt.bf16.f32' requires .target sm_80 or higher"), torch.bfloat16)
    buffer = torch.zeros(2, 8).as_subclass(OnACard)
    assert isinstance(chunked.rows_for(buffer, None, torch.bfloat16), TorchRows)
    assert not isinstance(chunked.rows_for(buffer, None, torch.float32), TorchRows)


def test_tokens_are_drawn_on_a_card_that_has_to_be_deterministic(monkeypatch):
    logits_BV, uniforms_B = torch.randn(3, 600, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5, 0.9]).double()
    sampling = SamplingParams(top_p=0.9)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    on_the_card = draw(logits_BV.as_subclass(OnACard), uniforms_B.as_subclass(OnACard), sampling)
    for found, expected in zip(on_the_card, draw(logits_BV, uniforms_B, sampling), strict=True):
        assert torch.equal(found.as_subclass(torch.Tensor), expected)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    with pytest.raises(RuntimeError, match="cumsum_cuda_kernel"):
        running_sums(logits_BV.as_subclass(OnACard))


def test_a_baseline_is_judged_on_batches_that_lie_on_a_card_which_has_to_be_deterministic():
    batch = loss_case("any").batch
    sizes_B = batch.segment_ids[batch.counted].bincount()
    assert len(set(sizes_B.tolist())) > 1
    weight_N = torch.where(batch.weight > 0, 1 / sizes_B[batch.segment_ids], 0.0)
    on_a_card = evolve(batch, segment_ids=batch.segment_ids.as_subclass(OnACard), weight=weight_N.as_subclass(OnACard))
    with pytest.warns(TrainingWarning, match="it has a baseline, and the weight of a token depends on the length of its response"):
        judge_baseline(torch.optim.SGD([torch.ones(1)]), FusedOPDLoss(kl_baseline=True), [on_a_card])


def a_card(monkeypatch, major):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    return torch.device("cuda", 0)


def test_a_card_without_bfloat16_is_not_tried_with_it_as_a_compiler_may_end_the_process(kernels, monkeypatch, caplog):
    kernels(None)
    assert chunked._triton_rows(a_card(monkeypatch, 7), torch.bfloat16) is None
    assert not caplog.messages


def test_old_cards_of_nvidia_have_no_bfloat16_of_their_own_whatever_torch_says_and_others_are_left_alone(monkeypatch):
    assert has_bfloat16(torch.device("cpu"))
    assert [has_bfloat16(a_card(monkeypatch, major)) for major in (7, 8, 9)] == [False, True, True]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert has_bfloat16(a_card(monkeypatch, 7))


def test_flash_attention_3_is_for_two_generations_of_nvidias_cards(monkeypatch):
    assert [has_flash_3(a_card(monkeypatch, major)) for major in (7, 8, 9, 10, 12)] == [False, True, True, False, False]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has_flash_3(a_card(monkeypatch, 9))


def test_what_computes_in_bfloat16_on_a_card_without_it_is_told_what_to_do(llama, tokenizer, monkeypatch):
    monkeypatch.setattr(conditions, "has_bfloat16", lambda _: False)
    HFScorer(llama, tokenizer)
    narrow, emulated = copy.deepcopy(llama).bfloat16(), "it computes in bfloat16, which torch emulates on cpu, .*; "
    for make in (HFScorer, HFSource, CausalLMStudent):
        with pytest.warns(ModelWarning, match=emulated + r"load it as torch\.float32, which keeps its identity\."):
            make(narrow, tokenizer)
    with pytest.warns(ModelWarning, match=emulated + r"leave out `autocast`\."):
        CausalLMStudent(llama, tokenizer, autocast=torch.bfloat16)
    with pytest.raises(ModelError, match="load float32 weights, and leave out `autocast`"):
        CausalLMStudent(copy.deepcopy(llama).half(), tokenizer)
