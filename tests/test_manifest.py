"""Identities: what is the same model, the same tokenizer, the same manifest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from lopd.errors import ArgumentError, CorruptStoreError, InvalidRecordError
from lopd.records import Lineage, Manifest, ModelId, SamplingParams, fingerprint_tokenizer, mixture_id
from lopd.records.identity import hash_weights_in_order
from lopd.testing import tiny_manifest, tiny_provenance


def test_the_hash_of_weights_knows_values_and_not_the_dtype_that_holds_them() -> None:
    weights = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(5).half()}
    wide = {name: tensor.float() for name, tensor in weights.items()}
    assert hash_weights_in_order(weights.items()) == hash_weights_in_order(wide.items())


@pytest.mark.parametrize("change", [lambda w: w + 1e-7, lambda w: w.reshape(4, 3), lambda w: w.bfloat16()])
def test_the_hash_of_weights_knows_every_change(change: Any) -> None:
    weight = torch.randn(3, 4)
    assert hash_weights_in_order([("a", weight)]) != hash_weights_in_order([("a", change(weight))])
    assert hash_weights_in_order([("a", weight)]) != hash_weights_in_order([("b", weight)])


def test_hashed_weights_are_the_same_model_under_any_name() -> None:
    assert ModelId("here", "weights:1", "float32") == ModelId("there", "weights:1", "float32")
    assert ModelId("here", "weights:1", "float32") != ModelId("here", "weights:1", "bfloat16")
    assert ModelId("here", "weights:1", "float32").same_weights(ModelId("there", "weights:1", "bfloat16"))


def test_a_branch_name_is_a_revision_of_one_model_only() -> None:
    assert not ModelId("Qwen3-32B", "main", "bfloat16").same_weights(ModelId("QwQ-32B", "main", "bfloat16"))


@pytest.mark.parametrize("together", [", ", " + ", "; ", "|", " "])
def test_a_revision_of_several_hashes_is_that_of_none_of_them(together: str) -> None:
    member, old = ModelId("A", "weights:0123456789abcdef/0123456789", "float32"), ModelId("A", "weights:0123456789abcdef", "float32")
    mean = ModelId("mean", together.join((member.revision, "weights:fedcba9876543210/9876543210")), "float32")
    for one in (member, old):
        assert not mean.same_parameters(one)
        assert not mean.same_weights(one)
        assert hash(mean) != hash(one)
    assert not mean.same_weights(evolve(mean, name="product"))
    assert str(mean) == f"mean@0123456789ab/0123{together}fedcba987654/9876"
    assert member.same_parameters(old)
    assert str(member) == "A@0123456789ab/0123"


def test_stop_ids_are_a_tuple_of_ints_whatever_they_came_as():
    for given in ([1, 7], np.array([1, 7]), (1, 7)):
        params = SamplingParams(stop_ids=given)
        manifest = evolve(tiny_manifest(), sampling=params)
        assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
        assert params == SamplingParams(stop_ids=(1, 7))
    with pytest.raises(InvalidRecordError, match=r"stop_ids is \('\\n',\), expected token ids"):
        SamplingParams(stop_ids=("\n",))


def test_a_mixture_is_its_parts_in_whatever_order_and_says_all_of_them():
    a, b = ModelId("a", "weights:1234567890abcdef", "float32"), ModelId("b", "main", "bfloat16")
    both = mixture_id([a, b])
    assert both == mixture_id([b, a, b]) == mixture_id([both, a])
    assert both.parts == (a, b)
    assert str(both) == "a@1234567890ab + b@main"
    assert both.same_weights(mixture_id([b, evolve(a, name="copy of a", dtype="float16")]))
    assert not both.same_weights(mixture_id([a, evolve(b, name="c")]))
    assert not both.same_weights(a)
    assert mixture_id([a, a]) == a
    assert ModelId("merge of a + b", "main", "float32").parts == (ModelId("merge of a + b", "main", "float32"),)


def test_a_difference_of_manifests_names_the_innermost_field() -> None:
    manifest = tiny_manifest()
    assert manifest.difference(manifest) is None
    other = evolve(manifest, sampling=evolve(manifest.sampling, seed=7))
    assert manifest.difference(other) == f"sampling.seed is {manifest.sampling.seed}, expected 7"
    cast = evolve(manifest, policy=evolve(manifest.policy, dtype="float8"))
    assert manifest.difference(cast) == f"policy.dtype is {manifest.policy.dtype!r}, expected 'float8'"


def test_a_difference_that_another_processor_may_have_rounded_into_adapters_is_explained() -> None:
    here = ModelId("adapters", "weights:1/2", "float32")
    manifest, note = evolve(tiny_manifest(), policy=here), "another processor rounds otherwise"
    difference = manifest.difference(evolve(manifest, policy=evolve(here, revision="weights:3/2")))
    assert difference is not None
    assert difference.startswith(
        "policy.revision is 'weights:1/2', expected 'weights:3/2' (if both are the same adapters, not merged, another "
    )
    assert "identity=" not in difference, "other weights may have one name too"
    for change in (
        {"revision": "weights:1/3"},
        {"revision": "weights:3"},
        {"revision": "step-1"},
        {"name": "other", "revision": "weights:3/2"},
    ):
        found = str(manifest.difference(evolve(manifest, policy=evolve(here, **change))))
        assert note not in found, change
        assert ("lopd 0.2 recorded one of them: if it is a model with adapters" in found) == (change == {"revision": "weights:3"})
        assert "identity=" not in found
    assert note not in str(
        manifest.difference(evolve(manifest, policy=evolve(here, revision="weights:3/2"), sampling=SamplingParams(top_p=0.5)))
    )


def test_a_manifest_survives_json() -> None:
    manifest = evolve(tiny_manifest(), sampling=SamplingParams(stop_ids=(1, 2)), sft_teacher=ModelId("t", "r", "float32"), generation=3)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_manifest_of_another_schema_version_is_refused() -> None:
    with pytest.raises(CorruptStoreError, match="schema_version is 99"):
        Manifest.from_json({**tiny_manifest().to_json(), "schema_version": 99})


def test_a_tokenizer_is_its_whole_map(tokenizer: Any, swapped_tokenizer: Any) -> None:
    mine, theirs = fingerprint_tokenizer(tokenizer), fingerprint_tokenizer(swapped_tokenizer)
    assert mine.vocab_size == theirs.vocab_size
    assert not mine.same_vocabulary(theirs)


class OwnTokenizer:
    """A tokenizer of another kind."""

    def __init__(self, vocab: Any, chat_template: Any = None) -> None:
        self.get_vocab, self.chat_template = lambda: vocab, chat_template


def test_a_vocabulary_of_bytes_is_refused_by_name() -> None:
    """As the own code of Qwen 1 and HunYuan has it."""
    with pytest.raises(ArgumentError, match=r"vocabulary of an OwnTokenizer is of bytes .*; use the converted tokenizer"):
        fingerprint_tokenizer(OwnTokenizer({b"!": 0, b"\xff": 1}))


def test_several_chat_templates_are_the_same_in_whatever_order_they_are_listed() -> None:
    several = {"default": "a", "tool_use": "b", "rag": "c"}
    mine, theirs = (fingerprint_tokenizer(OwnTokenizer({"a": 0}, dict(order))) for order in (several.items(), reversed(several.items())))
    assert mine == theirs
    assert mine != fingerprint_tokenizer(OwnTokenizer({"a": 0}, {**several, "rag": "d"}))


def test_padding_and_the_version_of_an_engine_are_recorded_and_not_compared() -> None:
    manifest, column = tiny_manifest(), tiny_provenance("t")
    padded = evolve(manifest, tokenizer=evolve(manifest.tokenizer, pad_id=1))
    assert manifest.difference(padded) is None
    assert Manifest.from_json(padded.to_json()).tokenizer.pad_id == 1
    ended = evolve(padded, tokenizer=evolve(padded.tokenizer, eos_id=7))
    assert manifest.difference(ended) == f"tokenizer.eos_id is {manifest.tokenizer.eos_id}, expected 7"
    assert evolve(column, engine="other 2.0") == column
    assert evolve(column, top_k=2) != column


def test_a_lineage_is_read_back_and_a_damaged_one_refused(tmp_path: Path) -> None:
    assert Lineage.read(tmp_path) == Lineage()
    lineage = Lineage(sft_teacher=ModelId("t", "weights:1", "float32"))
    lineage.write(tmp_path)
    assert Lineage.read(tmp_path) == lineage
    (tmp_path / "lopd.json").write_text('{"sft_teacher": ')
    with pytest.raises(CorruptStoreError, match=r"lopd\.json"):
        Lineage.read(tmp_path)
