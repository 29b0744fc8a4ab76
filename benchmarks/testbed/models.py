"""Teachers trained on right workings, and students fine-tuned on what a teacher samples: small, from seeds, kept in a folder."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import asdict, evolve, field, frozen
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from lopd import (
    CausalLMStudent,
    FusedSFTLoss,
    Manifest,
    MemoryStore,
    ModelId,
    Prompt,
    Rollout,
    SamplingParams,
    batches,
    collect_rollouts,
    opd_steps,
)
from lopd.engines.hf import HFSource
from lopd.records import Lineage, Step, fingerprint_tokenizer
from lopd.verbs import StepStream
from testbed.products import Product
from testbed.task import CHARACTERS, EOS, Problem, Writer, encode, make_problems, make_tokenizer

STYLES = ("A", "B")
TOKENS_PER_BATCH = 3072
#: Hidden size and layers of a Llama, or of the family that is named.
Size = tuple[int, int] | tuple[int, int, str]
#: Task -> kind of its problems.
TASKS: dict[str, type[Problem]] = {"sums": Problem, "products": Product}
_TOKENIZERS = {task: make_tokenizer(kind.characters) for task, kind in TASKS.items()}
#: What decides a teacher, and what beside it a student.
_OF_TEACHER = (
    *("digits", "writer", "teacher_size", "taught_problems", "teacher_steps", "teacher_lr", "max_new_tokens", "batch"),
    *("sft_prompts", "opd_prompts", "held_out_prompts"),
)
_OF_STUDENT = ("student_size", "sft_steps", "sft_lr")


@frozen
class Setting:
    """All that decides what is built.

    Args:
        task: one of `TASKS`.
        digits: digits of its two numbers.
        writer: writes what the teachers are trained on.
        teacher_size, student_size: hidden size and layers, and the family (`FAMILIES`) if it is not Llama.
        taught_problems: on whose right workings the teachers are trained.
        teacher_steps: steps of that training, of `batch` rollouts.
        sft_prompts, opd_prompts, held_out_prompts: disjoint, and none that a teacher was trained on.
        sft_steps: on the teacher's sampled text.
        max_new_tokens: most tokens of a response.
        opd_steps, opd_lr: steps and rate of the OPD stage, online and offline alike; `batch` rollouts a step.
    """

    name: str
    task: str = "sums"
    digits: int = 2
    writer: Writer = field(factory=Writer)
    teacher_size: Size = (64, 2)
    student_size: Size = (48, 2)
    taught_problems: int = 4000
    teacher_steps: int = 700
    teacher_lr: float = 5e-3
    sft_prompts: int = 2000
    sft_steps: int = 400
    sft_lr: float = 5e-3
    opd_prompts: int = 3000
    held_out_prompts: int = 500
    max_new_tokens: int = 14
    batch: int = 128
    opd_steps: int = 100
    opd_lr: float = 1e-4


#: The paper's regime: a teacher with doubts, a student fine-tuned for long on its text.  Online OPD gains, and Lightning gains as much.
HEALTHY = Setting("healthy", writer=Writer(synonyms=2, slips=0.1), sft_steps=700)
#: A teacher that is all but certain, a student half-way through SFT: its errors are impossible to the teacher, and plain Lightning makes it worse.
FAILING = Setting("failing", sft_steps=300)


@frozen(eq=False)
class Testbed:
    """What was built of a setting and a seed: folders of models, and prompts.

    Args:
        teachers: style -> folder.
        students: style of the SFT teacher -> folder.
    """

    setting: Setting
    seed: int
    teachers: dict[str, Path]
    students: dict[str, Path]
    opd_prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]

    def sampling(self, samples: int = 1, temperature: float = 1.0) -> SamplingParams:
        """Return how every response is drawn."""
        return SamplingParams(self.setting.max_new_tokens, temperature, samples_per_prompt=samples, seed=self.seed)


def prepare(setting: Setting, seed: int, folder: Path, styles: Sequence[str] = STYLES) -> Testbed:
    """Build teachers and students, or find them built; settings share those that do not depend on their differences."""
    sizes = (setting.sft_prompts, setting.opd_prompts, setting.held_out_prompts, setting.taught_problems)
    problems = make_problems(sum(sizes), setting.digits, seed, TASKS[setting.task])
    sft, opd, held_out, taught = (list(part) for part in np.split(np.array(problems, object), np.cumsum(sizes)[:-1]))
    of_teacher, of_student = (_digest(setting, seed, names) for names in (_OF_TEACHER, (*_OF_TEACHER, *_OF_STUDENT)))
    teachers, students = {}, {}
    for style in styles:
        teachers[style] = once(folder / f"teacher-{style}-{of_teacher}", partial(_train_teacher, setting, seed, taught, style))
        students[style] = once(folder / f"student-{style}-{of_student}", partial(_sft, setting, seed, sft, teachers[style]))
    return Testbed(setting, seed, teachers, students, [p.prompt() for p in opd], [p.prompt() for p in held_out])


def _digest(setting: Setting, seed: int, names: Sequence[str]) -> str:
    settings = asdict(setting)
    names = names if setting.task == "sums" else ("task", *names)  # so the sums keep the names that they had before there were tasks
    return hashlib.sha256(json.dumps([seed, {name: settings[name] for name in names}]).encode()).hexdigest()[:12]


def once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Build into a folder, unless it exists; a folder that was killed half-way does not exist."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.partial")
        unfinished.mkdir(parents=True, exist_ok=True)
        build(unfinished)
        unfinished.rename(folder)
    return folder


def untrained_teacher(setting: Setting, seed: int, folder: Path) -> Path:
    """Save a teacher of this size with random weights: it costs what a trained one costs."""

    def build(place: Path) -> None:
        tokenizer = _TOKENIZERS[setting.task]
        model = new_model(setting.teacher_size, seed, TASKS[setting.task])
        CausalLMStudent(model, fingerprint_tokenizer(tokenizer)).export(place, tokenizer, Lineage())

    return once(folder / f"untrained-{_digest(setting, seed, _OF_TEACHER)}", build)


def new_model(size: Size, seed: int, kind: type[Problem] = Problem) -> PreTrainedModel:
    """Make a model with random weights, for problems of a kind."""
    torch.manual_seed(seed)
    hidden, layers, *family = size
    config = FAMILIES[family[0] if family else "llama"](int(hidden), int(layers), kind)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _llama(hidden: int, layers: int, kind: type[Problem], config: type[PreTrainedConfig] = LlamaConfig, **more: Any) -> PreTrainedConfig:
    return config(
        vocab_size=len(kind.characters),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=CHARACTERS.index(EOS),
        pad_token_id=None,
        attention_dropout=0.0,
        **kind.shape,
        **more,
    )


def _qwen3(hidden: int, layers: int, kind: type[Problem]) -> PreTrainedConfig:
    return _llama(hidden, layers, kind, Qwen3Config, num_key_value_heads=2, head_dim=hidden // 4)


def _gpt2(hidden: int, layers: int, kind: type[Problem]) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=len(kind.characters),
        n_embd=hidden,
        n_inner=2 * hidden,
        n_layer=layers,
        n_head=4,
        n_positions=kind.shape["max_position_embeddings"],
        bos_token_id=None,
        eos_token_id=CHARACTERS.index(EOS),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )


FAMILIES: dict[str, Callable[[int, int, type[Problem]], PreTrainedConfig]] = {"llama": _llama, "qwen3": _qwen3, "gpt2": _gpt2}


def scheduled(steps: StepStream, optimizer: torch.optim.Optimizer, lr: float) -> Iterator[Step]:
    """Yield the same steps; the rate rises over the first tenth and falls in a straight line."""
    total = steps.stop or 1
    for step in steps:
        rate = lr * min((step.index + 1) / (total / 10), 1.0) * (1 - step.index / total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        yield step


def _train_teacher(setting: Setting, seed: int, problems: Sequence[Problem], style: str, folder: Path) -> None:
    rng = np.random.default_rng([seed, STYLES.index(style)])
    writer = ModelId("written by rule", f"style {style}", "text")
    store = MemoryStore(Manifest(fingerprint_tokenizer(_TOKENIZERS[setting.task]), writer, SamplingParams(setting.max_new_tokens)))
    store.append([_right_answer(problem, problem.working(style, rng, setting.writer)) for problem in problems])
    model = new_model(setting.teacher_size, 1000 * seed + STYLES.index(style), TASKS[setting.task])
    _imitate(setting, model, store, (setting.teacher_steps, setting.teacher_lr), folder)


def _right_answer(problem: Problem, text: str) -> Rollout:
    prompt, ids = problem.prompt(), encode(text)
    return Rollout(f"{prompt.prompt_id}/s0/g0", prompt.token_ids, ids, [True] * len(ids), "stop")


def _sft(setting: Setting, seed: int, problems: Sequence[Problem], teacher: Path, folder: Path) -> None:
    source = source_of(teacher, SamplingParams(setting.max_new_tokens, seed=seed))
    store = MemoryStore(source.manifest)
    collect_rollouts(source, [problem.prompt() for problem in problems], store, prompts_per_batch=2048)
    model = new_model(setting.student_size, seed, TASKS[setting.task])
    _imitate(setting, model, store, (setting.sft_steps, setting.sft_lr), folder)


def source_of(folder: Path, sampling: SamplingParams) -> HFSource:
    """Return a source with batches as wide as suits such small models."""
    return evolve(HFSource.from_folder(folder, sampling), rows_per_batch=1024)


def _imitate(setting: Setting, model: PreTrainedModel, store: MemoryStore, pace: tuple[int, float], folder: Path) -> None:
    """Fine-tune on the rollouts of a store, through lopd's own loop, for so many steps at this rate."""
    (steps, lr), tokenizer = pace, _TOKENIZERS[setting.task]
    student = CausalLMStudent(model, fingerprint_tokenizer(tokenizer))
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream = batches(store, teacher=None, rollouts_per_step=setting.batch, tokens_per_batch=TOKENS_PER_BATCH)[:steps]
    for _ in opd_steps(student, scheduled(stream, optimizer, lr), FusedSFTLoss(), optimizer):
        pass
    student.export(folder, tokenizer, stream.lineage)
