"""lopd's loss in `transformers.Trainer`, for those who want to keep its callbacks, logging and launchers: the same step as `opd_steps`.

Trainer is given lopd's student as the model: what it calls is the student, and what comes back is lopd's `LossOutput`, a sum over tokens.
"""

from typing import Any

import numpy as np
import torch
from attrs import frozen
from tiny import QUESTIONS, model_folders
from transformers import Trainer, TrainingArguments

from lopd import CausalLMStudent, FusedOPDLoss, MemoryStore, SamplingParams, batches, by_token, collate, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.errors import ArgumentError
from lopd.guards import check_vocabulary
from lopd.protocols import OPDLoss
from lopd.records import LossOutput, make_prompts
from lopd.verbs import StepStream

#: Options by which Trainer asks something of a transformers model -> what to do with a student.
INSTEAD = {
    "save_strategy": "call `student.export` at the end: a checkpoint of Trainer is not a model folder, and fails where embeddings are tied",
    "gradient_checkpointing": "pass it to `CausalLMStudent`",
    "eval_strategy": "call `lopd.evaluate` on what samples from the export",
    "eval_dataset": "call `lopd.evaluate` on what samples from the export",
}


@frozen
class Collator:
    """Rows of a store -> what the student is called with, and the labels by which Trainer counts the tokens of a step."""

    steps: StepStream
    loss: OPDLoss

    def __call__(self, rows: list[int]) -> dict[str, Any]:
        """Return arguments of `CausalLMStudent.forward`, and `labels`, which Trainer takes out again."""
        # the columns that `batches` was given, by their roles
        read = self.steps.columns.read(self.steps.store, np.array(rows))
        roles = {name: name for name in ("teacher", "ref", "label", "label_mean") if name in read.scores}
        # by_token: the weights of a step add up to its number of tokens, which is what Trainer knows, over micro-batches and ranks
        batch = collate(read, by_token, **roles, top_k="teacher" if self.steps.columns.top_k else None)
        return {"batch": batch, "loss": self.loss, "labels": batch.targets.masked_fill(batch.weight == 0, -100)}


def mean_over_step(output: LossOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:  # noqa: ARG001  # Trainer's names
    """Return a micro-batch's share of the step's mean: the `compute_loss_func` of Trainer."""
    return output.loss_sum / num_items_in_batch.clamp(min=1)  # of a step in which no token counts the loss is 0


def make_trainer(student: CausalLMStudent, steps: StepStream, loss: OPDLoss, **options: Any) -> Trainer:
    """Make a Trainer over the rows that `batches` checked and found usable; `options` are those of TrainingArguments, without those of `INSTEAD`."""
    for name, value in options.items():
        if name in INSTEAD and value not in ("no", False, None):
            raise ArgumentError(f"Trainer: its option {name} is not for a student; leave it out, and {INSTEAD[name]}.")
    check_vocabulary("Store", steps.store.manifest.tokenizer, "the student's", student.tokenizer)
    fixed = {
        "remove_unused_columns": False,  # the collator chooses what the student is called with
        "dataloader_pin_memory": False,  # the student moves a batch to where it is
        "ddp_find_unused_parameters": False,  # on several ranks it would look for tensors, and find none in a `LossOutput`
        "use_cpu": not torch.cuda.is_available(),  # Apple's GPUs have no float64
        "save_strategy": "no",
        "report_to": "none",
    }
    args = TrainingArguments(**{**fixed, **options})
    args._n_gpu = min(args.n_gpu, 1)  # Trainer would put several into DataParallel, which looks for tensors in outputs; torchrun takes all
    return Trainer(
        model=student,
        args=args,
        train_dataset=steps.rows.tolist(),
        data_collator=Collator(steps, loss),
        compute_loss_func=mean_over_step,
    )


if __name__ == "__main__":
    student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own
    source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12))
    store = MemoryStore(source.manifest)
    collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), store)
    score_rollouts(store, HFScorer.from_folder(teacher_dir))

    model, tokenizer = load_model(student_dir, torch.float32)
    student = CausalLMStudent(model, tokenizer)
    steps = batches(store, ref="behavior")
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "max_steps": 8,
        "logging_steps": 1,
    }
    trainer = make_trainer(student, steps, FusedOPDLoss(ratio_to_ref=True), output_dir="runs/13", **settings)
    trainer.train()
    print(f"{trainer.state.global_step} steps, loss {trainer.state.log_history[0]['loss']:.3f} in the first")
    student.export("runs/13/student", tokenizer, steps.lineage)
