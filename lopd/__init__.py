"""lopd: offline on-policy distillation.  Sample once, score once, train with no teacher in memory.

The method is Lightning OPD (Wu, Han, Cai; arXiv 2604.13010).  Five nouns (`lopd.protocols`), verbs (below), records in between
(`lopd.records`).  What brings its own dependencies is imported from its own module: `lopd.engines.hf`, `lopd.records.prompts`, `lopd.tools.console`,
`lopd.tools.report`.
"""

import sys as _sys
import typing as _typing
from importlib.metadata import version as _version

__version__ = _version("lopd")

if _sys.platform == "win32":
    import lopd.errors as _errors

    raise _errors.MissingDependencyError(
        "lopd: the system is Windows, expected Linux or macOS; run it in WSL2, with stores and runs in its own file system (~/..., not /mnt/c/...)."
    )

if _typing.TYPE_CHECKING:
    from lopd.backends.lance.store import LanceStore as LanceStore
    from lopd.backends.memory_store import MemoryStore as MemoryStore
    from lopd.backends.opening import open_store as open_store
    from lopd.backends.zarr.store import ZarrStore as ZarrStore
    from lopd.engines.privileged import PrivilegedScorer as PrivilegedScorer
    from lopd.engines.student import CausalLMStudent as CausalLMStudent
    from lopd.errors import LopdError as LopdError
    from lopd.guards.audit import audit as audit
    from lopd.guards.consistency import ConsistencyPolicy as ConsistencyPolicy
    from lopd.guards.residual import Residualiser as Residualiser
    from lopd.guards.residual import residualise as residualise
    from lopd.guards.watch import DriftLimits as DriftLimits
    from lopd.guards.watch import stored_advantages as stored_advantages
    from lopd.guards.watch import watch_drift as watch_drift
    from lopd.losses.beside import EntropyBonus as EntropyBonus
    from lopd.losses.beside import WindowRatio as WindowRatio
    from lopd.losses.chunked import selected_logprobs as selected_logprobs
    from lopd.losses.chunking import Chunking as Chunking
    from lopd.losses.fused import FusedLoss as FusedLoss
    from lopd.losses.fused import FusedOPDLoss as FusedOPDLoss
    from lopd.losses.fused import FusedSFTLoss as FusedSFTLoss
    from lopd.losses.reference import ReferenceLoss as ReferenceLoss
    from lopd.losses.reference import ReferenceOPDLoss as ReferenceOPDLoss
    from lopd.losses.reference import SFTLoss as SFTLoss
    from lopd.losses.reference import WeightedLoss as WeightedLoss
    from lopd.losses.top_k import TopKObjective as TopKObjective
    from lopd.protocols.labels import labels_of as labels_of
    from lopd.protocols.reading import rows_of as rows_of
    from lopd.records.collate import by_rollout as by_rollout
    from lopd.records.collate import by_token as by_token
    from lopd.records.collate import collate as collate
    from lopd.records.identity import ModelId as ModelId
    from lopd.records.lineage import Lineage as Lineage
    from lopd.records.manifest import Manifest as Manifest
    from lopd.records.manifest import SamplingParams as SamplingParams
    from lopd.records.prompts import make_prompts as make_prompts
    from lopd.records.prompts import read_prompts as read_prompts
    from lopd.records.rollouts import Prompt as Prompt
    from lopd.records.rollouts import Rollout as Rollout
    from lopd.records.rollouts import Scores as Scores
    from lopd.records.rollouts import floor_logprobs as floor_logprobs
    from lopd.records.steps import StepMetrics as StepMetrics
    from lopd.tools.interop.imports import import_text as import_text
    from lopd.tools.interop.imports import import_trajectories as import_trajectories
    from lopd.verbs.checkpoint import load_checkpoint as load_checkpoint
    from lopd.verbs.checkpoint import save_checkpoint as save_checkpoint
    from lopd.verbs.collect import collect_rollouts as collect_rollouts
    from lopd.verbs.evaluate import evaluate as evaluate
    from lopd.verbs.evaluate import evaluate_reverse_kl as evaluate_reverse_kl
    from lopd.verbs.labels import label_rollouts as label_rollouts
    from lopd.verbs.loader import batches as batches
    from lopd.verbs.preflight import Preflight as Preflight
    from lopd.verbs.refresh import refresh_every as refresh_every
    from lopd.verbs.refresh import refresh_when as refresh_when
    from lopd.verbs.refresh import sample_round as sample_round
    from lopd.verbs.scoring import score_rollouts as score_rollouts
    from lopd.verbs.train import opd_steps as opd_steps
else:
    # each is imported when it is first asked for, so that `lopd --help` does not wait for torch
    import ast as _ast
    import pkgutil as _pkgutil
    from functools import cache as _cache
    from importlib import import_module as _import_module

    def __getattr__(name: str) -> object:
        """Import a public name, or a folder of the package."""
        homes = _homes()
        if name == "__all__":
            return list(homes)
        if name in homes:
            value = getattr(_import_module(homes[name]), name)
        elif any(home.startswith(f"lopd.{name}.") for home in homes.values()):
            value = _import_module(f"lopd.{name}")
        else:
            raise AttributeError(f"module 'lopd' has no attribute {name!r}", name=name, obj=_sys.modules[__name__])
        return globals().setdefault(name, value)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_homes()})

    @_cache
    def _homes() -> dict[str, str]:
        """Return public name -> its module, as the imports above have it."""
        nodes = _ast.walk(_ast.parse(_pkgutil.get_data(__name__, "__init__.py")))
        named = [node for node in nodes if isinstance(node, _ast.ImportFrom) and node.module.startswith("lopd.")]
        return {alias.name: node.module for node in named for alias in node.names}
