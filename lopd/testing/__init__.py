"""Conformance suites and Hypothesis strategies, for our implementations and other people's.

Subclass a suite in a test module, define how to make the thing, and pytest runs every clause of its protocol's contract:

    class TestMyStore(StoreConformance):
        def make(self, manifest): return MyStore(manifest)
        def reopen(self, store): return store

    class TestMyLoss(LossConformance):
        def make(self): return MyFusedLoss()
        def reference(self): return ReferenceOPDLoss()

`SourceConformance`, `ScorerConformance` and `StudentConformance` judge what samples, what scores and what is trained; they need a model.
"""

from lopd.records.optional import needing as _needing

with _needing("hypothesis", __name__, "test"):
    from lopd.testing.loss_cases import LossCase as LossCase
    from lopd.testing.loss_cases import loss_case as loss_case
    from lopd.testing.loss_cases import loss_cases as loss_cases
    from lopd.testing.loss_cases import separated_loss_cases as separated_loss_cases
    from lopd.testing.losses import LossConformance as LossConformance
    from lopd.testing.losses import assert_at_least_as_exact as assert_at_least_as_exact
    from lopd.testing.records import assert_same_rollout as assert_same_rollout
    from lopd.testing.records import assert_same_top_k as assert_same_top_k
    from lopd.testing.records import rollouts as rollouts
    from lopd.testing.records import scores_for as scores_for
    from lopd.testing.records import tiny_manifest as tiny_manifest
    from lopd.testing.records import tiny_provenance as tiny_provenance
    from lopd.testing.records import tiny_rollout as tiny_rollout
    from lopd.testing.records import tiny_scores as tiny_scores
    from lopd.testing.records import tiny_top_k as tiny_top_k
    from lopd.testing.scorers import ScorerConformance as ScorerConformance
    from lopd.testing.sources import SourceConformance as SourceConformance
    from lopd.testing.store_suite import assert_holds as assert_holds
    from lopd.testing.stores import StoreConformance as StoreConformance
    from lopd.testing.students import StudentConformance as StudentConformance
