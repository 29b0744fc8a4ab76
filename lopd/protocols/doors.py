"""What is asked of arguments at the door of a verb, and of what engines give back, so that a wrong one is a sentence, and not a raw error."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from inspect import getmembers, isfunction, signature
from itertools import filterfalse, zip_longest
from typing import Any, TypeVar

import numpy as np
from torch.nn.parallel import DataParallel
from torch.optim import Optimizer

from lopd.errors import ArgumentError, ConflictError, InvalidRecordError, LopdError, ScorerError, SourceError
from lopd.protocols import LogprobReader, LogprobStore, OPDLoss, Progress, RolloutSource, Student, TeacherScorer
from lopd.records.arrays import Int32Array
from lopd.records.checks import a_kind, check_call, check_kind, check_list
from lopd.records.ranks import inner
from lopd.records.rollouts import Prompt, Rollout, Scores, prompt_id_of, rollout_id

Answer = TypeVar("Answer", Rollout, Scores)


class _Optimizer:
    """What lopd asks of an optimizer; wrappers have this much in common."""

    step = zero_grad = state_dict = load_state_dict = None


#: How messages name each noun, and what to pass in place of something else.
_NOUNS: dict[type, tuple[str, str]] = {
    LogprobReader: ("Store", "open it: `lopd.open_store(path)`"),
    LogprobStore: ("Store", "open it: `lopd.open_store(path)`"),
    OPDLoss: ("Loss", "make one: `lopd.FusedOPDLoss()`"),
    Optimizer: ("Optimizer", "make one: `torch.optim.AdamW(student.parameters())`"),
    Progress: ("Progress", "pass None for a bar or lines, or `RichProgress(Console(quiet=True))` for nothing"),
    RolloutSource: ("Source", "make one: `HFSource(model, tokenizer, SamplingParams())`"),
    Student: ("Student", "wrap it: `lopd.CausalLMStudent(model, tokenizer)`"),
    TeacherScorer: ("Scorer", "make one: `HFScorer(model, tokenizer)`"),
}

#: The error for other answers of an engine, how messages name it, several answers and one, and what it gives.
_ANSWERS: dict[type, tuple[type[LopdError], str, str, str, str]] = {
    Rollout: (
        *(SourceError, "Source", "Rollouts", "rollout {} of {} is {!r}"),
        "`sample` gives every sample of every prompt, in order, in one flat list",
    ),
    Scores: (
        *(ScorerError, "Scorer", "Scores", "score {} of {} is of {!r}"),
        "`score` gives one for each rollout, in order, made with `Scores.of(rollout, ...)`",
    ),
}


def check_noun(value: object, noun: type) -> None:
    """Refuse what is not of this noun, by names that it lacks, or the arguments of its methods; a student may be inside a DistributedDataParallel.

    Raises:
        ArgumentError: it is something else, such as an objective in place of a loss, a class in place of an object, or a noun of an older lopd.
    """
    (name, remedy), kind, thing = _NOUNS[noun], _Optimizer if noun is Optimizer else noun, inner(value)
    if noun is Student and isinstance(value, DataParallel):
        remedy = "leave that out, or put the student in DistributedDataParallel, in a process for each card (torchrun)"
    check_kind(name, thing, kind, remedy)
    # it can be called, and would end in the first step
    if noun is OPDLoss and hasattr(value, "ids") and hasattr(value, "wants_entropy"):
        raise ArgumentError(f"{name}: it is {a_kind(value)}, which is an objective; pass a loss on it: `FusedLoss(...)`.")
    for method, call in getmembers(kind, isfunction):
        if method == "__call__" or not method.startswith("_"):
            _, *needed = (p.name for p in signature(call).parameters.values() if p.default is p.empty)
            check_call(f"{name}: `{method}`", thing if method == "__call__" else getattr(thing, method), ", ".join(needed))


def check_prompt_list(prompts: Sequence[Prompt], *, unique: bool = False) -> None:
    """Refuse what is not a list of prompts, or is empty, or has an id twice where that matters.

    Raises:
        ArgumentError: it cannot be indexed, such as a generator or a single prompt, or it is the path of a file, or one is not a `Prompt`.
        InvalidRecordError: the list is empty, or an id occurs twice.
    """
    if isinstance(prompts, str | os.PathLike):
        raise ArgumentError(
            f"Prompts: they are {str(prompts)!r:.80}, expected a list; read a file with `lopd.read_prompts(path, tokenizer)`, or make them of texts "
            "with `lopd.make_prompts`."
        )
    ids = ids_of(prompts)
    if not ids:
        raise InvalidRecordError("Prompts: there are 0, expected at least 1; check the prompt file.")
    for name in (name for name, count in Counter(ids).items() if unique and count > 1):
        raise InvalidRecordError(
            f"Prompt {name!r}: its id occurs twice, expected unique ids; rename or drop one, and for more samples of a prompt raise "
            "`samples_per_prompt`."
        )


def ids_of(prompts: Sequence[Prompt]) -> list[str]:
    """Return the ids of prompts.

    Raises:
        ArgumentError: they are something else.
    """
    check_list("Prompts", prompts)
    for wrong in (prompt for prompt in prompts if not isinstance(prompt, Prompt)):
        raise ArgumentError(f"Prompts: one is {a_kind(wrong)} ({wrong!r:.40}), expected a Prompt; make them with `lopd.make_prompts`.")
    return [prompt.prompt_id for prompt in prompts]


def check_prompts_of(owner: str, reader: LogprobReader, prompts: Iterable[Prompt], rollouts: Iterable[Rollout]) -> None:
    """Refuse rollouts of a store that have the ids of these prompts, and were sampled from others.

    Where one prompt begins with the other, they may be turns of one conversation; so may they where the first rollout of the id and round fits, for
    a template may rewrite what came before a turn.

    Raises:
        ConflictError: it names the first.
    """
    known = dict[str, list[Int32Array]]()
    for prompt in prompts:
        known.setdefault(prompt.prompt_id, []).append(prompt.token_ids)

    def fits(rollout: Rollout) -> bool:
        stored = rollout.prompt_ids
        return any(np.array_equal(ids[: stored.size], stored[: ids.size]) for ids in known[prompt_id_of(rollout.rollout_id)])

    for rollout in filterfalse(fits, rollouts):
        name = prompt_id_of(rollout.rollout_id)
        first = reader.find([rollout_id(name, 0, rollout.generation)])
        if first[0] < 0 or not fits(reader.read(first.tolist())[0].rollout):
            remedy = "pass the prompts that were sampled from, or, where others have their ids, only rows of their rounds"
            raise other_prompt(owner, rollout, name, f"{remedy} (`rows_of(store, prompts, [ROUND])`)")


def other_prompt(owner: str, rollout: Rollout, name: str, remedy: str) -> ConflictError:
    """Return the error for a rollout that was sampled from another prompt than the one of this name."""
    size = rollout.prompt_ids.size
    return ConflictError(
        f"{owner}: rollout {rollout.rollout_id!r} has a prompt of {size} tokens other than those of prompt {name!r}; {remedy}."
    )


def answers_of(kind: type[Answer], given: object) -> list[Answer]:
    """Return what a source or a scorer gave as a list.

    Raises:
        SourceError: it is something else than rollouts.
        ScorerError: it is something else than scores.
    """
    error, owner, several, _, rule = _ANSWERS[kind]
    answers: list[Any] = list(given if isinstance(given, Iterable) else [given])
    for other in (answer for answer in answers if not isinstance(answer, kind) or answer is given):
        raise error(f"{owner}: it gave {a_kind(other)}, expected {several}; {rule}.")
    return answers


def check_order(kind: type[Answer], answers: Sequence[Answer], wanted: Sequence[str]) -> None:
    """Refuse other answers than one for each of these ids, in order.

    Raises:
        SourceError: a rollout is another or missing.
        ScorerError: a score is another or missing.
    """
    error, owner, _, one, rule = _ANSWERS[kind]
    for place, (got, name) in enumerate(zip_longest([answer.rollout_id for answer in answers], wanted)):
        if got != name:
            raise error(f"{owner}: {one.format(place, len(answers), got)}, expected {name!r}; {rule}.")


def check_scores(rollouts: Sequence[Rollout], scores: Sequence[Scores], refused: Sequence[tuple[Rollout, str]]) -> dict[str, str]:
    """Return why rollouts are refused, by id.

    Raises:
        ScorerError: the scores are not those of the other rollouts, in order, or not one for each of their tokens.
    """
    reasons = {rollout.rollout_id: reason for rollout, reason in refused}
    accepted = [rollout for rollout in rollouts if rollout.rollout_id not in reasons]
    check_order(Scores, scores, [rollout.rollout_id for rollout in accepted])
    for rollout, score in zip(accepted, scores, strict=True):
        if (score.content_hash, score.logprobs.size) != (rollout.content_hash, rollout.response_ids.size):
            raise ScorerError(
                f"Rollout {rollout.rollout_id!r}: the scorer gave {score.logprobs.size} log-probs of hash {score.content_hash.hex()[:8]}, "
                f"expected {rollout.response_ids.size} of {rollout.content_hash.hex()[:8]}; make them with `Scores.of(rollout, ...)`."
            )
    return reasons
