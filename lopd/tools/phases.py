"""A run that is a row of phases, each done once: what a program needs to be killed and called again."""

import hashlib
import json
import math
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
from attrs import asdict, evolve, frozen
from torch.optim import Optimizer

from lopd.engines.conditions import randomly
from lopd.engines.student import CausalLMStudent
from lopd.errors import StoreWriteError, TrainingWarning
from lopd.guards.watch import watch_drift
from lopd.protocols import LogprobReader, OPDLoss
from lopd.protocols.reading import usual_end
from lopd.records.devices import give_back
from lopd.records.files import open_anywhere
from lopd.records.flush import flush
from lopd.records.lineage import Lineage
from lopd.records.optional import need
from lopd.records.paths import is_there, walked, without_secrets
from lopd.records.ranks import Ranks
from lopd.records.steps import Step, StepMetrics
from lopd.records.unfinished import unfinished
from lopd.records.warn import noting, warn_user
from lopd.tools.claims import check_claim, read_kept
from lopd.tools.console import PlainConsole, table
from lopd.tools.report import RunHistory, decoder_of, write_run_report
from lopd.verbs.checkpoint import load_checkpoint, save_checkpoint
from lopd.verbs.loader import StepStream
from lopd.verbs.showing import UNWATCHED_S
from lopd.verbs.train import opd_steps

console = PlainConsole()
#: Added to the seed of a run, with which rollouts are drawn.  Random numbers of a prompt are the same for all models, and from those that drew the
#: text of SFT a student draws that text again, far more often than its policy does.
EVALUATION_SEEDS, TEXT_SEEDS = 1_000, 1_000_000
_HIDDEN = ("name", "peak_rss_gib")
_BETWEEN_CHECKPOINTS = 5
#: Seconds of training for each of saving, where that takes more than one: a large student is written for longer than a few steps take.
_APART = 10
#: Lines that a training prints, where a step takes less than a minute.
_LINES = 20
_STILL = 1e-5  # a norm of a step's gradient that is rounding


def counted(history: Sequence[StepMetrics]) -> dict[str, int]:
    """Count the tokens of a training."""
    return {"response_tokens": sum(m.response_tokens for m in history), "read_tokens": sum(m.read_tokens for m in history)}


def counted_in(store: LogprobReader) -> dict[str, int]:
    """Count the tokens of a store, which were sampled or scored."""
    lengths = store.lengths()
    return {"response_tokens": int(lengths[:, 1].sum()), "read_tokens": int(lengths.sum())}


@frozen
class Run:
    """A folder in which finished phases are kept.

    Args:
        folder: the run's folder.
    """

    folder: Path

    def phase(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `work` gives, with its wall time and the number of attempts; it is computed once, and read back afterwards.

        A phase that was killed and resumed has more than one attempt, and its wall time is that of the last.

        Raises:
            ConflictError: what is kept of it cannot be read.
        """
        path = self._row(name)
        if is_there(path):
            row: dict[str, Any] = read_kept(path, Mapping[str, Any], "remove it, to do its phase again")
        else:
            console.rule(name, align="left")
            begun = path.with_suffix(".attempts")
            attempts = 1 + (read_kept(begun, int, "remove it") or 0)
            write_json(begun, attempts)
            started = perf_counter()
            row = {"name": name, "response_tokens": 0, "read_tokens": 0, "held_out_reverse_kl": None, "ci95": None, "attempts": attempts}
            give_back()  # what the phase before held
            with noting() as said:
                row |= work()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
            row |= {"warnings": said, "wall_s": round(perf_counter() - started, 2), "peak_rss_gib": round(peak, 2)}
            write_json(path, row)
        shown = {k.replace("_", " "): v for k, v in row.items() if k not in _HIDDEN and v is not None and not isinstance(v, list | dict)}
        console.print(table(name, list(shown), [list(shown.values())]))
        return row

    def phases(self, work: Mapping[str, Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
        """Do the phases that are left, in this order, and return all rows; what was made from a phase that is done again is made again too."""
        for name in [*work][len(self.kept(work)) :]:
            self._row(name).unlink(missing_ok=True)
        return [self.phase(name, work[name]) for name in work]

    def kept(self, names: Iterable[str]) -> list[str]:
        """Return those of these phases that `phases` does not do again: the first, up to one that is not done."""
        return [*takewhile(lambda name: is_there(self._row(name)), names)]

    def _row(self, name: str) -> Path:
        return self.folder / "phases" / f"{name.replace(' ', '-').lower()}.json"

    def claim(
        self,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        fixed_by: Callable[[str], str] = lambda _: "*.attempts",
        decisive: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        """Take the folder for these settings and these contents of the files it reads (see `digest`); one folder holds one run.

        A value may change as long as no phase has used it, in this folder or in those in it.

        Args:
            settings: name -> value.
            inputs: name -> digest.
            fixed_by: name -> file in `phases` that is there once it was used: "opd.json" is once this phase is done, "*.attempts" once any has begun.
                A file that is named without a `*` may be removed, to do its phase and those after it again.
            decisive: settings -> those of them that are compared, as they are; the others are only kept, and may change at any time.

        Raises:
            ConflictError: it holds the run of other settings or contents, or files of these names that no run wrote.
            StoreWriteError: it cannot be written to.
        """
        check_claim(self.folder, settings, inputs, fixed_by, decisive)
        # in this order: settings without inputs are those of another program
        write_json(self.folder / "inputs.json", inputs)
        write_json(self.folder / "settings.json", settings)


def wall_time(row: Mapping[str, Any]) -> str:
    """Return the seconds of a phase; those of the last of several attempts are marked as what they are."""
    return f"{row['wall_s']:,.0f}" + f" (attempt {row['attempts']})" * bool(row["attempts"] > 1)


def digest(path: str) -> str:
    """Return a hash of the content of a file or URL, or of all files in a folder and their names: a path may get other content under its name.

    Of a folder, names that begin with a dot are left out: tools write there (git, `hf download`, the Finder of a Mac), and no engine reads there.
    """
    folder = Path(path)
    if not folder.is_dir():
        return _digest_file(path)
    names = [file.relative_to(folder) for file in sorted(map(Path, walked(folder))) if file.is_file()]
    parts = [f"{name} {_digest_file(str(folder / name))}" for name in names if "/." not in f"/{name}"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _digest_file(path: str) -> str:
    with open_anywhere(f"File {without_secrets(path)}", path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write_json(path: Path, data: Any) -> None:
    """Write all of it or nothing, wherever a process or a machine ends, and whoever else writes it.

    Raises:
        StoreWriteError: the operating system refuses.
    """
    try:
        with unfinished(path.with_name(f".{path.name}.partial")) as partial:
            (partial / path.name).write_text(json.dumps(data, indent=1) + "\n")
            flush(partial / path.name)
            (partial / path.name).replace(path)
        flush(path.parent)
    except OSError as error:
        raise StoreWriteError(
            f"File {path}: it cannot be written ({error}); free space or mend permissions, or choose another folder."
        ) from error


def train_phase(
    checkpoints: Path, student: CausalLMStudent, optimizer: Optimizer, steps: StepStream, loss: OPDLoss, *, rate: Callable[[int], float]
) -> dict[str, Any]:
    """Train on the steps of a store, resumably; return their tokens, and the metrics of all steps as their history.

    A student that is fine-tuned on a text stops where that ends, from then on.  What dropout draws follows from the seed of the steps.

    Args:
        checkpoints: folder of the checkpoints.
        student: that is trained.
        optimizer: over its parameters.
        steps: a slice of `batches`; drift is watched where they have a teacher and a reference.
        loss: the loss of every step.
        rate: number of a step -> its learning rate.
    """
    on_text = not steps.columns.teachers and steps.columns.label is None
    if on_text and (end := usual_end(steps.store, steps.rows, student.stop_ids)) is not None:
        student.stop_at(end)
        console.print(f"the text ends with token {end}, so the student stops there, too, from now on", soft_wrap=True)
    peak = max(map(rate, range(steps.stop or 0)), default=0.0)
    set_rate(optimizer, peak)  # as it was saved

    def paced(done: int) -> Iterator[Step]:
        for step in evolve(steps, start=done):
            set_rate(optimizer, rate(step.index), peak)
            yield step

    def begin(done: int) -> Iterator[StepMetrics]:
        trained = opd_steps(student, paced(done), loss, optimizer)
        return watch_drift(trained) if steps.columns.teachers and steps.columns.ref else trained

    drawn_for = repr((steps.seed, steps.columns.teachers, steps.columns.label, Ranks.current().rank))  # SFT and OPD draw their own
    seed = int(hashlib.sha256(drawn_for.encode()).hexdigest()[:15], 16)
    history = resumably(checkpoints, student, optimizer, steps, begin, total=steps.stop or 0, seed=seed)
    if still := [metrics.step for metrics in history if metrics.grad_norm < _STILL]:
        warn_user(
            f"Training: the gradient was 0 in {len(still)} of {len(history)} steps, the first of them step {still[0]}, so these taught the student "
            "nothing; look at the metrics before: too high a rate makes probabilities 0 and 1, and a student that is its teacher learns nothing.",
            TrainingWarning,
        )
    return {**counted(history), "history": [asdict(m) for m in history]}


def set_rate(optimizer: Optimizer, rate: float, peak: float = 0.0) -> None:
    """Set the learning rate of all parameters; no warning asks for a higher one while it is less than half of its peak."""
    for group in optimizer.param_groups:
        group.update(lr=rate, initial_lr=max(rate, peak))


def write_page(folder: Path, store: LogprobReader, title: str) -> None:
    """Draw `report.html` of a run, from `metrics.json` and the trained student, `opd`, in its folder."""
    tokenizer = need("lopd.engines.finding", "Report").load_tokenizer(folder / "opd")
    history = RunHistory.read(folder / "metrics.json")
    write_run_report(
        folder / "report.html",
        store,
        history.steps,
        phases=history.phases,
        decode=decoder_of(tokenizer),
        lineage=Lineage.read(folder / "opd"),
        versions=history.versions,
        title=title,
    )


def _follow(steps: Iterable[StepMetrics], total: int) -> Iterator[StepMetrics]:
    """Yield the same metrics, with some twenty lines of them printed, or one a minute, by one of the ranks if there are several."""
    quiet, between, last = Ranks.current().rank > 0, max(total // _LINES, 1), -math.inf
    for metrics in steps:
        done = metrics.step + 1
        if not quiet and (done % between == 0 or done in (1, total) or monotonic() - last >= UNWATCHED_S):
            last = monotonic()
            console.print(f"{metrics}  ({done} of {total})", soft_wrap=True)
        yield metrics


def resumably(
    checkpoints: Path,
    student: CausalLMStudent,
    optimizer: Optimizer,
    trained_on: StepStream | Lineage,
    begin: Callable[[int], Iterable[StepMetrics]],
    *,
    total: int,
    seed: int,
) -> list[StepMetrics]:
    """Train, and return the metrics of all steps, those of a killed process included; every few steps there is a checkpoint.

    Args:
        checkpoints: their folder.
        student: whose parameters are saved and restored.
        optimizer: whose state is saved and restored.
        trained_on: the steps of a store, which are compared with those that were saved; a run that samples again at each step has a lineage only.
        begin: trains on from the step of this number.
        total: number of steps.
        seed: decides what all devices draw; of the CPU and the student's device, the caller's random state is as it was afterwards.
    """
    # a run that was killed after its last step and is still to be exported is no other run
    steps, lineage = (evolve(trained_on, stop=None), trained_on.lineage) if isinstance(trained_on, StepStream) else (None, trained_on)
    with randomly(student):
        torch.manual_seed(seed)
        done = load_checkpoint(checkpoints, student, optimizer, steps=steps)
        kept = read_kept(checkpoints / "history.json", list[Any], f"restore it, or remove {checkpoints}", needed=True) if done else []
        history = [StepMetrics.from_json(row) for row in kept[:done]]
        saved, took = monotonic(), 0.0
        for metrics in _follow(begin(done), total):
            history.append(metrics)
            due = (metrics.step + 1) % _BETWEEN_CHECKPOINTS == 0
            # ranks save together, so the first one's clock counts
            if due and Ranks.current().gather([took < 1 or monotonic() - saved >= _APART * took])[0]:
                begun = monotonic()
                Ranks.current().first(lambda: write_json(checkpoints / "history.json", [asdict(m) for m in history]))
                save_checkpoint(checkpoints, student, optimizer, next_step=metrics.step + 1, lineage=lineage, steps=steps)
                saved, took = monotonic(), monotonic() - begun
    return history
