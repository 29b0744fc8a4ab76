"""Which model a vLLM runs: that of its folder, whose files may be replaced while it runs, or before a restart."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lopd.engines.causal_lm import cut_to_rows
from lopd.engines.finding import check_described, check_whole, described, load_tokenizer, local_folder, looking_for
from lopd.engines.identity import Identified, folder_model_id, folder_version
from lopd.engines.stored import plain_config
from lopd.engines.vllm.engine import VLLMEngine
from lopd.engines.vllm.settings import VLLMSettings
from lopd.errors import EngineError, ModelError
from lopd.records.identity import ModelId, TokenizerId

# Options of vLLM that change what the weights in a folder compute.
_CHANGING = {"hf_overrides", "hf_config_path", "kv_cache_dtype", "quantization", "rope_scaling", "rope_theta"}


def open_folder(
    folder: str | Path, settings: VLLMSettings | None, identity: ModelId | None, *, scoring: bool = False, top_k: int = 0
) -> tuple[VLLMEngine, Any]:
    """Return an engine on a model folder or hub name, and the tokenizer; what cannot be run or identified is refused before weights are downloaded.

    Raises:
        EngineError: there is no such model, or it cannot be read.
        ModelError: it has adapters, its identity has to be stated, or see `VLLMEngine.context`.
    """
    beside, settings = local_folder(folder, weights=False), settings or VLLMSettings()
    check_described(beside)
    check_whole(beside)
    if identity is None:
        _check_plain(beside, settings)
    path = local_folder(folder)
    tokenizer = load_tokenizer(path)
    known = cut_to_rows(tokenizer, getattr(described(path).get_text_config(), "vocab_size", None))
    return VLLMEngine(path, known.vocab_size, settings, scoring=scoring, top_k=top_k), tokenizer


def identify(engine: VLLMEngine, identity: ModelId | None) -> Identified:
    """Return the identity that was stated, or that of the folder with its version, for `as_identified`.

    Raises:
        EngineError: a file is damaged.
        ModelError: it has to be stated, or see `folder_model_id`.
    """
    if identity is not None:
        return Identified(identity, None)
    _check_plain(engine.folder, engine.settings)
    version = folder_version(engine.folder)  # first: what is written meanwhile has another
    return Identified(folder_model_id(engine.folder, engine.settings.dtype), version)


def check_engine(owner: str, engine: VLLMEngine, known: TokenizerId, top_k: int, *, scoring: bool) -> None:
    """Refuse an engine that was made for another task or vocabulary.

    Raises:
        EngineError: it samples where it shall score or the other way round, gives fewer log-probs a token, or has another number of ids.
    """
    if engine.scoring != scoring:
        raise EngineError(
            f"{owner}: the engine has scoring={engine.scoring}, expected scoring={scoring}; sampling and scoring need engines of their own."
        )
    if engine.top_k < top_k:
        raise EngineError(f"{owner}: the engine gives {engine.top_k} log-probs a token, expected {top_k}; make it with `top_k={top_k}`.")
    if engine.vocab_size != known.vocab_size:
        wanted = f"expected {known.vocab_size}, as the tokenizer has them; make it with `vocab_size={known.vocab_size}`."
        raise EngineError(f"{owner}: the engine cuts its logits to {engine.vocab_size} ids, {wanted}")


@contextmanager
def as_identified(owner: str, engine: VLLMEngine, identified: Identified) -> Iterator[None]:
    """Refuse to run another model than was identified, here and after what is done within: an engine that dies there is started again.

    An engine that has loaded what its folder held at another time is closed; where the files were replaced, the identity is taken again.
    It must be that of the files that answered: those that took their place since may be others.

    Args:
        owner: how messages name who computes.
        engine: that computes.
        identified: what it was; its version is brought up to date.

    Raises:
        EngineError: the folder holds another model, or did while it was asked.
    """
    if identified.version is not None and engine.version != identified.version:
        engine.close()
    _check(owner, engine, identified)
    yield
    _check(owner, engine, identified)


def _check(owner: str, engine: VLLMEngine, identified: Identified) -> None:
    if identified.version is None or engine.version == identified.version:
        return
    found = identify(engine, None)
    if (found.identity, found.version) != (identified.identity, engine.version):
        engine.close()
        raise EngineError(
            f"{owner}: the model in {engine.folder} was replaced after it was identified, expected {identified.identity}; make a new one."
        )
    identified.version = found.version


def _check_plain(folder: Path, settings: VLLMSettings) -> None:
    """Refuse a model whose identity has to be stated; its weights need not be there.

    Raises:
        EngineError: its configuration cannot be read.
        ModelError: an option changes what it computes, or its weights are quantised.
    """
    options = settings.options
    for name in sorted(name for name in options.keys() & _CHANGING if options[name] not in (None, "auto")):
        raise ModelError(
            f"Model {folder}: vLLM's option {name!r} makes a model that its folder does not have; pass `identity=` with a revision of its own."
        )
    with looking_for(folder):
        plain_config(folder)
