"""The planner of memory and the architectures of transformers: each is answered, all weights counted, or refused with its cause."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from attrs import evolve
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import plan_families
from plan_families import ANSWERED, PHASES, USE, goals, held_bytes, measure
from tiny_models import CLASSES, SPECIAL, tiny_config

from lopd.errors import LopdError, ModelError
from lopd.tools.plan import Need, scoring, training
from lopd.tools.plan.live import PARTS

RESULTS = Path(plan_families.__file__).parent / "results" / "plan_families.json"
#: Positions that are learned or added to the scores; a head of keys that all share; layers that are dropped at random; experts; a part that reads
#: images.
ANSWERS = ("gpt2", "bloom", "falcon", "opt", "mixtral", "gemma3")
REFUSES = {
    "dbrx": r"a DbrxConfig cannot be followed without numbers \(aten.nonzero",
    "emu3": "a Emu3TextConfig is not the configuration of a causal LM",
}


@pytest.mark.parametrize("family", ANSWERS)
def test_a_family_is_answered_and_all_its_weights_are_counted(family):
    row = measure(family)
    assert {row[phase] for phase in PHASES} == {ANSWERED}
    assert row["planned_bytes"] == row["weight_bytes"]


@pytest.mark.parametrize("family", REFUSES)
def test_a_family_is_refused_with_the_cause(family):
    row = measure(family)
    for phase in PHASES:
        with pytest.raises(ModelError, match=REFUSES[family]):
            raise ModelError(row[phase])


@pytest.mark.parametrize("name", ["MptConfig", "FalconConfig", "Qwen3MoeConfig"])
def test_weights_of_a_whole_model_follow_from_a_few_of_its_layers(name):
    config = getattr(transformers, name)()
    assert round(training(config, USE).gigabytes(1)["weights"] * 1e9) == held_bytes(config)


@pytest.mark.parametrize("family", ["falcon", "gptj", "gpt_neo"])
def test_cards_share_a_family_that_has_attention_of_its_own(family):
    config = tiny_config(getattr(transformers, CLASSES[family]).config_class, **SPECIAL.get(family, {}))
    one, two = (training(config, evolve(USE, gpus=gpus)).gigabytes(1) for gpus in (1, 2))
    assert two["moments"] == pytest.approx(one["moments"] / 2)


def test_layers_with_experts_above_those_without_are_counted():
    dense = {"num_hidden_layers": 5, "first_k_dense_replace": 3}
    config = tiny_config(transformers.DeepseekV3Config, **SPECIAL["deepseek_v3"], **dense)
    assert round(training(config, USE).gigabytes(1)["weights"] * 1e9) == held_bytes(config)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mellum", {"num_hidden_layers": 5, "layer_types": None}),
        ("deepseek_v32", {"num_hidden_layers": 5}),
        ("gpt_neo", {"num_layers": 4, "attention_types": [[["global", "local"], 2]]}),
    ],
)
def test_layers_whose_kinds_are_listed_in_a_way_of_its_own_are_counted(family, more):
    if family not in CLASSES:
        pytest.skip(f"transformers {transformers.__version__} does not have {family}")
    config = tiny_config(getattr(transformers, CLASSES[family]).config_class, **{**SPECIAL.get(family, {}), **more})
    assert round(training(config, USE).gigabytes(1)["weights"] * 1e9) == held_bytes(config)


def test_every_other_configuration_is_refused_before_a_model_is_made():
    refused = 0
    for name in sorted(CONFIG_MAPPING_NAMES.keys() - CLASSES.keys()):
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # noqa: S112 - some have parts that must be given, or need a package or the network
            continue
        with pytest.raises(ModelError, match="is not the configuration of a causal LM"):
            scoring(config, USE)
        refused += 1
    assert refused > 400


def test_an_encoder_with_a_decoder_is_not_followed_without_its_encoder():
    config = transformers.T5Config(num_layers=2, architectures=["T5ForConditionalGeneration"])
    with pytest.raises(ModelError, match="a T5Config is not the configuration of a causal LM"):
        scoring(config, USE)


def test_an_error_of_a_family_is_the_cause(monkeypatch):
    class OddConfig(transformers.Qwen3Config):
        pass

    def broken(*_, **__):
        raise KeyError("no such table\nof attentions")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", broken)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "_model_mapping", {OddConfig: None})
    with pytest.raises(LopdError, match=r"a OddConfig cannot be made and run on token ids alone \(KeyError: .*of attentions"):
        training(OddConfig(), USE)


def test_the_recorded_families_are_those_that_there_are():
    recorded = json.loads(RESULTS.read_text())
    assert [goal["met"] for goal in goals(recorded["rows"])] == [True, True, True]
    if recorded["versions"]["transformers"] != transformers.__version__:
        pytest.skip("recorded with another version of transformers")
    assert {CLASSES.get(row["family"]) for row in recorded["rows"]} == set(CLASSES.values())


def test_code_that_does_something_else_with_one_row_more_is_refused():
    with pytest.raises(ModelError, match="something else with one row more"):
        Need.of(2, [np.zeros((3, len(PARTS)), np.int64)], [np.zeros((4, len(PARTS)), np.int64)])
