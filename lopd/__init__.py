"""lopd: offline on-policy distillation.  Sample once, score once, train with no teacher in memory.

The method is Lightning OPD (Wu, Han, Cai; arXiv 2604.13010).  Five nouns (`lopd.protocols`), verbs (below), records in between
(`lopd.types`).  What brings its own dependencies is imported from its own module: `lopd.engines.hf`, `lopd.prompts`, `lopd.console`,
`lopd.report`.
"""

from importlib.metadata import version as _version

from lopd.audit import audit as audit
from lopd.backends.lance_store import LanceStore as LanceStore
from lopd.backends.memory_store import MemoryStore as MemoryStore
from lopd.backends.opening import open_store as open_store
from lopd.backends.zarr_store import ZarrStore as ZarrStore
from lopd.checkpoint import load_checkpoint as load_checkpoint
from lopd.checkpoint import save_checkpoint as save_checkpoint
from lopd.collate import by_rollout as by_rollout
from lopd.collate import by_token as by_token
from lopd.collate import collate as collate
from lopd.collect import collect_rollouts as collect_rollouts
from lopd.consistency import ConsistencyPolicy as ConsistencyPolicy
from lopd.errors import LopdError as LopdError
from lopd.evaluate import evaluate as evaluate
from lopd.evaluate import evaluate_reverse_kl as evaluate_reverse_kl
from lopd.guards import DriftLimits as DriftLimits
from lopd.guards import stored_advantages as stored_advantages
from lopd.guards import watch_drift as watch_drift
from lopd.identity import ModelId as ModelId
from lopd.loader import batches as batches
from lopd.losses.chunked import Chunking as Chunking
from lopd.losses.chunked import selected_logprobs as selected_logprobs
from lopd.losses.fused import FusedLoss as FusedLoss
from lopd.losses.fused import FusedOPDLoss as FusedOPDLoss
from lopd.losses.fused import FusedSFTLoss as FusedSFTLoss
from lopd.losses.reference import ReferenceLoss as ReferenceLoss
from lopd.losses.reference import ReferenceOPDLoss as ReferenceOPDLoss
from lopd.losses.reference import SFTLoss as SFTLoss
from lopd.losses.reference import WeightedLoss as WeightedLoss
from lopd.losses.top_k import TopKObjective as TopKObjective
from lopd.manifest import Lineage as Lineage
from lopd.manifest import Manifest as Manifest
from lopd.manifest import SamplingParams as SamplingParams
from lopd.preflight import Preflight as Preflight
from lopd.refresh import refresh_every as refresh_every
from lopd.refresh import refresh_when as refresh_when
from lopd.refresh import sample_round as sample_round
from lopd.residual import Residualiser as Residualiser
from lopd.residual import residualise as residualise
from lopd.scoring import score_rollouts as score_rollouts
from lopd.students import CausalLMStudent as CausalLMStudent
from lopd.train import opd_steps as opd_steps
from lopd.types import Prompt as Prompt
from lopd.types import Rollout as Rollout
from lopd.types import Scores as Scores
from lopd.types import floor_logprobs as floor_logprobs

__version__ = _version("lopd")
