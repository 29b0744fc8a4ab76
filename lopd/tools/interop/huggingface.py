"""A store as a Hugging Face `datasets.Dataset`, and back."""

from typing import Any

from attrs import evolve

from lopd.backends import sealing
from lopd.errors import ArgumentError
from lopd.protocols import LogprobReader, LogprobStore
from lopd.protocols.doors import check_noun
from lopd.protocols.reading import rows_at_once
from lopd.records.checks import a_kind, check_at_least
from lopd.records.manifest import Manifest
from lopd.records.optional import need
from lopd.tools.interop.arrow_table import sound, store_tables, tables
from lopd.tools.interop.description import CHECKSUM, Description


def to_hf_dataset(reader: LogprobReader) -> Any:
    """Return all rollouts with all their scores as a `datasets.Dataset` in memory, with the columns of `lopd.tools.interop.arrow_table`.

    The manifest and the provenance of the columns are in `dataset.info.description`, which `save_to_disk` keeps.  Rows and description have
    checksums, which `from_hf_dataset` verifies.  For a store larger than memory, use `export_parquet`:
    `datasets.load_dataset("parquet", ...)` reads the file, without the description, and `import_parquet` brings the store back.

    Raises:
        ArgumentError: the store is something else.
        InvalidRecordError: a rollout id is not text that Arrow can hold.
        MissingDependencyError: datasets is not installed.
    """
    check_noun(reader, LogprobReader)
    datasets, pa = need("datasets", "Hugging Face datasets"), need("pyarrow", "Hugging Face datasets")
    description = Description.of(reader)
    table = pa.concat_tables([description.schema().empty_table(), *tables(reader, description, 1024)])
    description = evolve(description, fingerprint=sealing.checksum(b"".join(table[CHECKSUM].to_pylist())))
    info = datasets.DatasetInfo(description=description.to_json())
    return datasets.Dataset(table, info=info, fingerprint=description.fingerprint)


def from_hf_dataset(dataset: Any, store: LogprobStore, *, rows_per_commit: int = 1024) -> None:
    """Append the rows of a dataset that `to_hf_dataset` made, or of a selection of them; run it again to resume.

    Verifies the checksum of every row, and that no row is missing unless the dataset is a selection.  Warns of a dataset without checksums,
    as lopd 0.2 made them.

    Args:
        dataset: with its description.
        store: created with `hf_dataset_manifest(dataset)`.
        rows_per_commit: rollouts appended together, or fewer where the values of each are very many; bounds memory.

    Raises:
        ArgumentError: it is not a `datasets.Dataset`, or the store is something else.
        InvalidRecordError: a row breaks the contract of a rollout or of scores, or `rows_per_commit` is less than 1.
        CorruptStoreError: it has no description of lopd, a row does not match its checksum, or rows are missing though none were selected.
        ManifestMismatchError: the store has another manifest.
        ConflictError: other content or values are under an id, another model under a column, or another policy under a round, of the store.
    """
    check_noun(store, LogprobStore)
    check_at_least("Import", "rows_per_commit", rows_per_commit, 1)
    description, owner = _describe(dataset)
    # `datasets` gives a selection, or whatever else it makes of a dataset, another fingerprint
    rows = len(dataset) if dataset._fingerprint == description.fingerprint else None
    # most values are of 4 bytes
    widths = [batch.nbytes / 4 / batch.num_rows for batch in dataset.data.to_batches() if batch.num_rows]
    batches = dataset.with_format("arrow").iter(rows_at_once(rows_per_commit, widths))
    store_tables(store, description, sound(batches, owner), owner, rows=rows)


def hf_dataset_manifest(dataset: Any) -> Manifest:
    """Return the manifest of the store that was exported.

    Raises:
        ArgumentError: it is not a `datasets.Dataset`.
        CorruptStoreError: the dataset has no description of lopd.
    """
    return _describe(dataset)[0].manifest


def _describe(dataset: Any) -> tuple[Description, str]:
    """Return what all rows have in common, and how messages name the dataset."""
    if not isinstance(dataset, need("datasets", "Hugging Face datasets").Dataset):
        raise ArgumentError(f"Dataset: it is {a_kind(dataset)}, expected a `datasets.Dataset`; pass one split of it.")
    owner = " ".join(["Dataset", *(str(file["filename"]) for file in dataset.cache_files[:1])])
    return Description.from_json(dataset.info.description, owner, dataset.column_names), owner
