"""The same models, prompts, batch, rate and steps in TRL's DistillationTrainer: what people would use instead, with the teacher alive all along.

Its loss is the divergence over the whole vocabulary, here the reverse KL (beta = 1), of tokens that the student samples at every step.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from lopd.engines.hf import load_model
from testbed.models import Setting, prepare
from testbed.runs import Clock, Training

ARM = "TRL DistillationTrainer"


class _Measure(TrainerCallback):
    """Accuracy on the way; its time is not counted."""

    def __init__(self, at: Sequence[int], clock: Clock, accuracy: Callable[[], float]) -> None:
        self.at, self.clock, self.accuracy, self.points = at, clock, accuracy, []

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step in self.at:
            spent = self.clock.total()
            self.points.append((state.global_step, self.clock.run("evaluation", self.accuracy), spent))


def make_trainer(models: tuple[Any, Any], tokenizer: Any, prompts: Sequence[str], folder: str, **options: Any) -> Any:
    """Make a DistillationTrainer of a student by a teacher, in float32 on the CPU, that writes nothing.

    Args:
        models: student and teacher.
        tokenizer: tokenizer of both.
        prompts: as text.
        folder: for what it writes all the same.
        options: others of its configuration.
    """
    from trl import DistillationConfig, DistillationTrainer

    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": options["max_steps"]}
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    student, teacher = models
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=folder, lr_scheduler_type="constant", adam_beta2=0.98, beta=1.0, temperature=1.0, **quiet, **plain, **options
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )


def run_trl(setting: Setting, seed: int, folder: Path, curve: Sequence[int], *, rate: float = 1.0, name: str = ARM) -> dict[str, Any]:
    """Train in TRL, and return a row like those of `testbed.arms.run_arm`, under a name, at so many times the learning rate of the setting."""
    warnings.simplefilter("ignore")
    bed = prepare(setting, seed, folder, ("A",))
    training, teacher = Training.of(bed.students["A"], setting.opd_lr), load_model(bed.teachers["A"], torch.float32)[0]
    tokenizer = training.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    started = training.start(bed, bed.teachers["A"])
    prompts = [tokenizer.decode(p.token_ids).replace(" ", "") for p in bed.opd_prompts]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(
            (training.student.model, teacher),
            tokenizer,
            prompts,
            scratch,
            per_device_train_batch_size=setting.batch,
            max_steps=setting.opd_steps,
            learning_rate=setting.opd_lr * rate,
            weight_decay=0.1,
            max_completion_length=setting.max_new_tokens,
            seed=seed,
        )
        clock = Clock()
        measure = _Measure(curve, clock, lambda: training.accuracy(bed).mean)
        trainer.add_callback(measure)
        with counted(trainer, clock):
            trainer.train()
            spent = clock.split()
    row = {"setting": setting.name, "seed": seed, "arm": name, "sft_teacher": "A", "opd_teacher": "A", **started}
    ended, curve = training.measure(bed, bed.teachers["A"]), [(0, started["start"], 0.0), *measure.points]
    return {**row, **ended, "cpu_s": spent, "curve": curve}


@contextmanager
def counted(trainer: Any, clock: Clock) -> Iterator[None]:
    """Count sampling, and the forward passes of the teacher's layers; its head and log-softmax stay in what is called training."""
    sample, read, teacher = trainer._generate, trainer._get_last_hidden_state, trainer.accelerator.unwrap_model(trainer.teacher_model)

    def reading(model: Any, *arguments: Any, **options: Any) -> Any:
        if model is not teacher:
            return read(model, *arguments, **options)
        return clock.run("scoring", lambda: read(model, *arguments, **options))

    trainer._generate, trainer._get_last_hidden_state = lambda prompts: clock.run("sampling", sample, prompts), reading
    try:
        yield
    finally:
        trainer._generate, trainer._get_last_hidden_state = sample, read
