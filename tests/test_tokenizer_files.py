"""A byte-level tokenizer splits texts as its tokenizer.json does, whatever class of transformers its configuration names."""

import json
import sys
from pathlib import Path

import pytest
import transformers
from huggingface_hub import constants
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from lopd.engines.finding import load_tokenizer
from lopd.records import fingerprint_tokenizer, make_prompts

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from recipes.paper import Recipe
from recipes.run import problems_of

#: What GPT-2's class ends with where no file states it.
END = "<|endoftext|>"
BYTES, DIGITS = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}<think>\n{% endif %}"


class MistralCommonBackend:
    """Like that of transformers where mistral-common is installed: pieces that decode alike are one in its vocabulary."""

    def get_vocab(self) -> dict[str, int]:
        return {"\ufffd": 255, "12": 258}


def save(folder: Path, kind: str, *parts: pre_tokenizers.PreTokenizer, **settings: object) -> Path:
    """Save a tokenizer of bytes, of one pair of digits, as models of the Llama family have it, and of one pair of letters."""
    folder.mkdir(parents=True)
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "xY", END])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2"), ("x", "Y")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([*parts]), decoders.ByteLevel() if parts else decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>", END])
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": None, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **named, **settings}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of `someone/distilled` in the cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "models--someone--distilled"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("a" * 40)
    return model / "snapshots" / ("a" * 40)


@pytest.mark.parametrize("named", [False, True], ids=["folder", "hub name"])
@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "GPT2Tokenizer"])
def test_prompts_are_split_as_the_file_has_it(kind: str, named: bool, snapshot: Path) -> None:
    """The class of Llama would drop spaces and the newline behind `<think>`, and that of GPT-2 would read two digits as one token."""
    folder = save(snapshot, kind, DIGITS, BYTES)
    tokenizer = load_tokenizer("someone/distilled" if named else folder)
    (prompt,) = make_prompts(["what is 12?"], tokenizer)
    assert tokenizer.decode(prompt.token_ids.tolist()) == "<s>what is 12?<think>\n"
    assert tokenizer.convert_tokens_to_ids("12") not in prompt.token_ids


@pytest.mark.parametrize("named", [False, True], ids=["folder", "hub name"])
def test_a_tokenizer_of_mistral_is_the_files_also_with_mistral_common(named: bool, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(snapshot, "LlamaTokenizerFast", DIGITS, BYTES)
    (folder / "tekken.json").write_text("{}")
    alone = fingerprint_tokenizer(load_tokenizer(folder))
    theirs = MistralCommonBackend()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: theirs)
    assert fingerprint_tokenizer(load_tokenizer("someone/distilled" if named else folder)) == alone
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(folder) is theirs, "there is no other file"


def test_text_is_normalised_as_the_file_has_it(tmp_path: Path) -> None:
    """The class of Qwen2 would make one letter of a letter and its accent."""
    tokenizer = load_tokenizer(save(tmp_path / "model", "Qwen2Tokenizer", DIGITS, BYTES))
    assert tokenizer.decode(tokenizer.encode("cafe\u0301", add_special_tokens=False)) == "cafe\u0301"


def test_a_split_is_the_files_whatever_tokens_the_vocabulary_has(tmp_path: Path) -> None:
    """The class of GPT-2 would leave capitals in their word, which shows in one pair of letters alone."""
    capitals = pre_tokenizers.Split(Regex(r"\p{Lu}"), "isolated")
    tokenizer = load_tokenizer(save(tmp_path / "model", "GPT2Tokenizer", capitals, BYTES))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("xY", add_special_tokens=False)) == ["x", "Y"]


def test_problems_of_a_recipe_are_split_as_the_file_has_it(tmp_path: Path) -> None:
    folder, problems = save(tmp_path / "model", "LlamaTokenizerFast", DIGITS, BYTES), tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "what is 12?"}')
    (prompt,) = problems_of(str(problems), Recipe("teacher", "student", 8.0, 4.0, template="{prompt}"), str(folder))
    assert load_tokenizer(folder).decode(prompt.token_ids.tolist()) == "<s>what is 12?<think>\n"


def test_what_a_class_is_told_to_add_is_kept(tmp_path: Path) -> None:
    spaced = load_tokenizer(save(tmp_path / "spaced", "GPT2Tokenizer", BYTES, add_prefix_space=True))
    assert spaced.convert_ids_to_tokens(spaced.encode("a", add_special_tokens=False)) == ["Ġ", "a"]
    assert type(load_tokenizer(save(tmp_path / "pieces", "LlamaTokenizer"))) is transformers.LlamaTokenizer, "it is not byte-level"


def test_tokens_that_the_files_leave_to_a_class_are_kept(tmp_path: Path) -> None:
    folder = save(tmp_path / "bare", "GPT2Tokenizer", DIGITS, BYTES)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("12", add_special_tokens=False)) == 2, "it is the file's"
    assert tokenizer.eos_token == END
