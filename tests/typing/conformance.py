"""Only type-checked, never run: every class against the protocol it is used as.  A forgotten or renamed method fails here."""

import torch

from lopd.backends.files import Files
from lopd.backends.files.by_fsspec import FsspecFiles
from lopd.backends.files.cloud import ObstoreFiles
from lopd.backends.files.local import LocalFiles
from lopd.backends.lance.store import LanceStore
from lopd.backends.memory_store import MemoryStore
from lopd.backends.zarr.store import ZarrStore
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.privileged import PrivilegedScorer
from lopd.engines.server import ServerScorer, ServerSource
from lopd.engines.student import CausalLMStudent
from lopd.engines.vllm import VLLMScorer, VLLMSource
from lopd.losses.beside import EntropyBonus
from lopd.losses.divergences import forward_kl
from lopd.losses.fused import FusedLoss, FusedOPDLoss, FusedSFTLoss
from lopd.losses.objective import Objective, OPDObjective
from lopd.losses.reference import ReferenceLoss, ReferenceOPDLoss, SFTLoss, WeightedLoss
from lopd.losses.top_k import TopKObjective
from lopd.protocols import (
    DurableStore,
    Labeller,
    LogprobReader,
    LogprobStore,
    LogprobWriter,
    OPDLoss,
    Progress,
    RolloutSource,
    StatesCorrection,
    StatesRatio,
    Student,
    TeacherScorer,
    Verifier,
)
from lopd.records import ScoredRollout, Step, Weighting, by_rollout, by_token
from lopd.tools.console import RichProgress
from lopd.tools.interop import TorchDataset
from lopd.verbs import StepStream


def rollout_sources(hf: HFSource, vllm: VLLMSource, served: ServerSource) -> tuple[RolloutSource, RolloutSource, RolloutSource]:
    return hf, vllm, served


def teacher_scorers(hf: HFScorer, vllm: VLLMScorer, served: ServerScorer) -> tuple[TeacherScorer, TeacherScorer, TeacherScorer]:
    return hf, vllm, served


def told(scorer: PrivilegedScorer) -> TeacherScorer:
    return scorer


def labeller(verifier: Verifier) -> Labeller:
    return verifier


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


def objectives() -> tuple[Objective, Objective, StatesCorrection]:
    return OPDObjective(), TopKObjective(forward_kl), EntropyBonus(OPDObjective())


def losses_that_state_their_correction(fused: FusedLoss, plain: ReferenceLoss, sum_of_losses: WeightedLoss) -> list[StatesCorrection]:
    return [ReferenceOPDLoss(), FusedOPDLoss(), fused, plain, sum_of_losses]


def losses_that_state_their_ratio(fused: FusedLoss, plain: ReferenceLoss, sum_of_losses: WeightedLoss) -> list[StatesRatio]:
    return [OPDObjective(), EntropyBonus(OPDObjective()), ReferenceOPDLoss(), FusedOPDLoss(), fused, plain, sum_of_losses]


def student(model: CausalLMStudent) -> Student:
    return model


def progress(bar: RichProgress) -> Progress:
    return bar


def weightings() -> tuple[Weighting, Weighting]:
    return by_rollout, by_token


def first_step(stream: StepStream) -> Step:
    return next(iter(stream))
