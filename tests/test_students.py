"""CausalLMStudent: cut below its head, packed, adapted, checkpointed, exported -- and still the model it was."""

import copy
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from attrs import evolve
from conftest import TOKENIZER_ID
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lopd import collate
from lopd.engines.causal_lm import lm_head, packed_hidden_states, recompute_layers, row_hidden_states
from lopd.engines.hf import HFSource, load_model
from lopd.engines.probes import check_training
from lopd.engines.student import CausalLMStudent
from lopd.errors import LopdError, ModelError, TokenizerMismatchError
from lopd.losses.chunking import Chunking
from lopd.losses.fused import FusedOPDLoss
from lopd.losses.reference import ReferenceOPDLoss, SFTLoss
from lopd.records import Lineage, LossOutput, ModelId, Rollout, SamplingParams, ScoredRollout, by_token, fingerprint_tokenizer

VOCAB = 96
KINDS = ("llama_tied", "qwen3_padded", "gemma2_softcap", "mistral_window", "gpt2", "phi_bias", "granite_scaled", "cohere_scaled")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def records(rollouts):
    """Return the rollouts with made-up teacher scores, some far enough away to be clipped."""
    rng = np.random.default_rng(5)
    return [ScoredRollout(r, {"teacher": -rng.exponential(4, r.response_ids.size).astype(np.float32)}) for r in rollouts]


class Spy:
    """A loss that keeps what it is given."""

    def __call__(self, hidden_ND, head, batch, /):
        self.hidden_ND, self.head, self.batch = hidden_ND, head, batch
        zero = hidden_ND.sum() * 0
        return LossOutput(zero, zero.detach(), zero.detach())


def seen_by_a_loss(student, batch):
    spy = Spy()
    with torch.no_grad():
        student(batch, spy)
    return spy


def gradients(student):
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, tolerance=2e-5):
    assert got.keys() == expected.keys()
    assert any(float(g.abs().max()) > 0 for g in expected.values())
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert float((got[name] - gradient).abs().max()) <= tolerance * scale, name


def train(student, batch, loss, steps=2, lr=0.05):
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        student(batch, loss).loss_sum.backward()
        optimizer.step()


# --- the cut --------------------------------------------------------------------------------------------------------------------------


@every_kind
def test_logits_of_the_packed_cut_model_are_those_of_the_whole_model_on_each_rollout_alone(kind, models, records):
    model = copy.deepcopy(models(kind))
    seen = seen_by_a_loss(CausalLMStudent(model, TOKENIZER_ID), collate(records))
    got_NV = seen.head.logits(seen.hidden_ND)
    with torch.no_grad():
        alone = []
        for record in records:
            ids = torch.tensor([*record.rollout.prompt_ids.tolist(), *record.rollout.response_ids.tolist()])
            alone.append(models(kind)(input_ids=ids[None], use_cache=False).logits[0, :-1, :VOCAB])
    assert got_NV.shape == (sum(len(r.rollout) - 1 for r in records), VOCAB)
    np.testing.assert_allclose(got_NV.detach(), torch.cat(alone), atol=5e-5, rtol=1e-4)


def test_positions_restart_with_each_rollout(records, models):
    positions = seen_by_a_loss(CausalLMStudent(copy.deepcopy(models("gpt2")), TOKENIZER_ID), collate(records)).batch.position_ids
    assert positions.tolist() == [i for r in records for i in range(len(r.rollout) - 1)]


@every_kind
def test_rollouts_of_a_pack_do_not_see_each_other(kind, models, records):
    student = CausalLMStudent(copy.deepcopy(models(kind)), TOKENIZER_ID)
    before = seen_by_a_loss(student, collate(records))
    old = records[3].rollout
    other = Rollout("other/s0/g0", (old.prompt_ids + 7) % VOCAB, (old.response_ids + 11) % VOCAB, old.loss_mask, "length")
    after = seen_by_a_loss(student, collate([*records[:3], ScoredRollout(other, {}), *records[4:]]))
    changed_N = before.batch.segment_ids == 3
    assert float((after.hidden_ND - before.hidden_ND)[changed_N].abs().min(dim=0).values.max()) > 1e-3
    np.testing.assert_allclose(after.hidden_ND[~changed_N], before.hidden_ND[~changed_N], atol=1e-6, rtol=1e-6)


@every_kind
@pytest.mark.parametrize("loss", [SFTLoss(), ReferenceOPDLoss(clip=2.0)], ids=["sft", "opd"])
def test_packed_equals_one_by_one_in_loss_and_gradient(kind, loss, models, records):
    teacher = "teacher" if isinstance(loss, ReferenceOPDLoss) else None
    packed, single = (CausalLMStudent(copy.deepcopy(models(kind)), TOKENIZER_ID) for _ in range(2))
    whole = packed(collate(records, teacher=teacher), loss)
    whole.loss_sum.backward()
    sums = np.zeros(3)
    for record in records:
        output = single(collate([record], teacher=teacher), loss)
        output.loss_sum.backward()
        sums += [float(output.loss_sum.detach()), float(output.reverse_kl_sum), float(output.clipped_sum)]
    got = [float(whole.loss_sum.detach()), float(whole.reverse_kl_sum), float(whole.clipped_sum)]
    np.testing.assert_allclose(got, sums, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(packed), gradients(single), tolerance=1e-4)


def gradients_by(student, batch, loss):
    student.zero_grad()
    student(batch, loss).loss_sum.backward()
    return gradients(student)


@every_kind
def test_the_fused_loss_gives_every_parameter_the_gradient_of_the_plain_one(kind, models, records):
    student, batch = CausalLMStudent(copy.deepcopy(models(kind)), TOKENIZER_ID), collate(records, by_token, teacher="teacher")
    student.eval()
    fused = FusedOPDLoss(clip=2.0, chunking=Chunking(chunk_bytes=1))
    assert_same_gradients(gradients_by(student, batch, fused), gradients_by(student, batch, ReferenceOPDLoss(clip=2.0)))


def test_the_fused_loss_trains_adapters_under_a_frozen_head(models, records):
    student, batch = (
        CausalLMStudent(adapted(copy.deepcopy(models("llama_tied"))), TOKENIZER_ID),
        collate(records, by_token, teacher="teacher"),
    )
    student.eval()
    train(student, batch, FusedOPDLoss(), steps=1)
    fused, plain = (gradients_by(student, batch, loss) for loss in (FusedOPDLoss(), ReferenceOPDLoss()))
    assert all("lora" in name for name in fused)
    assert_same_gradients(fused, plain)


def test_the_sft_loss_is_the_negative_log_likelihood_that_transformers_computes(models, rollouts):
    rollout = rollouts[0]
    ids = torch.tensor([[*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()]])
    labels = ids.clone()
    labels[:, : rollout.prompt_ids.size] = -100
    ours, theirs = CausalLMStudent(copy.deepcopy(models("llama_tied")), TOKENIZER_ID), copy.deepcopy(models("llama_tied"))
    output = ours(collate([ScoredRollout(rollout, {})], by_token), SFTLoss())
    output.loss_sum.backward()
    expected = theirs(input_ids=ids, labels=labels).loss * rollout.response_ids.size
    expected.backward()
    assert float(output.loss_sum.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(gradients(ours.model), gradients(theirs))


class _Louder(transformers.LlamaForCausalLM):
    """Does something to its logits that no field of its config shows."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.3
        return output


class _Forbidding(transformers.LlamaForCausalLM):
    """Rules out a token that its head does not rule out."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 40] = -torch.inf
        return output


class _Blind(transformers.LlamaForCausalLM):
    """A decoder that claims to know lengths, but does not look at positions: packed rollouts see each other."""

    def get_decoder(self):
        return lambda input_ids, **_: self.model(input_ids=input_ids, use_cache=False)


def test_a_model_whose_packed_rollouts_see_each_other_reads_them_in_rows(models):
    model = _Blind(copy.deepcopy(models("llama_tied").config)).eval()
    model.load_state_dict(models("llama_tied").state_dict())
    model.config = copy.deepcopy(model.config)  # its layers keep theirs
    model.config._attn_implementation = "flash_attention_2"
    assert check_training(model, VOCAB) is row_hidden_states


@pytest.mark.parametrize("kind", [_Louder, _Forbidding])
def test_a_model_that_cannot_be_cut_is_refused(kind, models):
    model = kind(copy.deepcopy(models("llama_tied").config)).eval()
    model.load_state_dict(models("llama_tied").state_dict())
    with pytest.raises(ModelError, match=kind.__name__):
        check_training(model, VOCAB)
    with pytest.raises(ModelError, match=kind.__name__):
        CausalLMStudent(model, TOKENIZER_ID)


@pytest.mark.parametrize(
    ("attention", "shape"), [("sdpa", (2, 4)), ("eager", (2, 4)), ("flash_attention_2", (1, 6)), ("flex_attention", (1, 6))]
)
def test_a_pack_stays_one_row_only_for_attention_that_knows_lengths(attention, shape):
    seen = []

    class Decoder:
        config = transformers.PretrainedConfig(attn_implementation=attention)

        def get_decoder(self):
            return self

        def __call__(self, input_ids, position_ids=None, **_):
            seen.append((input_ids, position_ids))
            return SimpleNamespace(last_hidden_state=input_ids[..., None].float())

    ids_N, positions_N = torch.tensor([5, 6, 7, 8, 9, 4]), torch.tensor([0, 1, 2, 3, 0, 1])
    hidden_ND = packed_hidden_states(Decoder(), ids_N, positions_N, [4, 2])
    assert hidden_ND[:, 0].tolist() == ids_N.tolist(), "whatever the form, each token has its own hidden state"
    ((rows, positions),) = seen
    assert rows.shape == shape
    assert (positions is None) is (shape[0] == 2)


def test_a_head_smaller_than_the_vocabulary_or_no_head_at_all_is_refused(models):
    with pytest.raises(ModelError, match=r"96 rows.*97"):
        CausalLMStudent(copy.deepcopy(models("llama_tied")), evolve(TOKENIZER_ID, vocab_size=VOCAB + 1))
    headless = copy.deepcopy(models("qwen3_padded"))
    headless.lm_head = torch.nn.Identity()
    with pytest.raises(ModelError, match="Identity"):
        CausalLMStudent(headless, TOKENIZER_ID)


def test_a_model_that_gives_nan_is_refused(models):
    model = copy.deepcopy(models("llama_tied"))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError):
        CausalLMStudent(model, TOKENIZER_ID)


def test_a_head_that_rules_a_token_out_is_no_reason_to_refuse_a_model(models, records):
    model = copy.deepcopy(models("phi_bias"))
    with torch.no_grad():
        model.lm_head.bias[40] = -torch.inf
    student = CausalLMStudent(model, TOKENIZER_ID)
    without = [r for r in records if 40 not in r.rollout.response_ids]
    student(collate(without, teacher="teacher"), ReferenceOPDLoss()).loss_sum.backward()
    assert all(bool(g.isfinite().all()) for g in gradients(student).values())


def test_checking_the_cut_leaves_mode_random_state_and_gradients_as_they_were(make_model):
    for training in (True, False):
        model = make_model("gpt2_dropout").train(training)
        state = torch.get_rng_state()
        check_training(model, VOCAB)
        assert model.training is training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())


# --- adapters -------------------------------------------------------------------------------------------------------------------------


def adapted(model, **options):
    torch.manual_seed(0)  # or the draws depend on which tests ran before
    return peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options})
    )


def test_only_adapters_are_trained_and_they_are(models, records):
    student = CausalLMStudent(adapted(copy.deepcopy(models("qwen3_padded"))), TOKENIZER_ID)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    train(student, collate(records), SFTLoss())
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name]) is (name not in trained), name


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3_padded", "mistral_window"])
def test_a_student_with_adapters_computes_with_them(kind, models, records):
    model = adapted(copy.deepcopy(models(kind)))
    seen = seen_by_a_loss(CausalLMStudent(model, TOKENIZER_ID), collate(records[:1]))
    ids = seen.batch.inputs[None]
    with torch.no_grad():
        np.testing.assert_allclose(seen.head.logits(seen.hidden_ND), model.eval()(input_ids=ids).logits[0, :, :VOCAB], atol=5e-5, rtol=1e-4)
        assert not torch.allclose(model(input_ids=ids).logits, models(kind)(input_ids=ids).logits, atol=1e-2)


def test_an_adapter_on_the_head_is_refused(models):
    with pytest.raises(ModelError, match="lm_head carries an adapter"):
        CausalLMStudent(adapted(copy.deepcopy(models("qwen3_padded")), target_modules=["q_proj", "lm_head"]), TOKENIZER_ID)


def test_adapters_with_gradient_checkpointing_get_the_same_gradients(models, records):
    torch.manual_seed(3)
    model = adapted(copy.deepcopy(models("llama_tied")))
    plain = CausalLMStudent(copy.deepcopy(model), TOKENIZER_ID)
    checkpointed = CausalLMStudent(copy.deepcopy(model), TOKENIZER_ID, gradient_checkpointing=True)
    for student in (plain, checkpointed):
        student(collate(records), SFTLoss()).loss_sum.backward()
    assert len(gradients(plain)) == 8
    assert_same_gradients(gradients(checkpointed), gradients(plain))


# --- memory and precision -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama_tied", "gemma2_softcap", "gpt2"])
@pytest.mark.parametrize(("own", "asked"), [(None, True), ({"use_reentrant": True}, False), ({"use_reentrant": True}, True), ({}, False)])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(own, asked, kind, models, records):
    results = {}
    for checkpointing in (False, True):
        model = copy.deepcopy(models(kind))
        if checkpointing and own is not None:
            model.gradient_checkpointing_enable(own)
        student = CausalLMStudent(model, TOKENIZER_ID, gradient_checkpointing=checkpointing and asked)
        decoder, calls = student.model.get_decoder(), []
        layer = (decoder.h if kind == "gpt2" else decoder.layers)[0]
        # the attention, not the MLP: recomputation stops as soon as it has what the backward pass needs
        (layer.attn if kind == "gpt2" else layer.self_attn).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        student(collate(records, teacher="teacher"), ReferenceOPDLoss()).loss_sum.backward()
        results[checkpointing] = (len(calls), gradients(student))
    assert results[False][0] == 1
    assert results[True][0] == 2
    assert_same_gradients(results[True][1], results[False][1])


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3_padded", "gemma2_softcap"])
def test_bfloat16_weights_and_autocast_run_and_stay_close(kind, models, records):
    batch = collate(records, teacher="teacher")
    exact = CausalLMStudent(copy.deepcopy(models(kind)), TOKENIZER_ID)
    cast = CausalLMStudent(copy.deepcopy(models(kind)), TOKENIZER_ID, autocast=torch.bfloat16)
    small = CausalLMStudent(copy.deepcopy(models(kind)).to(torch.bfloat16), TOKENIZER_ID)
    losses, dtypes = {}, {}
    for name, student in (("exact", exact), ("cast", cast), ("small", small)):
        seen = {}
        student.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _m, _a, out, seen=seen: seen.update(layer=out.dtype))
        output = student(batch, SFTLoss())
        output.loss_sum.backward()
        losses[name], dtypes[name] = float(output.loss_sum.detach()), seen["layer"]
        assert output.loss_sum.dtype == torch.float32, "log-softmax is in float32 whatever the layers are"
        assert all(bool(g.isfinite().all()) for g in gradients(student).values())
        assert {p.grad.dtype for p in student.parameters()} == {p.dtype for p in student.parameters()}
    assert dtypes == {"exact": torch.float32, "cast": torch.bfloat16, "small": torch.bfloat16}
    assert {p.dtype for p in cast.parameters()} == {torch.float32}
    assert losses["cast"] == pytest.approx(losses["exact"], rel=0.03)
    assert losses["small"] == pytest.approx(losses["exact"], rel=0.03)
    assert losses["cast"] != losses["exact"]


def test_float16_is_refused_for_what_is_trained(models, records):
    model = models("llama_tied")
    with pytest.raises(ModelError, match=r"autocast is torch\.float16, expected torch\.float32 or torch\.bfloat16, as float16 rounds"):
        CausalLMStudent(copy.deepcopy(model), TOKENIZER_ID, autocast=torch.float16)
    # adapters are in float32, and their gradients come through the base
    for half in (copy.deepcopy(model).half(), adapted(copy.deepcopy(model).half())):
        with pytest.raises(ModelError, match=r"its weights are torch\.float16"):
            CausalLMStudent(half, TOKENIZER_ID)
    student = CausalLMStudent(adapted(copy.deepcopy(model).half()), TOKENIZER_ID, autocast=torch.bfloat16)
    student(collate(records), SFTLoss()).loss_sum.backward()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(student).values())


def test_logits_are_float32_under_autocast_and_with_bfloat16_weights_and_the_head_says_what_may_be_multiplied(models, records):
    for student in (
        CausalLMStudent(copy.deepcopy(models("llama_tied")), TOKENIZER_ID, autocast=torch.bfloat16),
        CausalLMStudent(copy.deepcopy(models("llama_tied")).to(torch.bfloat16), TOKENIZER_ID),
    ):
        seen = seen_by_a_loss(student, collate(records))
        expected = seen.hidden_ND.double() @ seen.head.weight.double().T
        got = seen.head.logits(seen.hidden_ND)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.detach(), expected.detach(), rtol=1e-4, atol=1e-4)
        assert (seen.head.compute_dtype or seen.head.weight.dtype) == torch.bfloat16


def test_the_mixed_precision_of_fsdp2_is_the_dtype_of_the_head_that_a_loss_sees(models, records):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        student = CausalLMStudent(copy.deepcopy(models("llama_tied")), TOKENIZER_ID)
        seen = seen_by_a_loss(fully_shard(student, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), collate(records))
        assert seen.hidden_ND.dtype == seen.head.weight.dtype == torch.bfloat16
    finally:
        torch.distributed.destroy_process_group()


def test_accelerate_finds_the_layers_that_it_is_to_shard(models):
    model = copy.deepcopy(models("llama_tied"))
    layers = {type(layer).__name__ for layer in model.model.layers}
    assert set(CausalLMStudent(model, TOKENIZER_ID)._no_split_modules) == layers
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert set(CausalLMStudent(adapted, TOKENIZER_ID)._no_split_modules) == layers


def test_a_batch_of_a_single_prediction_can_be_trained_on(models):
    record = ScoredRollout(Rollout("tiny/s0/g0", [5], [6], [True], "stop"), {})
    student = CausalLMStudent(copy.deepcopy(models("llama_tied")), TOKENIZER_ID)
    with torch.no_grad():
        expected = -float(models("llama_tied")(input_ids=torch.tensor([[5]])).logits[0, 0].log_softmax(-1)[6])
    output = student(collate([record]), SFTLoss())
    output.loss_sum.backward()
    assert float(output.loss_sum.detach()) == pytest.approx(expected, rel=1e-5)


# --- export ---------------------------------------------------------------------------------------------------------------------------

LINEAGE = Lineage(ModelId("sft-teacher", "abc", "float32"), ModelId("opd-teacher", "def", "bfloat16"))


# not gemma2: transformers forgets with which attention it was made, and only "eager" caps the attention logits
@pytest.mark.parametrize("kind", ["llama_tied", "qwen3_padded", "phi_bias"])
def test_an_exported_folder_is_an_ordinary_model_with_its_lineage(kind, models, tokenizer, records, tmp_path):
    student = CausalLMStudent(copy.deepcopy(models(kind)), TOKENIZER_ID)
    train(student, collate(records), SFTLoss(), steps=1, lr=0.01)
    student.export(tmp_path / "deep" / "model", tokenizer, LINEAGE)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "model").eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, student.model.eval()(input_ids=ids).logits)
        assert not torch.allclose(loaded(input_ids=ids).logits, models(kind)(input_ids=ids).logits, atol=1e-3)
    assert Lineage.read(tmp_path / "deep" / "model") == LINEAGE
    _, again = load_model(tmp_path / "deep" / "model")
    assert fingerprint_tokenizer(again) == fingerprint_tokenizer(tokenizer)
    source = HFSource.from_folder(tmp_path / "deep" / "model", SamplingParams(max_new_tokens=4))
    assert source.manifest.sft_teacher == LINEAGE.sft_teacher
    assert source.manifest.policy.same_weights(HFSource(student.model, tokenizer).manifest.policy)


def test_a_student_is_not_exported_with_a_tokenizer_of_other_ids(models, swapped_tokenizer, tmp_path):
    student = CausalLMStudent(copy.deepcopy(models("llama_tied")), TOKENIZER_ID)
    with pytest.raises(TokenizerMismatchError, match="Tokenizer to export"):
        student.export(tmp_path / "model", swapped_tokenizer, LINEAGE)
    assert not (tmp_path / "model").exists()


def test_exported_adapters_load_on_their_base_model(models, tokenizer, records, prompts, tmp_path):
    models("llama_tied").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    student = CausalLMStudent(adapted(base), TOKENIZER_ID)
    train(student, collate(records), SFTLoss(), steps=1)
    student.export(tmp_path / "adapters", tokenizer, LINEAGE)
    assert (tmp_path / "adapters" / "adapter_config.json").exists()
    greedy = SamplingParams(max_new_tokens=5, temperature=0.0)
    expected = HFSource(student.model, tokenizer, greedy).sample(prompts)
    source = HFSource.from_folder(tmp_path / "adapters", greedy)
    assert [r.response_ids.tolist() for r in source.sample(prompts)] == [r.response_ids.tolist() for r in expected]
    assert source.manifest.sft_teacher == LINEAGE.sft_teacher


def test_a_folder_without_lineage_records_no_teacher(models, tokenizer, tmp_path):
    models("llama_tied").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert HFSource.from_folder(tmp_path, SamplingParams()).manifest.sft_teacher is None


def test_a_head_without_weights_says_what_it_is():
    model = SimpleNamespace(get_output_embeddings=lambda: None)
    with pytest.raises(LopdError, match="NoneType"):
        lm_head(model, VOCAB)


def test_a_tokenizer_will_do_in_place_of_its_fingerprint(llama, tokenizer):
    model = copy.deepcopy(llama)
    assert CausalLMStudent(model, tokenizer).tokenizer == CausalLMStudent(model, TOKENIZER_ID).tokenizer == TOKENIZER_ID


def test_layers_are_recomputed_by_the_switch_that_transformers_has():
    asked = []
    both = {"activation_checkpointing_enable": lambda **options: asked.append(options), "gradient_checkpointing_enable": None}
    recompute_layers(SimpleNamespace(**both))  # 5.24, where the older name warns
    recompute_layers(SimpleNamespace(gradient_checkpointing_enable=lambda **options: asked.append(options)))
    assert asked == [{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}} for kind in ("activation", "gradient")]
