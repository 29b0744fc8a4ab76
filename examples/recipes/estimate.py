"""What a recipe will take, before it starts: `lopd.tools.plan` for the OPD stage, and what comes before and after it at the same rates."""

from attrs import evolve, frozen

from lopd.tools.plan import Bill, GpuRates, Work, lightning, rates_like
from recipes.paper import Recipe

# mean response over the longest one: a guess, as the paper does not state it
_FILL = 0.75
# bytes of a stored token of the SFT text: its id, and its log-prob under the teacher that wrote it
_BYTES_A_TOKEN = 8


@frozen
class Estimate:
    """What a recipe takes.

    Args:
        opd: rollouts, scores and training.
        gpu_hours: GPU-hours of everything else, by phase.
        gigabytes: what -> 10^9 bytes on disk.
    """

    opd: Bill
    gpu_hours: dict[str, float]
    gigabytes: dict[str, float]


def work_of(recipe: Recipe) -> Work:
    """Return the OPD stage of a recipe."""
    return Work(
        prompts=recipe.rollouts,
        response_tokens=recipe.max_new_tokens * _FILL,
        steps=recipe.opd_steps,
        rollouts_per_step=recipe.opd_rollouts_per_step,
        tokens_per_batch=recipe.tokens_per_batch,
        student_billions=recipe.student_billions,
        teacher_billions=recipe.teacher_billions,
        columns=(0,),
        sampler=(recipe.temperature, recipe.top_p) != (1, 1),
    )


def estimate(recipe: Recipe, problems: int = 0, rates: GpuRates | None = None, evaluations: int = 2) -> Estimate:
    """Estimate what this recipe takes, with so many problems in each evaluation of a student.

    Rates are by default those that the paper's hours imply.
    """
    work, flops = work_of(recipe), recipe.tflops * 1e12
    rates = rates or rates_like(work, flops)
    writes = rates_like(evolve(work, student_billions=recipe.teacher_billions), flops).sampling
    sft_text = recipe.sft_texts * recipe.sft_tokens * _FILL
    sft = recipe.sft_steps * recipe.sft_rollouts_per_step * (work.prompt_tokens + recipe.sft_tokens * _FILL)
    tested = evaluations * problems * recipe.test_samples * recipe.test_tokens * _FILL
    seconds = {"SFT text": sft_text / writes, "SFT": sft / rates.training, "evaluation": tested / rates.sampling}
    bill = lightning(work, rates, recipe.gpus)
    disk = {
        "SFT text": sft_text * _BYTES_A_TOKEN / 1e9,
        "rollouts and scores": bill.store_bytes / 1e9,
        # two students in float32, and for each the latest checkpoint with both moments of AdamW
        "students and checkpoints": 2 * (1 + 3) * 4 * recipe.student_billions,
    }
    return Estimate(bill, {name: total / 3600 for name, total in seconds.items()}, disk)


def describe(found: Estimate, gpus: int) -> list[str]:
    """Return lines for people."""
    hours = {**found.gpu_hours, **{phase.name: phase.gpu_hours for phase in found.opd.phases}, "OPD stage": found.opd.gpu_hours}
    return [
        *(f"{name:26s} {h:10.2f} GPU-hours  {h / gpus:8.2f} hours on {gpus} GPUs" for name, h in hours.items()),
        *(f"{name:26s} {size:10.3f} GB on disk before compression" for name, size in found.gigabytes.items()),
        f"{'GPUs hold':26s} {found.opd.memory_gb:10.1f} GB at most, and activations",
    ]
