"""What a recipe will take, before it starts: GPU-hours and bytes, from a few rates that can be measured or guessed."""

from attrs import frozen

from recipes.paper import Recipe


@frozen
class Rates:
    """What a GPU does.

    The defaults are what table 2 of Lightning OPD (arXiv 2604.13010v2) implies for its 4B and 8B runs, if responses fill three quarters of
    their greatest length: take your own from the progress lines of a short run.

    Args:
        fill: mean response over the longest one.
        sampled: tokens a second of one GPU while the student samples; the teacher is slower in proportion to its size.
        flops: of one GPU at its best, a second (an H100 in bfloat16).
        scoring: share of that while the teacher reads.
        training: share of that while the student trains.
    """

    fill: float = 0.75
    sampled: float = 1500.0
    flops: float = 989e12
    scoring: float = 0.2
    training: float = 0.1


@frozen
class Estimate:
    """What a recipe takes.

    Args:
        gpu_hours: phase -> GPU-hours.
        gigabytes: what -> 10^9 bytes on disk.
        training_gigabytes: memory of weights, gradients and optimizer in float32, activations not counted.
    """

    gpu_hours: dict[str, float]
    gigabytes: dict[str, float]
    training_gigabytes: float

    @property
    def opd_gpu_hours(self) -> float:
        """Of the OPD stage: rollouts, scores, training.  SFT and its text are not in the paper's table 2 either."""
        return sum(self.gpu_hours[name] for name in ("rollouts", "scores", "OPD"))


#: Bytes of a stored token before compression: its id, whether it counts, and its log-prob under two models.
_BYTES_A_TOKEN = 4 + 1 + 4 + 4


def estimate(recipe: Recipe, problems: int = 0, rates: Rates | None = None) -> Estimate:
    """What this recipe takes, with so many problems in the evaluation."""
    rates = rates or Rates()
    sft_text = recipe.sft_texts * recipe.sft_tokens * rates.fill
    sft = recipe.sft_steps * recipe.sft_rollouts_per_step * recipe.sft_tokens * rates.fill
    stored = recipe.rollouts * recipe.max_new_tokens * rates.fill
    opd = recipe.opd_steps * recipe.opd_rollouts_per_step * recipe.max_new_tokens * rates.fill
    tested = 2 * problems * recipe.test_samples * recipe.test_tokens * rates.fill

    def passes(tokens: float, billions: float, flops_a_token: float, share: float) -> float:
        return tokens * billions * 1e9 * flops_a_token / (rates.flops * share) / 3600

    def sampling(tokens: float, slower: float = 1.0) -> float:
        return tokens * slower / rates.sampled / 3600

    hours = {
        "SFT text": sampling(sft_text, recipe.teacher_billions / recipe.student_billions),
        "SFT": passes(sft, recipe.student_billions, 6, rates.training),
        "rollouts": sampling(stored),
        "scores": passes(stored, recipe.teacher_billions, 2, rates.scoring),
        "OPD": passes(opd, recipe.student_billions, 6, rates.training),
        "evaluation": sampling(tested),
    }
    weights = 4 * recipe.student_billions
    disk = {
        "SFT text": sft_text * _BYTES_A_TOKEN / 1e9,
        "rollouts and scores": stored * _BYTES_A_TOKEN / 1e9,
        # two students in float32, and for each the latest checkpoint with both moments of AdamW
        "students and checkpoints": 2 * (weights + 3 * weights),
    }
    return Estimate(hours, disk, 4 * weights)


def describe(found: Estimate, gpus: int) -> list[str]:
    """Lines for people."""
    hours = [f"{name:26s} {h:10.2f} GPU-hours  {h / gpus:8.2f} hours on {gpus} GPUs" for name, h in found.gpu_hours.items()]
    disk = [f"{name:26s} {size:10.3f} GB on disk before compression" for name, size in found.gigabytes.items()]
    return [
        *hours,
        f"{'OPD stage':26s} {found.opd_gpu_hours:10.2f} GPU-hours (rollouts, scores, OPD)",
        *disk,
        f"{'training holds':26s} {found.training_gigabytes:10.1f} GB in float32, and activations",
    ]
