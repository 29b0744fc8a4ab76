"""Which attention a model computes with, and how rollouts lie before it.  FlashAttention is computed on the CPU here (`flash_stub`)."""

import copy
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import flash_stub
import pytest
import torch
from conftest import TOKENIZER_ID
from flash_stub import take_flash, take_flex
from test_no_waiting import a_batch, asked
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import sdpa_attention
from transformers.integrations.flash_attention import get_target_dtype

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import tiny_models
from tiny_models import build_model

from lopd import CausalLMStudent, FusedOPDLoss
from lopd.engines import borders, causal_lm, probes
from lopd.engines.causal_lm import hidden_states, packed_hidden_states, row_hidden_states
from lopd.engines.hf import HFScorer, load_model, loading
from lopd.engines.masks import known_rows
from lopd.engines.probes import check_training
from lopd.errors import EngineError, ModelError

LOSS = FusedOPDLoss(ratio_to_ref=True)


def gradients(student):
    found = []
    for seed, lengths in enumerate([(9, 1, 17), (12,)]):
        student.zero_grad()
        student(a_batch(seed, lengths), LOSS).loss_sum.backward()
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    return found


WAYS = [
    ("llama", take_flash, packed_hidden_states),
    ("qwen3", take_flash, packed_hidden_states),
    ("qwen3", take_flex, packed_hidden_states),
    ("lfm2", take_flash, row_hidden_states),
]


@pytest.mark.parametrize(("kind", "take", "way"), WAYS)
@pytest.mark.parametrize("recompute", [False, True])
def test_rollouts_are_packed_or_in_rows_and_gradients_are_the_same(kind, take, way, recompute):
    """The layers of a hybrid that are not attention would run from one packed rollout into the next."""
    model = build_model(kind, vocab_size=TOKENIZER_ID.vocab_size)
    expected = gradients(CausalLMStudent(copy.deepcopy(model), TOKENIZER_ID))
    with take(model):
        assert check_training(model, TOKENIZER_ID.vocab_size) is way
        found = gradients(CausalLMStudent(model, TOKENIZER_ID, gradient_checkpointing=recompute))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "size"), [("falcon_h1", 0.1), ("lfm2", 0.02)])
def test_a_hybrid_whose_weights_hardly_show_it_is_not_packed(kind, size, dtype, monkeypatch):
    """What is taken here holds for all models of its structure, whatever their weights."""
    monkeypatch.setattr(tiny_models, "_spread", lambda model: None)
    model = build_model(kind, initializer_range=size, vocab_size=TOKENIZER_ID.vocab_size).to(dtype)
    with take_flash(model):
        assert check_training(model, TOKENIZER_ID.vocab_size) is row_hidden_states


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("ctrl", lambda model: model),  # it scales its embeddings in place
        ("olmoe", lambda model: model.requires_grad_(False)),
        ("mistral", lambda model: model.model.compile(backend="eager")),
    ],
    ids=["in place", "frozen experts", "compiled"],
)
def test_what_is_right_packed_stays_packed_and_as_it_was(kind, change, monkeypatch):
    monkeypatch.setattr(probes, "knows_lengths", lambda model: True)
    monkeypatch.setattr(causal_lm, "knows_lengths", lambda model: True)
    model = build_model(kind, vocab_size=TOKENIZER_ID.vocab_size).bfloat16()
    change(model)
    with torch.no_grad():
        assert check_training(model, TOKENIZER_ID.vocab_size) is packed_hidden_states
    assert not model.get_input_embeddings()._forward_hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "border",
    [
        {"attention_chunk_size": 32, "attn_temperature_tuning": False},
        {"attention_chunk_size": 4, "no_rope_layers": [0, 0], "floor_scale": 32},  # no layer has chunks
    ],
    ids=["chunks", "temperature"],
)
def test_a_model_that_goes_by_places_of_a_row_is_not_packed_where_no_probe_reaches_so_far(border, monkeypatch):
    monkeypatch.setattr(borders, "_LONGEST", 8)
    model = build_model("llama4_text", vocab_size=TOKENIZER_ID.vocab_size, **border)
    with take_flex(model):
        assert check_training(model, TOKENIZER_ID.vocab_size) is row_hidden_states


def in_16_bits(module, query, *rest, **known):
    """Compute as the real kernel, which refuses float32.

    transformers casts what is in float32 to the dtype of an autocast, or of the weights.
    """
    to = get_target_dtype(query, module) or query.dtype
    if to == torch.float32:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    return flash_stub.flash(module, query.to(to), *(part if part is None else part.to(to) for part in rest), **known)


def test_float32_weights_take_flash_attention_in_the_autocast_of_a_student_alone(monkeypatch, tokenizer):
    # another family than above: what was found of a structure is not asked again
    model = build_model("olmo2", vocab_size=TOKENIZER_ID.vocab_size)
    expected = gradients(CausalLMStudent(copy.deepcopy(model), TOKENIZER_ID, autocast=torch.bfloat16))
    with take_flash(model):
        monkeypatch.setitem(flash_stub.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", in_16_bits)
        assert check_training(model, TOKENIZER_ID.vocab_size, torch.bfloat16) is packed_hidden_states
        found = gradients(CausalLMStudent(model, TOKENIZER_ID, autocast=torch.bfloat16))
        says = r'it raises RuntimeError \(FlashAttention only support fp16.*; load it with `attention="sdpa"`, {}\.$'
        with pytest.raises(ModelError, match=says.format("or pass `autocast=torch.bfloat16`")):
            CausalLMStudent(model, TOKENIZER_ID)
        with pytest.raises(ModelError, match=says.format("which a student with autocast can use too")):
            HFScorer(model, tokenizer)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm()) < 0.05 * float(theirs.norm())


def test_transformers_would_ask_whether_rows_are_packed(llama):
    """The day it does not, `lopd/engines/masks.py` can go."""
    ids_BS = torch.arange(12).view(2, 6)
    for known, question in ((False, ["_local_scalar_dense"]), (True, [])):
        with asked() as found, torch.no_grad():
            if known:
                with known_rows():
                    hidden_states(llama, ids_BS)
            else:
                hidden_states(llama, ids_BS)
        assert [name for name in found if not name.startswith("__")] == question


def test_what_is_known_of_rows_is_known_in_one_thread_and_while_it_is_so():
    packed_1S = torch.tensor([[0, 1, 2, 0, 1]])
    seen = []
    with known_rows():
        assert masking_utils.find_packed_sequence_indices(packed_1S) is None
        other = Thread(target=lambda: seen.append(masking_utils.find_packed_sequence_indices(packed_1S)))
        other.start()
        other.join()
        with known_rows(packed_1S):
            assert masking_utils.find_packed_sequence_indices(packed_1S) is packed_1S
        assert masking_utils.find_packed_sequence_indices(packed_1S) is None
    for found in (seen[0], masking_utils.find_packed_sequence_indices(packed_1S)):
        assert found.tolist() == [[0, 0, 0, 1, 1]]


@pytest.fixture
def folder(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def on_a_gpu(monkeypatch, flash):
    """Pretend that the model is on a GPU, and that FlashAttention is installed."""

    def put(model, name):
        model.config._attn_implementation_internal = name

    monkeypatch.setattr(loading, "_on_cuda", lambda model: True)
    monkeypatch.setattr(loading, "_FLASH", {"flash_attention_3": lambda: False, "flash_attention_2": lambda: True})
    for name in loading._FLASH:
        monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, lambda *_, **__: None)
    monkeypatch.setitem(flash_stub.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", put)


def loaded(folder, caplog, **options):
    """Load the model; return the attention that is taken, and the last line of the log."""
    with caplog.at_level(logging.INFO, "lopd"):
        model, _ = load_model(folder, **options)
    line = caplog.messages[-1]
    assert line.startswith(f"Model {str(folder)!r}: attention {model.config._attn_implementation} (")
    return model.config._attn_implementation, line


def test_flash_attention_is_taken_where_it_is_right_and_the_log_says_so(folder, monkeypatch, caplog):
    on_a_gpu(monkeypatch, flash_stub.flash)
    assert loaded(folder, caplog, dtype=torch.bfloat16) == (
        "flash_attention_2",
        f"Model {str(folder)!r}: attention flash_attention_2 (hidden states are those of sdpa)",
    )


def test_float32_weights_take_flash_attention_for_the_autocast_of_a_student(folder, tokenizer, monkeypatch, caplog):
    on_a_gpu(monkeypatch, in_16_bits)
    taken, line = loaded(folder, caplog, dtype=torch.float32)
    assert (taken, "weights are torch.float32; pass the `autocast`" in line) == ("sdpa", True)
    assert loaded(folder, caplog, dtype=torch.float32, autocast=torch.bfloat16)[0] == "flash_attention_2"
    model, _ = load_model(folder, torch.float32, autocast=torch.bfloat16)
    assert model.dtype == torch.float32
    found = gradients(CausalLMStudent(model, tokenizer, autocast=torch.bfloat16))
    plain, _ = load_model(folder, torch.float32, attention="sdpa")
    for ours, theirs in zip(found, gradients(CausalLMStudent(plain, tokenizer, autocast=torch.bfloat16)), strict=True):
        assert float((ours - theirs).norm()) < 0.05 * float(theirs.norm())
    for autocast in (torch.float32, torch.float16, "bfloat16", True):
        with pytest.raises(EngineError, match=r"expected torch\.bfloat16"):
            load_model(folder, torch.float32, autocast=autocast)


def wrong(module, query, *rest, **known):
    output, weights = flash_stub.flash(module, query, *rest, **known)
    return output * 1.5, weights


def missing(*_, **__):
    raise RuntimeError("FlashAttention only supports head dimension at most 256")


@pytest.mark.parametrize("flash", [wrong, missing])
def test_flash_attention_that_is_wrong_or_raises_is_not_taken(folder, monkeypatch, caplog, flash):
    on_a_gpu(monkeypatch, flash)
    taken, line = loaded(folder, caplog, dtype=torch.bfloat16)
    assert (taken, "cannot be used, or gives other hidden states" in line) == ("sdpa", True)
    assert flash is wrong or any("head dimension" in line for line in caplog.messages)


def ending(*_, **__):
    """End the process, as FlashAttention-3 does on a card for which it has no kernel: not by an `Exception`."""
    raise SystemExit(1)


@pytest.mark.parametrize(("major", "flash_3", "taken"), [(9, flash_stub.flash, 3), (12, ending, 2)])
def test_flash_attention_3_is_not_tried_on_a_card_on_which_it_ends_the_process(folder, monkeypatch, caplog, major, flash_3, taken):
    on_a_gpu(monkeypatch, flash_stub.flash)
    monkeypatch.setitem(loading._FLASH, "flash_attention_3", lambda: True)
    monkeypatch.setitem(flash_stub.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_3", flash_3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    assert loaded(folder, caplog, dtype=torch.bfloat16)[0] == f"flash_attention_{taken}"
    refused = pytest.raises(EngineError, match=r"'flash_attention_3' cannot be used \(it has no kernel for this card")
    with nullcontext() if taken == 3 else refused:
        load_model(folder, attention="flash_attention_3")


def saved(tokenizer, folder, kind, sharper=1, **special):
    model = build_model(kind, vocab_size=TOKENIZER_ID.vocab_size, **special)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= sharper
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def capping(module, query, key, value, attention_mask, *, scaling, softcap=None, **known):
    """Compute a FlashAttention that keeps the cap and knows no window."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = query @ key.mT * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1).to(value.dtype) @ value).transpose(1, 2), None


@pytest.mark.parametrize(("flash", "taken"), [(capping, "flash_attention_2"), (flash_stub.flash, "eager")])
def test_flash_attention_is_judged_by_what_keeps_a_cap_on_attention_scores(tokenizer, tmp_path, monkeypatch, caplog, flash, taken):
    saved(tokenizer, tmp_path, "gemma2", sharper=100, attn_logit_softcapping=0.5, sliding_window=64)
    on_a_gpu(monkeypatch, flash)
    assert loaded(tmp_path, caplog, dtype=torch.bfloat16)[0] == taken


@pytest.mark.parametrize(("window", "taken"), [(20, "sdpa"), (200, "flash_attention_2")])
def test_flash_attention_is_judged_beyond_a_window(tokenizer, tmp_path, monkeypatch, caplog, window, taken):
    """The function in place of FlashAttention knows no window; the context ends before the wider one does."""
    saved(tokenizer, tmp_path, "starcoder2", sliding_window=window, max_position_embeddings=64)
    on_a_gpu(monkeypatch, flash_stub.flash)
    assert loaded(tmp_path, caplog, dtype=torch.bfloat16)[0] == taken


def test_the_cpu_takes_what_transformers_takes(folder, caplog):
    for dtype in (torch.float32, torch.bfloat16):
        taken, line = loaded(folder, caplog, dtype=dtype)
        assert (taken, "FlashAttention is for CUDA" in line) == ("sdpa", True)


def test_an_attention_that_is_asked_for_is_taken_or_refused(folder):
    assert load_model(folder, attention="eager")[0].config._attn_implementation == "eager"
    for name in ("flash_attention_2", "nonsense"):
        with pytest.raises(EngineError, match=rf"attention '{name}' cannot be used \(.*leave it out"):
            load_model(folder, attention=name)


@pytest.mark.parametrize(
    "asks", [lambda attention_mask, key: True, lambda attention_mask, key, value: True], ids=["before 5.13", "from 5.13 on"]
)
def test_float32_and_old_cards_on_cuda_get_a_kernel_that_keeps_no_scores(asks, monkeypatch):
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", asks)
    with known_rows():
        pass
    values = asks.__code__.co_argcount - 2

    def in_groups(dtype, *, is_cuda=True, major=8):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
        key = SimpleNamespace(is_cuda=is_cuda, device=torch.device("cuda" if is_cuda else "cpu"), dtype=dtype)
        found = sdpa_attention.use_gqa_in_sdpa(None, key, *[key] * values)
        assert sdpa_attention.use_gqa_in_sdpa(attention_mask=None, key=key, **{"value": key} if values else {}) == found
        return found

    for dtype in (torch.float32, torch.float64):
        assert not in_groups(dtype)
        assert in_groups(dtype, is_cuda=False)
    assert in_groups(torch.bfloat16)
    assert not in_groups(torch.float16, major=7)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert in_groups(torch.float32), "autocast gives it 16 bits"
