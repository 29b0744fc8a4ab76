"""What makes offline distillation safe: is it the right teacher, will stored rollouts do, has the student moved too far, who wrote this text."""

from lopd.guards.audit import Audit as Audit
from lopd.guards.audit import Candidate as Candidate
from lopd.guards.consistency import ConsistencyPolicy as ConsistencyPolicy
from lopd.guards.consistency import check_teacher_consistency as check_teacher_consistency
from lopd.guards.consistency import check_vocabulary as check_vocabulary
from lopd.guards.residual import Residualiser as Residualiser
from lopd.guards.residual import ResidualReport as ResidualReport
from lopd.guards.start import StartReport as StartReport
from lopd.guards.start import advise as advise
from lopd.guards.start import measure_start as measure_start
from lopd.guards.watch import DriftLimits as DriftLimits
from lopd.guards.watch import judge_advantages as judge_advantages
from lopd.guards.watch import judge_loss as judge_loss
from lopd.guards.watch import stored_advantages as stored_advantages
from lopd.guards.watch import watch_drift as watch_drift
