"""Rollouts and scores <-> Arrow tables: one row for each rollout, everything that a reader gives, and a description of the whole.

    rollout_id, generation, finish_reason, prompt_ids, response_ids, loss_mask, behavior_logprobs, content_hash
    sampler_logprobs                                               where a rollout of the store has them
    logprobs/<column>                                              of each score column; null where a rollout has no scores
    top_k_ids/<column>, top_k_logprobs/<column>, top_k_tail/<column>   of those that keep a support; K values a token, token after token
    checksum                                                       of all these values of the row, see `row_checksum`

The description (manifest, generations, provenance of each column, number of rows) is JSON, with a checksum of itself.
Tables without checksums, which lopd 0.2 wrote and other programs may write, are imported with a warning.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
from attrs import evolve
from numpy.typing import NDArray
from xxhash import xxh3_128

from lopd.backends import admission
from lopd.backends.id_index import ID_HASH, encode_ids, hash_ids
from lopd.errors import (
    ConflictError,
    CorruptStoreError,
    InvalidRecordError,
    LopdError,
    ManifestMismatchError,
    MissingScoresError,
    UncheckedDataWarning,
)
from lopd.protocols import LogprobReader, LogprobStore
from lopd.protocols.reading import VALUES_AT_ONCE, in_batches, named, parts
from lopd.records.manifest import Provenance
from lopd.records.optional import need
from lopd.records.rollouts import Rollout, ScoredRollout, Scores
from lopd.records.support import TopK
from lopd.tools.interop.description import CHECKSUM, TOP_K_FIELDS, Description

# Arrays enter a checksum as the table holds them, in whatever type a store gives them.
_TYPES = {"b": "|b1", "i": "<i4", "u": "<i4", "f": "<f4"}
# One read of a bucket costs as much as many rows; those that are compared are in memory already.
_AT_ONCE = 1024
_SCORES = ("logprobs/", *(f"top_k_{field}/" for field in TOP_K_FIELDS))
FIELDS = ("rollout_id", "prompt_ids", "response_ids", "loss_mask", "finish_reason", "behavior_logprobs", "generation", "sampler_logprobs")
_Wanted = list[tuple[Mapping[str, Any], int]]  # rows of an import, each with its row in the store


def tables(reader: LogprobReader, description: Description, rows_per_table: int) -> Iterator[Any]:
    """Yield the whole store in tables of about so many rows, or fewer where their values are very many."""
    schema, waiting, first, total = description.schema(), dict[int, ScoredRollout](), 0, 0
    for part in parts(reader, min(64, rows_per_table)):
        total += part.values
        # parts of the same rows follow one another: where one begins behind all that wait, none of these is still to come
        if waiting and part.rows[0] == first + len(waiting) and (len(waiting) >= rows_per_table or total > VALUES_AT_ONCE):
            yield _table([waiting[row] for row in sorted(waiting)], schema)
            waiting, first, total = {}, part.rows[0], part.values
        waiting.update(zip(part.rows, part.read(reader), strict=True))
    if waiting:
        yield _table([waiting[row] for row in sorted(waiting)], schema)


def _table(rows: Sequence[ScoredRollout], schema: Any) -> Any:
    pa = need("pyarrow", "Arrow tables")
    names, made = [name for name in schema.names if name != CHECKSUM], list[dict[str, Any]]()
    for row in rows:
        _check_text(row.rollout.rollout_id)
        values = {name: _value(row, name) for name in names}
        made.append({**values, CHECKSUM: row_checksum(values)})
    return pa.Table.from_pylist(made, schema)


def row_checksum(row: Mapping[str, Any]) -> bytes:
    """Return 16 bytes that depend on each value of a row, its length and the name of its column.

    XXH3 of these, column after column: name, type (that of an array, "null", or nothing) and number of bytes, as text with a zero byte
    behind each; and the bytes, which are text for what is not an array.
    """
    digest = xxh3_128()
    for name, value in row.items():
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value, _TYPES.get(value.dtype.kind))
            kind, data = array.dtype.str, array.tobytes()
        else:
            kind, data = "null" if value is None else "", str(value).encode()
        digest.update(f"{name}\0{kind}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.digest()


def _value(row: ScoredRollout, name: str) -> Any:
    kind, slash, column = name.partition("/")
    if not slash:
        return getattr(row.rollout, name)
    if kind == "logprobs":
        return row.scores.get(column)
    return getattr(row.top_k[column], kind.removeprefix("top_k_")).reshape(-1) if column in row.top_k else None


def refuse_other(store: LogprobReader, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Provenance]) -> None:
    """Refuse rows of an import that are in the store, or among them, with other values, before it is written to.

    An append keeps what came first and says nothing, since a repeated request may round otherwise.  An import reads a file again: it was mended.

    Args:
        store: they are about to be appended to it.
        rows: values by the names of columns.
        columns: provenance of the score columns in them.

    Raises:
        ConflictError: a value is another, beyond what a store of float16 rounds, or is in one of the two alone; or a column is another model's.
    """
    for column, provenance in columns.items():
        admission.check_provenance(named(store), column, store.columns, provenance)
    ids = [row["rollout_id"] for row in rows]
    twice, firsts = {rollout_id for rollout_id, times in Counter(ids).items() if times > 1}, dict[tuple[str, str], Any]()
    for rollout_id, row in zip(ids, rows, strict=True):
        # scores may be in one of them alone
        for name, given in row.items() if rollout_id in twice else ():
            if not (given is None and "/" in name) and not _same(given, firsts.setdefault((rollout_id, name), given)):
                raise ConflictError(f"{named(store)}: rollout {rollout_id!r} comes twice, with other {name}; leave one of them out.")
    found = store.find(ids)
    for part in in_batches(np.flatnonzero(found >= 0), _AT_ONCE):
        wanted = [(rows[i], row) for i, row in zip(part, found[part].tolist(), strict=True)]
        try:
            _compare(store, wanted, columns, {})
        except MissingScoresError:
            # not before: it looks at the whole store, and what an import has brought before has all its scores
            _compare(store, wanted, columns, {column: store.scored(column) for column in columns})


def _compare(store: LogprobReader, wanted: _Wanted, columns: Mapping[str, Provenance], scored: Mapping[str, NDArray[np.bool_]]) -> None:
    """Refuse rows of an import that have other values in these rows of the store; a column that is not in `scored` has scores of them all."""
    groups: dict[tuple[str, ...], _Wanted] = {}
    for values, row in wanted:
        both = tuple(name for name in columns if values[f"logprobs/{name}"] is not None and (name not in scored or scored[name][row]))
        groups.setdefault(both, []).append((values, row))
    for both, members in groups.items():
        read = store.read([row for _, row in members], both, [name for name in both if columns[name].top_k])
        for (values, _), record in zip(members, read, strict=True):
            for name, given in values.items():
                if name.partition("/")[2] in ("", *both) and not _same(given, kept := _value(record, name)):
                    how = "without" if kept is None else "with" if given is None else "with other"
                    raise ConflictError(
                        f"{named(store)}: rollout {values['rollout_id']!r} is there {how} {name}, and an import replaces nothing; import into a "
                        "new store, and texts or trajectories of several files in one call, as one list of records."
                    )


def _same(given: Any, kept: Any) -> bool:
    if not isinstance(given, np.ndarray) or not isinstance(kept, np.ndarray):
        return type(given) is type(kept) and bool(given == kept)
    rounded = given.dtype.kind == "f" and given.shape == kept.shape
    return np.array_equal(given, kept) or (rounded and np.allclose(kept, given, rtol=2.0**-11, atol=2.0**-25))


def _check_text(rollout_id: str) -> None:
    try:
        rollout_id.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecordError(
            f"Rollout {rollout_id!r}: its id has a lone surrogate at {error.start}, expected text for Arrow; rename the prompt and collect it again."
        ) from error


def store_tables(store: LogprobStore, description: Description, incoming: Iterator[Any], owner: str, *, rows: int | None) -> None:
    """Append all rows of these tables, and their scores, table by table; what is there already is skipped.

    Args:
        store: takes them.
        description: what the tables hold.
        incoming: the tables.
        owner: how messages name them.
        rows: how many there are; None for a selection of those that were exported.

    Raises:
        ManifestMismatchError: the store belongs to another policy, tokenizer or sampling.
        CorruptStoreError: a row does not match its checksum or its hash, rows are missing, or a table does not match the description.
        ConflictError: other content or values are under an id, another model under a column, or another policy under a round, of the store.
    """
    difference = store.manifest.difference(description.manifest)
    if difference is not None:
        raise ManifestMismatchError(f"{named(store)}: {difference}, the manifest of {owner}; create the store with that manifest.")
    for number, policy in description.generations.items():  # all of them, before one is begun
        admission.check_generation(named(store), number, store.generations.get(number), policy)
    first, expected, needed = next(incoming, None), description.rows, description.schema().names
    names = needed if first is None else first.column_names
    if unknown := [name for name in names if name not in needed and name.startswith(_SCORES)]:
        raise CorruptStoreError(
            f"{owner}: its description lacks whose scores the columns {unknown} are; drop them, and add these with `store.append_scores`."
        )
    if {*needed} - {*names} == {CHECKSUM}:
        # Somebody has taken it out, to edit values.
        description = evolve(description, rows=None)
    if description.rows is None:
        unchecked = f"{owner}: it has no checksums, so damage to it cannot be noticed; export it again with this version of lopd."
        warnings.warn(unchecked, UncheckedDataWarning, stacklevel=3)
    if rows is not None:
        _check_rows(owner, rows, expected)
    for number, policy in description.generations.items():
        store.begin_generation(number, policy)
    schema, seen, hashes = description.schema(), 0, [np.zeros(0, ID_HASH)]
    for table in chain(() if first is None else (first,), incoming):
        pairs = [(row, _rollout(row, owner)) for row in _rows(table, schema, owner, seen)]
        seen += len(pairs)
        hashes.append(hash_ids(encode_ids([rollout.rollout_id for _, rollout in pairs])))
        refuse_other(store, [row for row, _ in pairs], description.columns)
        store.append([rollout for _, rollout in pairs])
        for name, provenance in description.columns.items():
            scores = [_scores(row, rollout, name, provenance, owner) for row, rollout in pairs if row[f"logprobs/{name}"] is not None]
            store.append_scores(name, provenance, scores)
    _check_rows(owner, seen, rows)
    if rows is not None:
        _check_rows(owner, np.unique(np.concatenate(hashes)).size, expected, f"different rollouts in {seen} rows")
    for name, reasons in description.quarantined.items():
        # a selection of the rows may lack some of them
        there = store.find(list(reasons)) >= 0
        kept = {rollout_id: reason for (rollout_id, reason), found in zip(reasons.items(), there.tolist(), strict=True) if found}
        store.quarantine(name, description.columns[name], kept)


def _check_rows(owner: str, count: int, expected: int | None, of: str = "rows") -> None:
    if expected not in (None, count):
        raise CorruptStoreError(
            f"{owner}: it has {count} {of}, expected the {expected} that were exported; restore it from a backup, or where it was filtered import "
            "the whole of it and choose rows with `batches(rows=...)`."
        )


@contextmanager
def reading(owner: str) -> Iterator[None]:
    """Make one error of whatever a foreign library raises at damaged data; an error of ours stays."""
    try:
        yield
    except LopdError:
        raise
    except Exception as error:  # each part of pyarrow and of datasets raises its own
        raise CorruptStoreError(f"{owner}: it cannot be read ({error}); restore it from a backup.") from error


def sound(incoming: Iterator[Any], owner: str) -> Iterator[Any]:
    """Yield these tables, each looked at before its values are: a damaged offset would end the process.

    Raises:
        CorruptStoreError: one of them is damaged; it names the row that it begins with.
    """
    seen = 0
    while True:
        with reading(f"{owner}, from row {seen}"):
            if (table := next(incoming, None)) is not None:
                table.validate(full=True)
        if table is None:
            return
        yield table
        seen += len(table)


def _rows(table: Any, schema: Any, owner: str, first: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, of which the first has this number; lists are arrays."""
    pa = need("pyarrow", "Arrow tables")
    try:
        table = table.select(schema.names).cast(schema)
    except (KeyError, pa.ArrowException) as error:
        raise CorruptStoreError(f"{owner}: its columns are {table.column_names} and do not fit ({error}); export it again.") from error
    columns = (table[field.name].to_numpy() if pa.types.is_list(field.type) else table[field.name].to_pylist() for field in schema)
    for number, values in enumerate(zip(*columns, strict=True), first):
        row = dict(zip(schema.names, values, strict=True))
        if CHECKSUM in row and row.pop(CHECKSUM) != row_checksum(row):
            raise CorruptStoreError(
                f"{owner}: row {number}, rollout {row['rollout_id']!r}, does not match its checksum; restore it from a backup."
            )
        yield row


def _rollout(row: Mapping[str, Any], owner: str) -> Rollout:
    values: dict[str, Any] = {name: row.get(name) for name in FIELDS}
    rollout = Rollout(**values)
    if rollout.content_hash != row["content_hash"]:
        raise CorruptStoreError(
            f"{owner}: rollout {rollout.rollout_id!r} has content hash {rollout.content_hash.hex()[:8]}, expected the "
            f"{(row['content_hash'] or b'').hex()[:8]} of its row; export it again."
        )
    return rollout


def _scores(row: Mapping[str, Any], rollout: Rollout, name: str, provenance: Provenance, owner: str) -> Scores:
    support, k, length = None, provenance.top_k, rollout.response_ids.size
    if k:
        ids, logprobs, tail = (row[f"top_k_{part}/{name}"] for part in TOP_K_FIELDS)
        if ids is None or logprobs is None or tail is None or ids.size != length * k or logprobs.size != length * k:
            raise CorruptStoreError(
                f"{owner}: rollout {rollout.rollout_id!r} has a top-k support of another size, expected {k} a token, of {length}; export it again."
            )
        support = TopK(ids.reshape(length, k), logprobs.reshape(length, k), tail, provenance.drawn)
    return Scores.of(rollout, row[f"logprobs/{name}"], top_k=support, signed=provenance.signed)
