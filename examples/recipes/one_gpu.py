"""Offline beside online OPD on one GPU, in one evening: Qwen3-4B teaches Qwen3-1.7B to solve GSM8K, tested on GSM8K and MATH-500.

Needs `lopd[recipes,vllm]`.  lopd downloads no problems; `datasets` makes the files (one JSON object a line, with "prompt" and "answer"):

    from datasets import load_dataset
    for part, name in {"train[:3500]": "sft", "train[3500:]": "opd", "test": "gsm8k"}.items():
        load_dataset("openai/gsm8k", "main", split=part).rename_column("question", "prompt").to_json(f"{name}.jsonl")
    math = load_dataset("HuggingFaceH4/MATH-500", split="test").select_columns(["problem", "answer"])
    math.rename_column("problem", "prompt").to_json("math-500.jsonl")

Then, from the folder `examples`:

    python -m recipes.one_gpu 24gb --only-estimate
    python -m recipes.one_gpu 24gb --sft-prompts sft.jsonl --prompts opd.jsonl --test gsm8k.jsonl math-500.jsonl --out runs/one-gpu

The card is `24gb`, which trains adapters, or `80gb`, which trains all weights.  Hours and memory of every phase are printed first, and a phase
that the card has no room for is refused before anything starts.  SFT is done once; each of three seeds then samples, scores and trains by
Lightning OPD, and does as many steps of online OPD from the same start, on the same prompts, through the same loss.  The table at the end has
accuracies with intervals over problems and over seeds, paired differences, and hours beside those that were planned.

One model is on the card at a time; in online OPD the teacher stays beside the student.  Both arms sample and score with transformers, so that
their hours compare; of adapters, online OPD samples through them and Lightning from merged weights, which is quicker.  vLLM writes the text of
SFT and answers the tests (`--engine hf` needs no vLLM).  Every phase is kept in `--out`: a second call finds it done, a killed one resumes.

What is not known: this recipe has run on a CPU with tiny models (`tests/test_one_gpu.py`), never on a GPU.  Its hours are the planner's, its
memory is computed, and its learning rates were not searched: that of OPD is the paper's, and ten times as much for adapters.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from attrs import asdict, evolve
from online_opd import online_opd
from peft import get_peft_model

from lopd import CausalLMStudent, FusedOPDLoss, Lineage, SamplingParams, ZarrStore
from lopd.engines.hf import HFScorer, HFSource, load_model, load_tokenizer
from lopd.records import Prompt, StepMetrics, read_prompts
from lopd.tools.phases import Run, console, counted, digest, resumably
from lopd.tools.plan import lora_config
from recipes.cards import CARDS, OneGpu, check_fit, describe, make_plan, room_of, teacher_dtype
from recipes.compare import Arm, grade, report
from recipes.run import Engine, add_fields, check_vocabularies, dtype_of, given, opd_sampling, sample, score, sft_sampling, test_sampling
from recipes.train import make_optimizer, phase_of, run_phase

_FIELDS = [f for f in attrs.fields(OneGpu) if not f.name.endswith("gpus")]


def main() -> None:
    """Print the plan, run every phase, and print the table."""
    recipe, options = parse()
    tests = {Path(path).stem: problems_of(path, recipe, recipe.test_prompt_tokens)[: recipe.test_problems] for path in options.test}
    plan = make_plan(recipe, sum(map(len, tests.values())) or 2 * recipe.test_problems)
    for line in describe(plan, room_of(recipe)):
        console.print(line, soft_wrap=True)
    check_fit(plan, room_of(recipe))
    if options.only_estimate:
        return
    check_vocabularies(recipe)
    sft_prompts = problems_of(options.sft_prompts, recipe, recipe.prompt_tokens)[: recipe.sft_texts] if recipe.sft_steps else []
    prompts = problems_of(options.prompts, recipe, recipe.prompt_tokens)[: recipe.rollouts]
    check_prompts(recipe, sft_prompts, prompts, tests)
    run = Run(options.out)
    files = {path: digest(path) for path in (options.sft_prompts, options.prompts, *options.test) if path}
    # seeds and arms may be added to a run
    settings = {name: value for name, value in asdict(recipe).items() if name not in {"seeds", "with_online"}}
    run.claim({**settings, "engine": options.engine}, files)
    # a problem of two tests is answered once
    every = [*{problem.prompt_id: problem for problems in tests.values() for problem in problems}.values()]
    phases = Phases(run, plan.recipe, options.engine, every)
    start, sft = phases.sft(sft_prompts)
    arms = [phases.tested("teacher", recipe.teacher), evolve(phases.tested("start", start), phases=sft), *phases.opd(start, prompts)]
    report(run.folder, plan, arms, tests)


def parse() -> tuple[OneGpu, argparse.Namespace]:
    """Parse the options: return the card's recipe with what was given, and where everything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("card", choices=CARDS)
    parser.add_argument("--sft-prompts", help="problems that the teacher answers")
    parser.add_argument("--prompts", help="problems that the student answers")
    parser.add_argument("--test", nargs="+", default=[], help="problems with answers, a file for each test")
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="writes the text of SFT, and answers the tests")
    parser.add_argument("--only-estimate", action="store_true", help="print what it will take, and stop; needs no files")
    add_fields(parser, _FIELDS)
    options = parser.parse_args()
    recipe = evolve(CARDS[options.card], **given(options, _FIELDS))
    needed = ["prompts", "test", "out", *(["sft_prompts"] if recipe.sft_steps else [])]
    missing = [f"--{name.replace('_', '-')}" for name in needed if not getattr(options, name)]
    if missing and not options.only_estimate:
        parser.error(f"{' and '.join(missing)} are missing; pass them, or --only-estimate")
    if len({Path(path).stem for path in options.test}) < len(options.test):
        parser.error(f"--test has files of one name: {' '.join(options.test)}; a test is named after its file, so rename one")
    return recipe, options


def problems_of(path: str, recipe: OneGpu, longest: int) -> list[Prompt]:
    """Put the problems in the template of the recipe, and in the student's chat template."""
    tokenizer = load_tokenizer(recipe.student)
    variables = {"enable_thinking": recipe.thinking}
    return read_prompts(path, tokenizer, template=recipe.template, max_tokens=longest, chat_template_kwargs=variables)


def check_prompts(recipe: OneGpu, sft_prompts: list[Prompt], prompts: list[Prompt], tests: dict[str, list[Prompt]]) -> None:
    """Refuse too few problems, a test of what was trained on, and an id of several problems: answers and grades are found by it."""
    if len(prompts) < recipe.opd_rollouts_per_step:
        raise SystemExit(
            f"Prompts: there are {len(prompts)}, expected at least {recipe.opd_rollouts_per_step}, the rollouts of a step; pass more, or lower "
            "--opd-rollouts-per-step."
        )
    trained = {bytes(problem.token_ids) for problem in (*sft_prompts, *prompts)}
    for name, problems in tests.items():
        seen = sum(bytes(problem.token_ids) in trained for problem in problems)
        if seen:
            raise SystemExit(f"Test {name}: {seen} of its {len(problems)} problems are trained on, expected 0; drop them from either file.")
    known = dict[str, tuple[str, Prompt]]()
    for name, problem in ((name, problem) for name, problems in tests.items() for problem in problems):
        other, before = known.get(problem.prompt_id, ("", problem))
        if other == name or (before.answer, bytes(before.token_ids)) != (problem.answer, bytes(problem.token_ids)):
            where = f"test {name} has two problems" if other == name else f"tests {other} and {name} have unlike problems"
            raise SystemExit(f"Problem {problem.prompt_id!r}: {where} of this id, expected 1; give one of them another id, or drop it.")
        known[problem.prompt_id] = name, problem


@attrs.frozen
class Phases:
    """What is done on the card, one model at a time.

    Args:
        run: its folder.
        recipe: the recipe of this card.
        engine: writes the text of SFT and answers the tests.
        problems: problems of all tests.
    """

    run: Run
    recipe: OneGpu
    engine: str
    problems: list[Prompt]

    def sft(self, prompts: list[Prompt]) -> tuple[str, list[dict[str, Any]]]:
        """Return the student that OPD starts from, and what made it: SFT on the teacher's text, or nothing."""
        recipe, folder = self.recipe, self.run.folder
        if not recipe.sft_steps:
            return recipe.student, []
        longest = recipe.prompt_tokens + recipe.sft_tokens
        done = [
            self.run.phase(
                "SFT text", lambda: sample(self._source(recipe.teacher, sft_sampling(recipe), longest), prompts, folder / "sft.zarr")
            ),
            self.run.phase("SFT", lambda: train(folder, "sft", recipe.student, recipe)),
        ]
        return str(folder / "sft"), done

    def opd(self, start: str, prompts: list[Prompt]) -> Iterator[Arm]:
        """Yield both arms, by seed."""
        for seed in range(self.recipe.seed, self.recipe.seed + self.recipe.seeds):
            run = Run(self.run.folder / f"seed-{seed}")
            yield from evolve(self, run=run, recipe=evolve(self.recipe, seed=seed))._opd(start, prompts)

    def _opd(self, start: str, prompts: list[Prompt]) -> Iterator[Arm]:
        recipe, folder = self.recipe, self.run.folder
        store = folder / "opd.zarr"
        offline = [
            self.run.phase("rollouts", lambda: sample(make_source(start, opd_sampling(recipe), recipe), prompts, store)),
            self.run.phase("scores", lambda: score(make_scorer(recipe), store, "teacher")),
            self.run.phase("OPD", lambda: train(folder, "opd", start, recipe)),
        ]
        yield evolve(self.tested("OPD", str(folder / "opd")), phases=offline)
        if recipe.with_online:
            online = self.run.phase("online OPD", lambda: train_online(folder, start, prompts, recipe))
            yield evolve(self.tested("online OPD", str(folder / "online")), phases=[online])

    def tested(self, name: str, model: str) -> Arm:
        """Sample this model's answers to the tests, and grade them."""
        path = self.run.folder / f"test-{name.replace(' ', '-').lower()}.zarr"

        def work() -> dict[str, Any]:
            longest = self.recipe.test_prompt_tokens + self.recipe.test_tokens
            found = sample(self._source(model, test_sampling(self.recipe), longest), self.problems, path)
            return {**found, "grades": grade(path, self.problems, load_tokenizer(model))}

        return Arm(name, self.recipe.seed, self.run.phase(f"evaluation of {name}", work))

    def _source(self, model: str, sampling: SamplingParams, longest: int) -> Any:
        if self.engine == "hf":
            return make_source(model, sampling, self.recipe)
        # students in float32, whose small updates 16 bits would round away
        recipe = self.recipe if model == self.recipe.teacher else evolve(self.recipe, dtype="float32")
        return Engine(recipe, self.engine, longest).source(model, sampling)


def make_source(model: str, sampling: SamplingParams, recipe: OneGpu) -> HFSource:
    """Load a model that samples with transformers, in the dtype in which it scores or is trained."""
    return HFSource.from_folder(model, sampling, dtype_of(model, recipe), recipe.device, rows_per_batch=recipe.rows)


def make_scorer(recipe: OneGpu) -> HFScorer:
    """Load the teacher that scores; in another dtype than it wrote the text of SFT in, it would be another model."""
    model, tokenizer = load_model(recipe.teacher, teacher_dtype(recipe), recipe.device)
    return HFScorer(model, tokenizer, tokens_per_batch=recipe.tokens_per_batch)


def make_student(start: str, recipe: OneGpu) -> tuple[CausalLMStudent, Any]:
    """Load the student on this card in float32, with new adapters if the recipe trains these; and its tokenizer."""
    model, tokenizer = load_model(start, torch.float32, recipe.device)
    torch.manual_seed(recipe.seed)  # of adapters, and of dropout
    if recipe.lora_rank:
        model = get_peft_model(model, lora_config(recipe.lora_rank))
    autocast = None if recipe.dtype == "float32" else getattr(torch, recipe.dtype)
    return CausalLMStudent(model, tokenizer, autocast=autocast, gradient_checkpointing=True), tokenizer


def export(student: CausalLMStudent, tokenizer: Any, lineage: Lineage, folder: Path) -> None:
    """Write a model that every engine loads: adapters are merged into the weights."""
    if hasattr(student.model, "merge_and_unload"):
        merged = student.model.merge_and_unload()
        student = CausalLMStudent(merged.requires_grad_(True), tokenizer)
    student.export(folder, tokenizer, lineage)


def train(folder: Path, name: str, start: str, recipe: OneGpu) -> dict[str, Any]:
    """Train SFT or OPD on what is stored in the folder, resumably, into its folder of this name."""
    phase = phase_of(folder, name, recipe)
    student, tokenizer = make_student(start, recipe)
    found = run_phase(folder / "checkpoints" / name, phase, student, recipe)
    export(student, tokenizer, phase.stream.lineage, folder / name)
    return found


def train_online(folder: Path, start: str, prompts: list[Prompt], recipe: OneGpu) -> dict[str, Any]:
    """Train the baseline: same start, loop, loss, rate and number of rollouts a step, but fresh ones, and the teacher always there."""
    student, tokenizer = make_student(start, recipe)
    optimizer, teacher = make_optimizer(student, recipe), make_scorer(recipe)
    # the start may be a name in the hub, and the rollouts of the other arm were read from there with its lineage
    before = Lineage(sft_teacher=ZarrStore.open(folder / "opd.zarr").manifest.sft_teacher)
    lineage = evolve(before, opd_teacher=teacher.provenance.model)
    source = HFSource(student.model, tokenizer, opd_sampling(recipe), before, rows_per_batch=recipe.rows)
    for group in optimizer.param_groups:
        group["lr"] = recipe.opd_lr
    # every step has a share of its own, and begins again where the prompts end
    shares = [prompts[i % len(prompts)] for i in range(recipe.opd_steps * recipe.opd_rollouts_per_step)]

    def begin(done: int) -> Iterator[StepMetrics]:
        return online_opd(
            student,
            source,
            teacher,
            shares,
            FusedOPDLoss(clip=recipe.clip, ratio_to_ref=recipe.ratio_to_ref),
            optimizer,
            steps=recipe.opd_steps,
            start=done,
            tokens_per_batch=recipe.tokens_per_batch,
        )

    history = resumably(folder / "checkpoints" / "online", student, optimizer, lineage, begin, total=recipe.opd_steps, seed=recipe.seed)
    export(student, tokenizer, lineage, folder / "online")
    return {**counted(history), "history": [asdict(m) for m in history]}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
