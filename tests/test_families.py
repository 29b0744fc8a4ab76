"""Families of transformers as tiny models: each ability is right, or refused by an error of lopd; and what the benchmark makes of it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import families
import tiny_models
from families import ABILITIES, BEYOND, attempt, find_goals, measure
from tiny_models import CLASSES, VARIANTS, build_model, tiny_config

from lopd.errors import ModelError

EVERYTHING = ("score", "sample", "gradient", "export")
ASKED = (*EVERYTHING, "length", "bfloat16")
#: Of each kind of model one: windows, caps and scales, experts, latent attention, positions that are learned or added to the attention.
ABLE = (
    *("llama", "qwen3", "gemma3", "gemma3_text", "gemma2", "cohere2", "granite"),
    *("mixtral", "gpt_oss", "deepseek_v3", "gpt2", "bloom", "olmo3"),
)
#: Those in which something is missing, or was wrong once: caches of their own, prompts of unlike length that change the answer, rope that looks
#: at the longest row, caps and scales that the model hides.
PARTLY = (
    *("bert", "falcon_h1", "llama, yarn", "llama, dynamic rope"),
    *("qwen3_5_text", "lfm2", "jamba", "mamba", "minimax", "deepseek_v4", "recurrent_gemma", "rwkv", "bart", "llama4_text"),
    *("llama, longrope", "gemma2, sdpa", "hyperclovax, logits scaling 1.02"),
)


def known(name):
    family, _ = VARIANTS.get(name, (name, {}))
    if family not in CLASSES:
        pytest.skip(f"this version of transformers does not have {family}")
    return name


def silent(row):
    """Return the abilities that are wrong without an error of lopd."""
    return {ability: row[ability] for ability in ABILITIES.keys() & row.keys() if row[ability]["verdict"] in {"wrong", "raw"}}


@pytest.mark.parametrize("name", ABLE)
def test_a_family_is_scored_sampled_trained_and_exported(name):
    row = measure(known(name))
    assert silent(row) == {}
    assert [ability for ability in EVERYTHING if row[ability]["verdict"] != "right"] == []


@pytest.mark.parametrize("name", PARTLY)
def test_an_ability_that_a_family_lacks_is_refused_and_never_silently_wrong(name):
    row = measure(known(name), ASKED)
    assert silent(row) == {}
    assert all(row[ability]["cause"] for ability in ASKED if row[ability]["verdict"] == "refused")


def test_a_verdict_is_a_size_or_a_cause(llama, tmp_path):
    def raising(error):
        def check(model, folder):
            raise error

        return check

    refusal = ModelError("Model Tiny: its rope has a border, expected none within 64 tokens; sample with vLLM.")
    assert attempt(raising(refusal), llama, tmp_path) == {"verdict": "refused", "cause": "its rope has a border"}
    assert attempt(raising(KeyError("a\nb")), llama, tmp_path) == {"verdict": "raw", "cause": "KeyError: 'a\\nb'"}
    assert attempt(lambda *_: 2e-3, llama, tmp_path) == {"verdict": "wrong", "error": 2e-3}
    assert attempt(lambda *_: 1e-4, llama, tmp_path) == {"verdict": "right", "error": 1e-4}
    assert attempt(lambda *_: float("nan"), llama, tmp_path) == {"verdict": "wrong", "error": BEYOND}


def test_the_benchmark_sees_scores_that_are_off_by_three_in_a_hundred(monkeypatch):
    asked = ["score", "bfloat16"]
    assert silent(measure("llama", asked)) == {}
    scores = families._scores
    monkeypatch.setattr(families, "_scores", lambda *args: [1.03 * found for found in scores(*args)])
    assert silent(measure("llama", asked)).keys() == set(asked)


def test_what_cannot_be_built_says_why():
    assert measure("not a family")["not_built"] == "KeyError: 'not a family'"


def test_a_configuration_keeps_what_the_class_does_not_have_out():
    config = tiny_config(type(build_model("gpt2").config))
    assert (config.n_embd, config.n_layer, config.vocab_size) == (32, 2, 96)
    assert not hasattr(config, "kv_lora_rank")


def test_models_are_those_of_their_seed():
    first, again, other = (build_model("llama", seed=seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_each_class_is_tried_once():
    found = tiny_models.families()
    assert len(set(found.values())) == len(found) >= 90
    assert "gpt2" in found
    assert "gpt-sw3" not in found


def test_goals_count_families_and_what_is_silent():
    right, wrong = {"verdict": "right", "error": 0.0}, {"verdict": "wrong", "error": 1.0}
    rows = [{"family": f"f{i}", **dict.fromkeys(ABILITIES, right)} for i in range(90)]
    assert all(goal["met"] for goal in find_goals(rows))
    rows += [{"family": "llama, yarn", **dict.fromkeys(ABILITIES, right), "sample": wrong}, {"family": "x", "not_built": "KeyError: x"}]
    goals = {goal["name"]: goal for goal in find_goals(rows)}
    assert goals["families that were built and tried"]["measured"] == 90
    assert not goals["sample: families wrong without an error"]["met"]
    assert goals["score: families wrong without an error"]["met"]
