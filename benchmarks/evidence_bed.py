"""Real weights for `evidence.py`: a teacher, students cut from it, their prompts and stores; all built once, and kept in a folder.

Teacher and prompts are those of the quickstart (`examples/smollm2.py`).  Folder of a seed: `text.zarr`, what the teacher wrote on the prompts of SFT,
of OPD and of the held-out part; and for each student `model/`, and `store.zarr` with its rollouts and one column of scores for each support.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from attrs import evolve, frozen
from record import ROOT
from testbed.runs import Clock

from lopd import (
    CausalLMStudent,
    FusedSFTLoss,
    MemoryStore,
    Prompt,
    Rollout,
    SamplingParams,
    ZarrStore,
    batches,
    collect_rollouts,
    make_prompts,
    opd_steps,
    score_rollouts,
)
from lopd.engines.hf import HFScorer, HFSource, exact_reverse_kl, load_model
from lopd.guards.start import measure_start
from lopd.protocols import LogprobStore
from lopd.records import Lineage, RolloutSums, prompt_id_of

sys.path.insert(0, str(ROOT / "examples"))
import smollm2
from phases import write_json

Row = dict[str, Any]
#: Rows that sampling and scoring take at once where nothing waits for them: a store is made in large batches.
ROWS = 64
#: Column -> what the teacher is asked for beside the log-prob of the sampled token.
COLUMNS: dict[str, dict[str, int]] = {
    "teacher": {},
    "top16": {"top_k": 16},
    "top64": {"top_k": 64},
    "candidates": {"candidates": 16},
    "drawn": {"drawn": 16},
}
#: What the policy keeps beside each token it samples: as many of its most likely as `measure_start` can use, and the draws.
KEPT = {"candidates": 64, "drawn": 16}
BETAS = (0.9, 0.98)
#: Share of words in common that makes a question a near copy of another.
ALIKE = 0.8
T = TypeVar("T")


@frozen
class Size:
    """How much there is of everything.

    Args:
        sft_prompts, opd_prompts, held_out: questions, split anew for each seed.
        new_tokens: of every response, at most.
        sft_epochs, sft_batch, sft_lr: of SFT; the rate falls in a straight line.
        batch: rollouts of a step of OPD; one pass over the OPD prompts is `opd_prompts / batch` steps.
    """

    sft_prompts: int = 256
    opd_prompts: int = 96
    held_out: int = 32
    new_tokens: int = 48
    sft_epochs: int = 1
    sft_batch: int = 8
    sft_lr: float = 2e-4
    batch: int = 8


@frozen
class Kind:
    """A student: the teacher without some layers.

    Args:
        name: in tables.
        dropped: layers that are left out.
    """

    name: str
    dropped: tuple[int, ...]


NEAR, FAR = Kind("near", (14, 15)), Kind("far", (13, 14, 15, 16, 17, 18))


def once(path: Path, work: Callable[[], Row]) -> Row:
    """A finished unit is a file, with the CPU seconds it took all in all, which a killed run that is called again finds."""
    if not path.exists():
        begun = time.process_time()
        row = work()
        write_json(path, {**row, "unit_s": time.process_time() - begun})
    found: Row = json.loads(path.read_text())
    return found


@cache
def teacher(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, once a process; both of them stay."""
    model, tokenizer = load_model(folder, torch.float32)
    return model.requires_grad_(False), tokenizer


@frozen
class Bed:
    """A seed and a student.

    Args:
        folder: of the whole run.
    """

    folder: Path
    size: Size
    seed: int
    kind: Kind

    @property
    def home(self) -> Path:
        """What is this seed's, whatever the student."""
        return self.folder / f"seed-{self.seed}"

    @property
    def of_student(self) -> Path:
        """What is the student's."""
        return self.home / self.kind.name

    @property
    def scorer(self) -> HFScorer:
        """The teacher."""
        return HFScorer(*teacher(self.folder / "teacher"))

    def sampling(self, candidates: int = 0, drawn: int = 0) -> SamplingParams:
        """How every response that is trained on is drawn, and what is kept beside it."""
        return SamplingParams(self.size.new_tokens, seed=self.seed, candidates=candidates, drawn=drawn)

    def prompts(self) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
        """Disjoint ones: SFT, OPD, held out."""
        return _prompts(self)

    def text(self) -> ZarrStore:
        """What the teacher wrote."""
        return ZarrStore.open(self.home / "text.zarr")

    def rows_of_text(self, prompts: list[Prompt]) -> Any:
        """Where its answers to these prompts are."""
        named = {prompt.prompt_id for prompt in prompts}
        store = self.text()
        return np.flatnonzero([prompt_id_of(r.rollout.rollout_id) in named for r in store.read(range(len(store)), columns=())])

    def student(self) -> tuple[CausalLMStudent, Any, Lineage]:
        """A fresh copy after SFT."""
        model, tokenizer = load_model(self.of_student / "model", torch.float32)
        return CausalLMStudent(train_from_the_cut(model, self.kind), tokenizer), tokenizer, Lineage.read(self.of_student / "model")


@cache
def _prompts(bed: Bed) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    return _split(bed, make_prompts(smollm2.questions(), teacher(bed.folder / "teacher")[1]))


def _split(bed: Bed, every: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
    shuffled = [every[i] for i in np.random.default_rng(bed.seed).permutation(len(every))]
    sft, opd, held_out = np.cumsum([bed.size.sft_prompts, bed.size.opd_prompts, bed.size.held_out]).tolist()
    return shuffled[:sft], shuffled[sft:opd], shuffled[opd:held_out]


def near_copies(bed: Bed) -> int:
    """How many held-out questions have at least `ALIKE` of their words in common with one that is trained on (Jaccard)."""
    sft, opd, held_out = _split(bed, [frozenset(re.findall(r"\w+", question.lower())) for question in smollm2.questions()])
    return sum(any(len(ours & theirs) >= ALIKE * len(ours | theirs) for theirs in (*sft, *opd)) for ours in held_out)


def train_from_the_cut(model: Any, kind: Kind) -> Any:
    """Layers before the cut compute what the teacher's do, and stay as they are; so do embeddings, which are the head, too.

    That is what makes this affordable: a step takes two thirds of the time.
    """
    model.get_input_embeddings().requires_grad_(False)
    for layer in model.model.layers[: min(kind.dropped)]:
        layer.requires_grad_(False)
    return model


def make_teacher(folder: Path) -> Row:
    """Unpack the weights."""
    return once(folder / "teacher.json", lambda: smollm2.save_teacher(_fresh(folder / "teacher")) or {"kind": "teacher"})


def make_text(bed: Bed) -> Row:
    """The teacher's answers to all prompts of a seed."""

    def work() -> Row:
        source = HFSource(*teacher(bed.folder / "teacher"), bed.sampling(), rows_per_batch=ROWS)
        store = ZarrStore.open_or_create(_fresh(bed.home / "text.zarr"), source.manifest)
        spent = _fill(store, source, [prompt for part in bed.prompts() for prompt in part], {})
        return {"kind": "text", "seed": bed.seed, "rollouts": len(store), "cpu_s": spent}

    return once(bed.home / "text.json", work)


def make_student(bed: Bed) -> Row:
    """Cut it, fine-tune it on the teacher's answers, and measure it."""

    def work() -> Row:
        clock, size, home = Clock(), bed.size, _fresh(bed.of_student / "model")
        smollm2.save_pruned(*teacher(bed.folder / "teacher"), home, bed.kind.dropped)
        student, tokenizer, _ = bed.student()
        optimizer = optimizer_of(student, size.sft_lr)
        rows = bed.rows_of_text(bed.prompts()[0])
        stream = batches(bed.text(), teacher=None, rollouts_per_step=size.sft_batch, seed=bed.seed, rows=rows)
        total = size.sft_epochs * size.sft_prompts // size.sft_batch
        for metrics in opd_steps(student, stream[:total], FusedSFTLoss(), optimizer):
            for group in optimizer.param_groups:
                group["lr"] = size.sft_lr * (1 - (metrics.step + 1) / total)
        student.export(_fresh(home), tokenizer, stream.lineage)
        spent = clock.split()
        row = {"kind": "sft", "seed": bed.seed, "student": bed.kind.name, "steps": total, "cpu_s": spent, "near_copies": near_copies(bed)}
        return {**row, **measure(bed, student.model)}

    return once(bed.of_student / "sft.json", work)


def make_store(bed: Bed, columns: Collection[str] = COLUMNS.keys(), shares: Collection[float] = ()) -> Row:
    """The student's answers to the OPD prompts, scored in several ways; what each part costs, and what the diagnostics say.

    Smaller stores are made, too, as they cost more than their share: their batches are smaller.  Of their scores only the plain ones are made, for
    what the others cost beside them is known from the whole store.

    Args:
        bed: with its student.
        columns: of `COLUMNS`; `start_of` reads "top64".
        shares: of the prompts, for which a store is made, timed, and thrown away.
    """

    def work() -> Row:
        student, tokenizer, lineage = bed.student()
        source, prompts = HFSource(student.model, tokenizer, bed.sampling(**KEPT), lineage, rows_per_batch=ROWS), bed.prompts()[1]
        store = ZarrStore.open_or_create(_fresh(bed.of_student / "store.zarr"), source.manifest)
        spent = _fill(store, source, prompts, {name: evolve(bed.scorer, **COLUMNS[name]) for name in columns})
        parts = {
            f"{share:g}": _fill(MemoryStore(source.manifest), source, prompts[: round(share * len(prompts))], {"teacher": bed.scorer})
            for share in shares
        }
        return {"kind": "store", "seed": bed.seed, "student": bed.kind.name, "cpu_s": {"1": spent, **parts}, "start": start_of(store)}

    return once(bed.of_student / "store.json", work)


def _fill(store: LogprobStore, source: HFSource, prompts: list[Prompt], scorers: Mapping[str, HFScorer]) -> Row:
    """Sample and score; CPU seconds of all that these calls do, as a live run pays for all of it.  Neither has the self-test of the scorer."""
    sampling = _seconds(partial(collect_rollouts, source, prompts, store, prompts_per_batch=ROWS))
    scoring = {
        name: _seconds(partial(score_rollouts, store, scorer, column=name, rollouts_per_batch=ROWS, preflight=None))
        for name, scorer in scorers.items()
    }
    return {"sampling": sampling, "scoring": scoring}


def _seconds(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def start_of(store: ZarrStore) -> Row:
    """The diagnostics before training, as plain numbers."""
    said = measure_start(store, teacher="top64", ref="policy")
    least, most = said.outside or (None, None)
    return {
        "reverse_kl": said.reverse_kl.mean,
        "overlap": {str(k): found.mean for k, found in said.overlap.items()},
        "outside_top64": [part.mean for part in (least, most) if part is not None],
        "advantage_quantiles": said.advantages.quantiles,
        "tail": said.beyond_tail,
        "verdict": said.verdict,
    }


def optimizer_of(student: CausalLMStudent, rate: float) -> torch.optim.AdamW:
    """At a constant rate, so that every step of a run is an end that it could have had."""
    return torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=rate, betas=BETAS, weight_decay=0.0)


def measure(bed: Bed, model: Any, *, forward: bool = True) -> Row:
    """Of a student on the held-out prompts, rollout by rollout: reverse KL on its fresh answers, and, if asked, forward KL on the teacher's.

    Draws are coupled: all students of a seed have the same uniform numbers, so what they differ in is not luck.
    """
    held_out, tokenizer = bed.prompts()[2], teacher(bed.folder / "teacher")[1]
    source = HFSource(model, tokenizer, SamplingParams(bed.size.new_tokens, seed=1000 + bed.seed), rows_per_batch=ROWS)
    rollouts = source.sample(held_out)
    kl = exact_reverse_kl(source, bed.scorer, rollouts)
    found = {"reverse_kl": _plain(kl), "ended": float(np.mean([r.finish_reason == "stop" for r in rollouts]))}
    if not forward:
        return found
    written = [r.rollout for r in bed.text().read(bed.rows_of_text(held_out), columns=())]
    return {**found, "forward_kl": _plain(forward_kl(written, HFScorer(model, tokenizer)))}


def forward_kl(written: list[Rollout], student: HFScorer) -> RolloutSums:
    """KL(teacher, student) in nats, summed over each of the teacher's answers, from its sampled tokens: what two students differ in is exact."""
    own = [r.behavior_logprobs for r in written if r.behavior_logprobs is not None]
    gaps = [teacher_T - scores.logprobs for teacher_T, scores in zip(own, student.score(written), strict=True)]
    return RolloutSums(np.array([gap.sum(dtype=np.float64) for gap in gaps]), np.array([gap.size for gap in gaps], np.float64))


def mean_kl(point: Row) -> float:
    """Nats a token, held-out reverse KL at a point of a curve."""
    return float(sum(point["reverse_kl"]["sums"]) / sum(point["reverse_kl"]["counts"]))


def _plain(sums: RolloutSums) -> Row:
    return {"sums": sums.sums.round(4).tolist(), "counts": sums.counts.astype(int).tolist()}


def _fresh(folder: Path) -> Path:
    """A place in which nothing of a killed attempt is left: its seconds are lost, so its work is done again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder
