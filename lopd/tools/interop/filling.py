"""What imports of records share: where records come from, and the store that they go into."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lopd.backends import admission
from lopd.errors import ArgumentError
from lopd.protocols import LogprobStore
from lopd.records.checks import a_kind
from lopd.records.contents import several
from lopd.records.files import named_file, read_records
from lopd.records.manifest import Manifest
from lopd.records.rollouts import Rollout
from lopd.tools.interop.arrow_table import FIELDS, refuse_other

_ROWS_PER_COMMIT = 1024
#: Makes the store of an import.
StoreMaker = Callable[[Manifest], LogprobStore]


def check_maker(owner: str, store: object) -> None:
    """Refuse a store in the place of what makes one.

    Raises:
        ArgumentError: it cannot be called.
    """
    if not callable(store):
        raise ArgumentError(f"{owner}: store is {a_kind(store)}; pass `lambda manifest: ZarrStore.open_or_create(PATH, manifest)`.")


def records_of(kind: str, records: str | os.PathLike[str] | Iterable[Any]) -> tuple[tuple[str, str], Iterable[tuple[int, Any]]]:
    """Return how messages name all records, and one, before its number; and the records with their numbers, of a file or in memory.

    Args:
        kind: kind of record, for example "Text".
        records: a path or a URL, or many of them.

    Raises:
        PromptError: the file cannot be read, or they are something else.
    """
    if isinstance(records, str | os.PathLike):
        path, owner = named_file(f"{kind} file", records)
        item, found = read_records(owner, path)
        return (owner, item), found
    many = f"{kind.removesuffix('y')}ies" if kind.endswith("y") else f"{kind}s"
    return (many, f"{kind} number"), enumerate(several(many, records, "a path"))


def fill(store: StoreMaker, manifest: Manifest, rollouts: Sequence[Rollout]) -> LogprobStore:
    """Return the store with all rollouts; none is committed unless all of them can be.

    Raises:
        InvalidRecordError: a token id is outside the vocabulary.
        ManifestMismatchError: the store is of another writer or tokenizer.
        ConflictError: it has another rollout under an id, or the same with other log-probs or another end.
    """
    vocab_size, generations = manifest.tokenizer.vocab_size, {manifest.generation}
    admission.new_rollouts("Import", rollouts, vocab_size=vocab_size, generations=generations, known={})
    made = store(manifest)
    refuse_other(made, [{name: getattr(rollout, name) for name in FIELDS} for rollout in rollouts], {})
    for first in range(0, len(rollouts), _ROWS_PER_COMMIT):
        made.append(rollouts[first : first + _ROWS_PER_COMMIT])
    return made
