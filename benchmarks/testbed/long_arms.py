"""Arms of the long testbed: the store that the losses need, used whole or in part, beside the same losses with a live teacher."""

from attrs import evolve

from lopd import FusedLoss
from testbed.arms import ONLINE, PLAIN, RATIO, Arm
from testbed.estimator_arms import RESIDUAL, TOP_RESIDUAL
from testbed.runs import Support

DRAWN = Arm("16 drawn, residual", FusedLoss(RESIDUAL), support=Support(drawn=16))


def part(arm: Arm, share: float) -> Arm:
    """The same on a share of the prompts, so in more passes over fewer rollouts."""
    return evolve(arm, name=f"{arm.name}, 1/{round(1 / share)} of the prompts", prompts=share)


def live(arm: Arm) -> Arm:
    """The same loss and support with a live teacher, on rollouts that are sampled at every step."""
    return evolve(arm, name=f"online OPD, {arm.name.removeprefix('stored ')}", every=1)


#: The arm that the goals are set for, and the same with a live teacher; chosen on seeds from 100 on.
BEST, BEST_LIVE = part(TOP_RESIDUAL, 1 / 4), live(TOP_RESIDUAL)
STORED = (PLAIN, RATIO, DRAWN, TOP_RESIDUAL, BEST, part(TOP_RESIDUAL, 1 / 16))
#: With the sampled token alone (on fresh rollouts the ratio is 1, so it is online for plain and ratio alike), then with a support.
LIVE = (ONLINE, BEST_LIVE)
