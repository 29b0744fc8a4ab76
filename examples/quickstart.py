"""Lightning OPD from beginning to end on a real model, in about ten minutes on two cores: `make quickstart`.

The teacher is SmolLM2-135M-Instruct, the student a copy of it without some layers.  The teacher writes answers; the student is fine-tuned
on them (SFT), samples its own answers once, the same teacher scores them once, and is freed.  Then the student trains on the stored scores.
Held-out reverse KL to the teacher, on fresh rollouts, is measured before SFT, after SFT and after OPD.

Every phase is kept in `--out`: a second call finds it done, a killed one resumes.  For your own models and prompts:

    python examples/quickstart.py --teacher DIR --student DIR --prompts FILE.jsonl --store PATH --out DIR
"""

import argparse
import gc
import json
import platform
import resource
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import attrs
import numpy as np
import smollm2
import torch
import transformers
from attrs import asdict, frozen
from online_opd import online_opd
from rich.console import Console

import lopd
from lopd import (
    CausalLMStudent,
    Lineage,
    ReferenceOPDLoss,
    SamplingParams,
    SFTLoss,
    ZarrStore,
    batches,
    collect_rollouts,
    opd_steps,
    score_rollouts,
)
from lopd.checkpoint import load_checkpoint, save_checkpoint
from lopd.console import RichProgress, table
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.evaluate import evaluate_reverse_kl
from lopd.loader import StepStream
from lopd.metrics import Estimate, advantage_quantiles
from lopd.prompts import make_prompts, read_prompts
from lopd.report import draw_run
from lopd.types import Prompt, StepMetrics

console = Console()
transformers.utils.logging.disable_progress_bar()


@frozen
class Settings:
    """Everything that decides the result; kept in the run's folder, and compared when a run is resumed."""

    teacher: str = ""
    student: str = ""
    prompts: str = ""
    store: str = ""
    dropped_layers: tuple[int, ...] = (14, 15, 16, 17)
    sft_prompts: int = 96
    opd_prompts: int = 160
    held_out_prompts: int = 64
    max_new_tokens: int = 48
    sft_steps: int = 16
    sft_rollouts_per_step: int = 12
    sft_lr: float = 2e-4
    opd_steps: int = 20
    opd_rollouts_per_step: int = 16
    opd_lr: float = 5e-5
    clip: float = 10.0
    ratio_to_ref: bool = False
    seed: int = 0
    online: bool = False


def parse() -> tuple[Settings, Path]:
    """Every setting is an option of the same name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the run")
    for f in attrs.fields(Settings):
        option = f"--{f.name.replace('_', '-')}"
        if f.type is bool:
            parser.add_argument(option, action="store_true", default=f.default)
        elif f.name == "dropped_layers":
            parser.add_argument(option, type=lambda text: tuple(int(i) for i in text.split(",") if i), default=f.default)
        else:
            parser.add_argument(option, type=f.type, default=f.default)
    options = vars(parser.parse_args())
    out = options.pop("out")
    return Settings(**options), out


@frozen
class Run:
    """A folder of finished phases."""

    folder: Path
    settings: Settings

    def phase(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` gives, with its wall time; done once, and read back ever after."""
        path = self.folder / "phases" / f"{name.replace(' ', '-').lower()}.json"
        if path.exists():
            row = json.loads(path.read_text())
        else:
            console.rule(name, align="left")
            started = perf_counter()
            row = {"name": name, "tokens": 0, "held_out_reverse_kl": None, "ci95": None, **work()}
            row["wall_s"] = round(perf_counter() - started, 2)
            row["peak_rss_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
            write_json(path, row)
        shown = {k: v for k, v in row.items() if not isinstance(v, list | dict) and v is not None and k != "name"}
        console.print(table(name, list(shown), [list(shown.values())]))
        return row


def write_json(path: Path, data: Any) -> None:
    """Write all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.rename(path)


def main() -> None:
    """The whole method."""
    settings, out = parse()
    check_settings(out, settings)
    run = Run(out, settings)
    teacher_dir, student_dir = prepare(run)
    sft_prompts, opd_prompts, held_out = split_prompts(settings, teacher_dir)
    phases = [
        run.phase("evaluate before SFT", lambda: held_out_reverse_kl(student_dir, teacher_dir, held_out, settings)),
        run.phase("teacher writes SFT text", lambda: teacher_text(run, teacher_dir, sft_prompts)),
        run.phase("SFT", lambda: sft(run, student_dir)),
        run.phase("evaluate after SFT", lambda: held_out_reverse_kl(out / "sft", teacher_dir, held_out, settings)),
        run.phase("student rollouts", lambda: student_rollouts(run, opd_prompts)),
        run.phase("teacher scores", lambda: teacher_scores(run, teacher_dir)),
        run.phase("Lightning OPD", lambda: lightning_opd(run)),
        run.phase("evaluate after OPD", lambda: held_out_reverse_kl(out / "opd", teacher_dir, held_out, settings)),
    ]
    if settings.online:
        phases.append(run.phase("online OPD", lambda: online(run, teacher_dir, opd_prompts)))
        phases.append(run.phase("evaluate after online OPD", lambda: held_out_reverse_kl(out / "online", teacher_dir, held_out, settings)))
    finish(run, phases)


def check_settings(out: Path, settings: Settings) -> None:
    """One folder, one run: other settings need another folder."""
    path, mine = out / "settings.json", json.loads(json.dumps(asdict(settings)))
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = [name for name in mine if name != "online" and mine[name] != theirs.get(name)]
        if changed:
            name = changed[0]
            raise SystemExit(
                f"Run {out}: {name} is {theirs.get(name)!r} there, expected {mine[name]!r}; pass another --out, or remove the folder."
            )
    write_json(path, mine)


def prepare(run: Run) -> tuple[Path, Path]:
    """Folders of teacher and student; the default pair is made here."""
    settings = run.settings
    teacher_dir = Path(settings.teacher or run.folder / "models" / "teacher")
    student_dir = Path(settings.student or run.folder / "models" / "student")
    if not settings.teacher:
        run.phase("unpack teacher", lambda: smollm2.save_teacher(teacher_dir) or {})
    if not settings.student:
        run.phase("prune student", lambda: smollm2.save_pruned(*load_model(teacher_dir), student_dir, settings.dropped_layers) or {})
    return teacher_dir, student_dir


def split_prompts(settings: Settings, teacher_dir: Path) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Disjoint prompts for SFT, OPD and the held-out evaluation, after one shuffle."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher_dir)
    prompts = read_prompts(settings.prompts, tokenizer) if settings.prompts else make_prompts(smollm2.questions(), tokenizer)
    sizes = (settings.held_out_prompts, settings.sft_prompts, settings.opd_prompts)
    if len(prompts) < sum(sizes):
        raise SystemExit(
            f"Prompts: there are {len(prompts)}, expected at least {sum(sizes)}; pass fewer with --sft-prompts and its sisters."
        )
    shuffled = [prompts[i] for i in np.random.default_rng(settings.seed).permutation(len(prompts))]
    held_out, sft_prompts, opd_prompts = (shuffled[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3))
    return sft_prompts, opd_prompts, held_out


def sampling(settings: Settings, seed: int) -> SamplingParams:
    """Temperature 1, uncut: rollouts are draws from the policy itself."""
    return SamplingParams(max_new_tokens=settings.max_new_tokens, seed=seed)


def held_out_reverse_kl(student_dir: Path, teacher_dir: Path, prompts: list[Prompt], settings: Settings) -> dict[str, Any]:
    """KL(student, teacher) in nats per token on fresh rollouts of the student."""
    source = HFSource.from_folder(student_dir, sampling(settings, seed=settings.seed + 1000))
    estimate = evaluate_reverse_kl(source, HFScorer.from_folder(teacher_dir), prompts)
    return {"held_out_reverse_kl": estimate.mean, "ci95": estimate.ci95, "rollouts": estimate.clusters, "tokens": estimate.values}


def teacher_text(run: Run, teacher_dir: Path, prompts: list[Prompt]) -> dict[str, Any]:
    """Phase 0: the teacher answers the SFT prompts."""
    source = HFSource.from_folder(teacher_dir, sampling(run.settings, run.settings.seed))
    store = ZarrStore.open_or_create(run.folder / "sft.zarr", source.manifest)
    collect_rollouts(source, prompts, store, prompts_per_batch=32, progress=RichProgress(console))
    return {"tokens": int(store.lengths()[:, 1].sum()), "rollouts": len(store)}


def sft(run: Run, student_dir: Path) -> dict[str, Any]:
    """SFT: the same loop, with a loss whose advantage is 1.  The exported student knows whose text it learned."""
    settings = run.settings
    store = ZarrStore.open(run.folder / "sft.zarr")
    steps = batches(
        store,
        rollouts_per_step=settings.sft_rollouts_per_step,
        tokens_per_batch=2048,
        seed=settings.seed,
        stop=settings.sft_steps,
        teacher=None,
    )
    return train(run, "sft", student_dir, steps, SFTLoss(), settings.sft_lr)


def student_rollouts(run: Run, prompts: list[Prompt]) -> dict[str, Any]:
    """Lightning OPD, phase 1: the SFT student answers the OPD prompts, once."""
    source = HFSource.from_folder(run.folder / "sft", sampling(run.settings, run.settings.seed))
    store = ZarrStore.open_or_create(rollout_store(run), source.manifest)
    collect_rollouts(source, prompts, store, prompts_per_batch=32, progress=RichProgress(console))
    return {"tokens": int(store.lengths()[:, 1].sum()), "rollouts": len(store)}


def teacher_scores(run: Run, teacher_dir: Path) -> dict[str, Any]:
    """Lightning OPD, phase 1 still: the SFT teacher reads them, once.  It is freed when this returns."""
    store = ZarrStore.open(rollout_store(run))
    score_rollouts(store, HFScorer.from_folder(teacher_dir), rollouts_per_batch=32, progress=RichProgress(console))
    gc.collect()
    records = store.read(range(len(store)), columns=("teacher", "behavior"))
    quantiles = advantage_quantiles([r.scores["behavior"] for r in records], [r.scores["teacher"] for r in records])
    console.print("advantages at the start, nats: " + ", ".join(f"{level:.0%} {value:.2f}" for level, value in quantiles.items()))
    return {"tokens": int(store.lengths()[:, 1].sum()), "advantage_quantiles": {str(k): v for k, v in quantiles.items()}}


def lightning_opd(run: Run) -> dict[str, Any]:
    """Lightning OPD, phase 2: no teacher."""
    settings = run.settings
    steps = batches(
        ZarrStore.open(rollout_store(run)),
        rollouts_per_step=settings.opd_rollouts_per_step,
        tokens_per_batch=2048,
        seed=settings.seed,
        stop=settings.opd_steps,
        ref="behavior",
    )
    return train(run, "opd", run.folder / "sft", steps, opd_loss(settings), settings.opd_lr)


def opd_loss(settings: Settings) -> ReferenceOPDLoss:
    """The loss of both OPD phases."""
    return ReferenceOPDLoss(clip=settings.clip, ratio_to_ref=settings.ratio_to_ref)


def online(run: Run, teacher_dir: Path, prompts: list[Prompt]) -> dict[str, Any]:
    """The baseline: same start, loop, loss and number of rollouts, but fresh ones at every step and the teacher always there."""
    settings = run.settings
    model, tokenizer = load_model(run.folder / "sft")
    lineage = Lineage.read(run.folder / "sft")
    source = HFSource(model, tokenizer, sampling(settings, settings.seed), lineage)
    student = make_student(model, tokenizer)
    optimizer = make_optimizer(student, settings.opd_lr)
    history = list(
        follow(
            online_opd(
                student, source, HFScorer.from_folder(teacher_dir), prompts, opd_loss(settings), optimizer, steps=settings.opd_steps
            ),
            settings.opd_steps,
        )
    )
    student.export(run.folder / "online", tokenizer, lineage)
    return {"tokens": sum(m.tokens for m in history), "history": [asdict(m) for m in history]}


def train(run: Run, name: str, start: Path, steps: StepStream, loss: Any, lr: float) -> dict[str, Any]:
    """Run `opd_steps` with a checkpoint now and then, and export the student to `name`."""
    model, tokenizer = load_model(start)
    student = make_student(model, tokenizer)
    optimizer = make_optimizer(student, lr)
    folder = run.folder / "checkpoints" / name
    done = load_checkpoint(folder, student, optimizer)
    history = [StepMetrics(**row) for row in read_history(folder)][:done]
    remaining = attrs.evolve(steps, start=done)
    for metrics in follow(opd_steps(student, remaining, loss, optimizer), steps.stop or 0):
        history.append(metrics)
        if (metrics.step + 1) % 10 == 0:
            save_checkpoint(folder, student, optimizer, next_step=metrics.step + 1, lineage=steps.lineage)
            write_json(folder / "history.json", [asdict(m) for m in history])
    student.export(run.folder / name, tokenizer, steps.lineage)
    return {"tokens": sum(m.tokens for m in history), "history": [asdict(m) for m in history]}


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Metrics of the steps before the newest checkpoint."""
    path = folder / "history.json"
    return json.loads(path.read_text()) if path.exists() else []


def make_student(model: Any, tokenizer: Any) -> CausalLMStudent:
    """The whole model is trained."""
    return CausalLMStudent(model, lopd.manifest.fingerprint_tokenizer(tokenizer).vocab_size)


def make_optimizer(student: CausalLMStudent, lr: float) -> torch.optim.AdamW:
    """The paper's optimizer (table 6), at a rate for a small model and few steps."""
    trained = [p for _, p in student.named_parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.1)


def follow(steps: Iterable[StepMetrics], total: int) -> Iterator[StepMetrics]:
    """The same metrics, with a line for each printed."""
    for m in steps:
        console.print(
            f"step {m.step + 1:3d}/{total}  loss {m.loss:7.3f}  reverse KL {m.reverse_kl:6.3f}  gradient {m.grad_norm:5.2f}  "
            f"{m.tokens / m.seconds:,.0f} tokens/s"
        )
        yield m


def rollout_store(run: Run) -> Path:
    """Where the scored rollouts are."""
    return Path(run.settings.store or run.folder / "store.zarr")


def finish(run: Run, phases: list[dict[str, Any]]) -> None:
    """The closing table, `metrics.json` and `curves.png`."""
    rows = [[p["name"], p["wall_s"], p["tokens"], interval(p)] for p in phases]
    console.print(table("Lightning OPD, phase by phase", ["phase", "wall s", "tokens", "held-out reverse KL (nats per token, 95 %)"], rows))
    history = {p["name"]: [StepMetrics(**row) for row in p.pop("history")] for p in phases if "history" in p}
    measured = [p for p in phases if p["held_out_reverse_kl"] is not None]
    held_out = {
        p["name"].removeprefix("evaluate "): Estimate(p["held_out_reverse_kl"], p["ci95"], p["rollouts"], p["tokens"]) for p in measured
    }
    versions = {"lopd": lopd.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    report = {"phases": phases, "settings": asdict(run.settings), "versions": versions, "machine": machine}
    write_json(run.folder / "metrics.json", report)
    draw_run(run.folder / "curves.png", held_out, history["SFT"], history["Lightning OPD"])
    console.print(f"total {sum(p['wall_s'] for p in phases):.0f} s; written: {run.folder}/metrics.json, {run.folder}/curves.png")


def interval(phase: dict[str, Any]) -> str:
    """`mean ± half-width`, if it was measured."""
    return "" if phase["held_out_reverse_kl"] is None else f"{phase['held_out_reverse_kl']:.4f} ± {phase['ci95']:.4f}"


if __name__ == "__main__":
    main()
