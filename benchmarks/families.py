"""Which families of transformers can be scored, sampled, trained and exported here: `make bench-families`.

    python benchmarks/families.py             # writes benchmarks/results/families.json; less than ten minutes on two cores
    python benchmarks/families.py llama rwkv  # prints these, writes nothing

Every causal LM of the installed transformers is built as a tiny random model (`tiny_models.py`) in float32.  The truth is the whole model on one
rollout alone, without cache.  Each ability is `right` (its error is within `LIMIT`), `refused` by an error of lopd (with its cause), `wrong`, or
`raw` (another library's error came through).
"""

import argparse
import copy
import signal
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from record import describe_machine, result_file
from tiny_models import CONTEXT, VARIANTS, VOCAB, build_model, build_tokenizer, families

from lopd import CausalLMStudent, FusedOPDLoss, Lineage, LopdError, ModelId, Prompt, Rollout, SamplingParams, collate
from lopd.engines.hf import HFScorer, HFSource, folder_model_id, load_model, model_id
from lopd.records import ScoredRollout

Row = dict[str, Any]

#: Nats; of a gradient, relative to its norm.
LIMIT = 1e-3
#: The error where there is not a number to compare, or the rollouts themselves differ.
BEYOND = 1e9
SECONDS = 60
TOKENIZER = build_tokenizer()
LINEAGE = Lineage(ModelId("sft teacher", "1", "float32"))
SAMPLING = SamplingParams(max_new_tokens=10, samples_per_prompt=2, stop_ids=tuple(range(20)))  # a fifth of the vocabulary: rows leave early


class NotBuiltError(Exception):
    """transformers cannot save and load the model, or peft cannot wrap it; lopd has no part in it."""


class OutOfTimeError(BaseException):
    """A family takes longer than `SECONDS`; not an `Exception`, so that nothing but `run` catches it."""


def make_prompts() -> list[Prompt]:
    """Make seven prompts of 1 to 11 tokens, the first of them with EOS in the middle."""
    rng = np.random.default_rng(0)
    drawn = [rng.integers(4, VOCAB, size) for size in (5, 1, 11, 3, 8, 2, 5)]
    drawn[0][2] = TOKENIZER.eos_token_id
    return [Prompt(f"p{i}", ids) for i, ids in enumerate(drawn)]


def make_rollouts() -> list[Rollout]:
    """Make seven rollouts of 2 to 15 tokens, one with a single token on either side and one with a mask."""
    rng = np.random.default_rng(1)
    lengths = [(4, 6), (1, 1), (9, 2), (2, 13), (1, 5), (12, 1), (6, 6)]
    drawn = [(rng.integers(4, VOCAB, p), rng.integers(4, VOCAB, t), np.ones(t, bool)) for p, t in lengths]
    drawn[3][2][2:5] = False
    return [Rollout(f"r{i}/s0/g0", prompt, response, mask, "length") for i, (prompt, response, mask) in enumerate(drawn)]


PROMPTS, ROLLOUTS = make_prompts(), make_rollouts()
RECORDS = [
    ScoredRollout(rollout, {"teacher": -np.random.default_rng(i).exponential(4, rollout.response_ids.size).astype(np.float32)})
    for i, rollout in enumerate(ROLLOUTS)
]


def whole_logprobs(model: Any, rollout: Rollout) -> torch.Tensor:
    """Return (T,) log-probs of the response by the whole model on this rollout alone, without cache."""
    ids = torch.tensor([*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()])
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1, :VOCAB]
    logprobs: torch.Tensor = logits.float().log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)
    return logprobs[rollout.prompt_ids.size - 1 :]


def truth(model: Any, rollouts: Sequence[Rollout]) -> list[NDArray[np.float32]]:
    """Return the log-probs of each rollout, in eval mode."""
    model.eval()
    with torch.no_grad():
        return [whole_logprobs(model, rollout).numpy() for rollout in rollouts]


def behavior(rollouts: Sequence[Rollout]) -> list[NDArray[np.float32]]:
    """Return the log-probs that were recorded while sampling."""
    return [rollout.behavior_logprobs for rollout in rollouts if rollout.behavior_logprobs is not None]


def largest(found: Sequence[NDArray[np.float32]], wanted: Sequence[NDArray[np.float32]]) -> float:
    """Return the largest difference, nats; `BEYOND` if one is not a number."""
    differences = np.concatenate([np.abs(a - b) for a, b in zip(found, wanted, strict=True)])
    return float(differences.max()) if np.isfinite(differences).all() else BEYOND


def score(model: Any, _: Path) -> float:
    """Return the error of the scores of rollouts of unlike length in one batch."""
    return largest(_scores(model), truth(model, ROLLOUTS))


def sample(model: Any, _: Path) -> float:
    """Return the error of the log-probs that are recorded while prompts of unlike length are sampled together.

    The error is `BEYOND` if another batch gives other rollouts.
    """
    source = HFSource(model, TOKENIZER, SAMPLING)
    together = source.sample(PROMPTS)
    alone = [rollout for prompt in PROMPTS for rollout in source.sample([prompt])]
    error = max(largest(behavior(rollouts), truth(model, rollouts)) for rollouts in (together, alone))
    same = all(np.array_equal(a.response_ids, b.response_ids) for a, b in zip(together, alone, strict=True))
    return error if same or error > LIMIT else BEYOND


def length(model: Any, _: Path) -> float:
    """Return the error of scores of a rollout that is longer than the context, and of log-probs of one that is sampled up to it and beyond.

    Most models refuse these.
    """
    ids = np.random.default_rng(2).integers(4, VOCAB, CONTEXT + 6)
    long = [Rollout("long/s0/g0", ids[:4], ids[4:], np.ones(CONTEXT + 2, bool), "length")]

    def sampled() -> float:
        drawn = HFSource(model, TOKENIZER, SAMPLING).sample([Prompt("long", ids[: CONTEXT - 4])])
        return largest(behavior(drawn), truth(model, drawn))

    error, refusal = 0.0, None
    for part in (lambda: largest(_scores(model, long), truth(model, long)), sampled):
        try:
            error = max(error, part())
        except LopdError as refused:
            refusal = refused
    if refusal is not None and error <= LIMIT:
        raise refusal
    return error


def gradient(model: Any, _: Path) -> float:
    """Return the error of the gradient of a packed batch, relative to that of the plain loss on each rollout alone."""
    plain = copy.deepcopy(model).train()  # before anything has run: some models keep what they computed, and cannot be copied then
    student = CausalLMStudent(model, TOKENIZER)
    if (attention := model.config._attn_implementation) != plain.config._attn_implementation:
        plain.set_attn_implementation(attention)  # as the student did
    _train(student)
    for record in RECORDS:
        logprobs = whole_logprobs(plain, record.rollout)
        mask = torch.from_numpy(record.rollout.loss_mask).float()
        advantages = torch.from_numpy(record.scores["teacher"]) - logprobs.detach()
        (-mask / mask.sum() * advantages * logprobs).sum().backward()
    pairs = [(_gradient_of(a), _gradient_of(b)) for a, b in zip(student.model.parameters(), plain.parameters(), strict=True)]
    squares = sum(float((a - b).square().sum()) for a, b in pairs), sum(float(b.square().sum()) for _, b in pairs)
    return float((squares[0] / squares[1]) ** 0.5) if squares[1] else BEYOND


def _gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter, dtype=torch.float64) if parameter.grad is None else parameter.grad.double()


def _train(student: CausalLMStudent, rate: float = 0.0) -> None:
    """Train on a packed batch for one step at this rate; the gradients stay."""
    student(collate(RECORDS, teacher="teacher"), FusedOPDLoss(clip=None)).loss_sum.backward()
    torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=rate).step()


def export(model: Any, folder: Path) -> float:
    """Return the error of the scores of a trained student by the model that is loaded from its folder."""
    student = CausalLMStudent(model, TOKENIZER)
    _train(student, rate=0.01)
    student.export(folder / "student", TOKENIZER, LINEAGE)
    loaded, _ = load_model(folder / "student", torch.float32)
    return largest(truth(loaded, ROLLOUTS), truth(student.model, ROLLOUTS))


def identity(model: Any, folder: Path) -> float:
    """Return how many identities, beyond one, the model has in memory, in its folder, and loaded from there."""
    CausalLMStudent(model, TOKENIZER).export(folder / "same", TOKENIZER, LINEAGE)
    loaded, _ = load_model(folder / "same", torch.float32)
    return len({model_id(model), model_id(loaded), folder_model_id(folder / "same", torch.float32)}) - 1.0


def lora(model: Any, folder: Path) -> float:
    """Return the error of scores with adapters on all linear layers, and of scores of the trained adapters loaded from their folder."""
    adapted = _adapted(model, folder / "base")
    error = score(adapted, folder)
    student = CausalLMStudent(adapted, TOKENIZER)
    _train(student, rate=0.01)
    student.export(folder / "adapters", TOKENIZER, LINEAGE)
    loaded, _ = load_model(folder / "adapters", torch.float32)
    return max(error, largest(truth(loaded, ROLLOUTS), truth(student.model, ROLLOUTS)))


def _adapted(model: Any, folder: Path) -> Any:
    """Wrap the model with peft, and save it to the folder too.

    Raises:
        NotBuiltError: the two libraries cannot do it.
    """
    try:
        model.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        base, _ = load_model(folder)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(base, config).eval()
        truth(adapted, ROLLOUTS)
    except LopdError:
        raise
    except Exception as error:
        raise NotBuiltError(_named(error)) from error
    return adapted


def bfloat16(model: Any, _: Path) -> float:
    """Return the mean error of scores in bfloat16 beyond what bfloat16 does to the whole model.

    Both are mean differences to the same weights in float32.
    """
    low = model.to(torch.bfloat16)
    found, wanted = _scores(low), truth(low, ROLLOUTS)
    return max(_mean_difference(found, wanted) - _mean_difference(wanted, truth(low.float(), ROLLOUTS)), 0.0)


def _mean_difference(found: Sequence[NDArray[np.float32]], wanted: Sequence[NDArray[np.float32]]) -> float:
    return float(np.abs(np.concatenate(found) - np.concatenate(wanted)).mean())


def _scores(model: Any, rollouts: Sequence[Rollout] = ROLLOUTS) -> list[NDArray[np.float32]]:
    return [scores.logprobs for scores in HFScorer(model, TOKENIZER).score(rollouts)]


ABILITIES: Mapping[str, Callable[[Any, Path], float]] = {
    check.__name__: check for check in (score, sample, length, gradient, export, identity, lora, bfloat16)
}


def attempt(check: Callable[[Any, Path], float], model: Any, folder: Path) -> Row:
    """Return the verdict on one ability, with its error or its cause."""
    try:
        error = check(copy.deepcopy(model), folder)
    except LopdError as refusal:
        return {"verdict": "refused", "cause": _first_clause(str(refusal).replace(f"{folder}/", ""))}  # a folder of this run
    except NotBuiltError as missing:
        return {"verdict": "not built", "cause": str(missing)}
    except Exception as raw:
        return {"verdict": "raw", "cause": _named(raw)}
    if error <= LIMIT:
        return {"verdict": "right", "error": error}
    return {"verdict": "wrong", "error": error if error < BEYOND else BEYOND}


def _named(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].split('. ')[0][:160]}"


def _first_clause(sentence: str) -> str:
    """Return the first clause of a message: `Model LlamaForCausalLM: it is small, expected large; enlarge it.` is cut to `it is small`."""
    _, _, rest = sentence.partition(": ")
    return (rest or sentence).split(", expected ")[0].split("; ")[0].rstrip(".")


def measure(name: str, abilities: Sequence[str] = tuple(ABILITIES)) -> Row:
    """Check all abilities of one family or variant, or return why it cannot be built."""
    family, special = VARIANTS.get(name, (name, {}))
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            model = build_model(family, **special)
        except Exception as error:
            return {"family": name, "not_built": _named(error)}
        found = {ability: attempt(ABILITIES[ability], model, Path(folder)) for ability in abilities}
    return {"family": name, "class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters()), **found}


def run(name: str) -> Row:
    """Call `measure` with a limit of time, in a process that computes with one thread."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        return measure(name)
    except OutOfTimeError:
        late = {"verdict": "raw", "cause": f"not done in {SECONDS} s"}
        return {"family": name, **dict.fromkeys(ABILITIES, late)}
    finally:
        signal.alarm(0)


def _stop(*_: Any) -> None:
    raise OutOfTimeError


def find_goals(rows: Sequence[Row]) -> list[Row]:
    """Judge the number of families, and that nothing is silently wrong."""
    built = [row for row in rows if "not_built" not in row]
    tried = sum(row["family"] not in VARIANTS for row in built)
    found = [{"name": "families that were built and tried", "goal": ">= 90", "measured": tried, "met": tried >= 90}]
    for verdict, words in (("wrong", "wrong without an error"), ("raw", "that end in another library's error")):
        for ability in ABILITIES:
            number = sum(row[ability]["verdict"] == verdict for row in built)
            found.append({"name": f"{ability}: families {words}", "goal": "0", "measured": number, "met": number == 0})
    return found


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families or variants; all of them where none is named")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(options.workers) as pool:
        for row in pool.map(run, options.names or [*families(), *VARIANTS]):
            print(row, flush=True)
            rows.append(row)
    if not options.names:
        goals = find_goals(rows)
        for goal in goals:
            print("met   " if goal["met"] else "MISSED", goal["name"], "goal", goal["goal"], "measured", goal["measured"])
        result_file("families", describe_machine(), rows, goals)


if __name__ == "__main__":
    main()
