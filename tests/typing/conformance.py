"""Only type-checked, never run: every class against the protocol it is used as.  A forgotten or renamed method fails here."""

import torch

from lopd.backends.cloud_files import ObstoreFiles
from lopd.backends.files import Files
from lopd.backends.fsspec_files import FsspecFiles
from lopd.backends.lance_store import LanceStore
from lopd.backends.local_files import LocalFiles
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr_store import ZarrStore
from lopd.collate import Weighting, by_rollout, by_token
from lopd.console import RichProgress
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.server import ServerScorer, ServerSource
from lopd.engines.vllm import VLLMScorer, VLLMSource
from lopd.interop import TorchDataset
from lopd.loader import StepStream
from lopd.losses.fused import FusedLoss, FusedOPDLoss, FusedSFTLoss
from lopd.losses.objective import Objective, OPDObjective
from lopd.losses.reference import ReferenceLoss, ReferenceOPDLoss, SFTLoss, WeightedLoss
from lopd.protocols import (
    DurableStore,
    LogprobReader,
    LogprobStore,
    LogprobWriter,
    OPDLoss,
    Progress,
    RolloutSource,
    Student,
    TeacherScorer,
)
from lopd.steps import Step
from lopd.students import CausalLMStudent
from lopd.types import ScoredRollout


def rollout_sources(hf: HFSource, vllm: VLLMSource, served: ServerSource) -> tuple[RolloutSource, RolloutSource, RolloutSource]:
    return hf, vllm, served


def teacher_scorers(hf: HFScorer, vllm: VLLMScorer, served: ServerScorer) -> tuple[TeacherScorer, TeacherScorer, TeacherScorer]:
    return hf, vllm, served


def memory_store(store: MemoryStore) -> tuple[LogprobStore, LogprobReader, LogprobWriter]:
    return store, store, store


def zarr_store(store: ZarrStore) -> tuple[DurableStore, LogprobReader, LogprobWriter]:
    return store, store, store


def lance_store(store: LanceStore) -> tuple[DurableStore, LogprobReader, LogprobWriter]:
    return store, store, store


def files(local: LocalFiles, bucket: ObstoreFiles, other: FsspecFiles) -> tuple[Files, Files, Files]:
    return local, bucket, other


def dataset(rows: TorchDataset) -> torch.utils.data.Dataset[ScoredRollout]:
    return rows


def losses() -> tuple[OPDLoss, OPDLoss, OPDLoss]:
    return ReferenceOPDLoss(), SFTLoss(), WeightedLoss(((1.0, ReferenceOPDLoss()), (0.1, SFTLoss())))


def fused_losses(loss: FusedLoss, plain: ReferenceLoss) -> tuple[OPDLoss, OPDLoss, OPDLoss, OPDLoss]:
    return FusedOPDLoss(), FusedSFTLoss(), loss, plain


def objective() -> Objective:
    return OPDObjective()


def student(model: CausalLMStudent) -> Student:
    return model


def progress(bar: RichProgress) -> Progress:
    return bar


def weightings() -> tuple[Weighting, Weighting]:
    return by_rollout, by_token


def first_step(stream: StepStream) -> Step:
    return next(iter(stream))
