"""What fits on a card: predictions beside the bytes that the real phases keep alive, and what is said where something does not fit."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from transformers import AutoConfig, Gemma3TextConfig, MambaConfig, Qwen3Config

from lopd.errors import LopdError, ModelError
from lopd.losses import chunking
from lopd.losses.chunking import CHUNK_BYTES
from lopd.tools import command
from lopd.tools.plan import Use, Work, fit, fits, following, rates_like, sampling, scoring, training
from lopd.tools.plan.live import LiveBytes, chunk_size

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_memory

CONFIG = Qwen3Config(
    vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
QUANTISED = Qwen3Config(quantization_config={"quant_method": "awq", "bits": 4})
USE = Use(prompt_tokens=8, response_tokens=56, tokens_per_batch=512, rows=16, autocast=None, chunk_bytes=CHUNK_BYTES)


def main(arguments):
    return command.main(["plan", *arguments])


def alive(case):
    """Return the most bytes that the real phase has alive; the model is made in it."""
    live = LiveBytes()
    with live:
        gpu_memory.run(CONFIG, case)
    return max(sum(parts) for parts in live._after)


@pytest.mark.filterwarnings("ignore::lopd.errors.LopdWarning")
@pytest.mark.parametrize("case", ["training, bfloat16 autocast", "scoring", "sampling"])
def test_a_phase_keeps_alive_what_was_planned(case, monkeypatch):
    kept = {"dtype", "autocast", "lora_rank", "gradient_checkpointing"}
    changes = {name: getattr(gpu_memory.CASES[case], name) for name in kept}
    monkeypatch.setitem(gpu_memory.CASES, case, evolve(USE, **changes, rows_per_chunk=128))
    gpu_memory.run(CONFIG, case)  # models of one structure are probed once
    planned = sum(gpu_memory.planned_gb(CONFIG, case).values()) * 1e9
    assert planned == pytest.approx(alive(case), rel=0.1)


@pytest.mark.parametrize(
    ("phase", "use"),
    [(training, evolve(USE, gradient_checkpointing=True, autocast=torch.bfloat16)), (training, evolve(USE, packed=True)), (sampling, USE)],
)
def test_layers_that_are_alike_are_run_a_few_at_a_time_and_the_rest_follows_exactly(phase, use, monkeypatch):
    found = phase(CONFIG, use)
    monkeypatch.setattr(following, "_layers_alike", lambda *_: None)
    whole = phase(CONFIG, use)
    for rows in (1, 8, 100):
        assert found.gigabytes(rows) == pytest.approx(whole.gigabytes(rows))


def test_the_most_that_fits_is_the_last_that_fits():
    needed = training(CONFIG, USE)
    room = 2 * sum(needed.gigabytes(8).values())
    most = needed.most_rows(room)
    assert sum(needed.gigabytes(most).values()) <= room < sum(needed.gigabytes(most + 1).values())
    assert needed.most_rows(1e-6) == 0


def test_a_micro_batch_is_counted_with_all_positions_that_shorter_rollouts_fill():
    use = evolve(USE, tokens_per_batch=127, rows=1)
    needed = training(CONFIG, use)
    one, full, two = (sum(needed.gigabytes(tokens / 64).values()) for tokens in (64, 127, 128))
    tiny, small, large = (fit._by_tokens("training", needed, use, room) for room in (0.9 * one, (one + full) / 2, full + 1e-9))
    assert one < small.gb == large.gb == full < two
    assert (tiny.fits, small.fits, large.fits) == (False, False, True)
    assert 64 <= small.most < large.most == 127
    assert tiny.most == 0, "a part of a rollout cannot be trained"
    training(CONFIG, evolve(use, tokens_per_batch=63))  # the last token of a rollout is not read


@pytest.mark.parametrize("count", [training, scoring, sampling])
def test_a_batch_of_one_rollout_is_counted_as_a_row_of_a_larger_one(count):
    one, many = (count(CONFIG, evolve(USE, tokens_per_batch=rows * 64, rows=rows, rows_per_chunk=56)) for rows in (1, 4))
    assert one.gigabytes(1) == pytest.approx(many.gigabytes(1), rel=0.01)


def test_adapters_are_all_that_is_trained_beside_weights_that_stay():
    whole, adapted = (training(CONFIG, evolve(USE, lora_rank=rank, dtype=torch.bfloat16)).gigabytes(1) for rank in (0, 8))
    assert adapted["moments"] == pytest.approx(2 * adapted["gradients"])
    assert adapted["moments"] < whole["moments"]
    assert whole["weights"] < adapted["weights"] < 2 * whole["weights"]


def test_cards_that_share_a_student_hold_a_part_of_it_each():
    one, four = (training(CONFIG, evolve(USE, gpus=gpus)).gigabytes(1) for gpus in (1, 4))
    assert four["moments"] == pytest.approx(one["moments"] / 4)
    assert four["weights"] > one["weights"] / 4, "some of it is there whole"
    cast = training(CONFIG, evolve(USE, gpus=4, autocast=torch.bfloat16)).gigabytes(1)
    assert cast["weights"] == four["weights"], "it is gathered as it is, and cast then"


def test_cards_gather_weights_that_stay_without_gradients():
    one, many = (training(CONFIG, evolve(USE, gpus=gpus, lora_rank=1)).gigabytes(1) for gpus in (1, 64))
    assert many["weights"] < one["weights"], "two of its four layers are there whole"


def test_what_fits_is_said_without_advice():
    found = fits(CONFIG, USE, card_gb=1, teacher=CONFIG)
    assert found.fits
    assert [phase.name for phase in found.phases] == ["sampling", "scoring", "training"]
    assert found.advice == ()
    assert all(phase.most > 16 for phase in found.phases)


def test_what_does_not_fit_is_said_with_what_to_change(monkeypatch):
    needed = training(CONFIG, USE)
    # as if each of the changes left a third of what stays
    monkeypatch.setattr(
        fit, "training", lambda _, use, __: needed.shared(3 ** (use.gradient_checkpointing + 2 * (use.lora_rank > 0)) * use.gpus, 0)
    )
    room = sum(needed.gigabytes(USE.rollouts).values())
    found = fits(CONFIG, USE, card_gb=0.5 * room / 0.85)
    assert not found.fits
    advice = [sentence for sentence in found.advice if sentence.startswith("training: ")]
    assert advice[0].startswith("training: tokens_per_batch=")
    assert advice[1].startswith("training: gradient_checkpointing=True fits with tokens_per_batch=")
    assert "lora_rank=64" in advice[2]
    assert "gpus=2" in advice[-1]
    none = fits(CONFIG, USE, card_gb=1e-5).advice
    assert none[-1] == "training: take shorter rollouts, a smaller model or a larger card"


def test_a_sliding_window_keeps_its_own_tokens_alone():
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    layers = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "num_key_value_heads": 2, "head_dim": 16}
    near, far = (
        sampling(Gemma3TextConfig(**sizes, **layers, sliding_window=window, max_position_embeddings=512), evolve(USE, response_tokens=248))
        for window in (16, 4096)
    )
    token = 2 * 2 * 16 * 4  # keys and values
    beside = far.gigabytes(1)["keys and values"] * 1e9 - 3 * 254 * token
    assert 0 <= beside < 3 * 254 * token / 20, "masks and positions"
    assert near.gigabytes(1)["keys and values"] * 1e9 == pytest.approx((2 * 16 + 254) * token + beside)


def test_a_model_whose_code_looks_at_numbers_is_refused():
    class Looking(torch.nn.Module):
        def forward(self, hidden, **_):
            return hidden if bool(hidden.sum() > 0) else -hidden

    def made(config, dtype, lora_rank, attention):
        model = following.empty(config, dtype, lora_rank, attention)
        model.model.norm = Looking()
        return model

    with pytest.raises(ModelError, match="a Qwen3Config cannot be followed without numbers"):
        following.count(CONFIG, lambda config: made(config, torch.float32, 0, "sdpa"), 1, _prepare)


def _prepare(model, live):
    def step(rows):
        model.model(input_ids=torch.zeros(rows, 4, dtype=torch.long), attention_mask=torch.ones(rows, 4), use_cache=False)
        return [live.stretch()]

    return step


def test_other_families_are_followed_too():
    config = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8)
    assert scoring(config, USE).most_rows(1) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Use(rows=0), "Use: rows is 0, expected at least 1"),
        (lambda: Use(lora_rank=-1), "Use: lora_rank is -1"),
        (lambda: Use(response_tokens=1.5), "response_tokens is 1.5, expected a whole number"),
        (lambda: Use(prompt_tokens=float("nan")), "prompt_tokens is nan, expected a whole number"),
        (lambda: Use(chunk_bytes=0), "Use: chunk_bytes is 0, expected at least 1"),
        (lambda: Use(packed="no"), "Use: packed is 'no', expected True or False"),
        (lambda: Use(dtype="bfloat16"), "Use: dtype is 'bfloat16', expected torch.float32"),
        (lambda: Use(autocast=torch.float32), "Use: autocast is torch.float32, expected None or torch.bfloat16"),
        (lambda: Use(autocast=torch.float16), "Use: autocast is torch.float16, expected None or torch.bfloat16"),
        (lambda: training(CONFIG, evolve(USE, dtype=torch.float16)), "its weights are torch.float16, expected torch.float32"),
        (
            lambda: training(CONFIG, evolve(USE, tokens_per_batch=62)),
            "Use: tokens_per_batch is 62, expected at least 63, the longest rollout",
        ),
        (lambda: scoring(QUANTISED, USE), "Plan: the weights of this Qwen3Config are quantised, and would be counted as if they were not"),
        (lambda: fits(CONFIG, USE, card_gb=0), "Fit: card_gb is 0, expected finite and more than 0"),
        (lambda: fits(CONFIG, USE, card_gb="24"), "Fit: card_gb is '24', expected a number"),
        (lambda: fits(CONFIG, USE, card_gb=float("nan")), "Fit: card_gb is nan"),
        (
            lambda: fits(CONFIG, Use(), card_gb=24),
            "prompt_tokens \\+ response_tokens is 3584, expected at most 256, the context of this Qwen3",
        ),
        (lambda: fits("Qwen/Qwen3-8B", USE, card_gb=24), "Plan: a model is a str, expected a transformers configuration"),
        (lambda: fits(Qwen3Config, USE, card_gb=24), "Plan: a model is the class Qwen3Config"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(make, message):
    with pytest.raises(LopdError, match=message):
        make()


def test_the_chunk_is_the_one_that_losses_take_on_the_card(monkeypatch):
    card, row = torch.device("cuda"), 4 * 151_936
    for room_gb in (80, 30, 22, 20.5):
        monkeypatch.setattr(chunking, "free_bytes", lambda _, room_gb=room_gb: int((room_gb - 20) * 1e9))
        size = chunk_size(2, 20e9, row_bytes=row, tokens=3072, limit=None, room_gb=room_gb)
        assert size == row * chunking.chunk_rows(chunking.Chunking(), 2 * 3072, row, card)


def test_a_card_with_room_has_a_larger_chunk():
    use = evolve(USE, chunk_bytes=None, tokens_per_batch=64 * 64)
    needed, small = training(CONFIG, use), training(CONFIG, use, 0.018)
    assert needed.gigabytes(64)["weights"] == small.gigabytes(64)["weights"]
    assert sum(small.gigabytes(64).values()) < sum(needed.gigabytes(64).values())


def test_what_adamw_divides_by_is_counted_and_shared_by_cards():
    few = evolve(USE, response_tokens=1, prompt_tokens=1, tokens_per_batch=2)
    one, two = (training(CONFIG, evolve(few, gpus=gpus)).gigabytes(1) for gpus in (1, 2))
    assert one["activations"] == pytest.approx(one["moments"] / 2, rel=0.01)
    assert two["activations"] == pytest.approx(one["activations"] / 2, rel=0.2)


def test_small_students_sample_faster_and_large_ones_slower():
    rates = [rates_like(Work(prompts=1, student_billions=size)).sampling for size in (0.6, 1.7, 4.0, 8.2, 16.4)]
    assert rates[2] == pytest.approx(rates[3])
    assert rates[4] == pytest.approx(rates[3] / 2)
    assert np.all(np.diff(rates[:3]) < 0)
    assert rates[0] < 4.0 / 0.6 * rates[2], "a step takes some time whatever the size"


def test_the_command_line_says_what_fits(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path / "student")
    assert AutoConfig.from_pretrained(tmp_path / "student").hidden_size == 64
    card = ["--student", str(tmp_path / "student"), "--prompt-tokens", "8", "--response-tokens", "56", "--tokens-per-batch", "512"]
    assert main([*card, "--card", "1", "--autocast", "float32"]) == 0
    assert "tokens_per_batch" in capsys.readouterr().out
    assert main([*card, "--card", "0.004", "--rows", "1", "--gpus", "64", "--gradient-checkpointing", "--lora-rank", "8", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert found["advice"]
    whole = sum(training(CONFIG, Use(prompt_tokens=8, response_tokens=56, tokens_per_batch=512)).gigabytes(8).values())
    tight = [*card, "--card", f"{0.7 * whole / 0.85}", "--rows", "1"]
    assert main([*tight, "--json"]) == 1
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert len(advice) == 4
    for sentence in advice[2:]:
        words = [word for word in sentence.split()[1:] if word not in ("fits", "with")]
        assert main([*tight, *words]) == 0
    capsys.readouterr()
    assert main([*card, "--card", "1", "--prompt-tokens", "nan"]) == 2
    assert "prompt_tokens is nan" in capsys.readouterr().err
    assert main(["--card", "24"]) == 2
    assert "--student is missing" in capsys.readouterr().err
    assert main(["--card", "24", "--student", str(tmp_path / "nothing")]) == 2
