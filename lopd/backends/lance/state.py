"""The catalog of a store on LanceDB, and its records."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from attrs import field, frozen, mutable
from xxhash import xxh3_64_intdigest

from lopd.backends.column_names import ColumnName
from lopd.errors import CorruptStoreError
from lopd.records.identity import ModelId
from lopd.records.manifest import Commit, Provenance
from lopd.records.stored import Count, Seconds, read_as

#: A table that will be made; the table of a column, or of the rollouts; what was sampled, not scored, merged; files of an older lopd.
Kind = Literal["begun", "table", "generation", "quarantine", "compaction", "old"]
# A table is a folder of the database.
_TableName = Annotated[str, re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")]


class Record(TypedDict):
    """The fields of each record."""

    kind: Kind
    when: Seconds


class _Begun(Record):
    table: _TableName
    column: ColumnName | None


class _Table(_Begun):
    provenance: Provenance | None


class _Generation(Record):
    generation: Count
    policy: ModelId


class _Quarantine(Record):
    column: ColumnName
    reasons: Mapping[Count, str]


class _Compaction(Record):
    column: ColumnName | None
    rows: Count
    tokens: Count


class _Old(Record):
    files: Mapping[str, str]


@frozen
class TableEntry:
    """Which table holds the rollouts, or a column.

    Args:
        table: its name in the database.
        provenance: who computed the scores; None for the rollouts.
        seed: where the checksums of its lines begin, so that lines of another table are noticed; 0 in tables of an older lopd.
    """

    table: _TableName
    provenance: Provenance | None
    seed: int


@mutable
class CatalogState:
    """What was there at one moment; `Catalog` keeps it.

    Args:
        tables: table of each column; that of the rollouts has the key None, and is there from the first append on.
        begun: names of all tables that were begun, with their columns.
        generations: policies, by round.
        reasons: by column, why its model could not score rows, scored since or not; of several reasons for a row the latest.
        events: generations, compactions and quarantines, for the history.
        number: number of records.
        last: checksum of the last record; of lopd.json before there is one; "" before anything was read.
        old: files of an older lopd, with their checksums.
    """

    tables: dict[str | None, TableEntry] = field(factory=dict)
    begun: dict[str, str | None] = field(factory=dict)
    generations: dict[int, ModelId] = field(factory=dict)
    reasons: dict[str, dict[int, str]] = field(factory=dict)
    events: list[Commit] = field(factory=list)
    number: int = 0
    last: str = ""
    old: dict[str, str] = field(factory=dict)

    def add(self, document: Mapping[str, Any], owner: str, *, old: bool = False) -> None:
        """Take in a record.

        Args:
            document: its JSON.
            owner: its name in messages.
            old: it is a file of an older lopd.

        Raises:
            CorruptStoreError: it is something else.
        """
        kind = read_as(Record, document, owner)["kind"]
        rows, tokens, column = 0, 0, document.get("column")
        if kind == "begun":
            begun = read_as(_Begun, document, owner)
            self.begun[begun["table"]] = begun["column"]
        elif kind == "table":
            table = read_as(_Table, document, owner)
            self.tables[table["column"]] = TableEntry(table["table"], table["provenance"], 0 if old else table_seed(table["table"]))
        elif kind == "generation":
            generation = read_as(_Generation, document, owner)
            self.generations[generation["generation"]] = generation["policy"]
        elif kind == "quarantine":
            quarantine = read_as(_Quarantine, document, owner)
            rows = len(quarantine["reasons"])
            self.reasons.setdefault(quarantine["column"], {}).update(quarantine["reasons"])
        elif kind == "compaction":
            merged = read_as(_Compaction, document, owner)
            rows, tokens = merged["rows"], merged["tokens"]
        else:
            files = read_as(_Old, document, owner)["files"]
            if added := sorted(self.old.keys() - files):
                raise CorruptStoreError(
                    f"{owner}: an older lopd wrote {added[0]} after a newer one went on with the store; update lopd everywhere, move that file away, "
                    "and repeat what was appended or scored."
                )
            if differing := sorted(files.items() ^ self.old.items()):
                raise CorruptStoreError(
                    f"{owner}: {differing[0][0]} is not the file that was there when the log began; restore the store from a backup."
                )
        if kind in ("generation", "quarantine", "compaction"):
            self.events.append(Commit(0, kind, rows, tokens, column, document["when"]))


def table_seed(table: str) -> int:
    """Return where the checksums of a table's lines begin."""
    return xxh3_64_intdigest(table.encode())
