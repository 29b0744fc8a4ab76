"""Rates that the paper's GPU-hours imply: a first guess where nothing was measured.

Source: Lightning OPD, arXiv 2604.13010v2, table 2 (GPU-hours on H100) with the settings of its section 4: 17,400 prompts, 150 steps of 256
rollouts, responses of at most 4,096 tokens.  It does not state how long responses were; here they are three quarters of that, and as the same length
turns hours into rates and rates into hours, the hours do not depend on it.
"""

from collections.abc import Callable, Mapping
from statistics import geometric_mean

import numpy as np
from attrs import frozen

from lopd.records.checks import to_real
from lopd.tools.plan.bill import GpuRates
from lopd.tools.plan.work import Work

#: Floating-point operations a second of the paper's GPU, dense bfloat16, as its maker has it.
H100_FLOPS = 989e12

#: Length of responses that rates are guessed for.
RESPONSE_TOKENS = 3 * 4096 // 4


@frozen
class Measured:
    """A row of table 2, GPU-hours.

    Args:
        work: what was done.
        rollouts, scores, training: phases of Lightning OPD.
        online: online OPD as a whole.
    """

    work: Work
    rollouts: float
    scores: float
    training: float
    online: float

    @property
    def total(self) -> float:
        """GPU-hours of Lightning OPD."""
        return self.rollouts + self.scores + self.training


def _work(student: float, teacher: float) -> Work:
    return Work(prompts=17_400, steps=150, response_tokens=RESPONSE_TOKENS, student_billions=student, teacher_billions=teacher)


#: Student -> what the paper reports for it.
TABLE_2: Mapping[str, Measured] = {
    "Qwen3-4B from Qwen3-8B": Measured(_work(4.0, 8.2), rollouts=10, scores=2, training=8, online=72),
    "Qwen3-8B from Qwen3-32B": Measured(_work(8.2, 32.8), rollouts=10, scores=4, training=16, online=120),
}

#: Billions of parameters -> tokens a second of one response by vLLM 0.6.3 in bfloat16 on an A100, after a prompt of one token.
#: Source: Qwen2.5 speed benchmark, qwen.readthedocs.io/en/v2.5/benchmark/speed_benchmark.html; parameters of the model cards.
DECODED: Mapping[float, float] = {0.49: 311.55, 1.54: 183.33, 3.09: 127.61, 7.61: 84.28}


def rates_like(work: Work, flops: float = H100_FLOPS) -> GpuRates:
    """Return rates for models of these sizes, at the shares of `flops` that table 2 implies (the geometric mean of its rows).

    Sampling is as fast as there for students of 4B to 8B, in both rows the same, slower in proportion for larger ones, and faster for smaller
    ones as decoding is (`DECODED`): a step reads the weights, and takes some time besides.

    Args:
        work: sizes of the models; rates are those of rollouts as long as the paper's, whatever its lengths are (`guessed_for`).
        flops: floating-point operations that one GPU does in a second.
    """
    flops = to_real("Rates", "flops", flops)
    sampled = _mean(lambda row: row.work.rollouts * row.work.response_tokens / row.rollouts / 3600)
    reads = _mean(lambda row: row.work.tokens * row.work.flops_teacher / row.scores / 3600 / H100_FLOPS)
    # a token is trained on forwards and, at twice the price, backwards
    trains = _mean(
        lambda row: row.work.trained / row.work.rollouts * row.work.tokens * 3 * row.work.flops_student / row.training / 3600 / H100_FLOPS
    )
    # the line through `DECODED`: all else in a step of decoding takes as long as reading so many billions of parameters
    slope, start = np.polyfit(list(DECODED), [1 / rate for rate in DECODED.values()], 1)
    sizes, rest = [row.work.flops_student for row in TABLE_2.values()], 2e9 * float(start / slope)
    slower, faster = max(sizes) / work.flops_student, (min(sizes) + rest) / (work.flops_student + rest)
    return GpuRates(
        sampling=sampled * min(1.0, slower) * max(1.0, faster) * flops / H100_FLOPS,
        scoring=reads * flops / work.flops_teacher,
        training=trains * flops / (3 * work.flops_student),
    )


def guessed_for(work: Work) -> int | None:
    """Return how long the responses are that `rates_like` guesses for, where those of this work are more than twice as long; None elsewhere.

    There attention and the cache make each token dearer, by how much depends on the model and the engine.
    """
    return RESPONSE_TOKENS if work.response_tokens > 2 * RESPONSE_TOKENS else None


def lockstep_of(row: Measured) -> float:
    """Return how many times slower sampling and scoring were in online OPD than in bulk, for its GPU-hours to be what they are.

    Its training is the same as Lightning's.  What is left is spent on as many rollouts as steps took, not as many as were stored: on waiting for the
    longest response of each step, on batches of 32 rollouts a GPU, on GPUs that hold a teacher while others sample, on new weights for the
    engine.  The paper does not split it, and its two runs were not matched in all settings.
    """
    return (row.online - row.training) / ((row.rollouts + row.scores) * row.work.trained / row.work.rollouts)


def _mean(of: Callable[[Measured], float]) -> float:
    return geometric_mean(map(of, TABLE_2.values()))


#: Geometric mean of both rows.
PAPER_LOCKSTEP = _mean(lockstep_of)
