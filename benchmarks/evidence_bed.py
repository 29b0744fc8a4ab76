"""Real weights for `evidence.py`: where a teacher, students cut from it, their prompts and stores are kept, and how a student is measured.

Teacher and questions are those of the quickstart (`examples/smollm2.py`), put without its instruction.

Folder of a seed: `text.zarr`, what the teacher wrote on the prompts of SFT,
of OPD and of the held-out part; and for each student `model/`, and `store.zarr` with its rollouts and one column of scores for each support.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from attrs import evolve, frozen
from record import ROOT

from lopd import (
    CausalLMStudent,
    Prompt,
    Rollout,
    SamplingParams,
    ZarrStore,
    make_prompts,
)
from lopd.engines.hf import HFScorer, HFSource, exact_reverse_kl, load_model
from lopd.records import Lineage, RolloutSums, prompt_id_of

sys.path.insert(0, str(ROOT / "examples"))
import smollm2

from lopd.tools.phases import write_json

Row = dict[str, Any]
#: Rows that sampling and scoring take at once where nothing waits for them: a store is made in large batches.
ROWS = 64
BETAS = (0.9, 0.98)
#: Share of words in common that makes a question a near copy of another.
ALIKE = 0.8
T = TypeVar("T")


@frozen
class Size:
    """How much there is of everything.

    Args:
        sft_prompts, opd_prompts, held_out: questions, split again for each seed.
        new_tokens: most tokens of a response.
        sft_epochs, sft_batch, sft_lr: epochs, batch and rate of SFT; the rate falls in a straight line.
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
    """Return a finished unit from its file, or do the work and write the file, with the CPU seconds of it all, unless the unit tells its own.

    A killed run that is called again finds it.
    """
    if not path.exists():
        begun = time.process_time()
        row = work()
        write_json(path, {"unit_s": time.process_time() - begun, **row})
    found: Row = json.loads(path.read_text())
    return found


@cache
def teacher(folder: Path) -> tuple[Any, Any]:
    """Load model and tokenizer, once a process; both of them stay."""
    model, tokenizer = load_model(folder, torch.float32)
    return model.requires_grad_(False), tokenizer


@frozen
class Bed:
    """A seed and a student.

    Args:
        folder: folder of the whole run.
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

    def run_file(self, arm: str, rate: float) -> Path:
        """Return where the run of an arm is kept."""
        return self.of_student / "runs" / f"{re.sub('[^a-z0-9]+', '-', arm.lower())}-{rate:g}.json"

    @property
    def scorer(self) -> HFScorer:
        """The teacher."""
        return HFScorer(*teacher(self.folder / "teacher"))

    def sampling(self, candidates: int = 0, drawn: int = 0) -> SamplingParams:
        """Return how every response that is trained on is drawn, and what is kept beside it."""
        return SamplingParams(self.size.new_tokens, seed=self.seed, candidates=candidates, drawn=drawn)

    def prompts(self) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
        """Return disjoint prompts: SFT, OPD, held out."""
        return _prompts(self)

    def text(self) -> ZarrStore:
        """Open the store of what the teacher wrote."""
        return ZarrStore.open(self.home / "text.zarr")

    def rows_of_text(self, prompts: list[Prompt]) -> Any:
        """Return the rows of the teacher's answers to these prompts."""
        named = {prompt.prompt_id for prompt in prompts}
        store = self.text()
        return np.flatnonzero([prompt_id_of(r.rollout.rollout_id) in named for r in store.read(range(len(store)), columns=())])

    def student(self) -> tuple[CausalLMStudent, Any, Lineage]:
        """Load a fresh copy of the student after SFT."""
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
    """Count the held-out questions that have at least `ALIKE` of their words in common with one that is trained on (Jaccard)."""
    sft, opd, held_out = _split(bed, [frozenset(re.findall(r"\w+", question.lower())) for question in smollm2.questions()])
    return sum(any(len(ours & theirs) >= ALIKE * len(ours | theirs) for theirs in (*sft, *opd)) for ours in held_out)


def train_from_the_cut(model: Any, kind: Kind) -> Any:
    """Freeze the layers before the cut, which compute what the teacher's do, and the embeddings, which are also the head.

    That is what makes this affordable: a step takes two thirds of the time.
    """
    model.get_input_embeddings().requires_grad_(False)
    for layer in model.model.layers[: min(kind.dropped)]:
        layer.requires_grad_(False)
    return model


def optimizer_of(student: CausalLMStudent, rate: float) -> torch.optim.AdamW:
    """Make an optimizer with a constant rate, so that every step of a run could have been its last."""
    return torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=rate, betas=BETAS, weight_decay=0.0)


@lru_cache(maxsize=1)
def untrained(bed: Bed) -> Any:
    """Load the student after SFT, to be compared with."""
    return load_model(bed.of_student / "model", torch.float32)[0].requires_grad_(False)


def measure(bed: Bed, model: Any, *, end: bool = True) -> Row:
    """Measure a student on the held-out prompts, rollout by rollout.

    It is the reverse KL on its fresh answers; at the end, that of the student after SFT at the same tokens, and the forward KL on the teacher's
    answers.

    Draws are coupled: all students of a seed have the same uniform numbers, so what they differ in is not luck.
    """
    held_out, tokenizer = bed.prompts()[2], teacher(bed.folder / "teacher")[1]
    source = HFSource(model, tokenizer, SamplingParams(bed.size.new_tokens, seed=1000 + bed.seed), rows_per_batch=ROWS)
    rollouts = source.sample(held_out)
    kl = exact_reverse_kl(source, bed.scorer, rollouts)
    found = {"reverse_kl": _plain(kl), "ended": float(np.mean([r.finish_reason == "stop" for r in rollouts]))}
    if not end:
        return found
    found["untrained_kl"] = _plain(exact_reverse_kl(evolve(source, model=untrained(bed)), bed.scorer, rollouts))
    written = [r.rollout for r in bed.text().read(bed.rows_of_text(held_out), columns=())]
    return {**found, "forward_kl": _plain(forward_kl(written, HFScorer(model, tokenizer)))}


def forward_kl(written: list[Rollout], student: HFScorer) -> RolloutSums:
    """Estimate KL(teacher, student) in nats, summed over each of the teacher's answers, from its sampled tokens.

    The difference of two students is exact.
    """
    own = [r.behavior_logprobs for r in written if r.behavior_logprobs is not None]
    gaps = [teacher_T - scores.logprobs for teacher_T, scores in zip(own, student.score(written), strict=True)]
    return RolloutSums(np.array([gap.sum(dtype=np.float64) for gap in gaps]), np.array([gap.size for gap in gaps], np.float64))


def mean_kl(point: Row, kind: str = "reverse_kl") -> float:
    """Return a held-out KL at a point of a curve, nats a token."""
    return float(sum(point[kind]["sums"]) / sum(point[kind]["counts"]))


def both_kl(row: Row) -> float:
    """Return the sum of both KLs at the end of a run: what is chosen by, for the forward one has the smaller error."""
    return mean_kl(row["curve"][-1]) + mean_kl(row["curve"][-1], "forward_kl")


def _plain(sums: RolloutSums) -> Row:
    return {"sums": sums.sums.round(4).tolist(), "counts": sums.counts.astype(int).tolist()}
