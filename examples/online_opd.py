"""Online OPD, the baseline, out of the same verbs: collect into memory, score, one step, again.  The teacher stays alive all through."""

from collections.abc import Callable, Iterator, Sequence

from attrs import evolve
from torch.optim import Optimizer

from lopd import MemoryStore, ModelId, batches, collect_rollouts, opd_steps, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.protocols import OPDLoss, Student
from lopd.types import Prompt, StepMetrics


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
    tokens_per_batch: int = 4096,
    schedule: Callable[[int], None] = lambda _: None,
) -> Iterator[StepMetrics]:
    """Train on fresh rollouts at every step; `source` samples from the very model that `student` trains.

    Step k samples the k-th share of the prompts with generation k, and takes one optimizer step on them; `schedule(k)` may set the rate.
    All of this depends on k and the weights alone, so a run resumes exactly with a checkpoint and `start`.
    """
    share = max(len(prompts) // steps, 1)
    for k in range(start, steps):
        current = evolve(source, generation=k, identity=ModelId("online student", f"step-{k}", "as trained"))
        first = k * share % len(prompts)
        store = MemoryStore(current.manifest)
        collect_rollouts(current, prompts[first : first + share], store)
        score_rollouts(store, teacher, preflight=None)  # it would be tested anew at every step
        step = batches(
            store,
            rollouts_per_step=len(store),
            tokens_per_batch=tokens_per_batch,
            start=k,
            stop=k + 1,
            ref="behavior",
        )
        schedule(k)
        yield from opd_steps(student, step, loss, optimizer)
