"""The pairs of teacher and student: sums with a verifier, which differ in sharpness, strength, size and family, and real ones, cut from SmolLM2."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import smollm2
import torch
from attrs import evolve, field, frozen
from pairs_runs import ARMS, FEW_ARMS, Arm, Pace, Pair, fine_tune
from testbed.models import TOKENS_PER_BATCH, Setting, once, prepare
from testbed.task import Writer, verify
from transformers import AutoTokenizer

from lopd import Prompt, SamplingParams
from lopd.engines.hf import load_model
from lopd.records import make_prompts

#: How sure the teacher of a pair of sums is.
CERTAIN, SOME_DOUBT, DOUBT = Writer(), Writer(synonyms=2, slips=0.03), Writer(synonyms=2, slips=0.1)
#: Chosen on seeds from 100 on.
SUMS_PACE = Pace(steps=48, rollouts=60, lr=3e-4, tokens_per_batch=TOKENS_PER_BATCH)
REAL_PACE = Pace(steps=8, rollouts=8, lr=2e-4, tokens_per_batch=1024)
#: Layers that are left out of the teacher, and how many SFT steps of how many prompts.
CUTS = {2: (15, 16), 6: (13, 14, 15, 16, 17, 18)}
REAL_SFT = (4, 12)
#: Those around the cut, as in the quickstart.
_TRAINED = range(8, 18)
_HELD_OUT, _REAL_TOKENS = 40, 24


@frozen
class Spec:
    """How a pair is made.

    Args:
        name: in tables.
        kind: "sums" or "real".
        sft_steps: steps of the student's SFT.
        build: from a seed and the folder in which models are kept.
        arms: that are run.
    """

    name: str
    kind: str
    sft_steps: int
    build: Callable[[int, Path], Pair] = field(repr=False)
    arms: Sequence[Arm] = ARMS


def sums(name: str, writer: Writer, sft_steps: int, **sizes: tuple[int, int] | tuple[int, int, str]) -> Spec:
    """Return a pair of the testbed of the claims."""
    setting = Setting(name, writer=writer, sft_steps=sft_steps, **sizes)
    return Spec(name, "sums", sft_steps, partial(_build_sums, setting))


def real(cut: int, sft_steps: int) -> Spec:
    """Return the pair of SmolLM2-135M-Instruct, and itself without some layers."""
    name = f"SmolLM2 without {cut} layers, SFT {sft_steps}"
    return Spec(name, "real", sft_steps, partial(_build_real, name, cut, sft_steps), FEW_ARMS)


def _build_sums(setting: Setting, seed: int, folder: Path, pace: Pace = SUMS_PACE) -> Pair:
    bed = prepare(setting, seed, folder / "testbed", ("A",))
    prompts = bed.opd_prompts[: pace.steps * pace.rollouts]
    models = bed.teachers["A"], bed.students["A"]
    return Pair(setting.name, seed, *models, prompts, bed.held_out, bed.sampling(), 2, pace, width=8, verify=verify, rows_per_batch=1024)


def _build_real(name: str, cut: int, sft_steps: int, seed: int, folder: Path) -> Pair:
    teacher, cut_model = folder / "smollm2", folder / f"cut-{cut}"
    once(teacher, smollm2.save_teacher)
    once(cut_model, lambda made: smollm2.save_pruned(*load_model(teacher), made, CUTS[cut]))
    pace = evolve(REAL_PACE, steps=sft_steps)
    held_out, sft, opd = _questions(teacher, seed, (_HELD_OUT, max(REAL_SFT) * pace.rollouts, REAL_PACE.steps * pace.rollouts))
    sampling = SamplingParams(_REAL_TOKENS, seed=seed)
    models, more = (teacher, cut_model), {"width": 64, "layers": _TRAINED, "dtype": torch.bfloat16}
    start = Pair(name, seed, *models, sft[: sft_steps * pace.rollouts], held_out, sampling, 1, pace, **more)
    tuned = once(folder / f"sft-{cut}-{sft_steps}-{seed}", partial(fine_tune, start))
    return evolve(start, student=tuned, opd=opd, pace=REAL_PACE)


def _questions(teacher: Path, seed: int, sizes: Sequence[int]) -> list[list[Prompt]]:
    """Return disjoint prompts, so many of each."""
    prompts = make_prompts(smollm2.questions(), AutoTokenizer.from_pretrained(teacher))
    chosen = np.random.default_rng(seed).permutation(len(prompts))[: sum(sizes)]
    return [[prompts[i] for i in part] for part in np.split(chosen, np.cumsum(sizes)[:-1])]


SUMS = (
    sums("certain, SFT 300", CERTAIN, 300),
    sums("certain, SFT 700", CERTAIN, 700),
    sums("certain, SFT 300, small student", CERTAIN, 300, student_size=(24, 2)),
    sums("some doubt, SFT 300", SOME_DOUBT, 300),
    sums("some doubt, SFT 700", SOME_DOUBT, 700),
    sums("some doubt, SFT 700, Qwen3 student", SOME_DOUBT, 700, student_size=(48, 2, "qwen3")),
    sums("doubt, SFT 150", DOUBT, 150),
    sums("doubt, SFT 300", DOUBT, 300),
    sums("doubt, SFT 700", DOUBT, 700),
    sums("doubt, SFT 700, small student", DOUBT, 700, student_size=(24, 2)),
    sums("doubt, SFT 700, student as large", DOUBT, 700, student_size=(64, 2)),
    sums("doubt, SFT 700, large teacher", DOUBT, 700, teacher_size=(96, 3)),
    sums("doubt, SFT 700, GPT-2 student", DOUBT, 700, student_size=(48, 2, "gpt2")),
    sums("doubt, SFT 700, GPT-2 teacher", DOUBT, 700, teacher_size=(64, 2, "gpt2")),
)
REAL = tuple(real(cut, steps) for cut in (2, 6) for steps in REAL_SFT)
