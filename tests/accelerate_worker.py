"""Training as `ranks_worker` does it, wrapped by accelerate; torchrun starts it, which is what `accelerate launch` starts on GPUs."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from attrs import asdict
from conftest import TOKENIZER_ID, build_model
from ranks_worker import STEPS, Case, make_optimizer, make_store

from lopd import CausalLMStudent, FusedOPDLoss, batches, opd_steps
from lopd.records.ranks import inner, on_first


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    case = Case()
    student = CausalLMStudent(build_model(case.model, seed=3), TOKENIZER_ID)
    student, optimizer = accelerator.prepare(student, make_optimizer(student))
    stream = batches(make_store(case.per_step), rollouts_per_step=case.per_step, tokens_per_batch=50, ref="behavior")[:STEPS]
    history = [asdict(metrics) for metrics in opd_steps(student, stream, FusedOPDLoss(), optimizer)]
    found = {"history": history, "weights": on_first(inner(student).state_dict())}
    if accelerator.is_main_process:
        torch.save((accelerator.num_processes, found), Path(folder) / "found.pt")
    accelerator.wait_for_everyone()
    os._exit(0)  # see `ranks_worker`


if __name__ == "__main__":
    main(sys.argv[1])
