"""Tokens a second of a training step: rollouts in rows of like length, packed, plainly padded, and TRL's trainer on the same rollouts.

    python benchmarks/bench_train.py           # writes benchmarks/results/bench_train.json; twelve minutes
    python benchmarks/bench_train.py --report  # its summary and goals again, from steps with both of TRL's ways

All train the same Llama model on the same steps of a Zarr store on disk, on one thread, and take turns.  TRL's DistillationTrainer is given
the stored responses in place of those that it would sample, so its step is the teacher's forward pass, its own two and the optimizer; of the
teacher's the layers are counted apart, its head and log-softmax are not.  It pads all rollouts of a step to the longest, and its loss is the
reverse KL over the whole vocabulary, twice over with the teacher's, where lopd's needs the log-prob of one token.  It trains a step at once, and
in four accumulated parts; what is quoted is the comparison with the faster.  CPU seconds, tokens without padding.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from time import process_time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from random_rollouts import fill, random_manifest
from record import ROOT, describe_machine, judge_again, result_file
from testbed.runs import Clock
from testbed.trl_peer import ARM as TRL
from testbed.trl_peer import counted, make_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils.logging import disable_progress_bar

import lopd.verbs.loader
from lopd import CausalLMStudent, FusedOPDLoss, ZarrStore, batches, opd_steps
from lopd.engines.causal_lm import hidden_states, packed_hidden_states
from lopd.records import fingerprint_tokenizer
from lopd.verbs import StepStream

RESULT = ROOT / "benchmarks" / "results" / "bench_train.json"
VOCABULARY, PROMPT, LONGEST = 16_384, 32, 512


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of the words w0, w1, ..."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w1")  # noqa: S106


def make_model(seed: int = 0) -> LlamaForCausalLM:
    """Make a model of six layers with random weights: speed does not depend on them."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, eos_token_id=1
        )
    )


def make_store(folder: Path, tokenizer: PreTrainedTokenizerFast, rollouts: int) -> ZarrStore:
    """Write random rollouts with scores to disk."""
    store = ZarrStore.create(str(folder), random_manifest(fingerprint_tokenizer(tokenizer), LONGEST))
    fill(store, rollouts, PROMPT, LONGEST, typical=130)
    return store


@define
class Meter:
    """CPU seconds of the parts of one step."""

    parts: dict[str, float] = field(factory=dict)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call so that its CPU seconds are added to this part."""

        def counted(*arguments: Any, **options: Any) -> Any:
            begun = process_time()
            try:
                return call(*arguments, **options)
            finally:
                self.parts[name] = self.parts.get(name, 0.0) + process_time() - begun

        return counted


def in_one_row(model: Any, input_ids_N: torch.Tensor, position_ids_N: torch.Tensor, _lengths: Sequence[int]) -> torch.Tensor:
    """Return the hidden states of a pack that stays one row, however attention is computed."""
    return hidden_states(model, input_ids_N[None], position_ids_N[None])[0]


def as_they_come(lengths: NDArray[np.int64], cap: int, _rank: int, _ranks: int) -> list[NDArray[np.int64]]:
    """Return micro-batches under the same bound, but not of similar length."""
    parts: list[list[int]] = [[]]
    for place, length in enumerate(lengths):
        longest = max([length, *lengths[parts[-1]]])
        if parts[-1] and longest * (len(parts[-1]) + 1) > cap:
            parts.append([])
        parts[-1].append(place)
    return [np.array(part) for part in parts]


#: How layers see a pack, and how a step is cut into packs.
PATHS = {
    "rows of like length": (packed_hidden_states, lopd.verbs.loader._split),
    "one row": (in_one_row, lopd.verbs.loader._split),
    "rows as they come": (packed_hidden_states, as_they_come),
}


#: How TRL cuts a step: name of its rows -> parts whose gradients it accumulates.
PEERS = {TRL: 1, f"{TRL}, in four parts": 4}


class Trained:
    """A student on one of these paths.

    Args:
        path: name in `PATHS`.
        stream: the steps.
        tokenizer: the model's.
    """

    def __init__(self, path: str, stream: StepStream, tokenizer: PreTrainedTokenizerFast) -> None:
        self.path, self.stream, self.meter = path, stream, Meter()
        self.student = CausalLMStudent(make_model(), tokenizer)
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5)
        optimizer.step = self.meter.timed("optimizer", optimizer.step)
        read = self.meter.timed("reading and collating", stream.step)
        loss = self.meter.timed("head and loss, forward", FusedOPDLoss())
        self.steps = opd_steps(self.student, map(read, count()), loss, optimizer)

    def run(self) -> dict[str, Any]:
        """Train one step, and return its seconds by part and its tokens a second."""
        self.meter.parts.clear()
        layers, split = PATHS[self.path]
        layers = self.meter.timed("layers, forward", layers)
        with patch.object(self.student, "_layers", layers), patch.object(lopd.verbs.loader, "_split", split):
            begun = process_time()
            metrics = next(self.steps)
            total = process_time() - begun
        parts = {**self.meter.parts, "backward, clipping, drift": total - sum(self.meter.parts.values())}
        return {"path": self.path, "step": metrics.step, "tokens": metrics.read_tokens, "cpu_s": total, "parts_s": parts}


class InTurns(TrainerCallback):
    """Times the steps of TRL's trainer; between two of them everything else takes its turn."""

    def __init__(self, peer: str, clock: Clock, others: Callable[[], list[dict[str, Any]]]) -> None:
        self.peer, self.clock, self.others, self.rows, self.begun = peer, clock, others, [], 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.clock.seconds["scoring"], self.begun = 0.0, process_time()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Stop the clock, and run the same step on the other paths."""
        total, teacher = process_time() - self.begun, self.clock.seconds["scoring"]
        found = self.others()
        step = {"path": self.peer, "step": state.global_step - 1, "tokens": found[0]["tokens"]}
        found.append({**step, "cpu_s": total - teacher, "teacher_cpu_s": teacher})
        self.rows += [{**row, "beside": self.peer} for row in found]


def measure(folder: Path, steps: int, rollouts: int, tokens_per_batch: int) -> list[dict[str, Any]]:
    """Return a row for each step of each path beside TRL at once and in parts; the first step of each is a warm-up and left out."""
    tokenizer = make_tokenizer()
    store = make_store(folder / "store.zarr", tokenizer, steps * rollouts)
    stream = batches(store, rollouts_per_step=rollouts, tokens_per_batch=tokens_per_batch, ref="behavior")
    return [row for peer in PEERS for row in measure_beside(peer, stream, tokenizer, folder, steps)]


def measure_beside(peer: str, stream: StepStream, tokenizer: PreTrainedTokenizerFast, folder: Path, steps: int) -> list[dict[str, Any]]:
    """Return the rows of our paths and of TRL when it cuts a step in this way."""
    rollouts = stream.rollouts_per_step
    ours = [Trained(path, stream, tokenizer) for path in PATHS]
    given = iter(range(steps))

    def stored(_prompts: Sequence[str]) -> tuple[list[list[int]], list[list[int]], None, None, list[Any]]:
        """Return the rollouts of the next step, in place of samples."""
        places = lopd.verbs.loader._places_of_step(next(given), rollouts, len(stream.rows), stream.seed)
        records = [record.rollout for record in stream.store.read(stream.rows[places])]
        return [r.prompt_ids.tolist() for r in records], [r.response_ids.tolist() for r in records], None, None, []

    cut = {"per_device_train_batch_size": rollouts // PEERS[peer], "gradient_accumulation_steps": PEERS[peer]}
    options = {**cut, "max_steps": steps, "learning_rate": 1e-5, "max_completion_length": LONGEST}
    trainer = make_trainer((make_model(), make_model(1)), tokenizer, ["w2"] * (steps * rollouts), str(folder / "trl"), **options)
    trainer._generate = stored
    clock = Clock()
    turns = InTurns(peer, clock, lambda: [path.run() for path in ours])
    trainer.add_callback(turns)
    with counted(trainer, clock):
        trainer.train()
    return [row for row in turns.rows if row["step"] > 0]


def measured() -> list[dict[str, Any]]:
    """Return the steps of the result file."""
    return [row for row in json.loads(RESULT.read_text())["rows"] if "step" in row]


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for every path the median tokens a second, and how much faster than TRL it was on the same step: median and range.

    Of the ways in which TRL cut a step it is the fastest that counts.
    """
    taken = {peer: {row["step"]: row["cpu_s"] for row in rows if row["path"] == peer} for peer in PEERS}
    if missing := ", ".join(repr(peer) for peer, steps in taken.items() if not steps):
        raise ValueError(f"These rows have no step of {missing}: they are older than this script.  Measure again, without --report.")
    best = min(taken, key=lambda name: statistics.median(taken[name].values()))
    found = []
    for path in (*PATHS, *taken):
        mine = [row for row in rows if row["path"] == path and (path in taken or row["beside"] == best)]
        ratios = [taken[best][row["step"]] / row["cpu_s"] for row in mine]
        summary = {"path": path, "steps": len(mine), "tokens_per_s": statistics.median(row["tokens"] / row["cpu_s"] for row in mine)}
        summary |= {"faster_than_trl": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}
        parts = [row.get("parts_s", {}) for row in mine]
        shares = {name: statistics.median(p[name] / row["cpu_s"] for p, row in zip(parts, mine, strict=True)) for name in parts[0]}
        found.append({**summary, "share_of_a_step": shares})
    teacher = statistics.median(row["teacher_cpu_s"] / row["cpu_s"] for row in rows if row["path"] == best)
    return [*found, {"path": best, "teacher_layers_over_the_rest_of_the_step": teacher}]


def goals(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the goals of the training step."""
    ours = found[0]
    wait = ours["share_of_a_step"]["reading and collating"]
    return [
        {
            "name": "training step over TRL's on the same rollouts, its teacher's layers not counted",
            "goal": ">= 1.5",
            "measured": ours["faster_than_trl"],
            "met": ours["faster_than_trl"] >= 1.5,
        },
        {"name": "data wait, share of a step", "goal": "<= 0.02", "measured": wait, "met": wait <= 0.02},
    ]


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--steps", type=int, default=6, help="of which the first is a warm-up")
    parser.add_argument("--rollouts", type=int, default=16, help="a step")
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.simplefilter("ignore")
    if options.report:
        rows = measured()
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(Path(folder), options.steps, options.rollouts, options.tokens_per_batch)
    found = summarise(rows)
    judged = goals(found)
    for row in (*found, *judged):
        print(row)
    if options.report:
        judge_again(RESULT, [*found, *rows], judged)
    else:
        result_file(RESULT.stem, describe_machine(), [*found, *rows], judged)


if __name__ == "__main__":
    main()
