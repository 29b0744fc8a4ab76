"""Arms that differ in what is stored of a token and in how the reverse KL is estimated from it: the teacher's tokens, the policy's, drawn ones."""

from functools import partial

from attrs import evolve

from lopd import EntropyBonus, FusedLoss, FusedOPDLoss, TopKObjective, WindowRatio
from lopd.losses.divergences import generalised_kl, reverse_kl
from lopd.losses.objective import OPDObjective
from lopd.losses.variants import window_ratio
from testbed.arms import ONLINE, PLAIN, RATIO, TOP_K, Arm
from testbed.runs import Support
from testbed.trl_peer import ARM as TRL

RESIDUAL = TopKObjective(reverse_kl, residual=True)
_EIGHT, _SIXTEEN = Support(candidates=8), Support(candidates=16)

_WINDOW = FusedLoss(WindowRatio(RESIDUAL))
CANDIDATES = Arm("8 candidates, residual", FusedLoss(RESIDUAL), support=_EIGHT)
WINDOW = Arm("8 candidates, residual, window", _WINDOW, support=_EIGHT)
TOP_RESIDUAL = Arm("stored top-8, residual", FusedLoss(RESIDUAL), support=Support(top_k=8))
#: The arm that the goals are set for; chosen on seeds from 100 on.
BEST = evolve(WINDOW, name=f"{WINDOW.name}, half of the prompts", prompts=0.5)
STORED = (
    PLAIN,
    RATIO,
    Arm("ratio, window", FusedOPDLoss(ratio_to_ref=True, transforms=(partial(window_ratio, window=8),))),
    Arm("LSPD: clip 5, entropy bonus", FusedLoss(EntropyBonus(OPDObjective(clip=5.0), 0.05))),
    TOP_K,
    TOP_RESIDUAL,
    Arm("stored top-8, residual, window", _WINDOW, support=Support(top_k=8)),
    Arm("8 candidates", FusedLoss(TopKObjective(reverse_kl)), support=_EIGHT),
    CANDIDATES,
    Arm("8 candidates, generalised KL", FusedLoss(TopKObjective(generalised_kl)), support=_EIGHT),
    WINDOW,
    BEST,
    Arm("16 candidates", FusedLoss(TopKObjective(reverse_kl)), support=_SIXTEEN),
    Arm("16 candidates, residual", FusedLoss(RESIDUAL), support=_SIXTEEN),
    Arm("4 candidates and top-4, residual", FusedLoss(RESIDUAL), support=Support(candidates=4, top_k=4)),
    Arm("8 drawn", FusedLoss(RESIDUAL), support=Support(drawn=8)),
)
LIVE = (ONLINE, evolve(ONLINE, name=f"online OPD, {CANDIDATES.name}", loss=CANDIDATES.loss, support=CANDIDATES.support))
#: Times the rate of all others, as less noise may allow; TRL has it too.
FASTER = 3.0


def faster(name: str) -> str:
    """Return the name of an arm at that rate."""
    return f"{name}; rate x {FASTER:g}"


FAST = tuple(evolve(arm, name=faster(arm.name), rate=FASTER) for arm in (RATIO, TOP_K, CANDIDATES, BEST, ONLINE))
#: Run where Lightning fails, too.
FALLEN = (ONLINE, *(arm for arm in STORED if arm.support.width in {0, 8} and arm != PLAIN))
#: In the curves of the plot, beside TRL; those at the higher rate in a row of their own.
CURVES = (ONLINE.name, TRL, RATIO.name, TOP_K.name, BEST.name, *(faster(name) for name in (ONLINE.name, TRL, BEST.name)))
