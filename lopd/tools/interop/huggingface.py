"""A store as a Hugging Face `datasets.Dataset`, and back."""

from collections.abc import Iterator
from typing import Any

from lopd.protocols import LogprobReader, LogprobStore
from lopd.records.manifest import Manifest
from lopd.records.optional import need
from lopd.tools.interop.arrow_table import Description, store_tables, tables


def to_hf_dataset(reader: LogprobReader) -> Any:
    """All rollouts with all their scores as a `datasets.Dataset` in memory, with the columns of `lopd.tools.interop.arrow_table`.

    The manifest and the provenance of the columns are in `dataset.info.description`, which `save_to_disk` keeps.  For a store larger than
    memory, use `export_parquet` and `datasets.load_dataset("parquet", ...)`.

    Raises:
        InvalidRecordError: a rollout id is no text that Arrow can hold.
        MissingDependencyError: datasets is not installed.
    """
    datasets, pa = need("datasets", "Hugging Face datasets"), need("pyarrow", "Hugging Face datasets")
    description = Description.of(reader)
    table = pa.concat_tables([description.schema().empty_table(), *tables(reader, description, 1024)])
    return datasets.Dataset(table, info=datasets.DatasetInfo(description=description.to_json()))


def from_hf_dataset(dataset: Any, store: LogprobStore, *, rows_per_commit: int = 1024) -> None:
    """Append the rows of a dataset that `to_hf_dataset` made, or of a selection of them; run it again to resume.

    Args:
        dataset: with its description.
        store: created with `hf_dataset_manifest(dataset)`.
        rows_per_commit: rollouts appended together; bounds memory.

    Raises:
        CorruptStoreError: it has no description of lopd, or a row does not match its hash.
        ManifestMismatchError: the store has another manifest.
        ConflictError: other content is under an id, or another model under a column, of the store.
    """
    store_tables(store, _describe(dataset), _batches(dataset, rows_per_commit), "Dataset")


def hf_dataset_manifest(dataset: Any) -> Manifest:
    """The manifest of the store that was exported.

    Raises:
        CorruptStoreError: the dataset has no description of lopd.
    """
    return _describe(dataset).manifest


def _describe(dataset: Any) -> Description:
    return Description.from_json(dataset.info.description, "Dataset")


def _batches(dataset: Any, rows: int) -> Iterator[Any]:
    arrow = dataset.with_format("arrow")
    for start in range(0, len(dataset), rows):
        yield arrow[start : start + rows]
