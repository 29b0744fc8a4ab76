"""Who taught a student, and on which rollouts: its lineage, which is kept beside its weights."""

import json
import re
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
from attrs import asdict, field, frozen
from numpy.typing import NDArray

from lopd.errors import CorruptStoreError, EngineError, InvalidRecordError, LopdError, StoreWriteError
from lopd.records.identity import ModelId, mixture_id
from lopd.records.manifest import Manifest
from lopd.records.optional import need
from lopd.records.paths import is_there, local_path, read_regular
from lopd.records.stored import LARGEST_JSON, Count, parse, read_as

LINEAGE_FILE = "lopd.json"


@frozen
class StoreId:
    """The rollouts of a store when something was trained on it; a store that has grown since still begins with them.

    Args:
        rollouts: how many there were.
        digest: hash of vocabulary, policy and sampling, and of the lengths of these rollouts.
    """

    rollouts: Count
    digest: str

    @classmethod
    def of(cls, manifest: Manifest, lengths_N2: NDArray[np.int64]) -> "StoreId":
        """Return the identity of N rollouts, from their prompt and response tokens; nothing is read of what they hold."""
        # a setting that a later version adds does not change the hash of what was sampled without it
        sampling = asdict(manifest.sampling, filter=lambda setting, value: value != setting.default)
        what = [manifest.tokenizer.vocab_hash, manifest.policy.revision, manifest.generation, sampling]
        digest = blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(lengths_N2, "<i8").tobytes())
        return cls(len(lengths_N2), digest.hexdigest())


class _Recorded(TypedDict):
    """The part of a lineage file that `Lineage` reads; exports record more in it, and lopd 0.2 less."""

    sft_teacher: ModelId | None
    opd_teacher: ModelId | None
    store: NotRequired[StoreId | None]


@frozen
class Lineage:
    """What a student was trained on: kept beside its weights, and copied into the manifest of what it samples.  Equal if the teachers are.

    Args:
        sft_teacher: the model that wrote the SFT data; `mixture_id` of several.
        opd_teacher: the model whose scores it was distilled on.
        store: the rollouts that it was trained on last; None if they were not recorded.

    Raises:
        InvalidRecordError: a teacher is not a `ModelId`, or the store not a `StoreId`.
    """

    sft_teacher: ModelId | None = None
    opd_teacher: ModelId | None = None
    store: StoreId | None = field(default=None, eq=False)

    def __attrs_post_init__(self) -> None:
        for name, value in asdict(self, recurse=False).items():
            kind, remedy = (StoreId, "`batches(store).lineage.store`") if name == "store" else (ModelId, "`scorer.provenance.model`")
            if not isinstance(value, kind | None):
                raise InvalidRecordError(f"Lineage: {name} is {value!r:.80}, expected a {kind.__name__}; pass {remedy}.")

    @classmethod
    def of(cls, *writers: str | Path | ModelId) -> "Lineage":
        """Return the lineage of a student whose SFT text these models wrote.

        A folder is identified by its weights, which are read a few at a time and never made a model (some seconds per GB); a hub name by
        those of its snapshot, which is downloaded unless it is there.  Of a model without weights to read, or with quantised ones, state the
        identity: `ModelId(name, version, dtype)`.

        Raises:
            EngineError: there is no such folder or model.
            ModelError: its weights cannot be identified (`lopd.engines.identity.folder_model_id`).
            InvalidRecordError: there are no writers.
        """
        if not writers:
            raise InvalidRecordError("Lineage: it is of 0 models, expected at least 1; an unknown one is `Lineage()`.")
        models = [writer if isinstance(writer, ModelId) else _identify(writer) for writer in writers]
        return cls(sft_teacher=mixture_id(models))

    def write(self, folder: str | Path) -> None:
        """Write it into a model's folder; what else an export recorded there stays.

        Raises:
            InvalidRecordError: the folder is not there, or is a store.
            CorruptStoreError: there is a lineage that cannot be read.
            StoreWriteError: the operating system refuses.
        """
        self.read(folder := local_path("Lineage", folder))
        path = folder / LINEAGE_FILE
        try:
            there = parse(read_regular(path, LARGEST_JSON)) if is_there(path) else {}
            path.write_text(json.dumps({**there, **asdict(self)}, indent=1) + "\n")
        except OSError as error:
            raise StoreWriteError(f"Lineage {path}: it cannot be written ({error}); free space or mend permissions.") from error

    @classmethod
    def read(cls, folder: str | Path) -> "Lineage":
        """Return what is recorded in a model's folder; an empty lineage if nothing is.

        Raises:
            CorruptStoreError: the file is not what lopd wrote.
            InvalidRecordError: the folder is not there, or is a store.
        """
        refuse_store("Lineage", folder := local_path("Lineage", folder))
        if not folder.is_dir():
            raise InvalidRecordError(f"Lineage {folder}: there is no such folder, expected a model's; check the path.")
        path = folder / LINEAGE_FILE
        try:
            data = read_as(_Recorded, parse(read_regular(path, LARGEST_JSON)), f"Lineage {path}")
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            if isinstance(error, LopdError):
                raise
            raise CorruptStoreError(f"Lineage {path}: it cannot be read ({error}); restore or remove it.") from error
        return cls(**data)


def _identify(folder: str | Path) -> ModelId:
    """Return the identity of a folder, by the engines, which stand on a floor above and bring their own dependencies: so they are asked for by
    name.
    """
    need("transformers", "Lineage.of")
    try:
        identity: ModelId = need("lopd.engines.identity", "Lineage.of").folder_model_id(folder)
    except EngineError as error:
        if local_path("Model", folder, EngineError).exists():
            raise
        raise EngineError(f"{str(error).rstrip('.')}; of a model that only a host has, state `ModelId(name, version, dtype)`.") from error
    return identity


def refuse_store(owner: str, folder: Path, refusal: type[LopdError] = InvalidRecordError) -> None:
    """Refuse a store where a model is expected: its root may have the name of a lineage.

    Raises:
        LopdError: an error of class `refusal`.
    """
    for path in (folder / LINEAGE_FILE, folder / "zarr.json"):
        with suppress(OSError):
            if re.search(b'"(manifest|lopd_storage)":', read_regular(path, LARGEST_JSON)):
                raise refusal(f"{owner} {folder}: the folder is a store, expected a model's; pass the folder of the model.")
