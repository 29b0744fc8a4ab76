"""Only type-checked, never run: every class against the protocol it is used as.  A forgotten or renamed method fails here."""

from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr_store import ZarrStore
from lopd.collate import Weighting, by_rollout, by_token
from lopd.console import RichProgress
from lopd.engines.hf import HFScorer, HFSource
from lopd.loader import StepStream
from lopd.losses.reference import ReferenceOPDLoss, SFTLoss, WeightedLoss
from lopd.protocols import (
    LogprobReader,
    LogprobStore,
    LogprobWriter,
    OPDLoss,
    Progress,
    RolloutSource,
    Student,
    TeacherScorer,
)
from lopd.students import CausalLMStudent
from lopd.types import Step


def rollout_source(source: HFSource) -> RolloutSource:
    return source


def teacher_scorer(scorer: HFScorer) -> TeacherScorer:
    return scorer


def memory_store(store: MemoryStore) -> tuple[LogprobStore, LogprobReader, LogprobWriter]:
    return store, store, store


def zarr_store(store: ZarrStore) -> tuple[LogprobStore, LogprobReader, LogprobWriter]:
    return store, store, store


def losses() -> tuple[OPDLoss, OPDLoss, OPDLoss]:
    return ReferenceOPDLoss(), SFTLoss(), WeightedLoss(((1.0, ReferenceOPDLoss()), (0.1, SFTLoss())))


def student(model: CausalLMStudent) -> Student:
    return model


def progress(bar: RichProgress) -> Progress:
    return bar


def weightings() -> tuple[Weighting, Weighting]:
    return by_rollout, by_token


def first_step(stream: StepStream) -> Step:
    return next(iter(stream))
