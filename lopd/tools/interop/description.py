"""What all rows of an exported table have in common, as JSON that notices damage to itself."""

from collections.abc import Collection, Mapping
from typing import Any

from attrs import asdict, evolve, field, frozen

from lopd.backends import sealing
from lopd.backends.column_names import check_column
from lopd.errors import CorruptStoreError
from lopd.protocols import LogprobReader
from lopd.records.checks import check_number
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance
from lopd.records.optional import need
from lopd.records.rollouts import SAMPLER_COLUMN
from lopd.records.stored import Count, parse, read_as

TOP_K_FIELDS = ("ids", "logprobs", "tail")
#: The column that has the checksum of each row.
CHECKSUM = "checksum"


@frozen
class Description:
    """What all rows of a table have in common.

    Args:
        manifest: the store's manifest.
        generations: rounds of sampling and their policies.
        columns: name -> who computed it.
        quarantined: column -> rollout id -> why it could not be scored.
        sampler: whether there is a column of `sampler_logprobs`.
        rows: number of rows that were exported; None if neither rows nor description have checksums.
        fingerprint: the exported dataset's fingerprint, which `datasets` changes when rows are selected; "" in a file.
        order: names of the columns, which JSON with a checksum sorts; empty for the order of `columns`.

    Raises:
        InvalidRecordError: a column has a name or a top-k that no store takes, or is missing.
    """

    manifest: Manifest
    generations: Mapping[Count, ModelId]
    columns: Mapping[str, Provenance]
    quarantined: Mapping[str, Mapping[str, str]] = field(factory=dict)
    sampler: bool = False
    rows: int | None = None
    fingerprint: str = ""
    order: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        vocab_size = self.manifest.tokenizer.vocab_size
        for name, provenance in self.columns.items():
            check_column("Description", name)
            distinct = provenance.top_k - provenance.drawn
            check_number(f"Column {name!r}", "top_k", distinct, distinct <= vocab_size, f"at most {vocab_size}, the size of the vocabulary")
        for what, names in (("order", self.order or self.columns), ("quarantined", {*self.columns, *self.quarantined})):
            check_number("Description", what, [*names], sorted(names) == sorted(self.columns), f"the columns {[*self.columns]}")

    @classmethod
    def of(cls, reader: LogprobReader) -> "Description":
        """Return the description of a store."""
        named = dict[str, dict[str, str]]()
        for name in reader.columns:
            if reasons := reader.quarantined(name):
                ids = [record.rollout.rollout_id for record in reader.read(list(reasons))]
                named[name] = dict(zip(ids, reasons.values(), strict=True))
        sampler = bool(reader.scored(SAMPLER_COLUMN).any())
        return cls(reader.manifest, dict(reader.generations), dict(reader.columns), named, sampler, len(reader))

    def to_json(self) -> str:
        """Return one line of JSON, with a checksum of itself."""
        document = {
            "manifest": self.manifest.to_json(),
            "generations": {str(number): asdict(policy) for number, policy in self.generations.items()},
            "columns": {name: provenance.to_json() for name, provenance in self.columns.items()},
            "quarantined": self.quarantined,
            "sampler": self.sampler,
            "rows": self.rows,
            "fingerprint": self.fingerprint,
            "order": list(self.columns),
        }
        return sealing.seal(document).decode()

    @classmethod
    def from_json(cls, text: str | bytes | None, owner: str, names: Collection[str]) -> "Description":
        """Return the inverse of `to_json`; also reads what lopd 0.2 wrote, which has no checksum.

        Args:
            text: what stands in the place of a description.
            owner: how messages name the export.
            names: its columns.

        Raises:
            CorruptStoreError: there is not a description, it is damaged, or has another schema version.
        """
        text = text if isinstance(text, bytes) else str(text or "")
        if text.lstrip()[:1] not in ("{", b"{"):
            if "content_hash" in names:
                raise CorruptStoreError(
                    f"{owner}: it has the columns of an export, and its description is lost, as `load_dataset`, pandas and a push lose it; import "
                    "the file that `export_parquet` wrote with `import_parquet`."
                )
            raise CorruptStoreError(
                f"{owner}: it has no description of a store, so lopd did not export it; export the store with `export_parquet` or "
                "`to_hf_dataset`, and read texts with `import_text`."
            )
        owner = f"{owner}: its description"
        try:
            data = text if isinstance(text, bytes) else text.encode()
            document = sealing.unseal(data) or parse(data)
        except ValueError as error:
            joined = "}\n\n{" in str(text)  # as `concatenate_datasets` joins them
            remedy = "several exports were joined: import one after the other into one store" if joined else "export it again"
            raise CorruptStoreError(f"{owner} cannot be read ({error}); {remedy}.") from error
        if isinstance(document, dict):
            if "checksum" in document:
                raise CorruptStoreError(f"{owner} does not match its checksum; restore it from a backup.")
            # states its version before anything is checked about its fields
            Manifest.from_json(document.get("manifest"), owner)
        # Damage may have changed the key of the checksum. It is not a field then.
        made = read_as(cls, document, owner)
        return evolve(made, columns={name: made.columns[name] for name in made.order or made.columns})

    def schema(self) -> Any:
        """Return the Arrow schema of a table."""
        pa = need("pyarrow", "Arrow tables")
        fields: list[tuple[str, Any]] = [
            ("rollout_id", pa.string()),
            ("generation", pa.int64()),
            ("finish_reason", pa.string()),
            ("prompt_ids", pa.list_(pa.int32())),
            ("response_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.bool_())),
            ("behavior_logprobs", pa.list_(pa.float32())),
            ("content_hash", pa.binary()),
            *([("sampler_logprobs", pa.list_(pa.float32()))] if self.sampler else []),
        ]
        for name, provenance in self.columns.items():
            fields.append((f"logprobs/{name}", pa.list_(pa.float32())))
            if provenance.top_k:
                types = (pa.int32(), pa.float32(), pa.float32())
                fields += [(f"top_k_{part}/{name}", pa.list_(kind)) for part, kind in zip(TOP_K_FIELDS, types, strict=True)]
        return pa.schema([*fields, *([] if self.rows is None else [(CHECKSUM, pa.binary())])])
