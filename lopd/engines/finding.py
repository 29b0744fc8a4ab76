"""Where is it?  The folder of a model and its tokenizer, or their name in the hub; what goes wrong there is one sentence."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lopd.records.optional import needing

with needing("transformers", __name__):
    import transformers
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from tokenizers import Tokenizer, decoders

from lopd.engines.inputs import stop_ids
from lopd.engines.stored import base_of
from lopd.errors import EngineError, LopdError, ModelError
from lopd.records.identity import TokenizerId
from lopd.records.lineage import refuse_store
from lopd.records.manifest import SamplingParams
from lopd.records.paths import check_files, local_path, names_path, without_secrets

#: Seconds for the hub to answer at all.
_PATIENCE_S = 10.0
_DESCRIPTIONS = ("*.json", "*.jinja", "*.model", "*.txt")
#: The weights once more, in a form of their maker's (gpt-oss, Mistral), which transformers does not read; `*` takes in "/" here.
_COPIES = ("*/*.safetensors", "consolidated*.safetensors")
_ADAPTERS = "adapter_config.json"
_CONFIGS, _TOKENIZERS = ("config.json", _ADAPTERS), ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
#: Where tokenizers split or normalise texts in different ways.  It begins with a space, which some classes may be asked to add.
_PROBE = " It's 12345 + 6,\n\n\tcafé (don't)\nIT'S cafe\u0301 ½ oneTwo://a_b/\n/ हिन्दी ภาษาที่ مُحَمَّد 中文 ❤️ 1️⃣\n"


def check_described(folder: str | Path) -> None:
    """Refuse a folder without the configuration of a model or of adapters; a name in the hub passes.

    Raises:
        ModelError: it has none.
    """
    path = Path(folder)
    if path.is_dir() and not any((path / name).exists() for name in _CONFIGS):
        there = ", ".join(sorted(repr(file.name) for file in path.iterdir())[:4]) or "nothing"
        raise ModelError(
            f"Model {folder}: it holds neither {' nor '.join(_CONFIGS)}, expected a model; pass a folder that `save_pretrained` wrote (in this one "
            f"there is {there})."
        )


def check_whole(folder: Path) -> None:
    """Refuse a folder with adapters for vLLM, which finds no model there, or would pass the adapters by.

    Raises:
        ModelError: it has them.
    """
    if (folder / _ADAPTERS).exists():
        raise ModelError(
            f"Model {folder}: it holds adapters ({_ADAPTERS}), and vLLM is given one model; merge them (`merge_and_unload()`), save that with the "
            "tokenizer and their generation_config.json, which has the ids that end a response, and write the lineage beside it."
        )


def described(name: str | Path) -> Any:
    """Return the configuration of the model in a folder, or of a hub name.

    Raises:
        EngineError: there is no such folder or model, it has no configuration, or that cannot be read.
    """
    with looking_for(name) as found:
        return transformers.AutoConfig.from_pretrained(str(found), trust_remote_code=False)


def configured_eos(folder: Path) -> list[int]:
    """Return the EOS ids of the model in a folder, as transformers and vLLM have them.

    They are those of generation_config.json, or of config.json where that file is missing.

    Raises:
        EngineError: it cannot be read.
    """
    with looking_for(folder):
        return _eos_of(_settings(folder)[:1])


def served_eos(folder: Path, tokenizer: TokenizerId, *, of_both: bool) -> frozenset[int]:
    """Return the EOS ids of a model that a server has, from a copy of its folder: servers do not report them.

    They are those of `configured_eos`, or of both files, in the folder or in that of the base model; and the tokenizer's.

    Raises:
        EngineError: they are those of a base model that is not on this machine; or they cannot be read.
    """
    files, adapters = _settings(folder), folder / _ADAPTERS
    if not files and adapters.exists():
        with looking_for(folder):
            base = base_of(adapters)
        try:
            files = _settings(local_folder(base, weights=False))
        except LopdError as error:
            raise EngineError(
                f"Model {str(folder)!r}: its adapters do not state what ends a response, and their base model {base!r:.80} is not here; pass "
                "`SamplingParams(stop_ids=...)`, or put the base's generation_config.json beside them."
            ) from error
    with looking_for(folder):
        return stop_ids(SamplingParams(), _eos_of(files if of_both else files[:1]), tokenizer)


def _eos_of(files: Sequence[Path]) -> list[int]:
    """Return the EOS ids of these files, read as transformers does: those of a text part count, and those of a model's class do not."""
    found = list[int]()
    for file in files:
        of_model = file.name == "config.json"
        read = transformers.GenerationConfig.from_pretrained(file.parent, config_file_name=file.name, _from_model_config=of_model)
        ids = read.eos_token_id
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return found


def _settings(folder: Path) -> list[Path]:
    return [folder / name for name in ("generation_config.json", "config.json") if (folder / name).exists()]


def load_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer in a folder, or of a hub name; weights are not read.

    A byte-level one splits texts as its tokenizer.json does, whatever class of transformers its configuration names.

    Raises:
        EngineError: there is no such folder or model, or its tokenizer cannot be read.
    """
    with looking_for(name) as found:
        try:
            return _as_stored(transformers.AutoTokenizer.from_pretrained(str(found), trust_remote_code=False), found)
        except Exception as error:  # tokenizers raises `Exception` itself
            _refuse_gated(name, error)
            lacks = found.is_dir() and not any((found / file).exists() for file in _TOKENIZERS)
            reason, remedy = _first_line(error), _own_code(error) or "look at its files and config.json, and save it again"
            if lacks:
                reason, remedy = f"the folder has neither {' nor '.join(_TOKENIZERS)}", "save it there: `tokenizer.save_pretrained(folder)`"
            raise EngineError(
                f"Model {str(name)!r}: its tokenizer cannot be loaded ({reason}), expected its files beside the weights; {remedy}."
            ) from error


def _as_stored(loaded: Any, found: Path) -> Any:
    """Return the tokenizer as tokenizer.json has it, where that is byte-level.

    Many classes of transformers take its vocabulary alone, and split texts as they do for their own family: under that of Llama other tokens than
    Llama's lose spaces, under that of GPT-2 they part numbers otherwise, and under that of Qwen2 marks from letters.  What is not byte-level has
    settings beside the file that count.  mistral-common, which transformers takes where it is installed, makes one of pieces that decode alike.
    """
    if type(loaded).__name__ == "MistralCommonBackend" and (local_folder(str(found), weights=False) / _TOKENIZERS[0]).exists():
        loaded = transformers.PreTrainedTokenizerFast.from_pretrained(str(found))
    file = found / _TOKENIZERS[0] if found.is_dir() else try_to_load_from_cache(str(found), _TOKENIZERS[0])
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None or not isinstance(file, str | Path) or not Path(file).exists():
        return loaded
    stored = Tokenizer.from_file(str(file))
    if not isinstance(stored.decoder, decoders.ByteLevel):
        return loaded
    theirs, ours = (one.encode(_PROBE, add_special_tokens=False) for one in (stored, backend))
    # ids alone hide a split across which no token of the probe would go
    if (theirs.ids, theirs.word_ids) == (ours.ids, ours.word_ids):
        return loaded
    # a class may state tokens that the files leave to it
    stated = {name: token for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    known = {name: token for name, token in stated.items() if stored.token_to_id(token) is not None}
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(found), **known)


def find_model(name: str | Path) -> Path:
    """Return the folder that a model's name is, with `~` expanded; a name in the hub as it is.

    Raises:
        EngineError: it is a file; or it is a path, and there is no such folder: the hub would be asked for it, again and again.
    """
    path = local_path("Model", name, EngineError)
    is_path = isinstance(name, Path) or names_path(str(name)) or (len(path.parts) > 1 and path.parent.is_dir())
    if path.is_file():
        raise _not_loaded(name, "it is a file", f"pass the folder that it is in, {str(path.parent)!r}")
    if is_path and not path.exists():
        raise _not_loaded(name, _nowhere(), "check the path")
    refuse_store("Model", path, EngineError)
    return path


@contextmanager
def looking_for(name: str | Path) -> Iterator[Path]:
    """Give what `find_model` does; turn what goes wrong while a model is looked for and read into one sentence.

    Raises:
        EngineError: there is no such folder, no such model in the hub or its cache, or it cannot be read.
    """
    found = find_model(name)
    if not (there := found.exists()):
        _reach_hub(str(name))
    try:
        check_files(found)
        yield found
    except (LopdError, torch.OutOfMemoryError):
        raise
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, HFValidationError, SafetensorError) as error:
        _refuse_gated(name, error)
        if isinstance(error, RuntimeError) and "mismatched" in str(error):
            reason = "its weights have other shapes than its config.json states; restore the one that was saved"
            raise ModelError(f"Model {str(name)!r}: {reason}.") from error
        # safetensors calls a file that it may not read one that is not there
        named = (file for file in found.glob("*") if file.name in str(error))
        hidden = next((file.name for file in named if os.access(file, os.F_OK) and not os.access(file, os.R_OK)), None)
        if hidden:
            raise _not_loaded(name, f"this account may not read its {hidden}", "change the mode of that file") from error
        remedy = "look at its files, and save it again" if there else "check the name, and the network if it is to be downloaded"
        if isinstance(error, SafetensorError):
            remedy = "its weights are not all there, so save or download them again (`git lfs pull` in a clone)"
        if isinstance(error, ImportError | RuntimeError):
            remedy = "see that what it asks for is there: quantised weights may need a GPU, or packages"
        raise _not_loaded(name, _first_line(error), _own_code(error) or remedy) from error


def _reach_hub(name: str) -> None:
    """Ask the hub once for a model that is not in its cache: huggingface_hub tries each file for most of a minute."""
    try:
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in (*_CONFIGS, *_TOKENIZERS)):
            HfApi().model_info(name, timeout=_PATIENCE_S)
    except Exception as error:  # of the hub, or of its HTTP library
        _refuse_gated(name, error)
        why, remedy = _unreached(error)
        raise _not_loaded(name, f"{_nowhere()}; {why}", remedy) from error


def _refuse_gated(name: str | Path, error: BaseException) -> None:
    """Refuse a model whose terms have to be accepted; transformers raises an error of its own from that of the hub."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, GatedRepoError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        remedy = f"accept them at {without_secrets(constants.ENDPOINT)}/{name}, then `hf auth login`, or set HF_TOKEN"
        raise _not_loaded(name, "it is for those who have accepted its terms", remedy) from error


def _unreached(error: Exception) -> tuple[str, str]:
    """Return why the hub does not give a model, and what to do."""
    hub = without_secrets(constants.ENDPOINT)
    if isinstance(error, HFValidationError):
        return "no model in the hub can have this name", "check the path"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so that the hub is not asked", "check the path, or unset HF_HUB_OFFLINE to download it"
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub} does not know it", "check the path or the name; a private model needs `hf auth login`, or HF_TOKEN"
    if isinstance(error, ValueError | TypeError | KeyError | AttributeError):
        return f"{hub} does not answer as a hub", "check the path, or HF_ENDPOINT"
    said = "" if hub != constants.ENDPOINT else f": {_first_line(error)}"
    return f"{type(error).__name__} of {hub}{said}", "check the path; or proxies and certificates, if it is to be downloaded"


def _nowhere() -> str:
    return f"there is no such folder, seen from {Path.cwd()}"


def _own_code(error: Exception) -> str:
    """Return what to do about a model that brings code of its own, which lopd does not run; "" for any other error."""
    remedy = "load it and its tokenizer with transformers (`trust_remote_code=True`), and pass both to `HFScorer`, `HFSource` or `CausalLMStudent`"
    return remedy if "trust_remote_code" in str(error) else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")


def _not_loaded(name: str | Path, reason: str, remedy: str) -> EngineError:
    return EngineError(
        f"Model {str(name)!r}: it cannot be loaded ({reason}), expected a folder that transformers saved, or a name in the hub; {remedy}."
    )


def local_folder(name: str | Path, *, weights: bool = True) -> Path:
    """Return a folder as it is, or the local snapshot of a hub name; it is downloaded unless it is there or HF_HUB_OFFLINE is set.

    Args:
        name: a folder, or a name in the hub.
        weights: whether the weights have to be there too, or only what stands beside them.

    Raises:
        EngineError: there is no such folder or snapshot.
    """
    with looking_for(name) as found:
        if found.is_dir():
            return found
        wanted = [*_DESCRIPTIONS, *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=[*_COPIES]))
