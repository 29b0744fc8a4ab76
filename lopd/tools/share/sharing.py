"""Push an exported student, push a store, and pull a store: each to or from a repository that the call names."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from lopd.backends.memory_store import MemoryStore
from lopd.engines.placing import exported_files
from lopd.errors import CorruptStoreError, InvalidRecordError, UncheckedDataWarning
from lopd.protocols import LogprobReader, LogprobStore
from lopd.protocols.reading import named
from lopd.records.lineage import LINEAGE_FILE, Lineage
from lopd.records.optional import need
from lopd.records.paths import is_here, local_path, names_path, read_regular
from lopd.records.stored import parse
from lopd.records.warn import warn_user
from lopd.tools.interop.imports import StoreMaker, check_maker
from lopd.tools.interop.parquet import export_parquet, import_parquet, open_parquet, parquet_manifest
from lopd.tools.share.cards import ROLLOUTS, About, dataset_card, model_card
from lopd.tools.share.hub import Repository

_CARD = "README.md"
#: A file whose texts are tokens.
_TOKENS = "tokenizer.json"
#: What the names of a column's scores begin with, in a file.
_SCORES = "logprobs/"


def push_student(
    folder: str | Path,
    repository: str,
    about: About | None = None,
    *,
    store: LogprobReader | None = None,
    private: bool = True,
    exist_ok: bool = False,
    endpoint: str | None = None,
) -> str:
    """Push an exported student with its card, in one commit, and return the hash of the commit.

    Exactly the files that the export wrote are sent, with its lineage and a card that is made from them; what else is in the folder is not.

    Args:
        folder: what `CausalLMStudent.export` wrote.
        repository: `owner/name`; made if it is not there.
        about: what is not recorded, for the card.
        store: what the student was trained on, for the card.
        private: whether only its owner may see it; a repository that is there stays as it is.
        exist_ok: commit also to a repository that has files.
        endpoint: URL of the hub; None for that of HF_ENDPOINT, or huggingface.co.

    Raises:
        InvalidRecordError: the folder is not an export, the repository's name does not fit, or one of its files names a path of this machine that
            is not the name of a teacher.
        CorruptStoreError: a file of the export is missing, is not a file of the folder, or cannot be read.
        ManifestMismatchError: the student was not trained on the store.
        StoreExistsError: the repository has files, without `exist_ok`, or weights that the export would not replace.
        HubError: there is no token, the hub refuses, the repository is public and should be private, or the hub cannot be reached.  Nothing was
            committed then, unless the answer to the commit was lost; a new repository may be there, empty.
        MissingDependencyError: huggingface_hub is not installed.
    """
    target, folder = Repository(repository, "model", endpoint), local_path("Export", folder)
    files = _files(folder)
    for name in files:
        _check_names(folder, name)
    card = str(model_card(folder, about, store)).encode()
    return target.commit({**files, _CARD: card}, f"Push {folder.resolve().name}", private=private, exist_ok=exist_ok)


def push_store(
    store: LogprobReader,
    repository: str,
    about: About | None = None,
    *,
    private: bool = True,
    exist_ok: bool = False,
    endpoint: str | None = None,
) -> str:
    """Push a store as a dataset of one parquet file with its card, in one commit, and return the hash of the commit.

    Everything that a reader gives is in the file, with manifest, provenance, checksums, and why rollouts are in quarantine.  It is written to a
    temporary folder first.  Before that it is seen that there is a token, that it may write, and what is in the repository; a new repository is made
    after it, and what the hub does not answer before, such as whether a fine-grained token may make one, is seen then.

    Args:
        store: any.
        repository: `owner/name`; made if it is not there.
        about: what is not recorded, for the card.
        private: whether only its owner may see it; a repository that is there stays as it is.
        exist_ok: commit also to a repository that has files.
        endpoint: URL of the hub; None for that of HF_ENDPOINT, or huggingface.co.

    Raises:
        InvalidRecordError: the repository's name does not fit, or a rollout's id is not text that parquet can hold.
        StoreExistsError: the repository has files, without `exist_ok`.
        HubError: as for `push_student`.
        MissingDependencyError: huggingface_hub or pyarrow is not installed.
    """
    target = Repository(repository, "dataset", endpoint)
    need("pyarrow", "Parquet")
    card = str(dataset_card(store, repository.rpartition("/")[2], about)).encode()
    # before everything is read
    target.look([ROLLOUTS, _CARD], private=private, exist_ok=exist_ok)
    with TemporaryDirectory() as folder:
        file = Path(folder) / ROLLOUTS
        export_parquet(store, file)
        return target.commit({ROLLOUTS: file, _CARD: card}, f"Push {len(store)} rollouts", private=private, exist_ok=exist_ok)


def pull_store(
    repository: str,
    *,
    revision: str | None = None,
    store: StoreMaker = MemoryStore,
    endpoint: str | None = None,
) -> LogprobStore:
    """Download what `push_store` pushed, verify it, and return it as a store; run it again to resume.

    A store that is there is filled up.  If that adds rollouts or scores beside rollouts or columns that this revision lacks, a warning counts these:
    they may be of a pull of another revision that broke off.

    Args:
        repository: `owner/name`.
        revision: branch, tag, or the commit that `push_store` returned; None for the newest.
        store: makes the store, for example `lambda manifest: ZarrStore.open_or_create("run.zarr", manifest)`.
        endpoint: URL of the hub; None for that of HF_ENDPOINT, or huggingface.co.

    Raises:
        HubError: there is no such dataset, it was not pushed by lopd, the token may not read it, or the hub cannot be reached.
        CorruptStoreError: the file is damaged, or no export of lopd.
        ManifestMismatchError, ConflictError: the store has other contents.
        InvalidRecordError: the repository's name does not fit.
        ArgumentError: `store` is a store or a path, and not what makes one.
        MissingDependencyError: huggingface_hub or pyarrow is not installed.
    """
    source = Repository(repository, "dataset", endpoint)
    check_maker(source.owner, store)
    file = source.fetch(ROLLOUTS, revision)
    made = store(parquet_manifest(file))
    before = _amounts(made)
    import_parquet(file, made)
    if _amounts(made) != before:
        _warn_of_others(file, made)
    return made


def _amounts(store: LogprobReader) -> list[int]:
    """Return how many rollouts there are, and scores in each column."""
    return [len(store), *(int(store.scored(column).sum()) for column in store.columns)]


def _warn_of_others(file: Path, made: LogprobReader) -> None:
    """Warn of a store that was filled up and has more than this revision: whether a pull of another one broke off there is not recorded."""
    with open_parquet(file, None) as (opened, _):
        others, names = len(made) - opened.metadata.num_rows, opened.schema_arrow.names
    more = [column for column in sorted(made.columns) if _SCORES + column not in names]
    if others > 0 or more:
        has = {f"{others} rollouts": others > 0, f"{len(more)} columns ({', '.join(more)})": len(more) > 0}
        warn_user(
            f"{named(made)}: it has {' and '.join(filter(has.get, has))} that this revision lacks, and got what it lacked itself; "
            "if a pull of another revision broke off there, it is neither of the two, so pull into a new store.",
            UncheckedDataWarning,
        )


def _files(folder: Path) -> dict[str, Path | bytes]:
    """Return the files of an export by their names, each looked at: a list in a file may name anything."""
    Lineage.read(folder)
    names = exported_files(folder)
    if not names:
        lacks = f"its {LINEAGE_FILE} lists 0 files" if (folder / LINEAGE_FILE).exists() else f"there is no {LINEAGE_FILE} in it"
        raise InvalidRecordError(f"Export {folder}: {lacks}; write it with `CausalLMStudent.export`.")
    files = dict[str, Path | bytes]()
    for name in sorted({*names, LINEAGE_FILE}):
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or path.is_symlink() or not path.is_file():
            raise CorruptStoreError(f"Export {folder}: {name!r:.80} of its list is not a file of the folder; export the student again.")
        files[name] = path
    return files


def _check_names(folder: Path, name: str) -> None:
    """Refuse a file that leads to a path of this machine: it shows the path to others, and leads nowhere for them."""
    try:
        written = _written(folder / name)
    except (OSError, ValueError, SafetensorError) as error:
        raise CorruptStoreError(f"Export {folder}: {name} cannot be read ({error}); export the student again.") from error
    for key, text in _texts("", written):
        # texts that begin with a slash may be anything, also tokens; the name of a teacher is its identity
        named = key.endswith("name_or_path") and (names_path(text) or os.path.isdir(text))  # noqa: PTH112 (a `Path` may refuse a long text)
        if named or (name != _TOKENS and (name, key) != (LINEAGE_FILE, "name") and is_here(text)):
            raise InvalidRecordError(
                f"Export {folder}: {key!r} of {name} is a path of this machine, expected a name in the hub; push that model first, and write its "
                "name there."
            )


def _written(path: Path) -> Any:
    """Return the text in a file of an export: its JSON, or the metadata of weights."""
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return file.metadata()
    return parse(read_regular(path)) if path.suffix == ".json" else None


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(name, part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(key, part)
