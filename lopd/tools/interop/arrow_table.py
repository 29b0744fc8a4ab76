"""Rollouts and scores <-> Arrow tables: one row for each rollout, everything that a reader gives, and a description of the whole.

    rollout_id, generation, finish_reason, prompt_ids, response_ids, loss_mask, behavior_logprobs, content_hash
    sampler_logprobs                                               where a rollout of the store has them
    logprobs/<column>                                              of each score column; null where a rollout has no scores
    top_k_ids/<column>, top_k_logprobs/<column>, top_k_tail/<column>   of those that keep a support; K values a token, token after token

The description (manifest, generations, provenance of each column) is JSON.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import asdict, field, frozen

from lopd.errors import CorruptStoreError, InvalidRecordError, ManifestMismatchError
from lopd.protocols import LogprobReader, LogprobStore
from lopd.protocols.reading import parts
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance
from lopd.records.optional import need
from lopd.records.rollouts import SAMPLER_COLUMN, Rollout, ScoredRollout, Scores, TopK

_TOP_K_FIELDS = ("ids", "logprobs", "tail")


@frozen
class Description:
    """What all rows of a table have in common.

    Args:
        manifest: of the store.
        generations: rounds of sampling and their policies.
        columns: name -> who computed it.
        quarantined: column -> rollout id -> why it could not be scored.
        sampler: whether there is a column of `sampler_logprobs`.
    """

    manifest: Manifest
    generations: Mapping[int, ModelId]
    columns: Mapping[str, Provenance]
    quarantined: Mapping[str, Mapping[str, str]] = field(factory=dict)
    sampler: bool = False

    @classmethod
    def of(cls, reader: LogprobReader) -> "Description":
        """What a store says."""
        named = dict[str, dict[str, str]]()
        for name in reader.columns:
            if reasons := reader.quarantined(name):
                ids = [record.rollout.rollout_id for record in reader.read(list(reasons))]
                named[name] = dict(zip(ids, reasons.values(), strict=True))
        sampler = bool(reader.scored(SAMPLER_COLUMN).any())
        return cls(reader.manifest, dict(reader.generations), dict(reader.columns), named, sampler)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(
            {
                "manifest": self.manifest.to_json(),
                "generations": {str(number): asdict(policy) for number, policy in self.generations.items()},
                "columns": {name: provenance.to_json() for name, provenance in self.columns.items()},
                "quarantined": self.quarantined,
                **({"sampler": True} if self.sampler else {}),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes | None, owner: str) -> "Description":
        """The inverse of `to_json`.

        Raises:
            CorruptStoreError: it is no description, or of another schema version.
        """
        try:
            data = json.loads(text or "")
            return cls(
                Manifest.from_json(data["manifest"]),
                {int(number): ModelId(**policy) for number, policy in data["generations"].items()},
                {name: Provenance.from_json(provenance) for name, provenance in data["columns"].items()},
                data.get("quarantined", {}),
                data.get("sampler", False),
            )
        except CorruptStoreError as error:
            raise CorruptStoreError(f"{owner}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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
                fields += [(f"top_k_{part}/{name}", pa.list_(kind)) for part, kind in zip(_TOP_K_FIELDS, types, strict=True)]
        return pa.schema(fields)


def tables(reader: LogprobReader, description: Description, rows_per_table: int) -> Iterator[Any]:
    """The whole store in tables of about so many rows."""
    schema, waiting = description.schema(), list[ScoredRollout]()
    for part in parts(reader, min(64, rows_per_table)):
        waiting += part.read(reader)
        if len(waiting) >= rows_per_table:
            yield _table(waiting, schema)
            waiting = []
    if waiting:
        yield _table(waiting, schema)


def _table(rows: Sequence[ScoredRollout], schema: Any) -> Any:
    pa = need("pyarrow", "Arrow tables")
    for row in rows:
        _check_text(row.rollout.rollout_id)
    return pa.table([pa.array([_value(row, column.name) for row in rows], column.type) for column in schema], schema=schema)


def _value(row: ScoredRollout, name: str) -> Any:
    """Return what a column of the table holds of a row."""
    kind, slash, column = name.partition("/")
    if not slash:
        return getattr(row.rollout, name)
    if kind == "logprobs":
        return row.scores.get(column)
    return getattr(row.top_k[column], kind.removeprefix("top_k_")).reshape(-1) if column in row.top_k else None


def _check_text(rollout_id: str) -> None:
    try:
        rollout_id.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecordError(
            f"Rollout {rollout_id!r}: its id has a lone surrogate at {error.start}, expected text that Arrow can hold; "
            "rename the prompt and collect it again."
        ) from error


def store_tables(store: LogprobStore, description: Description, incoming: Iterator[Any], owner: str) -> None:
    """Append all rows of these tables, and their scores, table by table; what is there already is skipped.

    Raises:
        ManifestMismatchError: the store belongs to another policy, tokenizer or sampling.
        CorruptStoreError: a row does not match its hash, or a table is not as the description says.
        ConflictError: other content is under an id, or another model under a column, of the store.
    """
    difference = store.manifest.difference(description.manifest)
    if difference is not None:
        raise ManifestMismatchError(f"{store!r}: {difference}, the manifest of {owner}; create the store with that manifest.")
    for number, policy in description.generations.items():
        if number not in store.generations:
            store.begin_generation(number, policy)
    schema = description.schema()
    for table in incoming:
        rows = [(row, _rollout(row, owner)) for row in _rows(table, schema, owner)]
        store.append([rollout for _, rollout in rows])
        for name, provenance in description.columns.items():
            scores = [_scores(row, rollout, name, provenance, owner) for row, rollout in rows if row[f"logprobs/{name}"] is not None]
            store.append_scores(name, provenance, scores)
    for name, reasons in description.quarantined.items():
        # a selection of the rows may lack some of them
        there = store.find(list(reasons)) >= 0
        kept = {rollout_id: reason for (rollout_id, reason), found in zip(reasons.items(), there.tolist(), strict=True) if found}
        store.quarantine(name, description.columns[name], kept)


def _rows(table: Any, schema: Any, owner: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table; lists are arrays."""
    pa = need("pyarrow", "Arrow tables")
    try:
        table = table.select(schema.names).cast(schema)
    except (KeyError, pa.ArrowException) as error:
        raise CorruptStoreError(
            f"{owner}: its columns are {table.column_names} and do not fit ({error}), expected those of its description; export it again."
        ) from error
    columns = (table[field.name].to_numpy() if pa.types.is_list(field.type) else table[field.name].to_pylist() for field in schema)
    for values in zip(*columns, strict=True):
        yield dict(zip(schema.names, values, strict=True))


def _rollout(row: Mapping[str, Any], owner: str) -> Rollout:
    names = ("rollout_id", "prompt_ids", "response_ids", "loss_mask", "finish_reason", "behavior_logprobs", "generation")
    rollout = Rollout(**{name: row[name] for name in names}, sampler_logprobs=row.get("sampler_logprobs"))
    if rollout.content_hash != row["content_hash"]:
        raise CorruptStoreError(
            f"{owner}: rollout {rollout.rollout_id!r} has content hash {rollout.content_hash.hex()[:8]}, expected the "
            f"{(row['content_hash'] or b'').hex()[:8]} of its row; export it again."
        )
    return rollout


def _scores(row: Mapping[str, Any], rollout: Rollout, name: str, provenance: Provenance, owner: str) -> Scores:
    support, k, length = None, provenance.top_k, rollout.response_ids.size
    if k:
        ids, logprobs, tail = (row[f"top_k_{part}/{name}"] for part in _TOP_K_FIELDS)
        if ids is None or logprobs is None or tail is None or ids.size != length * k or logprobs.size != length * k:
            raise CorruptStoreError(
                f"{owner}: rollout {rollout.rollout_id!r} has a top-k support of another size, expected {k} for each of its {length} tokens; "
                "export it again."
            )
        support = TopK(ids.reshape(length, k), logprobs.reshape(length, k), tail)
    return Scores.of(rollout, row[f"logprobs/{name}"], top_k=support, residual=provenance.residual)
