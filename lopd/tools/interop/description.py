"""What all rows of an exported table have in common, as JSON that notices damage to itself."""

import json
from collections.abc import Mapping
from typing import Any

from attrs import asdict, field, frozen

from lopd.backends import admission, sealing
from lopd.errors import CorruptStoreError
from lopd.protocols import LogprobReader
from lopd.records.checks import check_number
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance
from lopd.records.optional import need
from lopd.records.rollouts import SAMPLER_COLUMN

TOP_K_FIELDS = ("ids", "logprobs", "tail")
#: The column that has the checksum of each row.
CHECKSUM = "checksum"
# The keys of a description without a checksum. A damaged one that lost its checksum has another key.
_UNSEALED = {"manifest", "generations", "columns", "quarantined", "sampler"}


@frozen
class Description:
    """What all rows of a table have in common.

    Args:
        manifest: of the store.
        generations: rounds of sampling and their policies.
        columns: name -> who computed it.
        quarantined: column -> rollout id -> why it could not be scored.
        sampler: whether there is a column of `sampler_logprobs`.
        rows: number of rows that were exported; None if neither rows nor description have checksums.
        fingerprint: of the exported dataset, which `datasets` changes when rows are selected; "" in a file.
    """

    manifest: Manifest
    generations: Mapping[int, ModelId]
    columns: Mapping[str, Provenance]
    quarantined: Mapping[str, Mapping[str, str]] = field(factory=dict)
    sampler: bool = False
    rows: int | None = None
    fingerprint: str = ""

    @classmethod
    def of(cls, reader: LogprobReader) -> "Description":
        """What a store says."""
        named = dict[str, dict[str, str]]()
        for name in reader.columns:
            if reasons := reader.quarantined(name):
                ids = [record.rollout.rollout_id for record in reader.read(list(reasons))]
                named[name] = dict(zip(ids, reasons.values(), strict=True))
        sampler = bool(reader.scored(SAMPLER_COLUMN).any())
        return cls(reader.manifest, dict(reader.generations), dict(reader.columns), named, sampler, len(reader))

    def to_json(self) -> str:
        """One line of JSON, with a checksum of itself."""
        document = {
            "manifest": self.manifest.to_json(),
            "generations": {str(number): asdict(policy) for number, policy in self.generations.items()},
            "columns": {name: provenance.to_json() for name, provenance in self.columns.items()},
            # a sealed document sorts its keys
            "order": list(self.columns),
            "quarantined": self.quarantined,
            "sampler": self.sampler,
            "rows": self.rows,
            "fingerprint": self.fingerprint,
        }
        return sealing.seal(document).decode()

    @classmethod
    def from_json(cls, text: str | bytes | None, owner: str) -> "Description":
        """The inverse of `to_json`; also reads what lopd 0.2 wrote, which has no checksum.

        Raises:
            CorruptStoreError: it is no description, is damaged, or of another schema version.
        """
        try:
            return _described(text.encode() if isinstance(text, str) else text or b"")
        except CorruptStoreError as error:
            raise CorruptStoreError(f"{owner}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptStoreError(
                f"{owner}: its description of manifest and columns cannot be read ({error!r}), expected what lopd exported; export it again."
            ) from error

    def schema(self) -> Any:
        """The Arrow schema of a table."""
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


def _described(text: bytes) -> Description:
    data = sealing.unseal(text)
    if data is None:
        data = json.loads(text)
        if unknown := sorted(data.keys() - _UNSEALED):
            raise ValueError(f"it does not match its checksum, or has the unknown keys {unknown}")
        data = {"order": [*data["columns"]], "quarantined": {}, "sampler": False, "rows": None, "fingerprint": "", **data}
    elif not (isinstance(data["rows"], int) and isinstance(data["sampler"], bool)):
        raise TypeError("rows is not a whole number, or sampler not a bool")
    manifest = Manifest.from_json(data["manifest"])
    columns = {name: Provenance.from_json(data["columns"][name]) for name in data["order"]}
    for name, provenance in columns.items():
        admission.check_column("Description", name)
        fits = provenance.top_k <= manifest.tokenizer.vocab_size
        check_number(f"Column {name!r}", "top_k", provenance.top_k, fits, "at most the size of the vocabulary")
    for name, reasons in data["quarantined"].items():
        if name not in columns or not all(isinstance(reason, str) for reason in reasons.values()):
            raise ValueError(f"the reasons of column {name!r} are not text for each rollout of a column")
    generations = {int(number): ModelId(**policy) for number, policy in data["generations"].items()}
    check_number("Description", "last generation", last := max(generations, default=0), last < 2**63, "an int64")
    return Description(manifest, generations, columns, data["quarantined"], data["sampler"], data["rows"], str(data["fingerprint"]))
