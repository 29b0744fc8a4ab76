"""Plain data, checked once when it is made, and pure functions on it.

A token's way: Prompt -> Rollout -> Scores -> Batch -> LossOutput -> StepMetrics.  Where they come from: Manifest, Provenance, Lineage.
"""

from lopd.records.arrays import BoolArray as BoolArray
from lopd.records.arrays import Float32Array as Float32Array
from lopd.records.arrays import Int32Array as Int32Array
from lopd.records.collate import Weighting as Weighting
from lopd.records.collate import by_rollout as by_rollout
from lopd.records.collate import by_token as by_token
from lopd.records.drift import LEVELS as LEVELS
from lopd.records.drift import AdvantageSummary as AdvantageSummary
from lopd.records.drift import Drift as Drift
from lopd.records.estimates import Estimate as Estimate
from lopd.records.estimates import RolloutSums as RolloutSums
from lopd.records.estimates import sampled_reverse_kl as sampled_reverse_kl
from lopd.records.identity import ModelId as ModelId
from lopd.records.identity import TokenizerId as TokenizerId
from lopd.records.identity import fingerprint_tokenizer as fingerprint_tokenizer
from lopd.records.identity import mixture_id as mixture_id
from lopd.records.lineage import Lineage as Lineage
from lopd.records.lineage import StoreId as StoreId
from lopd.records.manifest import Commit as Commit
from lopd.records.manifest import Manifest as Manifest
from lopd.records.manifest import Provenance as Provenance
from lopd.records.manifest import SamplingParams as SamplingParams
from lopd.records.parity import Parity as Parity
from lopd.records.parity import measure_parity as measure_parity
from lopd.records.prompts import make_prompts as make_prompts
from lopd.records.prompts import read_prompts as read_prompts
from lopd.records.ranks import Ranks as Ranks
from lopd.records.rollouts import BEHAVIOR_COLUMN as BEHAVIOR_COLUMN
from lopd.records.rollouts import SAMPLER_COLUMN as SAMPLER_COLUMN
from lopd.records.rollouts import FinishReason as FinishReason
from lopd.records.rollouts import Prompt as Prompt
from lopd.records.rollouts import Rollout as Rollout
from lopd.records.rollouts import ScoredRollout as ScoredRollout
from lopd.records.rollouts import Scores as Scores
from lopd.records.rollouts import floor_logprobs as floor_logprobs
from lopd.records.rollouts import policy_column as policy_column
from lopd.records.rollouts import prompt_id_of as prompt_id_of
from lopd.records.rollouts import rollout_id as rollout_id
from lopd.records.rows import Rows as Rows
from lopd.records.steps import Batch as Batch
from lopd.records.steps import LMHead as LMHead
from lopd.records.steps import LossOutput as LossOutput
from lopd.records.steps import Step as Step
from lopd.records.steps import StepMetrics as StepMetrics
from lopd.records.support import TopK as TopK
