"""VERB `collect_rollouts`: prompts -> rollouts in a store.  Run it again to resume."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial

import numpy as np
from attrs import evolve, field, frozen
from numpy.typing import NDArray

from lopd.errors import ConflictError, ContextWarning, EngineError, ManifestMismatchError, RefusedPromptsWarning, SourceError
from lopd.protocols import LogprobStore, Progress, RolloutSource
from lopd.protocols.doors import check_noun, check_prompt_list, other_prompt
from lopd.protocols.reading import evenly, in_batches, named, walk
from lopd.records.checks import check_at_least
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import Prompt, Rollout, Scores, policy_column, rollout_id
from lopd.records.warn import warn_user
from lopd.verbs.asking import bounded, check_rollouts, isolate, shown
from lopd.verbs.filling import commit_scores

# Of prompts that are there; a read of each would fetch nearly all of a store, responses and log-probs too.
_COMPARED = 4096


@frozen
class CollectionReport:
    """What one call of `collect_rollouts` did.

    Args:
        rollouts: number that were sampled and kept.
        read_tokens: tokens of their prompts and responses.
        skipped: rollouts that were in the store before, or that another process committed meanwhile.
        refused: prompts that could not be sampled, and why; the next call tries them again.
        response_tokens: those of the read tokens that were sampled.
        cut: responses that did not end, and have fewer tokens than `max_new_tokens`: the policy's context was full.
    """

    rollouts: int = 0
    read_tokens: int = 0
    skipped: int = 0
    refused: Mapping[str, str] = field(factory=dict)
    response_tokens: int = field(default=0, eq=False)
    cut: int = field(default=0, eq=False)


def collect_rollouts(
    source: RolloutSource,
    prompts: Sequence[Prompt],
    store: LogprobStore,
    *,
    prompts_per_batch: int = 64,
    batches_at_once: int = 1,
    max_refused: int = 64,
    progress: Progress | None = None,
) -> CollectionReport:
    """Sample every prompt that the store does not hold yet, and commit batch by batch.

    Prompts are cut into the same batches each time, so a run that was stopped and repeated makes the same rollouts as one that was not.
    A prompt that the source refuses (for example because it is too long) is left out with a warning, and the rest goes on.
    What another process commits meanwhile is not sampled again, and of two rollouts under one id the first that was committed stays.

    Where the source keeps candidates (`SamplingParams.candidates`, `drawn`), they become a score column of the policy (`lopd.records.policy_column`),
    which serves as `ref` as well.  A call that is killed between the two appends leaves the last batch without them; the next one samples it
    again, and fills them in.  With an engine that does not repeat itself, first score the policy into that column.

    Args:
        source: the reference policy.
        prompts: with unique ids.
        store: made with `source.manifest`; the first rollouts of another generation begin that round in it.
        prompts_per_batch: sampled together and committed together.
        batches_at_once: calls of `source.sample` that are under way at the same time.  More than 1 is for engines with several workers (Ray,
            servers), which are else idle while the slowest response of a batch is finished; those in this process take one at a time.
        max_refused: stop when more prompts are refused, for then it is not the prompts.
        progress: None shows a bar on a terminal and in a notebook, and a line a minute elsewhere (`lopd.tools.console.RichProgress`).

    Warns:
        ContextWarning: some responses were cut where the policy's context is full; it is raised once, for the first batch that has any.
        RefusedPromptsWarning: some prompts were refused.

    Raises:
        ArgumentError: source, prompts, store or progress are something else.
        ConflictError: the store has other tokens under the id of a prompt, and nothing is sampled; or another policy began the round meanwhile; or
            the source samples other tokens than a call that was killed left without candidates.  Of prompts that are there, the number of tokens is
            compared; each token of those that lack samples or candidates, and of 4,096, evenly spaced.
        ManifestMismatchError: the store belongs to another policy, tokenizer or sampling; nothing is sampled.
        InvalidRecordError: there are no prompts, two share an id, `prompts_per_batch` or `batches_at_once` is less than 1, or `max_refused`
            than 0.
        SourceError: the source gave other rollouts than it was asked for, or of other prompts or another round; none of that batch is committed.
        EngineError: more than `max_refused` prompts were refused, or all.
        StoreWriteError: the store cannot be written to; before the first batch nothing is sampled.
    """
    check_noun(source, RolloutSource)
    check_noun(store, LogprobStore)
    if progress is not None:
        check_noun(progress, Progress)
    prompts_per_batch = check_at_least("Collection", "prompts_per_batch", prompts_per_batch, 1)
    batches_at_once = check_at_least("Collection", "batches_at_once", batches_at_once, 1)
    max_refused = check_at_least("Collection", "max_refused", max_refused, 0)
    check_prompt_list(prompts, unique=True)
    manifest = source.manifest
    samples = range(manifest.sampling.samples_per_prompt)
    # `halves` are rollouts that a call which was stopped has left without candidates
    missing, compared, halves = np.ones(len(prompts), np.bool_), np.full(len(prompts), -1), set[str]()

    def look_again(among: NDArray[np.int64]) -> None:
        _check_same_run(store, manifest)
        asked = among[missing[among]]
        names = [rollout_id(prompts[i].prompt_id, s, manifest.generation) for i in asked.tolist() for s in samples]
        rows = store.find(names).reshape(len(asked), len(samples))
        without = _without_candidates(store, manifest, rows)
        halves.update(names[i] for i in np.flatnonzero((rows >= 0) & without))
        missing[asked] = np.any((rows < 0) | without, axis=1)
        last = rows.max(axis=1)
        _check_same_prompts(store, [prompts[i] for i in asked.tolist()], np.where(last == compared[asked], -1, last), missing[asked])
        compared[asked] = last

    every = np.arange(len(prompts))
    look_again(every)
    if missing.any():
        # one that cannot be written to is refused before anything is sampled; and it sees by that what others have committed
        store.append(())
        look_again(every)
    report = CollectionReport(skipped=int((~missing).sum()) * len(samples))

    def batches() -> Iterator[list[Prompt]]:
        # cut before what is there is left out, so that a repeated run has the same batches
        for part in in_batches(every, prompts_per_batch):
            if missing[part].any():
                look_again(np.asarray(part))  # each commit sees what others have committed
            yield [prompts[i] for i in part if missing[i]]

    owner, whole, left = f"Source {manifest.policy}", len(prompts) * len(samples), int(missing.sum()) * len(samples)
    asked = bounded(
        owner,
        partial(isolate, owner, Rollout, source.sample, most=max_refused),
        filter(None, batches()),
        at_once=batches_at_once,
        most=max_refused,
    )
    with closing(asked), shown(progress, "sampling", whole, report.skipped, None, counted="response tokens") as advance:
        for batch, rollouts, refused in asked:
            reasons = {prompt.prompt_id: reason for prompt, reason in refused}
            check_rollouts(manifest, [prompt for prompt in batch if prompt.prompt_id not in reasons], rollouts)
            kept = _commit(store, manifest, rollouts, halves, begin=not report.rollouts)
            tokens = sum(r.response_ids.size for r in kept)
            cut = [r for r in kept if r.finish_reason == "length" and r.response_ids.size < manifest.sampling.max_new_tokens]
            if cut and not report.cut:
                _warn_of_cut(manifest, cut, len(kept))
            report = evolve(
                report,
                rollouts=report.rollouts + len(kept),
                read_tokens=report.read_tokens + sum(len(rollout) for rollout in kept),
                response_tokens=report.response_tokens + tokens,
                cut=report.cut + len(cut),
                refused={**report.refused, **reasons},
            )
            advance(len(rollouts), tokens, len(refused) * len(samples))
            left -= len(batch) * len(samples)
        if left:  # others have sampled them meanwhile
            advance(left, 0, 0)
    report = evolve(report, skipped=whole - report.rollouts - len(report.refused) * len(samples))
    _warn_of(report)
    return report


def _commit(store: LogprobStore, manifest: Manifest, rollouts: list[Rollout], halves: Container[str], *, begin: bool) -> list[Rollout]:
    """Append rollouts and candidates, and return those that added something: what another process committed under an id meanwhile goes before.

    Raises:
        ConflictError: an id has another prompt by now; or other tokens than the source gives again, for want of their candidates.
    """
    candidates, names = _candidates(manifest, rollouts), [rollout.rollout_id for rollout in rollouts]
    if not rollouts:
        return []
    if begin:
        # not before: a call that is killed while it samples would keep the round from every other policy
        store.begin_generation(manifest.generation, manifest.policy)
    known = np.array(
        [name in halves for name in names], np.bool_
    )  # before they were sampled here: their candidates are not just on the way
    for again in (True, False):
        store.append(())  # it sees by that what others have committed
        rows = store.find(names)
        lacking = (rows < 0) | _without_candidates(store, manifest, rows)
        there = {record.rollout.rollout_id: record.rollout for record in walk(store, rows[rows >= 0])}
        stored = [there.get(rollout.rollout_id, rollout) for rollout in rollouts]
        same = np.array([ours.content_hash == other.content_hash for ours, other in zip(rollouts, stored, strict=True)], np.bool_)
        kept = [rollouts[i] for i in np.flatnonzero(lacking & same)]
        try:
            # the store refuses those of another prompt
            edited = [r for r, other in zip(rollouts, stored, strict=True) if not np.array_equal(r.prompt_ids, other.prompt_ids)]
            store.append(kept + edited)
            break
        except ConflictError:  # another process was between the two
            if not again:
                raise
    if candidates:
        column = policy_column(manifest.generation)
        commit_scores(store, column, _provenance(manifest), [candidates[i] for i in np.flatnonzero(lacking & same)])
        for place in np.flatnonzero(known & lacking & ~same)[:1]:
            raise ConflictError(
                f"{named(store)}: rollout {names[place]!r} is without candidates, as a call that was stopped left it, and the source now samples "
                f"other tokens; score the policy into column {column!r} with a scorer whose top_k is {manifest.sampling.candidates}, or sample "
                "this round again in another store if it draws tokens."
            )
    return kept


def _without_candidates(store: LogprobStore, manifest: Manifest, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of these rollouts a call that was killed has left without what their source keeps of them."""
    if not manifest.sampling.candidates + manifest.sampling.drawn:
        return np.zeros(rows.shape, np.bool_)
    # a column of another model is refused before anything is sampled
    store.append_scores(policy_column(manifest.generation), _provenance(manifest), ())
    scored = np.append(store.scored(policy_column(manifest.generation)), False)
    return ~scored[rows]


def _provenance(manifest: Manifest) -> Provenance:
    """Return whose column the candidates of this round are."""
    sampling, tokenizer = manifest.sampling, manifest.tokenizer
    width = sampling.candidates + sampling.drawn
    return Provenance(
        manifest.policy, tokenizer.vocab_hash, "the source that sampled", top_k=width, eos_id=tokenizer.eos_id, drawn=sampling.drawn
    )


def _candidates(manifest: Manifest, rollouts: Sequence[Rollout]) -> list[Scores]:
    """Return the policy's log-probs of other tokens while it sampled, as scores like any others: as if it had read its own rollouts."""
    sampling, scores = manifest.sampling, list[Scores]()
    for rollout in rollouts if sampling.candidates + sampling.drawn else ():
        if rollout.candidates is None or rollout.behavior_logprobs is None:
            raise SourceError(
                f"Rollout {rollout.rollout_id!r}: it comes without candidates or log-probs, expected {sampling.candidates} candidates and "
                f"{sampling.drawn} drawn tokens as its source states; use a source that keeps them, or sample without."
            )
        scores.append(Scores.of(rollout, rollout.behavior_logprobs, top_k=rollout.candidates))
    return scores


def _check_same_prompts(store: LogprobStore, prompts: Sequence[Prompt], rows: NDArray[np.int64], missing: NDArray[np.bool_]) -> None:
    """Stop if a prompt was edited since its row (-1: none) was sampled: its rollouts would be skipped, and be those of the old one.

    Lengths are compared of all, and tokens of a sample, and of those that still miss something: these are sampled whole.
    """
    there = np.flatnonzero(rows >= 0)
    if not there.size:
        return
    sizes = [prompts[place].token_ids.size for place in there.tolist()]
    unlike = there[store.lengths()[rows[there], 0] != sizes][:1]
    looked = np.concatenate([unlike, there[missing[there]], evenly(there, _COMPARED)])
    for place, record in zip(looked.tolist(), walk(store, rows[looked], rows_per_read=256), strict=True):
        if not np.array_equal(prompts[place].token_ids, record.rollout.prompt_ids):
            remedy = "give the prompt another id, or use another store, if it or its template was edited"
            raise other_prompt(named(store), record.rollout, prompts[place].prompt_id, remedy)


def _check_same_run(store: LogprobStore, manifest: Manifest) -> None:
    """Refuse a source that differs from the store's manifest in more than its round, or from the policy with which that was begun."""
    generation = manifest.generation
    policy = store.generations.get(generation, manifest.policy)
    difference = evolve(store.manifest, generation=generation, policy=policy).difference(manifest)
    if difference is not None:
        raise ManifestMismatchError(
            f"{named(store)}: {difference}; create another store, sample with the policy and settings of this one, or give the round of another "
            "policy a number of its own (`generation`)."
        )


def _warn_of_cut(manifest: Manifest, cut: Sequence[Rollout], count: int) -> None:
    first = cut[0]
    warn_user(
        f"Collection: {len(cut)} of {count} responses were cut where the policy's context is full, the first ({first.rollout_id!r}) after "
        f"{first.response_ids.size} tokens, expected up to max_new_tokens = {manifest.sampling.max_new_tokens}; drop long prompts, use a policy "
        "with a longer context, or set `max_new_tokens` to what fits.",
        ContextWarning,
    )


def _warn_of(report: CollectionReport) -> None:
    if not report.refused:
        return
    first, reason = next(iter(report.refused.items()))
    if not report.rollouts + report.skipped:
        raise EngineError(
            f"Collection: all {len(report.refused)} prompts were refused; the first is {first!r} ({reason}); "
            "set right what is wrong with them all."
        )
    warn_user(
        f"Collection: {len(report.refused)} prompts could not be sampled and were left out; the first is {first!r} ({reason})",
        RefusedPromptsWarning,
    )
