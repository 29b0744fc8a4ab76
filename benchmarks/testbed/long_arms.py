"""Arms of the long testbed: the store that the losses need, used whole or in part, beside the same losses with a live teacher."""

from attrs import evolve

from lopd import FusedLoss
from testbed.arms import ONLINE, PLAIN, RATIO, Arm
from testbed.estimator_arms import RESIDUAL, TOP_RESIDUAL
from testbed.runs import Support

#: For OPD, and those that its steps see.
PROMPTS, SEEN = 1600, 1200
DRAWN = Arm("16 drawn, residual", FusedLoss(RESIDUAL), support=Support(drawn=16))


def few(arm: Arm, rollouts: int) -> Arm:
    """Return the same arm with so few stored rollouts, so with more passes over them."""
    return evolve(arm, name=f"{arm.name}, {rollouts} rollouts", prompts=rollouts / PROMPTS)


def live(arm: Arm) -> Arm:
    """Return an arm of the same loss and support with a live teacher, on rollouts that are sampled at every step."""
    return evolve(arm, name=f"online OPD, {arm.name.removeprefix('stored ')}", every=1)


#: The arm that the goals are set for, and the same with a live teacher; chosen on seeds from 100 on.
BEST, BEST_LIVE = few(TOP_RESIDUAL, 300), live(TOP_RESIDUAL)
#: The first three see each prompt once, as online OPD does.
STORED = (*(evolve(arm, prompts=SEEN / PROMPTS) for arm in (RATIO, PLAIN, TOP_RESIDUAL)), BEST, few(TOP_RESIDUAL, 75), few(DRAWN, 300))
#: With the sampled token alone (on fresh rollouts the ratio is 1, so it is online for plain and ratio alike), then with a support.
LIVE = (ONLINE, BEST_LIVE)
