"""VERB `label_rollouts`: a store's rollouts -> a column of a verifier's values.  Run it again to resume."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from lopd.errors import InvalidRecordError, ScorerError
from lopd.protocols import Labeller, LogprobStore, Progress
from lopd.protocols.doors import check_noun, check_prompt_list, ids_of
from lopd.protocols.reading import check_same_prompts, chosen, evenly, samples_of, walk
from lopd.records.checks import call_of, check_at_least, check_call, unwrapped
from lopd.records.identity import ModelId
from lopd.records.manifest import LABEL, Provenance
from lopd.records.paths import said_without_secrets
from lopd.records.rollouts import Prompt, Rollout, Scores, prompt_id_of
from lopd.records.waiting import own_call
from lopd.verbs.asking import bounded
from lopd.verbs.filling import Filling, ScoringReport

_VERSION = "1"


def label_rollouts(
    store: LogprobStore,
    verifier: Labeller,
    prompts: Sequence[Prompt] | None,
    *,
    column: str = "label",
    name: str | None = None,
    rows: NDArray[np.int64] | None = None,
    rollouts_per_batch: int = 256,
    batches_at_once: int = 1,
    recheck: int = 8,
    max_refused: int = 64,
    retry_quarantined: bool = False,
    progress: Progress | None = None,
) -> ScoringReport:
    """Label every rollout of these prompts that has no label in this column yet, shortest first, and commit batch by batch.

    A rollout on which the verifier fails does not stop the others: whatever it raises except KeyboardInterrupt, and an answer that is not a finite
    number, puts the rollout into quarantine when all are done.  `batches(label=column)` leaves it out.  That is so of SystemExit too, which a program
    that is judged may raise; a handler of SIGTERM that shall end the call raises KeyboardInterrupt.

    Args:
        store: with rollouts in it.
        verifier: as in `evaluate`; any finite number is a label, and one for each response token is too.
        prompts: what it is given with each rollout; rollouts of other prompts are left alone.  None for all rollouts, of a store of imported
            trajectories for example: the verifier is then given the prompt's id and tokens, without text and answer.
        column: where the labels go; it belongs to one verifier.
        name: the verifier's name in the column's provenance; None takes that of the function or the class, of a `functools.partial` that of the
            function inside.  Another name is another verifier, so put a version into it if you have several.
        rows: label these only; None for all.
        rollouts_per_batch: committed together; fewer where else there would not be `batches_at_once` batches.
        batches_at_once: batches that are labelled at the same time, in threads; more than 1 for a verifier that waits, for a server or a program.
        recheck: so many rollouts that have a label are judged again first, also where none is left to label; 0 for a verifier that is random.
        max_refused: stop when one call meets more, for then it is not the rollouts.
        retry_quarantined: try those too that are in quarantine since an earlier call.
        progress: see `lopd.tools.console.RichProgress`; None shows a bar or lines, as in `score_rollouts`.

    Returns:
        As `score_rollouts`; its `floored` and `parity` are for log-probs.

    Warns:
        QuarantineWarning: some rollouts are without labels in quarantine.

    Raises:
        ArgumentError: store, prompts or progress are something else, or the verifier does not take a prompt and a rollout.
        ConflictError: the column belongs to another verifier, or to a model, or rollouts have other prompts under these ids; nothing is labelled.
        ScorerError: the verifier gives another label than the column has; nothing is labelled.
        EngineError: it failed on more than `max_refused` rollouts, or on more than have labels; none of them is put in quarantine.
        NoSuchRowError: a row is not in the store.
        InvalidRecordError: the store is empty, there are no rollouts of these prompts, a number makes no sense, or the verifier fails on a rollout
            that it is to judge again.
    """
    check_noun(store, LogprobStore)
    check_call("Verifier", verifier, "prompt, rollout")
    if prompts is not None:
        check_prompt_list(prompts, unique=True)
    filling = Filling(store, column, rollouts_per_batch, batches_at_once, max_refused, progress)
    recheck = check_at_least("Labelling", "recheck", recheck, 0)
    name = name or call_of(unwrapped(verifier)[-1])  # what it passes may be a key
    provenance = Provenance(ModelId(name, "verifier", "float32"), store.manifest.tokenizer.vocab_hash, f"lopd labels {_VERSION}", LABEL)
    store.append_scores(column, provenance, ())
    wanted = chosen(store, rows)
    if prompts is not None:
        wanted = chosen(store, np.intersect1d(samples_of(store, [ids_of(prompts)], store.generations)[0], wanted))
        check_same_prompts(store, prompts, wanted)
    work = filling.left(wanted, retry_quarantined)
    by_id = None if prompts is None else {prompt.prompt_id: prompt for prompt in prompts}
    labelled = evenly(wanted[store.scored(column)[wanted]], recheck) if recheck else wanted[:0]
    for record in walk(store, labelled, (column,)):
        _check_again(record.scores[column], _label(verifier, by_id, record.rollout), column)

    def judge(rollouts: Sequence[Rollout]) -> tuple[list[Scores], list[tuple[Rollout, str]]]:
        made, refused = list[Scores](), list[tuple[Rollout, str]]()
        for rollout in rollouts:
            if own_call().cancelled():
                raise InterruptedError
            try:
                made.append(_label(verifier, by_id, rollout))
            except InvalidRecordError as error:
                refused.append((rollout, str(error)))
                if len(refused) > filling.max_refused:
                    break
        return made, refused

    # a batch is judged by one thread, and none shall be without
    size = max(1, min(filling.rollouts_per_batch, ceil(len(work.rows) / filling.batches_at_once)))
    batches = ([record.rollout for record in store.read(part)] for part in evolve(filling, rollouts_per_batch=size).batches(work, 1))
    asked = bounded(f"Verifier {name}", judge, batches, at_once=filling.batches_at_once, most=filling.max_refused)
    return filling.fill(f"labelling {column}", provenance, work, asked)


def _label(verifier: Labeller, prompts: Mapping[str, Prompt] | None, rollout: Rollout) -> Scores:
    """Return the verifier's answer, at each response token.

    Raises:
        InvalidRecordError: it failed, the answer is not a label, or the prompt has other tokens than the rollout's.
    """
    owner, name = f"Rollout {rollout.rollout_id!r}", prompt_id_of(rollout.rollout_id)
    prompt = Prompt(name, rollout.prompt_ids) if prompts is None else prompts[name]
    if not np.array_equal(prompt.token_ids, rollout.prompt_ids):
        raise InvalidRecordError(
            f"{owner}: prompt {prompt.prompt_id!r} has other tokens than the rollout was sampled from; pass those prompts."
        )
    try:
        answer: NDArray[Any] = np.asarray(verifier(prompt, rollout))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # some timeouts, and `sys.exit` of a program, are not an Exception
        raise InvalidRecordError(f"{owner}: the verifier raised {type(error).__name__}: {said_without_secrets(str(error)):.200}") from error
    with np.errstate(over="ignore"):
        values = answer.astype(np.float32) if answer.dtype.kind in "biuf" else np.array(np.nan)
    if not np.isfinite(values).all():
        raise InvalidRecordError(
            f"{owner}: the verifier gave {answer.tolist()!r:.80}, expected a finite number, or one for each response token."
        )
    return Scores.of(rollout, np.full(rollout.response_ids.size, values) if values.ndim == 0 else values, signed=True)


def _check_again(stored_T: NDArray[np.float32], label: Scores, column: str) -> None:
    """Refuse a verifier that returns other values than before, beyond rounding."""
    if not np.allclose(stored_T, label.logprobs, rtol=1e-3, atol=1e-6):
        raise ScorerError(
            f"Rollout {label.rollout_id!r}: column {column!r} has the label {stored_T.mean():g}, and the verifier now gives "
            f"{label.logprobs.mean():g}; label into another column, or pass `recheck=0` if the verifier is random."
        )
