"""A set-up of the Lightning OPD paper from the base model to the evaluated student.

Needs `lopd[recipes,vllm]`; from the folder `examples`:

    python -m recipes.run qwen3-4b-math --sft-prompts openthoughts.jsonl --prompts dapo.jsonl --test aime24.jsonl --out runs/4b-math
    python -m recipes.run qwen3-4b-code --student runs/4b-math/opd --prompts epicoder.jsonl --out runs/4b-code

Files have one JSON object a line: "prompt" (the problem) and, in a test, "answer".  What it will take is printed first; `--only-estimate`
stops there.  Every hyper-parameter is an option (`--help`).  Every phase is kept in `--out`: a second call finds it done, a killed one
resumes.

Sampling and scoring use vLLM, on `--student-gpus` and `--teacher-gpus` GPUs; `--engine hf` needs no vLLM and suits tiny models.  Training is
sharded over `--training-gpus` (FSDP2); a student whose weights, gradients and moments do not fit there is refused before anything starts.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from attrs import asdict, evolve

from lopd import SamplingParams, ZarrStore, collect_rollouts, score_rollouts
from lopd import evaluate as evaluate_policy
from lopd.engines.hf import HFScorer, HFSource, load_tokenizer
from lopd.guards import check_vocabulary
from lopd.records import Prompt, fingerprint_tokenizer, read_prompts
from lopd.tools.console import RichProgress
from lopd.tools.phases import TEXT_SEEDS, Run, console, counted_in, digest
from lopd.tools.plan import trained_gb
from recipes.estimate import describe, estimate, work_of
from recipes.grading import MathGrader
from recipes.paper import RECIPES, Recipe


def main() -> None:
    """Run every phase of the recipe."""
    recipe, options = parse()
    tests = problems_of(options.test, recipe, recipe.student) if options.test else []
    for line in describe(estimate(recipe, len(tests)), recipe.gpus):
        console.print(line)
    check_memory(recipe)
    if options.only_estimate:
        return
    check_vocabularies(recipe)
    run = Run(options.out)
    files = {name: getattr(options, name) for name in ("sft_prompts", "prompts", "test")}
    run.claim({**asdict(recipe), "engine": options.engine}, {name: digest(path) for name, path in files.items() if path})
    engine = Engine(recipe, options.engine)
    start = Path(recipe.student)
    if recipe.sft_steps:
        texts = problems_of(options.sft_prompts, recipe, recipe.student)[: recipe.sft_texts]
        run.phase("SFT text", lambda: sample(engine.source(recipe.teacher, sft_sampling(recipe)), texts, run.folder / "sft.zarr"))
        run.phase("SFT", lambda: train(run, "sft", recipe.student, recipe))
        start = run.folder / "sft"
    problems = problems_of(options.prompts, recipe, str(start))[: recipe.rollouts]
    run.phase("rollouts", lambda: sample(engine.source(str(start), opd_sampling(recipe)), problems, run.folder / "opd.zarr"))
    run.phase("scores", lambda: score(engine.scorer(recipe.teacher), run.folder / "opd.zarr", "teacher"))
    run.phase("OPD", lambda: train(run, "opd", str(start), recipe))
    if tests:
        for name, folder in (("start", start), ("OPD", run.folder / "opd")):
            run.phase(f"evaluation of {name}", lambda folder=folder: grade(engine.source(str(folder), test_sampling(recipe)), tests))


def parse() -> tuple[Recipe, argparse.Namespace]:
    """Parse the options: return the recipe with what was given instead of the paper's, and where everything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--sft-prompts", help="prompts that the teacher answers")
    parser.add_argument("--prompts", required=True, help="prompts that the SFT student answers")
    parser.add_argument("--test", help="problems with answers")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm")
    parser.add_argument("--only-estimate", action="store_true", help="print what it will take, and stop")
    add_fields(parser, attrs.fields(Recipe))
    options = parser.parse_args()
    recipe = evolve(RECIPES[options.recipe], **given(options, attrs.fields(Recipe)))
    if not recipe.student:
        parser.error("code goes on from the student of math, pass its folder with --student")
    if recipe.sft_steps and not options.sft_prompts:
        parser.error("SFT needs the prompts that the teacher answers, pass them with --sft-prompts")
    return recipe, options


def add_fields(parser: argparse.ArgumentParser, fields: Iterable[Any]) -> None:
    """Make an option of each of these hyper-parameters."""
    for f in fields:
        option = f"--{f.name.replace('_', '-')}"
        if f.type is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(option, type=f.type, default=None)


def given(options: argparse.Namespace, fields: Iterable[Any]) -> dict[str, Any]:
    """Return the fields that the command line has."""
    return {f.name: value for f in fields if (value := getattr(options, f.name)) is not None}


def check_vocabularies(recipe: Recipe) -> None:
    """Refuse a teacher of another vocabulary before its text is paid for: it is given the student's ids, and engines compare sizes alone."""
    theirs, ours = (fingerprint_tokenizer(load_tokenizer(model)) for model in (recipe.teacher, recipe.student))
    check_vocabulary(f"Teacher {recipe.teacher!r}", theirs, "the student's", ours)


def check_memory(recipe: Recipe) -> None:
    """Refuse what would run out of memory after days of sampling."""
    needed = trained_gb(work_of(recipe))
    if recipe.device.startswith("cuda") and torch.cuda.is_available():
        there = torch.cuda.get_device_properties(recipe.device).total_memory / 1e9
        room = 0.9 * there * recipe.training_gpus
        if needed > room:
            raise SystemExit(
                f"Training: weights, gradients and moments of the student take {needed:.0f} GB, expected at most {room:.0f} GB, 0.9 of the memory "
                f"of {recipe.training_gpus} GPUs; raise --training-gpus, or take a smaller student."
            )


def problems_of(path: str, recipe: Recipe, model: str) -> list[Prompt]:
    """Put the problems in the template of the recipe, and in the chat template of this model."""
    return read_prompts(path, load_tokenizer(model), template=recipe.template)


def sft_sampling(recipe: Recipe) -> SamplingParams:
    """Return how the teacher writes what SFT imitates; the paper does not state the temperature, so it is the policy itself."""
    return SamplingParams(recipe.sft_tokens, seed=recipe.seed + TEXT_SEEDS)


def opd_sampling(recipe: Recipe) -> SamplingParams:
    """Return how the SFT student answers (table 6)."""
    return SamplingParams(recipe.max_new_tokens, recipe.temperature, recipe.top_p, seed=recipe.seed)


def test_sampling(recipe: Recipe) -> SamplingParams:
    """Return how students are tested."""
    return SamplingParams(
        recipe.test_tokens, recipe.test_temperature, recipe.test_top_p, samples_per_prompt=recipe.test_samples, seed=recipe.seed
    )


def dtype_of(model: str, recipe: Recipe) -> torch.dtype:
    """Return what transformers loads a model in: the teacher in the recipe's dtype, students in float32, as they are trained."""
    return getattr(torch, recipe.dtype) if model == recipe.teacher else torch.float32


@attrs.frozen
class Engine:
    """Which engine samples and scores, and on how many GPUs.

    Args:
        recipe: with the numbers of GPUs.
        name: "vllm" or "hf".
        longest: tokens of prompt and response together, for which vLLM has room; None is the context of the model.
    """

    recipe: Recipe
    name: str
    longest: int | None = None

    def source(self, folder: str, sampling: SamplingParams) -> Any:
        """Load a policy."""
        if self.name == "hf":
            return HFSource.from_folder(folder, sampling, dtype_of(folder, self.recipe), self.recipe.device)
        from lopd.engines.vllm import VLLMSource

        return VLLMSource.from_folder(folder, sampling, self._settings(folder))

    def scorer(self, folder: str) -> Any:
        """Load a model that scores."""
        if self.name == "hf":
            return HFScorer.from_folder(folder, dtype_of(folder, self.recipe), self.recipe.device)
        from lopd.engines.vllm import VLLMScorer

        return VLLMScorer.from_folder(folder, self._settings(folder))

    def _settings(self, folder: str) -> Any:
        from lopd.engines.vllm import VLLMSettings

        recipe = self.recipe
        gpus = recipe.teacher_gpus if folder == recipe.teacher else recipe.student_gpus
        return VLLMSettings(dtype=getattr(torch, recipe.dtype), max_model_len=self.longest, tensor_parallel_size=gpus)


def sample(source: Any, prompts: list[Prompt], path: Path) -> dict[str, Any]:
    """Sample a policy's answers to prompts into a store."""
    with closed(source):
        store = ZarrStore.open_or_create(str(path), source.manifest)
        collect_rollouts(source, prompts, store, prompts_per_batch=1024, progress=RichProgress(console))
    return {**counted_in(store), "rollouts": len(store)}


def score(scorer: Any, path: Path, column: str) -> dict[str, Any]:
    """Score the student's answers."""
    store = ZarrStore.open(str(path))
    with closed(scorer):
        score_rollouts(store, scorer, column=column, progress=RichProgress(console))
    return counted_in(store)


def closed(engine: Any) -> AbstractContextManager[Any]:
    """Free the GPUs of a vLLM engine afterwards; transformers has nothing to close."""
    return closing(engine) if hasattr(engine, "close") else nullcontext()


def train(run: Run, name: str, start: str, recipe: Recipe) -> dict[str, Any]:
    """Train SFT or OPD, by as many processes as there are GPUs to train on; `recipes.train` is what each of them does."""
    ranks = ["--standalone", "--nproc-per-node", str(recipe.training_gpus)]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", "recipes.train", str(run.folder), name, start]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, check=True)
    return json.loads((run.folder / f"{name}.json").read_text())


def grade(source: Any, tests: list[Prompt]) -> dict[str, Any]:
    """Return the mean accuracy over the samples of every problem."""
    with closed(source):
        found = evaluate_policy(source, tests, MathGrader(source.tokenizer))
    return {"accuracy": found.avg_at_n.mean, "accuracy_ci95": found.avg_at_n.ci95, "samples": found.n}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
