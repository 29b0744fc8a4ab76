"""A trained model as a folder that engines load: it replaces what was there as a whole, or not at all.

The new folder is written beside the old one, flushed, and then takes its place in one move.  Files of yours (notes, logs) move along.
What no export wrote, and a student of other teachers, is never replaced: the new export then stands beside it, and an error states where.
`lopd.json` names the files of an export, which is how the next one knows them.  A mount point, which cannot be moved, is filled where nothing of an
export is in it, `lopd.json` last.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lopd.engines.causal_lm import unwrap, without_runners
from lopd.engines.effective import saved_adapter
from lopd.engines.older import is_untied, spell_out, widest
from lopd.engines.placing import begin, exported_files, files_in, name_files, place
from lopd.errors import LopdError, ModelError, ModelWarning, StoreWriteError
from lopd.records.flush import share_mode
from lopd.records.lineage import LINEAGE_FILE, Lineage
from lopd.records.paths import is_there
from lopd.records.warn import warn_user

#: Files of the processor of a model that also reads images, without which vLLM does not start it.  A chat_template.json is not among them: it
#: would be taken in the place of the student's own template.
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def check_exportable(model: Any, tokenizer: Any) -> None:
    """Save what is small, and compare which weights are shared with what transformers ties when it loads: an export must not fail after training.

    Warns:
        ModelWarning: the model also reads images, and what vLLM needs for that is not where it was loaded from.

    Raises:
        ModelError: transformers refuses to save the configuration or the tokenizer, or would load other weights than it saves; torch.compile stands
            in the place of a layer.
        StoreWriteError: the folder for temporary files, where it is tried, has no space.
    """
    model = without_runners(model)
    base, name = unwrap(model), type(unwrap(model)).__name__
    generation = getattr(base, "generation_config", None)
    own = {"config": getattr(base, "config", None), "generation_config": generation} if base is model else {}
    for what, part in {**own, "tokenizer": tokenizer}.items():
        if hasattr(part, "save_pretrained"):
            with _saving(f"Model {name}", f"its {what}", tried=True), tempfile.TemporaryDirectory() as folder:
                part.save_pretrained(folder)
    if base is not model and generation is not None:
        with _saving(f"Model {name}", "its generation_config"):
            generation.to_json_string()
    renamed = next((key for key, _ in base.named_parameters() if "_orig_mod." in key), None)
    if renamed:
        raise ModelError(
            f"Model {name}: its weight {renamed!r} has that name from torch.compile, so an export would load without it; compile in place, by "
            "`student.compile()` or `layer.compile()`."
        )
    tied: Mapping[str, str] = getattr(base, "all_tied_weights_keys", None) or {}
    shared: dict[int, list[str]] = {}
    for key, parameter in base.named_parameters(remove_duplicate=False) if base is model else ():
        if key not in tied:
            shared.setdefault(id(parameter), []).append(key)
    twice = next((keys for keys in shared.values() if len(keys) > 1), None)
    if twice:
        raise ModelError(
            f"Model {name}: {twice[0]!r} and {twice[1]!r} are one tensor, which its configuration does not state, so an export would load with "
            "one of them random; set `config.tie_word_embeddings = True` before loading, or give each its own tensor."
        )
    config = own.get("config")
    if getattr(config, "vision_config", None) is not None and not _processor_files(config):
        warn_user(
            f"Model {name}: it also reads images, and no file of its processor is where it was loaded from, expected {_PROCESSOR[0]} or "
            f"{_PROCESSOR[1]}, without which vLLM does not start its export; put or download it there, or put it into the export.",
            ModelWarning,
        )


def _processor_files(config: Any) -> list[Path]:
    """Return those beside the weights that a model was loaded from, in its folder or the cache of the hub."""
    # it brings a client of HTTP along, which students that are only trained do without
    from huggingface_hub import try_to_load_from_cache

    name = str(getattr(config, "_name_or_path", None) or "")

    def find(file: str) -> Any:
        commit = getattr(config, "_commit_hash", None)
        return Path(name, file) if Path(name).is_dir() else try_to_load_from_cache(name, file, revision=commit)

    try:
        found = [find(file) for file in _PROCESSOR] if name else []
    except ValueError:  # what was a folder, and is not there any more, cannot be a name in the hub
        return []
    return [Path(path) for path in found if isinstance(path, str | Path) and Path(path).is_file()]


def export_model(model: Any, tokenizer: Any, lineage: Lineage, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Write the folder, or leave it as it was.

    Args:
        model: a transformers model, or a peft model around one, whatever runs it.
        tokenizer: transformers'.
        lineage: written beside the weights.
        folder: may hold an earlier export, which is replaced, and files that are not a model's, which are kept.
        state: the weights, where the model's own are sharded.

    Raises:
        ModelError: transformers refuses to save the model or the tokenizer; or saves other weights, in the folder that the message names; or several
            adapters are active.
        StoreExistsError: the folder holds what no export wrote and this one would replace, or a student of other teachers; the export is in the
            folder that the message names.
        StoreWriteError: the disk refused; a student that was whole by then is in the folder that the message names.
    """
    from lopd.engines.written import check_written, name_end, quantiser_forgotten  # a model that is saved brought transformers along

    owner, model, folder = f"Export {folder}", without_runners(model), folder.expanduser().resolve()
    with _saving(owner, "it"), begin(folder) as fresh:
        # first: `save_pretrained` takes the weights out of `state`
        gathered, untied = None if state is None else dict(state), is_untied(model, state)
        adapter = saved_adapter(model)
        chosen = {} if adapter is None else {"selected_adapters": [adapter]}
        with quantiser_forgotten(unwrap(model)):
            model.save_pretrained(fresh, **chosen, **({} if state is None else {"state_dict": state}))
        if adapter not in (None, "default"):  # peft puts any other into a folder of its own, where none is looked for
            for path in (fresh / adapter).iterdir():
                path.rename(fresh / path.name)
            (fresh / adapter).rmdir()
        tokenizer.save_pretrained(fresh)
        if is_there(fresh / "config.json"):
            spell_out(fresh / "config.json", untied=untied, dtype=widest(model, gathered))
            check_written(owner, fresh, folder, unwrap(model), gathered)
        elif not is_there(fresh / "adapter_config.json"):
            raise StoreWriteError(
                f"{owner}: config.json has gone from {fresh} while it was written, and {folder} is as it was; export again."
            )
        generation = getattr(unwrap(model), "generation_config", None)
        if generation is not None and is_there(fresh / "adapter_config.json"):
            # peft leaves out which ids end a response; `save_pretrained` refuses settings that many base models have
            generation.to_json_file(fresh / "generation_config.json")
        name_end(fresh / "generation_config.json", unwrap(model), tokenizer)
        ours = exported_files(folder)
        for path in _processor_files(unwrap(model).config) if is_there(fresh / "config.json") else ():
            if path.name in ours or not (folder / path.name).exists():  # what somebody put there moves along
                shutil.copyfile(path, fresh / path.name)
        (fresh / "README.md").unlink(missing_ok=True)  # peft's form to fill in; the one in the folder is its owner's
        written = files_in(fresh)
        lineage.write(fresh)
        name_files(fresh, written)
        share_mode(fresh / LINEAGE_FILE)
        place(owner, model, fresh, written, folder)


@contextmanager
def _saving(owner: str, what: str, *, tried: bool = False) -> Iterator[None]:
    """Turn what goes wrong while transformers and the disk write into one sentence; what is only tried is written among temporary files."""
    try:
        yield
    except LopdError:
        raise
    except Exception as error:  # whatever a tokenizer or a model raises that cannot be saved
        if isinstance(error, OSError | SafetensorError) or "(os error " in str(error):  # as Rust ends what the system answered
            there = f"it is tried in {tempfile.tempdir or 'one of these'}, so free space there, or set TMPDIR"
            kept = "what was there is as it was, so free space or mend permissions, or export elsewhere"
            raise StoreWriteError(f"{owner}: {what} cannot be written ({error}); {there if tried else kept}.") from error
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(
            f"{owner}: {what} cannot be saved ({type(error).__name__}: {reason}); correct it on the model or the tokenizer before training, "
            "for example `model.generation_config.do_sample = True`."
        ) from error
