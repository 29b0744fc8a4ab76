"""The one file that makes a folder or a prefix a store: whether its place is free, and what is in it."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import get_args
from uuid import uuid4

from attrs import field, frozen

from lopd.backends.admission import check_manifest
from lopd.backends.files import Files, names_in, prove, reading, writing
from lopd.backends.ragged import LogprobDtype
from lopd.backends.sealing import damaged
from lopd.errors import CorruptStoreError, InvalidRecordError, StoreExistsError, StoreNotFoundError
from lopd.records.lineage import LINEAGE_FILE
from lopd.records.manifest import Manifest, Provenance
from lopd.records.stored import LARGEST_JSON, parse

_MODEL_FILES = ("config.json", "adapter_config.json", "model.safetensors", "adapter_model.safetensors")


@frozen
class Root:
    """The content of a store's root file.

    Args:
        manifest: what all rollouts have in common.
        logprob_dtype: how log-probs are kept; labels are kept in float32, as they may be any number.
        creation: no other store has it.
        chained: whether each record has its store, its number and the record before it; those of older stores need not.
    """

    manifest: Manifest
    logprob_dtype: LogprobDtype
    creation: str = field(factory=lambda: uuid4().hex)
    chained: bool = True

    def formats(self, provenance: Provenance | None = None, kept: LogprobDtype | None = None) -> tuple[int, LogprobDtype]:
        """Return the size of the vocabulary, and the type of rollouts' log-probs, or of a column's values: `kept`, if it has some already."""
        label = provenance is not None and provenance.label
        return self.manifest.tokenizer.vocab_size, kept or ("float32" if label else self.logprob_dtype)


@frozen
class RootFile:
    """How one kind of store writes its root.

    Args:
        name: the file's name.
        encode: gives the file's bytes; those of no two creations are the same, so that a repeated request knows its own file.
        decode: gives the content of the bytes under a URL; None if a single bit differs from what `encode` gave.  It raises StoreNotFoundError
            where the file belongs to something else.
    """

    name: str
    encode: Callable[[Root], bytes]
    decode: Callable[[str, bytes], Root | None]


def taken(files: Files, kind: RootFile, names: Sequence[str]) -> StoreExistsError:
    """Return the error for a place that holds these names, or nothing a moment ago."""
    what = other_kind(files, names) or ("a store" if not names or kind.name in names else _strange(names))
    return StoreExistsError(f"Store {files.url}: {what} is there, expected an empty folder or nothing; open it, or choose another path.")


def other_kind(files: Files, names: Sequence[str]) -> str:
    """Return what a folder with these names is, if lopd knows it and it is not a store; a model's lineage and a store's root may share a name."""
    if any(name in _MODEL_FILES for name in names):
        return "a model"
    if any(name.startswith("step-") for name in names):
        return "a folder of checkpoints"
    if LINEAGE_FILE in names:
        with suppress(OSError, ValueError, TypeError):
            return "the lineage of a trained model" if "sft_teacher" in parse(files.read(LINEAGE_FILE)) else ""
    return ""


def _strange(names: Sequence[str]) -> str:
    return f"something that is not a store ({names[0]!r})"  # it may be hidden: the .DS_Store of a Mac, or lost+found


def _not_a_store(files: Files, what: str) -> StoreNotFoundError:
    return StoreNotFoundError(f"Store {files.url}: the folder {what}, expected a store; check the path, or create one there.")


def put_root(files: Files, kind: RootFile, root: Root) -> bool:
    """Make an empty store where nothing is; False if another process did so at the same moment.

    Raises:
        InvalidRecordError: the manifest is something else, or there is no such type of log-probs.
        StorePathError: the storage does not keep what a store relies on.
        StoreWriteError: the storage refused.
    """
    check_manifest(f"Store {files.url}", root.manifest)
    if root.logprob_dtype not in get_args(LogprobDtype):
        raise InvalidRecordError(
            f"Store {files.url}: logprob_dtype is {root.logprob_dtype!r}, expected one of {', '.join(get_args(LogprobDtype))}; pass one of them."
        )
    prove(files)
    with writing(f"Store {files.url}", "creating it"):
        return files.put_if_absent(kind.name, kind.encode(root))


def read_root(files: Files, kind: RootFile) -> Root:
    """Return the content of the root file of the store in this place.

    Raises:
        StoreNotFoundError: the store is not there.
        StoreReadError: the storage refused.
        CorruptStoreError: the manifest is damaged, or of another schema version, or the file is too large.
    """
    with reading(f"Store {files.url}", "opening it"):
        try:
            data = files.read(kind.name)
        except (FileNotFoundError, NotADirectoryError) as error:
            names = names_in(files)
            raise _not_a_store(files, f"holds {other_kind(files, names) or _strange(names)}" if names else "is not there") from error
    try:
        root = kind.decode(files.url, data)
    except (CorruptStoreError, StoreNotFoundError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        root = None
    if root is None and (other := other_kind(files, names_in(files))):
        raise _not_a_store(files, f"holds {other}")
    if len(data) > LARGEST_JSON:
        raise CorruptStoreError(
            f"Store {files.url}: {kind.name} has {len(data):,} bytes, expected at most {LARGEST_JSON:,}; remove what others have put into it, "
            'such as "consolidated_metadata".'
        )
    if root is None:
        raise damaged(f"Store {files.url}", kind.name)
    return root
