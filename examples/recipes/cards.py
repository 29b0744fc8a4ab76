"""One pair of Qwen3 on one card: what decides the result, and what it takes on that card before anything starts."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers
from attrs import evolve, frozen

from lopd.tools.plan import PAPER_LOCKSTEP, ROOM, Use, online, rates_like, sampling, scoring, training
from recipes.estimate import estimate, work_of
from recipes.paper import Recipe


@frozen
class OneGpu(Recipe):
    """A recipe for one card.

    Args:
        teacher_billions, student_billions: 0 counts the parameters of the configurations.
        card_gb: memory of the card, 10^9 bytes; the card that is there counts, where one is.
        lora_rank: rank of the adapters on a student whose weights stay; 0 trains all weights.
        rows: responses that transformers samples side by side.
        prompt_tokens, test_prompt_tokens: longest prompt of training and of a test.
        test_problems: most problems of each test, the first ones of its file.
        seeds: how many times the OPD stage is run, with `seed` and the numbers after it; SFT is done once.
        thinking: `enable_thinking` of the chat template.
        with_online: online OPD too.
    """

    teacher_billions: float = 0.0
    student_billions: float = 0.0
    card_gb: float = 80.0
    lora_rank: int = 0
    rows: int = 64
    prompt_tokens: int = 512
    test_prompt_tokens: int = 1024
    test_problems: int = 500
    seeds: int = 3
    thinking: bool = False
    with_online: bool = True


_COMMON: dict[str, Any] = {
    "teacher": "Qwen/Qwen3-4B",
    "student": "Qwen/Qwen3-1.7B-Base",
    "sft_tokens": 512,
    "max_new_tokens": 512,
    # the policy that is trained, in sampling and in the test
    "temperature": 1.0,
    "test_samples": 1,
    "test_temperature": 1.0,
    "test_top_p": 1.0,
    "weight_decay": 0.0,
    # the loss that lopd recommends where one number a token is stored
    "ratio_to_ref": True,
    **dict.fromkeys(("gpus", "teacher_gpus", "student_gpus", "training_gpus"), 1),
}
#: A card of 80 GB (hours: H100) trains all weights; one of 24 GB (hours: RTX 4090) has room for adapters, and time for a quarter of the rollouts.
CARDS = {
    "80gb": OneGpu(
        **_COMMON,
        sft_texts=3000,
        sft_steps=94,
        sft_rollouts_per_step=64,
        sft_lr=1e-5,
        rollouts=1600,
        opd_steps=100,
        opd_rollouts_per_step=32,
        opd_lr=2e-6,
        test_tokens=1024,
    ),
    "24gb": OneGpu(
        **_COMMON,
        sft_texts=1000,
        sft_steps=62,
        sft_rollouts_per_step=32,
        sft_lr=1e-4,
        rollouts=400,
        opd_steps=50,
        opd_rollouts_per_step=16,
        opd_lr=2e-5,
        tokens_per_batch=4096,
        test_tokens=768,
        tflops=165.0,
        card_gb=24.0,
        lora_rank=64,
        rows=16,
        test_problems=200,
    ),
}
#: Configurations of these models, so that a plan needs no download.
_QWEN3: Mapping[str, Mapping[str, int]] = {
    "Qwen/Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen/Qwen3-1.7B-Base": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
}


def config_of(name: str) -> Any:
    """Load the configuration of a model."""
    if name not in _QWEN3:
        return transformers.AutoConfig.from_pretrained(name)
    return transformers.Qwen3Config(vocab_size=151_936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, **_QWEN3[name])


def teacher_dtype(recipe: OneGpu) -> torch.dtype:
    """Return the dtype of the teacher's weights."""
    return getattr(torch, recipe.dtype)


@frozen
class Plan:
    """What a recipe takes.

    Args:
        recipe: with the sizes of its models.
        hours: phase -> wall time; that of a phase that each seed has is of one seed.
        memory: phase -> part -> 10^9 bytes.
        gigabytes: what -> 10^9 bytes on disk.
    """

    recipe: OneGpu
    hours: dict[str, float]
    memory: dict[str, dict[str, float]]
    gigabytes: dict[str, float]

    @property
    def all_hours(self) -> float:
        """Hours of all phases and seeds."""
        return sum(hours * (self.recipe.seeds if name in PER_SEED else 1) for name, hours in self.hours.items())


#: Phases of a seed.
PER_SEED = ("rollouts", "scores", "OPD", "online OPD", "evaluation of OPD", "evaluation of online OPD")


def make_plan(recipe: OneGpu, problems: int) -> Plan:
    """Plan what this recipe takes, with so many problems in each evaluation.

    Hours are tokens over the rates that the paper's GPU-hours imply, in proportion to the floating-point operations of the card: a guess.
    """
    recipe = evolve(
        recipe,
        teacher_billions=recipe.teacher_billions or parameters_of(recipe.teacher) / 1e9,
        student_billions=recipe.student_billions or parameters_of(recipe.student) / 1e9,
    )
    found, work = estimate(recipe, problems, evaluations=1), work_of(recipe)
    evaluation = found.gpu_hours["evaluation"]
    of_teacher = estimate(evolve(recipe, student_billions=recipe.teacher_billions), problems, evaluations=1).gpu_hours["evaluation"]
    live = online(work, rates_like(work, recipe.tflops * 1e12), 1, PAPER_LOCKSTEP)
    of_opd = {phase.name: phase.wall_hours for phase in found.opd.phases}
    hours = {
        **(({name: found.gpu_hours[name] for name in ("SFT text", "SFT")}) if recipe.sft_steps else {}),
        "evaluation of teacher": of_teacher,
        "evaluation of start": evaluation,
        **{"OPD" if name == "training" else name: wall for name, wall in of_opd.items()},
        "online OPD": live.wall_hours,
        "evaluation of OPD": evaluation,
        "evaluation of online OPD": evaluation,
    }
    if not recipe.with_online:
        hours = {name: wall for name, wall in hours.items() if "online" not in name}
    memory = {name: _memory(name, recipe) for name in hours}
    return Plan(recipe, hours, memory, _disk(recipe, memory["OPD"], found.gigabytes))


@cache
def parameters_of(name: str) -> int:
    """Count the parameters of a model."""
    with torch.device("meta"):
        return sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config_of(name)).parameters())


def _memory(phase: str, recipe: OneGpu) -> dict[str, float]:
    student, teacher = student_use(recipe), Use(dtype=teacher_dtype(recipe), rows=recipe.rows, tokens_per_batch=recipe.tokens_per_batch)
    lengths = {"prompt_tokens": recipe.prompt_tokens, "response_tokens": recipe.max_new_tokens}
    tests = {"prompt_tokens": recipe.test_prompt_tokens, "response_tokens": recipe.test_tokens}
    if phase.startswith("evaluation"):
        of_teacher = phase.endswith("teacher")
        return _needs("sampling", recipe.teacher if of_teacher else recipe.student, evolve(teacher if of_teacher else student, **tests))
    if phase == "SFT text":
        return _needs("sampling", recipe.teacher, evolve(teacher, prompt_tokens=recipe.prompt_tokens, response_tokens=recipe.sft_tokens))
    if phase == "SFT":
        return _needs("training", recipe.student, evolve(student, prompt_tokens=recipe.prompt_tokens, response_tokens=recipe.sft_tokens))
    rollouts = _needs("sampling", recipe.student, evolve(student, **lengths))
    scores = _needs("scoring", recipe.teacher, evolve(teacher, **lengths))
    trains = _needs("training", recipe.student, evolve(student, **lengths))
    return {"rollouts": rollouts, "scores": scores, "OPD": trains, "online OPD": _together(trains, rollouts, scores)}[phase]


def student_use(recipe: OneGpu) -> Use:
    """Return how the student is trained and sampled from: in float32, since 16 bits drop most of a small update once adapters are merged."""
    return Use(
        dtype=torch.float32,
        autocast=None if recipe.dtype == "float32" else teacher_dtype(recipe),
        lora_rank=recipe.lora_rank,
        gradient_checkpointing=True,
        rows=recipe.rows,
        tokens_per_batch=recipe.tokens_per_batch,
    )


@cache
def _needs(phase: str, model: str, use: Use) -> dict[str, float]:
    rows = use.rows if phase == "sampling" else use.rollouts
    return {"sampling": sampling, "scoring": scoring, "training": training}[phase](config_of(model), use).gigabytes(rows)


def _together(trains: Mapping[str, float], rollouts: Mapping[str, float], scores: Mapping[str, float]) -> dict[str, float]:
    """Return the memory of training, and of what takes turns with it while all weights stay where they are.

    The trained student also samples.
    """
    staying = {part: size for part, size in trains.items() if part not in {"logits", "activations"}}
    turns = [_total(trains) - _total(staying), *(_total(of) - of["weights"] for of in (rollouts, scores))]
    return {**staying, "a step": max(turns), "the teacher's weights": scores["weights"]}


def _disk(recipe: OneGpu, trains: Mapping[str, float], of_one: Mapping[str, float]) -> dict[str, float]:
    trained = (1 if recipe.sft_steps else 0) + recipe.seeds * (2 if recipe.with_online else 1)
    # an export, and the latest checkpoint with the trained weights and both moments of AdamW in float32
    each = trains["weights"] + 1.5 * trains["moments"]
    rollouts = recipe.seeds * of_one["rollouts and scores"]
    return {"SFT text": of_one["SFT text"], "rollouts and scores": rollouts, "students and checkpoints": trained * each}


def describe(plan: Plan, room_gb: float) -> list[str]:
    """Return lines for people."""
    recipe = plan.recipe
    trains = f"{f'adapters of rank {recipe.lora_rank}' if recipe.lora_rank else 'all weights'}, in float32"
    parts = {name: ", ".join(f"{part} {size:.1f}" for part, size in memory.items()) for name, memory in plan.memory.items()}
    return [
        f"{recipe.teacher} ({recipe.teacher_billions:.2f}e9 parameters) -> {recipe.student} ({recipe.student_billions:.2f}e9); trains {trains}",
        f"{'phase':25s} {'hours':>6s} {'GB':>6s}",
        *(f"{name:25s} {plan.hours[name]:6.2f} {sum(memory.values()):6.1f}  {parts[name]}" for name, memory in plan.memory.items()),
        f"{f'all, seeds: {recipe.seeds}':25s} {plan.all_hours:6.2f} {max(map(_total, plan.memory.values())):6.1f}  of {room_gb:.1f} GB",
        *(f"{size:8.2f} GB on disk: {name}" for name, size in plan.gigabytes.items()),
        f"Hours are a guess, not measured: rates that the paper's GPU-hours imply, at {recipe.tflops:g} TFLOPS instead of 989, and in online OPD",
        f"sampling and scoring {PAPER_LOCKSTEP:.2f} times slower than in bulk, as there.  Memory is counted on the models' code, not on a card.",
    ]


def _total(memory: Mapping[str, float]) -> float:
    return sum(memory.values())


def room_of(recipe: OneGpu) -> float:
    """Return how much of the card a phase may take, in 10^9 bytes; without a card, of the one that the recipe is for."""
    there = recipe.device.startswith("cuda") and torch.cuda.is_available()
    return ROOM * (torch.cuda.get_device_properties(recipe.device).total_memory / 1e9 if there else recipe.card_gb)


def check_fit(plan: Plan, room_gb: float) -> None:
    """Refuse, before anything starts, a phase that the card has no room for."""
    for name, memory in plan.memory.items():
        if _total(memory) > room_gb:
            parts = ", ".join(f"{part} {size:.1f}" for part, size in memory.items())
            largest = max(memory, key=lambda part: memory[part])
            raise SystemExit(
                f"{name}: it takes {_total(memory):.1f} GB ({parts}), expected at most {room_gb:.1f} GB, {ROOM} of the card; most of it is "
                f"{largest}: {_advice(name, largest, plan.recipe)}."
            )


def _advice(phase: str, largest: str, recipe: OneGpu) -> str:
    if largest in {"keys and values", "logits", "activations", "a step"}:
        return "lower --rows or --tokens-per-batch"
    adapters = "" if recipe.lora_rank else "train adapters with --lora-rank 64, or "
    alone = ", or leave online OPD out with --no-with-online" if phase == "online OPD" else ""
    return f"{adapters}take smaller models with --student and --teacher{alone}"
