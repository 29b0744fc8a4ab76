"""Rollouts and scores <-> Arrow tables: one row for each rollout, everything that a reader gives, and a description of the whole.

    rollout_id, generation, finish_reason, prompt_ids, response_ids, loss_mask, behavior_logprobs, content_hash
    logprobs/<column>                                              of each score column; null where a rollout has no scores
    top_k_ids/<column>, top_k_logprobs/<column>, top_k_tail/<column>   of those that keep a support; K values a token, token after token

The description (manifest, generations, provenance of each column) is JSON.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
from attrs import asdict, field, frozen
from numpy.typing import NDArray

from lopd.backends import ragged
from lopd.errors import CorruptStoreError, InvalidRecordError, ManifestMismatchError, MissingDependencyError
from lopd.protocols import LogprobReader, LogprobStore
from lopd.protocols.reading import parts
from lopd.records.identity import ModelId
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import Rollout, ScoredRollout, Scores, TopK

_TOP_K_FIELDS = ("ids", "logprobs", "tail")


def need(package: str, use: str) -> Any:
    """An optional package, or a module of it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{use}: {package.partition('.')[0]} is not installed, expected it; pip install 'lopd[hf]'."
        ) from error


@frozen
class Description:
    """What all rows of a table have in common.

    Args:
        manifest: of the store.
        generations: rounds of sampling and their policies.
        columns: name -> who computed it.
        quarantined: column -> rollout id -> why it could not be scored.
    """

    manifest: Manifest
    generations: Mapping[int, ModelId]
    columns: Mapping[str, Provenance]
    quarantined: Mapping[str, Mapping[str, str]] = field(factory=dict)

    @classmethod
    def of(cls, reader: LogprobReader) -> "Description":
        """What a store says."""
        reasons = {name: reader.quarantined(name) for name in reader.columns}
        named = {name: dict(zip(_names(reader, rows), rows.values(), strict=True)) for name, rows in reasons.items() if rows}
        return cls(reader.manifest, dict(reader.generations), dict(reader.columns), named)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(
            {
                "manifest": self.manifest.to_json(),
                "generations": {str(number): asdict(policy) for number, policy in self.generations.items()},
                "columns": {name: provenance.to_json() for name, provenance in self.columns.items()},
                "quarantined": self.quarantined,
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
        ]
        for name, provenance in self.columns.items():
            fields.append((f"logprobs/{name}", pa.list_(pa.float32())))
            if provenance.top_k:
                types = (pa.int32(), pa.float32(), pa.float32())
                fields += [(f"top_k_{part}/{name}", pa.list_(kind)) for part, kind in zip(_TOP_K_FIELDS, types, strict=True)]
        return pa.schema(fields)


def _names(reader: LogprobReader, rows: Iterable[int]) -> list[str]:
    return [record.rollout.rollout_id for record in reader.read(list(rows))]


def tables(reader: LogprobReader, description: Description, rows_per_table: int) -> Iterator[Any]:
    """The whole store in tables of about so many rows."""
    pa = need("pyarrow", "Arrow tables")
    schema, waiting = description.schema(), list[ScoredRollout]()
    for part in parts(reader, min(64, rows_per_table)):
        waiting += part.read(reader)
        if len(waiting) >= rows_per_table:
            yield pa.table(_arrays(waiting, schema), schema=schema)
            waiting = []
    if waiting:
        yield pa.table(_arrays(waiting, schema), schema=schema)


def _arrays(rows: Sequence[ScoredRollout], schema: Any) -> list[Any]:
    pa = need("pyarrow", "Arrow tables")
    for row in rows:
        _check_text(row.rollout.rollout_id)
    arrays = []
    for column in schema:
        take = _values(column.name)
        values = [take(row) for row in rows]
        arrays.append(_lists(values, column.type) if pa.types.is_list(column.type) else pa.array(values, column.type))
    return arrays


def _values(name: str) -> Callable[[ScoredRollout], Any]:
    """How to take what a column of the table holds out of a row."""
    kind, slash, column = name.partition("/")
    if not slash:
        return lambda row: getattr(row.rollout, name)
    if kind == "logprobs":
        return lambda row: row.scores.get(column)
    part = kind.removeprefix("top_k_")
    return lambda row: getattr(row.top_k[column], part).reshape(-1) if column in row.top_k else None


def _check_text(rollout_id: str) -> None:
    try:
        rollout_id.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecordError(
            f"Rollout {rollout_id!r}: its id has a lone surrogate at {error.start}, expected text that Arrow can hold; "
            "rename the prompt and collect it again."
        ) from error


def _lists(values: Sequence[NDArray[Any] | None], kind: Any) -> Any:
    pa = need("pyarrow", "Arrow tables")
    there = [value for value in values if value is not None]
    flat = pa.array(np.concatenate(there) if there else [], kind.value_type)
    borders = pa.array(ragged.offsets(np.array([0 if value is None else value.size for value in values])), pa.int32())
    absent = pa.array([value is None for value in values])
    return pa.ListArray.from_arrays(borders, flat, type=kind, mask=absent)


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
        columns = _to_numpy(table, schema, owner)
        rollouts = [_rollout(columns, i, owner) for i in range(len(columns["rollout_id"]))]
        store.append(rollouts)
        for name, provenance in description.columns.items():
            store.append_scores(name, provenance, _scores(columns, name, provenance, rollouts, owner))
    for name, reasons in description.quarantined.items():
        # a selection of the rows may lack some of them
        there = store.find(list(reasons)) >= 0
        kept = {rollout_id: reason for (rollout_id, reason), found in zip(reasons.items(), there.tolist(), strict=True) if found}
        store.quarantine(name, description.columns[name], kept)


def _to_numpy(table: Any, schema: Any, owner: str) -> dict[str, list[Any]]:
    pa = need("pyarrow", "Arrow tables")
    try:
        table = table.select(schema.names).cast(schema).combine_chunks()
    except (KeyError, pa.ArrowException) as error:
        raise CorruptStoreError(
            f"{owner}: its columns are {table.column_names} and do not fit ({error}), expected those of its description; export it again."
        ) from error
    return {name: _to_pieces(table.column(name)) for name in schema.names}


def _to_pieces(column: Any) -> list[Any]:
    pa = need("pyarrow", "Arrow tables")
    if not pa.types.is_list(column.type):
        return list(column.to_pylist())
    pieces: list[Any] = []
    for chunk in column.chunks:
        flat, borders = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        spans = zip(pairwise(borders.tolist()), chunk.is_valid().to_pylist(), strict=True)
        pieces += [flat[start:end] if valid else None for (start, end), valid in spans]
    return pieces


def _rollout(columns: Mapping[str, list[Any]], i: int, owner: str) -> Rollout:
    names = ("rollout_id", "prompt_ids", "response_ids", "loss_mask", "finish_reason", "behavior_logprobs", "generation")
    rollout = Rollout(**{name: columns[name][i] for name in names})
    if rollout.content_hash != columns["content_hash"][i]:
        raise CorruptStoreError(
            f"{owner}: rollout {rollout.rollout_id!r} has content hash {rollout.content_hash.hex()[:8]}, expected the "
            f"{(columns['content_hash'][i] or b'').hex()[:8]} of its row; export it again."
        )
    return rollout


def _scores(columns: Mapping[str, list[Any]], name: str, provenance: Provenance, rollouts: Sequence[Rollout], owner: str) -> list[Scores]:
    made, k = [], provenance.top_k
    for i, rollout in enumerate(rollouts):
        logprobs_T = columns[f"logprobs/{name}"][i]
        if logprobs_T is not None:
            support = _top_k([columns[f"top_k_{part}/{name}"][i] for part in _TOP_K_FIELDS], k, rollout, owner) if k else None
            made.append(Scores.of(rollout, logprobs_T, top_k=support, residual=provenance.residual))
    return made


def _top_k(flat: Sequence[NDArray[Any] | None], k: int, rollout: Rollout, owner: str) -> TopK:
    ids, logprobs, tail = flat
    length = rollout.response_ids.size
    if ids is None or logprobs is None or tail is None or ids.size != length * k or logprobs.size != length * k:
        raise CorruptStoreError(
            f"{owner}: rollout {rollout.rollout_id!r} has a top-k support of another size, expected {k} for each of its {length} tokens; "
            "export it again."
        )
    return TopK(ids.reshape(length, k), logprobs.reshape(length, k), tail)
