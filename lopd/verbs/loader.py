"""VERB `batches`: a store -> the micro-batches of optimizer step k, which depend on (seed, k) alone."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import accumulate, chain, count, pairwise
from threading import Lock
from typing import Any, final

import numpy as np
import torch
from attrs import evolve, frozen
from numpy.typing import NDArray

from lopd.errors import ArgumentError, InvalidRecordError, RepeatedRolloutsWarning
from lopd.guards.consistency import ConsistencyPolicy, check_reference, check_teacher_consistency, lineage_after, manifest_of_rows
from lopd.guards.watch import judge_advantages, judge_sampling, stored_advantages
from lopd.protocols import LogprobReader
from lopd.protocols.doors import check_noun
from lopd.protocols.reading import VALUES_AT_ONCE, in_runs, named
from lopd.records.checks import call_of, check_at_least, check_kind
from lopd.records.collate import Weighting, by_rollout, collate
from lopd.records.glance import Glance, Glanced
from lopd.records.lineage import Lineage, StoreId
from lopd.records.ranks import Ranks
from lopd.records.rollouts import BEHAVIOR_COLUMN, Prompt
from lopd.records.rows import Rows
from lopd.records.steps import Batch, Step
from lopd.records.waiting import overlapped
from lopd.records.warn import warn_user
from lopd.verbs.columns import Columns, choose

_ROLLOUTS_PER_STEP = 256


@final
@frozen(eq=False, repr=False)
class StepStream(Glanced):
    """The steps of a run, one after the other without end; made by `batches`, which checks what it is made of.

    `steps[:150]` ends before step 150, and `steps[60:]` goes on with step 60: step k is the same wherever the run began.
    It trains on the `rows` that were there when it was made, also if the store grows; `positions` of each are what it takes of a micro-batch.
    A store is for one thread at a time, and on a GPU a thread reads ahead: what else reads, writes or refreshes while steps run is for another
    handle of the store.
    """

    lineage: Lineage
    store: LogprobReader
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    columns: Columns
    rollouts_per_step: int
    tokens_per_batch: int
    seed: int
    weighting: Weighting
    ranks: Ranks
    start: int = 0
    stop: int | None = None
    first: int = 0

    def _glance(self) -> Glance:
        facts = {
            "store": named(self.store),
            "rollouts": len(self.rows),
            "rollouts a step": self.rollouts_per_step,
            "tokens per batch": self.tokens_per_batch,
            "teacher": ", ".join(self.columns.teachers) or "none",
            "ref": self.columns.ref or "none",
            "OPD teacher": self.lineage.opd_teacher or "none",
            "seed": self.seed,
        }
        return Glance(f"Steps from {self.start:,} {'on' if self.stop is None else f'to {self.stop:,}'}", facts)

    @property
    def settings(self) -> dict[str, str | int | bool | None]:
        """What decides which rollouts step k has and what their tokens count, for `save_checkpoint`; how steps are split does not."""
        of, chosen = self.columns, np.stack([self.rows, *self.store.lengths()[self.rows].T])
        labels = [values[self.rows] for values in (of.labels, of.means) if values is not None]
        return {
            "rollouts_per_step": self.rollouts_per_step,
            "seed": self.seed,
            "first": self.first,
            "rows": f"{len(self.rows)} rollouts, {_digest(chosen, '<i8')}",
            "teacher": ", ".join(of.teachers) or None,
            "ref": of.ref,
            "top_k": of.top_k,
            "label": of.label and f"{of.label}, {_digest(np.stack(labels), '<f4')}",
            **({} if of.place is None else {"shares of teachers": _digest(of.place[self.rows], "<i8")}),
            "weighting": call_of(self.weighting),
        }

    def __iter__(self) -> Iterator[Step]:
        """Yield steps from `start` up to `stop`, or for ever; where this process uses a GPU, a thread reads and pins the next meanwhile."""
        indices = count(self.start) if self.stop is None else range(self.start, self.stop)
        # a card that nothing here has used yet is not the student's, and pinning would make a context on it
        read, ahead = (partial(self._pinned, Lock()), 2) if torch.cuda.is_initialized() else (self.step, 1)
        for _, step in overlapped(read, indices, ahead):
            yield step

    def _pinned(self, reading: Lock, index: int) -> Step:
        with reading:  # a store is for one thread at a time
            step = self.step(index)
        return evolve(step, batches=tuple(batch.pinned() for batch in step.batches))

    def __getitem__(self, steps: slice) -> "StepStream":
        """Return steps from `start` up to `stop` of the whole run, by their numbers in it.

        Raises:
            ArgumentError: it is not a slice.
            InvalidRecordError: a number is negative, it starts before `first`, or steps are left out in between.
        """
        if not isinstance(steps, slice):
            raise ArgumentError(f"Steps: the index is {steps!r:.80}, expected a slice such as [60:150]; ask for one step with `.step(60)`.")
        if steps.step not in (None, 1):
            raise InvalidRecordError(f"Steps: the slice has a step of {steps.step}, expected every step; filter them as they come.")
        start = self._check_step("start", self.first if steps.start is None else steps.start)
        stop = None if steps.stop is None else check_at_least("Steps", "stop", steps.stop, 0)
        ends = [end for end in (self.stop, stop) if end is not None]
        return evolve(self, start=max(start, self.start), stop=min(ends, default=None))

    def step(self, index: int) -> Step:
        """Return step `index`, or this rank's share of it, whatever was asked for before.

        Raises:
            InvalidRecordError: the index is not a whole number from `first` on.
        """
        index = self._check_step("index", index)
        places = _places_of_step(index, self.rollouts_per_step, len(self.rows), self.seed, self.first)
        rows, lengths = self.rows[places], self.positions[places]
        shares = [_split(lengths, self.tokens_per_batch, rank, self.ranks.size) for rank in range(self.ranks.size)]
        parts = shares[self.ranks.rank]
        # what sums gradients over ranks waits for each of them as many times as for the busiest
        idle = max(map(len, shares)) - len(parts)
        parts = [*parts, np.array([np.argmin(lengths)])] if idle else parts
        # before its first update a student should be the policy that sampled, whatever the loss is to read
        asked = index == 0 and self.columns.teachers and self.columns.ref is None and self.store.scored(BEHAVIOR_COLUMN)[rows].all()
        columns = evolve(self.columns, ref=BEHAVIOR_COLUMN) if asked else self.columns
        made = list[Batch]()
        # one read, unless they are very long: a store fetches many rows at once faster than a few at a time
        for run in in_runs(columns.width(self.store) * np.array([lengths[part].sum() for part in parts]), VALUES_AT_ONCE):
            near = [parts[i] for i in run]
            read = columns.read(self.store, rows[np.concatenate(near)])
            if self.columns.ref is not None:
                check_reference(self.store, self.columns.ref, set(read.generations.tolist()))
            made += [self._collate(read[start:stop]) for start, stop in pairwise(accumulate(map(len, near), initial=0))]
        if asked:
            made = [evolve(batch, behavior_logprobs=batch.ref_logprobs, ref_logprobs=None, sampler_logprobs=None) for batch in made]
        if idle:
            with torch.inference_mode(False):  # as those of `collate`
                made[-1:] = [evolve(made[-1], weight=torch.zeros_like(made[-1].weight))] * idle
        shared = _digest(np.concatenate([places, lengths, *chain.from_iterable(shares)]), "<i8")
        return Step(index, tuple(made), self.store.manifest.tokenizer.vocab_hash, idle, shared, self.ranks)

    def _check_step(self, name: str, value: Any) -> int:
        owner = f"Steps on rows that begin with step {self.first} (`first`)" if self.first else "Steps"
        return check_at_least(owner, name, value, self.first)

    def _collate(self, rows: Rows) -> Batch:
        role = {name: name if name in rows.scores else None for name in ("teacher", "ref", "label", "label_mean")}
        return collate(rows, self.weighting, **role, top_k="teacher" if self.columns.top_k else None)


def batches(
    store: LogprobReader,
    *,
    rollouts_per_step: int | None = None,
    tokens_per_batch: int = 8192,
    seed: int = 0,
    rows: NDArray[np.int64] | None = None,
    first: int = 0,
    teacher: str | Mapping[str, Sequence[Prompt]] | None = "teacher",
    ref: str | None = None,
    label: str | None = None,
    weighting: Weighting = by_rollout,
    top_k: bool = False,
    consistency: ConsistencyPolicy = ConsistencyPolicy.ERROR,
    ranks: Ranks | None = None,
) -> StepStream:
    """Return the steps of a training run over a store, shuffled for each epoch; rollouts in quarantine are left out, with a warning.

    They go on without end: `batches(store)[:150]` are the first 150, and `batches(store)[60:150]` resume such a run after 60.
    A resumed run equals an unbroken one if store and arguments are those of the run that was stopped.

    Args:
        store: rollouts, and the columns named below.
        rollouts_per_step: size of an optimizer step; None is 256, or all rollouts there are if they are fewer.
        tokens_per_batch: cap on the micro-batches that a step is split into, as rollouts times the longest of them; rollouts of like length
            share one.  This bounds memory of the device, where a plain loss holds the logits of all its response tokens (4 bytes * V each, a few
            times over).  All micro-batches of a step, and on a GPU of two steps ahead, are in memory of the host: some 50 bytes a token, and 12 more
            for each of the teacher's most likely tokens.
        seed: seed of the shuffle; step k depends on (seed, first, k) alone.
        rows: train on these only, each once an epoch, for example `lopd.rows_of(store, prompts, [generation])`; None for all.
        first: the step of the run with which these rows begin, as those of a round do; their epochs begin there, and no step is before it.
        teacher: score column to learn from; None trains on the rollouts as they are (SFT).  Several teachers: column -> the prompts whose
            rollouts learn from it; rollouts of other prompts are left out.  For SFT, and for privileged scores, rows of several rounds are read
            once, here, to know whose they are.
        ref: score column of the reference policy, for losses with an importance ratio, and to have drift measured.  `"behavior"` is
            what each rollout's own policy reported, so also right where rollouts are of several rounds.  It is the policy at temperature 1,
            and drift is measured from it.  Where temperature or top-p is another, `Batch.sampler_logprobs` come along, and ratios are to those.
        label: column of labels (`lopd.label_rollouts`), for `add_labels` and `weigh_labels` of `lopd.losses.variants`.  They come with the mean over
            all labelled rollouts of the same prompt and policy, those outside of `rows` too; it is read once, here.
        weighting: what a token counts (`by_rollout` or `by_token`).
        top_k: whether to bring the teacher's most likely tokens along, as many as its column keeps, for losses on them.
        consistency: what to do about another, or an unknown, SFT teacher (`check_teacher_consistency`).
        ranks: which share of each step is this process's; None takes torch.distributed's, or all.  The shares of a step are of like
            sizes, and have as many micro-batches each: a rank that has fewer goes through some that weigh nothing.

    Warns:
        TrainingWarning: a row is named more than once, and counts once.
        RepeatedRolloutsWarning: a step is larger than what there is to train on.
        AdvantageWarning: without a `ref`, so without an importance ratio, and without `top_k`, if many stored advantages of a teacher are far below
            0, on the rollouts that learn from it (`lopd.guards.watch`).
        SamplerWarning: the rollouts were drawn at another temperature or top-p than 1, and there is no `ref`, and no `top_k`, or rollouts
            without `sampler_logprobs`: it states how the gradient is biased.

    Raises:
        ArgumentError: an argument is something else, such as the path of a store.
        TeacherConsistencyError: see `check_teacher_consistency`.
        MissingScoresError: a column is not there, or not complete, or keeps no top-k though it is asked for.
        NoSuchRowError: a row is not in the store.
        ConflictError: rollouts have other prompts under the ids of a teacher's prompts.
        InvalidRecordError: the store is empty, a rollout has two teachers, `ref` is not of the policy, a column of labels is given for one of
            log-probs or the other way round, a rollout is longer than `tokens_per_batch`, or a number makes no sense.
    """
    check_noun(store, LogprobReader)
    if ranks is not None:
        check_kind("Ranks", ranks, Ranks, "pass `Ranks(0, 2)`")
    if rollouts_per_step is not None:
        rollouts_per_step = check_at_least("Steps", "rollouts_per_step", rollouts_per_step, 1)
    seed, first = check_at_least("Steps", "seed", seed, 0), check_at_least("Steps", "first", first, 0)
    tokens_per_batch = check_at_least("Steps", "tokens_per_batch", tokens_per_batch, 1)
    if not callable(weighting):
        raise InvalidRecordError(
            f"Steps: weighting is {weighting!r}, expected a function of the loss mask; pass `by_rollout` or `by_token`."
        )
    columns, usable = choose(store, teacher, ref, rows, label=label, top_k=top_k)
    count = min(_ROLLOUTS_PER_STEP, len(usable)) if rollouts_per_step is None else rollouts_per_step
    if count > len(usable):
        warn_user(
            f"{named(store)}: a step has {count} rollouts, and there are {len(usable)} to train on, so each step repeats some of them; pass a "
            "smaller `rollouts_per_step`, or sample more.",
            RepeatedRolloutsWarning,
        )
    positions = store.lengths()[usable].sum(axis=1) - 1
    longest = int(np.argmax(positions))
    if positions[longest] > tokens_per_batch:
        raise InvalidRecordError(
            f"Rollout {store.read([int(usable[longest])])[0].rollout.rollout_id!r}: it has {positions[longest]} positions, expected at most "
            f"tokens_per_batch = {tokens_per_batch}; raise the cap."
        )
    if ref is not None and rows is None:
        check_reference(store, ref, store.generations)
    provenances, graded = columns.provenances(store), label is not None and ref is not None
    # which policy sampled the rows matters to its own text and scores alone, and of several rounds it has to be read
    asked = not (provenances or graded) or any(made.privileged for made in provenances)
    manifest = manifest_of_rows(store, usable) if asked else store.manifest
    check_teacher_consistency(manifest, provenances, consistency, own_prompts=columns.place is not None)
    for place, column in enumerate(columns.teachers if ref is None and not top_k else ()):
        own = usable if columns.place is None else usable[columns.place[usable] == place]
        judge_advantages(store, stored_advantages(store, teacher=column, rows=own), column)
    if graded or (columns.teachers and (ref is not None or not top_k)):
        judge_sampling(store, usable, ratio=ref is not None)
    lineage = evolve(lineage_after(manifest, provenances, graded=graded), store=StoreId.of(store.manifest, store.lengths()))
    ranks = ranks or Ranks.current()
    return StepStream(lineage, store, usable, positions, columns, count, tokens_per_batch, seed, weighting, ranks, start=first, first=first)


def _digest(values: NDArray[Any], dtype: str) -> str:
    """Return a short hash of numbers, the same on every machine."""
    return blake2b(values.astype(dtype).tobytes(), digest_size=6).hexdigest()


def _places_of_step(index: int, count: int, total: int, seed: int, first: int = 0) -> NDArray[np.int64]:
    """Return places (of `total`) of step `index`: a window on the endless sequence of epochs, which begins with step `first`.

    Each epoch is a permutation, seeded by (seed, epoch), and by `first` where that is not 0.
    """
    places = np.arange((index - first) * count, (index - first + 1) * count)
    epochs = places // total
    return np.concatenate([_shuffle(seed, int(epoch), total, first)[places[epochs == epoch] % total] for epoch in np.unique(epochs)])


@lru_cache(maxsize=2)  # the steps of an epoch share it, and a million places take 20 ms to shuffle
def _shuffle(seed: int, epoch: int, total: int, first: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch, first) if first else (seed, epoch)).permutation(total)


def _split(lengths: NDArray[np.int64], cap: int, rank: int = 0, ranks: int = 1) -> list[NDArray[np.int64]]:
    """Return places of each micro-batch of a rank: longest first, so that rollouts of a batch are alike in length, and too little memory shows at
    once.

    A batch counts as rows times its longest, which bounds the padded form too.
    """
    order = np.argsort(-lengths, kind="stable")[rank::ranks]
    parts, first = [], 0
    while first < len(order):
        last = first + max(int(cap // lengths[order[first]]), 1)
        parts.append(order[first:last])
        first = last
    return parts
