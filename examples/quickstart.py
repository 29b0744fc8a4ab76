"""Lightning OPD from beginning to end on a real model, in under eight minutes on two cores: `make quickstart`.

The teacher is SmolLM2-135M-Instruct, the student a copy of it without some layers.  The teacher writes answers; the student is fine-tuned
on them (SFT), samples its own answers once, the same teacher scores them once (the sampled tokens, and the 64 that it finds most likely
at each place), and is freed.  Then the student trains on the stored scores, a few times over each answer.
Online OPD, the baseline, does as many steps with the same loss and prompts from the same SFT student, with fresh answers at each and the
teacher always there (`--no-online` leaves it out).  Held-out reverse KL to the teacher, on fresh rollouts, is measured after SFT and after
OPD of either kind.

Every phase is kept in `--out`: a second call finds it done, a killed one resumes.  For your own models and prompts:

    python examples/quickstart.py --teacher DIR --student DIR --prompts FILE.jsonl --store PATH --out DIR

A model is a DIR or a name in the hub.
The rates fit the default pair, a few of whose layers are trained for a few steps; your own models want far smaller ones (--sft-lr, --opd-lr).
`--store` may be a URL such as s3://bucket/run.zarr; credentials and endpoint come from the environment.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import smollm2
import torch
import transformers
from attrs import asdict, frozen
from closing import finish
from online_opd import online_opd
from training import learning_rate, make_optimizer

import lopd
from lopd import (
    CausalLMStudent,
    FusedLoss,
    Lineage,
    SamplingParams,
    SFTLoss,
    TopKObjective,
    ZarrStore,
    batches,
    by_token,
    collect_rollouts,
    score_rollouts,
    stored_advantages,
)
from lopd.engines.hf import HFScorer, HFSource, exact_reverse_kl, load_model, load_tokenizer
from lopd.losses.divergences import reverse_kl
from lopd.records import LEVELS, Prompt, StepMetrics, fingerprint_tokenizer, make_prompts, read_prompts
from lopd.tools.console import RichProgress
from lopd.tools.phases import Run, console, counted, counted_in, digest, resumably, set_rate, train_phase
from lopd.verbs import StepStream

transformers.utils.logging.disable_progress_bar()

#: Of Lightning and of online OPD: the reverse KL at each place, over the teacher's most likely tokens and all others as one.
OPD_LOSS = FusedLoss(TopKObjective(reverse_kl))


@frozen
class Settings:
    """Everything that decides the result; kept in the run's folder, and compared when a run is resumed."""

    teacher: str = ""
    student: str = ""
    prompts: str = ""
    store: str = ""
    dropped_layers: str = "11,12,13,14,15,16,17,18,19,20"
    trained_layers: str = "6,7,8,9,10,11,12,13,14,15"
    sft_prompts: int = 32
    opd_prompts: int = 32
    held_out_prompts: int = 80
    max_new_tokens: int = 48
    tokens_per_batch: int = 1024
    device: str = "cpu"
    sft_steps: int = 4
    sft_rollouts_per_step: int = 8
    sft_lr: float = 2e-4
    opd_steps: int = 8
    opd_rollouts_per_step: int = 12
    opd_lr: float = 6e-4
    top_k: int = 64
    seed: int = 0


def main() -> None:
    """Run the whole method."""
    settings, out, with_online = parse()
    check_models(settings)
    run = Run(out)
    run.claim(asdict(settings), inputs(settings))
    teacher_dir, student_dir, made = prepare(run, settings)
    sft_prompts, opd_prompts, held_out = split_prompts(settings, teacher_dir)
    store = settings.store or str(out / "store.zarr")
    phases = [
        *made,
        run.phase("teacher writes SFT text", lambda: sample_once(teacher_dir, sft_prompts, str(out / "sft.zarr"), settings)),
        run.phase("SFT", lambda: sft(run, student_dir, settings)),
        run.phase("evaluate after SFT", lambda: evaluate(out / "sft", teacher_dir, held_out, settings)),
        run.phase("student rollouts", lambda: sample_once(out / "sft", opd_prompts, store, settings)),
        run.phase("teacher scores", lambda: score_once(teacher_dir, store, settings)),
        run.phase("Lightning OPD", lambda: lightning_opd(run, store, settings)),
        run.phase("evaluate after OPD", lambda: evaluate(out / "opd", teacher_dir, held_out, settings)),
    ]
    if with_online:
        phases.append(run.phase("online OPD", lambda: online(run, teacher_dir, opd_prompts, settings)))
        phases.append(run.phase("evaluate after online OPD", lambda: evaluate(out / "online", teacher_dir, held_out, settings)))
    finish(run, phases, asdict(settings), store)


def parse() -> tuple[Settings, Path, bool]:
    """Parse the options: every setting has one of the same name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the run")
    online_help = "online OPD too, from the same start and through the same loop"
    parser.add_argument("--online", action=argparse.BooleanOptionalAction, default=True, help=online_help)
    for f in attrs.fields(Settings):
        option = f"--{f.name.replace('_', '-')}"
        if f.type is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=f.default)
        else:
            parser.add_argument(option, type=f.type, default=f.default, help=f"default: {f.default}")
    options = vars(parser.parse_args())
    out, with_online = options.pop("out"), options.pop("online")
    return Settings(**options), out, with_online


def check_models(settings: Settings) -> None:
    """Refuse what only the phase of scoring would find out, or nothing would."""
    if bool(settings.teacher) != bool(settings.student):
        raise SystemExit(
            "Models: only one of --teacher and --student is given, expected both or neither; the default student is cut from it."
        )
    if settings.teacher:
        folders = (settings.teacher, settings.student)
        theirs, ours = (fingerprint_tokenizer(load_tokenizer(folder)) for folder in folders)
        if not ours.same_vocabulary(theirs):
            raise SystemExit(
                f"Models: the vocabulary of --teacher has hash {theirs.vocab_hash[:12]}, expected that of --student, {ours.vocab_hash[:12]}; "
                "the same ids mean other tokens to this teacher, pass two models that share a tokenizer."
            )


def inputs(settings: Settings) -> dict[str, str]:
    """Return digests of what the run reads, because it may change under the same name (a model hub answers for what it sends)."""
    models = {name: getattr(settings, name) for name in ("teacher", "student") if Path(getattr(settings, name)).is_dir()}
    given = {**models, "prompts": settings.prompts}
    return {f"the content of --{name}": digest(path) for name, path in given.items() if path}


def prepare(run: Run, settings: Settings) -> tuple[str | Path, str | Path, list[dict[str, Any]]]:
    """Return the folders of teacher and student, or their names in the hub, and the phases that made them; the default pair is made here."""
    if settings.teacher:
        return settings.teacher, settings.student, []
    teacher_dir, student_dir = (run.folder / "models" / name for name in ("teacher", "student"))
    dropped = layers(settings.dropped_layers)
    made = [
        run.phase("unpack teacher", lambda: smollm2.save_teacher(teacher_dir) or {}),
        run.phase("prune student", lambda: smollm2.save_pruned(*load_model(teacher_dir), student_dir, dropped) or {}),
    ]
    return teacher_dir, student_dir, made


def layers(text: str) -> tuple[int, ...]:
    """Read `"3,4"` as numbers."""
    return tuple(int(i) for i in text.split(",") if i)


def split_prompts(settings: Settings, teacher_dir: str | Path) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """Return disjoint prompts for SFT, OPD and the held-out evaluation, after one shuffle."""
    tokenizer = load_tokenizer(teacher_dir)
    prompts = (
        read_prompts(settings.prompts, tokenizer) if settings.prompts else make_prompts(map(smollm2.chat, smollm2.questions()), tokenizer)
    )
    sizes = (settings.held_out_prompts, settings.sft_prompts, settings.opd_prompts)
    if len(prompts) < sum(sizes):
        raise SystemExit(
            f"Prompts: there are {len(prompts)}, expected at least {sum(sizes)}; pass fewer with --sft-prompts and its sisters."
        )
    shuffled = [prompts[i] for i in np.random.default_rng(settings.seed).permutation(len(prompts))]
    held_out, sft_prompts, opd_prompts = (shuffled[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(3))
    return sft_prompts, opd_prompts, held_out


def sample_once(model_dir: str | Path, prompts: list[Prompt], path: str, settings: Settings) -> dict[str, Any]:
    """Sample a model's answers into a store: the teacher's for SFT, the SFT student's for OPD (its lineage travels along)."""
    sampling = SamplingParams(max_new_tokens=settings.max_new_tokens, seed=settings.seed)
    source = HFSource.from_folder(model_dir, sampling, device=settings.device)
    store = ZarrStore.open_or_create(path, source.manifest)
    collect_rollouts(source, prompts, store, prompts_per_batch=64, progress=RichProgress(console))
    return {**counted_in(store), "rollouts": len(store)}


def score_once(teacher_dir: str | Path, path: str, settings: Settings) -> dict[str, Any]:
    """Score the student's rollouts with the teacher, which is freed when this returns."""
    store = ZarrStore.open(path)
    report = score_rollouts(store, make_teacher(teacher_dir, settings), rollouts_per_batch=32, progress=RichProgress(console))
    if report.floored:
        console.print(f"{report.floored} log-probs of the teacher were -inf; a floor is stored in their place")
    advantages = stored_advantages(store, count=len(store))
    console.print(f"advantages before the first step: {advantages}")
    quantiles = dict(zip(map(str, LEVELS), advantages.quantiles, strict=True))
    return {**counted_in(store), "advantage_quantiles": quantiles}


def make_teacher(folder: str | Path, settings: Settings) -> HFScorer:
    """Load the teacher, in batches small enough for a processor's cache."""
    model, tokenizer = load_model(folder, device=settings.device)
    return HFScorer(model, tokenizer, tokens_per_batch=settings.tokens_per_batch, rows_per_chunk=128, top_k=settings.top_k)


def sft(run: Run, student_dir: str | Path, settings: Settings) -> dict[str, Any]:
    """Fine-tune with the loop of OPD and a loss whose advantage is 1.  The exported student knows whose text it learned."""
    store = ZarrStore.open(run.folder / "sft.zarr")
    steps = batches(
        store,
        rollouts_per_step=settings.sft_rollouts_per_step,
        tokens_per_batch=settings.tokens_per_batch,
        seed=settings.seed,
        teacher=None,
    )[: settings.sft_steps]
    return train(run.folder, "sft", student_dir, steps, SFTLoss(), settings.sft_lr, settings)


def opd_batches(store: str, settings: Settings, ref: str = "behavior") -> StepStream:
    """Return the steps of Lightning OPD; the reference policy's log-probs are those it reported while it sampled."""
    return batches(
        ZarrStore.open(store),
        rollouts_per_step=settings.opd_rollouts_per_step,
        tokens_per_batch=settings.tokens_per_batch,
        seed=settings.seed,
        ref=ref,
        weighting=by_token,
        top_k=True,
    )[: settings.opd_steps]


def lightning_opd(run: Run, store: str, settings: Settings) -> dict[str, Any]:
    """Train with Lightning OPD: only the store, without teacher and sampling."""
    return train(run.folder, "opd", run.folder / "sft", opd_batches(store, settings), OPD_LOSS, settings.opd_lr, settings)


def train(
    folder: Path, name: str, start: str | Path, steps: StepStream, loss: lopd.protocols.OPDLoss, lr: float, settings: Settings
) -> dict[str, Any]:
    """Run `opd_steps` over these steps, resumably, and export the student to `folder / name`."""
    student, tokenizer = make_student(start, settings)
    rate = partial(learning_rate, lr=lr, total=steps.stop or 0)
    found = train_phase(folder / "checkpoints" / name, student, make_optimizer(student), steps, loss, rate=rate)
    student.export(folder / name, tokenizer, steps.lineage)
    return found


def online(run: Run, teacher_dir: str | Path, prompts: list[Prompt], settings: Settings) -> dict[str, Any]:
    """Train the baseline: same start, prompts, loop, loss and rollouts a step, but fresh ones at every step and the teacher always there."""
    asked = list(islice(cycle(prompts), settings.opd_steps * settings.opd_rollouts_per_step))
    student, tokenizer = make_student(run.folder / "sft", settings)
    optimizer = make_optimizer(student)
    set_rate(optimizer, settings.opd_lr)
    sft_lineage = Lineage.read(run.folder / "sft")
    source = HFSource(student.model, tokenizer, SamplingParams(max_new_tokens=settings.max_new_tokens, seed=settings.seed), sft_lineage)
    scorer = make_teacher(teacher_dir, settings)
    lineage = attrs.evolve(sft_lineage, opd_teacher=scorer.provenance.model)

    def begin(done: int) -> Iterator[StepMetrics]:
        return online_opd(
            student,
            source,
            scorer,
            asked,
            OPD_LOSS,
            optimizer,
            steps=settings.opd_steps,
            start=done,
            tokens_per_batch=settings.tokens_per_batch,
            weighting=by_token,
            schedule=lambda step: set_rate(optimizer, learning_rate(step, settings.opd_lr, settings.opd_steps), settings.opd_lr),
        )

    history = resumably(
        run.folder / "checkpoints" / "online", student, optimizer, lineage, begin, total=settings.opd_steps, seed=settings.seed
    )
    student.export(run.folder / "online", tokenizer, lineage)
    return {**counted(history), "history": [asdict(m) for m in history]}


def make_student(folder: str | Path, settings: Settings) -> tuple[CausalLMStudent, Any]:
    """Load the model of a folder; of the default student only the layers around the cut are trained, which is faster."""
    model, tokenizer = load_model(folder, torch.float32, settings.device)
    if not settings.student:
        model.requires_grad_(False)
        for i in layers(settings.trained_layers):
            model.model.layers[i].requires_grad_(True)
    return CausalLMStudent(model, tokenizer), tokenizer


def evaluate(student_dir: Path, teacher_dir: str | Path, prompts: list[Prompt], settings: Settings) -> dict[str, Any]:
    """Measure KL(student, teacher) in nats per token on fresh rollouts of the student for held-out prompts."""
    sampling = SamplingParams(max_new_tokens=settings.max_new_tokens, seed=settings.seed + 1000)
    source = HFSource.from_folder(student_dir, sampling, device=settings.device)
    sums = exact_reverse_kl(source, make_teacher(teacher_dir, settings), source.sample(prompts))
    kl = sums.per_token()
    per_rollout = {"sums": sums.sums.tolist(), "counts": sums.counts.tolist()}
    return {
        "held_out_reverse_kl": kl.mean,
        "ci95": kl.ci95,
        "rollouts": kl.clusters,
        "response_tokens": kl.values,
        "per_rollout": per_rollout,
    }


if __name__ == "__main__":
    main()
