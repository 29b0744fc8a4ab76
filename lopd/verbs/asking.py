"""How verbs ask an engine: in several calls at a time, and on without the rows that it refuses, for one bad row must not stop a month of work."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError, SourceError
from lopd.protocols import Counted, Progress, TeacherScorer
from lopd.protocols.doors import Answer, answers_of, check_order, check_scores
from lopd.records.manifest import Manifest
from lopd.records.rollouts import Prompt, Rollout, Scores, rollout_id
from lopd.records.waiting import overlapped, own_call
from lopd.verbs.showing import Showing

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def bounded(
    owner: str,
    call: Callable[[Sequence[_Item]], tuple[list[_Result], list[tuple[_Item, str]]]],
    batches: Iterable[Sequence[_Item]],
    *,
    at_once: int,
    most: int,
) -> Generator[tuple[Sequence[_Item], list[_Result], list[tuple[_Item, str]]], None, None]:
    """Yield each batch in order with what `call` gives for its items, and with those that it refuses and why; see `isolate` and `overlapped`.

    Raises:
        EngineError: more than `most` are refused in all batches together.
    """
    reasons: list[str] = []
    for batch, (results, refused) in overlapped(call, batches, at_once, leave=True):
        reasons += [reason for _, reason in refused]
        _check_refused(owner, reasons, most)
        yield batch, results, refused


@contextmanager
def shown(
    progress: Progress | None, what: str, total: int, done: int, tokens: int | None, *, counted: Counted = "read tokens"
) -> Iterator[Callable[[int, int, int], None]]:
    """Begin a progress, `Showing` for None, and end it with the block; gives what to call as `Progress.advance`."""
    progress = Showing() if progress is None else progress
    progress.begin(what, total, done, tokens, counted)
    try:
        yield progress.advance
    finally:
        progress.end()


def isolate(
    owner: str, kind: type[Answer], call: Callable[[Sequence[_Item]], Sequence[Answer]], items: Sequence[_Item], most: int
) -> tuple[list[Answer], list[tuple[_Item, str]]]:
    """Return what `call` gives for all items but those that it refuses, in order, and why it refuses those.

    A refused call is tried again in halves, down to the items that are refused alone.  What our engines check before they compute (lengths,
    ids) is found at once; a NaN costs the halves that hold it again.

    Args:
        owner: how messages name the engine.
        kind: what it gives.
        call: raises ContextOverflowError or InvalidRecordError if it refuses an item; any other error goes through.
        items: for one call.
        most: refused items that may be.

    Raises:
        EngineError: more than `most` are refused; it gives the first reason.
        InterruptedError: the verb that asked was left (`own_call`).
        SourceError, ScorerError: see `answers_of`.
    """
    results: list[Answer] = []
    refused: list[tuple[_Item, str]] = []
    waiting = [items] if items else []
    while waiting:
        if own_call().cancelled():
            raise InterruptedError
        part = waiting.pop()
        try:
            # a list first: a generator may give some before it refuses, and those are asked for again
            results += answers_of(kind, call(part))
        except (ContextOverflowError, InvalidRecordError) as error:
            middle = len(part) // 2
            if middle:
                waiting += [part[middle:], part[:middle]]
                continue
            refused.append((part[0], str(error)))
            _check_refused(owner, [reason for _, reason in refused], most)
    return results, refused


def _check_refused(owner: str, reasons: Sequence[str], most: int) -> None:
    if len(reasons) > most:
        raise EngineError(
            f"{owner}: it refused {len(reasons)} rows, expected at most {most} (`max_refused`); the first reason is {reasons[0]!r}; set right what "
            "is wrong with them all, or allow more."
        )


def check_rollouts(manifest: Manifest, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
    """Refuse other rollouts than every sample of these prompts, in order.

    Raises:
        SourceError: one is another or missing, or has the tokens of another prompt, or another round.
    """
    samples, generation = range(manifest.sampling.samples_per_prompt), manifest.generation
    wanted = [rollout_id(prompt.prompt_id, sample, generation) for prompt in prompts for sample in samples]
    check_order(Rollout, rollouts, wanted)
    for prompt, rollout in zip((prompt for prompt in prompts for _ in samples), rollouts, strict=True):
        if rollout.generation != generation or not np.array_equal(rollout.prompt_ids, prompt.token_ids):
            raise SourceError(
                f"Rollout {rollout.rollout_id!r}: it has generation {rollout.generation} and a prompt of {rollout.prompt_ids.size} tokens, expected "
                f"generation {generation} and the {prompt.token_ids.size} tokens of prompt {prompt.prompt_id!r}; make it with `prompt.token_ids` and "
                "`generation=`."
            )


def score_each(scorer: TeacherScorer, rollouts: Sequence[Rollout], most: int) -> tuple[list[Scores], dict[str, str]]:
    """Return scores of the rollouts that are not refused, in order, and why the others are, by id.

    Raises:
        EngineError: more than `most` are refused.
        ScorerError: see `answers_of` and `check_scores`.
    """
    scores, refused = isolate(f"Scorer {scorer.provenance.model}", Scores, scorer.score, rollouts, most)
    return scores, check_scores(rollouts, scores, refused)
