"""Online OPD, the baseline: rollouts that are refreshed at every step.  The teacher stays alive all through."""

from collections.abc import Callable, Iterator, Sequence

from attrs import evolve
from torch.optim import Optimizer

from lopd import MemoryStore, ModelId, batches, by_rollout, opd_steps, refresh_every, sample_round
from lopd.engines.hf import HFScorer, HFSource
from lopd.protocols import OPDLoss, Student
from lopd.records import Prompt, StepMetrics, Weighting


def online_opd(
    student: Student,
    source: HFSource,
    teacher: HFScorer,
    prompts: Sequence[Prompt],
    loss: OPDLoss,
    optimizer: Optimizer,
    *,
    steps: int,
    start: int = 0,
    tokens_per_batch: int = 8192,
    weighting: Weighting = by_rollout,
    schedule: Callable[[int], None] = lambda _: None,
) -> Iterator[StepMetrics]:
    """Train on fresh rollouts at every step; `source` samples from the very model that `student` trains.

    Step k samples the k-th share of the prompts with generation k, and takes one optimizer step on them; `schedule(k)` may set the rate.
    All of this depends on k and the weights alone, so a run resumes exactly with a checkpoint and `start`.
    A teacher with a `top_k` gives its most likely tokens, for losses on them.
    """
    share = max(len(prompts) // steps, 1)

    def make_round(generation: int, step: int) -> Iterator[StepMetrics]:
        current = evolve(source, generation=generation, identity=ModelId("online student", f"step-{step}", "as trained"))
        first = step * share % len(prompts)
        store = MemoryStore(current.manifest)  # what is a step old is never read again
        rows = sample_round(current, teacher, prompts[first : first + share], store)
        fresh = batches(
            store,
            rollouts_per_step=len(rows),
            tokens_per_batch=tokens_per_batch,
            ref="behavior",
            weighting=weighting,
            top_k=teacher.top_k > 0,
        )[step:]
        schedule(step)
        return opd_steps(student, fresh, loss, optimizer)

    return refresh_every(1, make_round, start=start, stop=steps)
