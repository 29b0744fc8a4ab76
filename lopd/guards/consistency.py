"""Whether what is about to be combined belongs together: the teacher with the policy, and token ids with the model that reads them.

Teacher consistency: the teacher that scores must be the teacher whose text trained the policy that sampled.
With another teacher the offline gradient has a bias that does not vanish at the start and does not shrink with training
(Lightning OPD, arXiv 2604.13010v2, theorem 3.8 and table 4: 69.9 against 63.1 on AIME 2024).
Judged from recorded weights, never from names that were typed.
"""

from collections.abc import Iterable, Sequence
from enum import Enum

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from lopd.errors import ArgumentError, InvalidRecordError, TeacherConsistencyError, TeacherConsistencyWarning, TokenizerMismatchError
from lopd.protocols import LogprobReader, TeacherScorer
from lopd.protocols.reading import named, rounds_of
from lopd.records.identity import UNKNOWN, HasVocabulary, TokenizerId, mixture_id, rounding_note
from lopd.records.lineage import Lineage
from lopd.records.manifest import Manifest, Provenance
from lopd.records.rollouts import BEHAVIOR_COLUMN, SAMPLER_COLUMN
from lopd.records.warn import warn_user

_RESIDUAL = "`consistency=ConsistencyPolicy.RESIDUALISE`"


class ConsistencyPolicy(Enum):
    """What to do when the scoring teacher is not the recorded SFT teacher, or none is recorded.

    RESIDUALISE trains on another teacher's scores if its habits were taken out of them (`lopd.residualise`), and stops otherwise.

    PRIVILEGED is for scores of the policy itself, or of its SFT teacher, after other prompts than the policy's (`lopd.PrivilegedScorer`).
    Consistency compares models that read the same, so it does not cover these: under each of the others they draw a warning, and under
    PRIVILEGED none.  Other scores are judged as under ERROR.
    """

    ERROR = "error"
    WARN = "warn"
    RESIDUALISE = "residualise"
    PRIVILEGED = "privileged"


def check_teacher_consistency(
    manifest: Manifest, teachers: Sequence[Provenance], policy: ConsistencyPolicy = ConsistencyPolicy.ERROR, *, own_prompts: bool = False
) -> None:
    """Stop (or warn) unless the teachers of these columns wrote the SFT text of the policy that sampled.

    Several teachers pass together if the recorded SFT teacher is a mixture of just these; else each is judged alone.  One of several SFT teachers
    passes alone where each column was given its `own_prompts`.

    Raises:
        ArgumentError: the policy is something else, such as its name.
        TeacherConsistencyError: another teacher, or an unknown one, under policy ERROR or PRIVILEGED, or under RESIDUALISE if its scores are raw.
    """
    if not isinstance(policy, ConsistencyPolicy):
        raise ArgumentError(
            f"Consistency: it is {policy!r:.80}, expected a ConsistencyPolicy; pass `lopd.ConsistencyPolicy.WARN` or another."
        )
    for teacher, wrong in zip(teachers, inconsistencies(manifest, teachers, own_prompts=own_prompts), strict=True):
        if wrong is None and teacher.privileged and policy is not ConsistencyPolicy.PRIVILEGED:
            warn_user(
                f"Policy {manifest.policy}: the scoring teacher is {_who(manifest, teacher)} after other prompts than the policy's, of which teacher "
                "consistency is not defined; pass `consistency=ConsistencyPolicy.PRIVILEGED` if this is meant.",
                TeacherConsistencyWarning,
            )
        if wrong is None or (policy is ConsistencyPolicy.RESIDUALISE and teacher.residual):
            continue
        if policy is ConsistencyPolicy.RESIDUALISE:
            how = _remedy(manifest, teacher) if teacher.privileged else "write one with `lopd.residualise`"
            raise TeacherConsistencyError(f"{wrong}; its scores are {teacher.logprobs_mode}, expected a residual: {how}.")
        message = _objection(manifest, teacher, wrong)
        if policy is not ConsistencyPolicy.WARN:
            raise TeacherConsistencyError(message)
        warn_user(message, TeacherConsistencyWarning)


def judge_scorer(store: LogprobReader, scored: Provenance) -> None:
    """Warn of scores, before they are paid for, that `check_teacher_consistency` would refuse as those of a teacher.

    Not of the policy's own, which are a reference; and not where the writer of the rollouts is unknown: then they are not a policy's samples.
    """
    manifest = manifest_of_model(store, scored)
    (wrong,) = inconsistencies(manifest, [scored], own_prompts=True)
    if wrong is None or UNKNOWN in store.generations.values() or scored.is_of(manifest.policy):
        return
    warn_user(_objection(manifest, scored, wrong), TeacherConsistencyWarning)


def _objection(manifest: Manifest, teacher: Provenance, wrong: str) -> str:
    passed = f"pass {_RESIDUAL}, as the teacher's habits were taken out of these scores"
    remedy = passed if teacher.residual else _remedy(manifest, teacher)
    return f"{wrong}; {remedy}, or train with `batches(consistency=ConsistencyPolicy.WARN)` if you know why they differ."


def _remedy(manifest: Manifest, teacher: Provenance) -> str:
    sft = manifest.sft_teacher
    if sft is not None and sft.same_parameters(teacher.model):
        return "its weights are the same, and its settings or buffers are not: load it as it was (rotary scaling, caps, attention implementation)"
    if sft is not None and sft.name == teacher.model.name and sft.dtype != teacher.model.dtype:
        in_use, wanted = teacher.model.dtype, sft.dtype
        return f"if it is that model in {in_use}, score with it in {wanted}, for rounded weights are another model's; else SFT on its text"
    residual = f", or train on a residual of its scores (`lopd.residualise`) and pass {_RESIDUAL}" * (not teacher.privileged)
    if _is_one_of_several(manifest, teacher):
        return f"let each of them score the rollouts of its own prompts (`batches(teacher={{column: prompts}})`){residual}"
    if teacher.privileged:
        several = ", train on the rows of one round (`rows=rows_of(store, prompts, [ROUND])`)" * (len(manifest.policy.parts) > 1)
        return f"score with the policy that sampled, or with its SFT teacher{several}"
    if sft is None:
        return (
            "a store keeps what was known when it was sampled, so if that teacher wrote the SFT text, record it beside the policy's weights "
            "(`Lineage.of(TEACHER).write(FOLDER)`) and sample again into another store; else find out who wrote the SFT text "
            "(`lopd.audit`) and score with that teacher"
        )
    return f"score with the SFT teacher, or SFT on text of this one{residual}"


def inconsistencies(manifest: Manifest, teachers: Sequence[Provenance], *, own_prompts: bool = False) -> list[str | None]:
    """Return what is wrong with each of the teachers that train together, in one clause.

    None for one that is the recorded SFT teacher, or the policy itself after other prompts, or, on its `own_prompts`, one of several SFT teachers.
    """
    sft = manifest.sft_teacher
    if sft is not None and teachers and sft.same_weights(mixture_id([teacher.model for teacher in teachers])):
        return [None] * len(teachers)
    clauses = (
        f"Policy {manifest.policy}: its SFT teacher is {sft or 'not recorded'}, and the scoring teacher is {teacher.model}"
        f"{f', expected the same model{rounding_note(sft, teacher.model)}' if sft else ''}"
        for teacher in teachers
    )
    return [None if _who(manifest, teacher, own_prompts) else clause for teacher, clause in zip(teachers, clauses, strict=True)]


def _who(manifest: Manifest, teacher: Provenance, own_prompts: bool = True) -> str:
    """Return what a teacher that may score is to the policy; "" for another."""
    if manifest.sft_teacher is not None and manifest.sft_teacher.same_weights(teacher.model):
        return "the SFT teacher"
    if teacher.privileged and manifest.policy.same_weights(teacher.model):
        return "the policy itself"
    return "one of the SFT teachers" if own_prompts and _is_one_of_several(manifest, teacher) else ""


def verdict(manifest: Manifest, scored: Provenance) -> str:
    """Return what a column's model is to the policy, for people.

    >>> from lopd.testing import tiny_manifest, tiny_provenance
    >>> verdict(tiny_manifest(), tiny_provenance("other"))
    'not known: its SFT teacher is not recorded'
    """
    if scored.label or scored.is_of(manifest.policy):
        return "not a teacher: these are labels of a verifier" if scored.label else "the policy itself"
    if scored.privileged and (who := _who(manifest, scored)):
        return f"privileged: it is {who}, and read other prompts than the policy"
    if inconsistencies(manifest, [scored]) == [None]:
        return "consistent: it is the SFT teacher"
    if _is_one_of_several(manifest, scored):
        return f"consistent on its own prompts: it is one of the SFT teachers {manifest.sft_teacher}"
    note = ", but these scores are residuals" if scored.residual else ", and it read other prompts than the policy" * scored.privileged
    if manifest.sft_teacher is None:
        return f"not known: its SFT teacher is not recorded{note}"
    return f"not consistent: the SFT teacher is {manifest.sft_teacher}{note}"


def _is_one_of_several(manifest: Manifest, teacher: Provenance) -> bool:
    sft = manifest.sft_teacher
    return sft is not None and len(sft.parts) > 1 and any(part.same_weights(teacher.model) for part in sft.parts)


def check_vocabulary(owner: str, theirs: HasVocabulary, whose: str, ours: TokenizerId) -> None:
    """Stop unless the ids of both are of one vocabulary.  Its size proves nothing: two vocabularies of one size are still two.

    Raises:
        TokenizerMismatchError: they are not.
    """
    if ours.same_vocabulary(theirs):
        return
    # only who reads with a tokenizer can be given another one
    size: int | None = None if owner.startswith("Tokenizer") else getattr(theirs, "vocab_size", None)
    remedy = "use a teacher, a student and rollouts of one tokenizer"
    how = "(`HFScorer(model, tokenizer)`, or its files in a copy of that folder)"
    if size is not None and size > ours.vocab_size:
        remedy += f", or, if only its ids from {ours.vocab_size} on are tokens that the other lacks, give it the smaller tokenizer {how} in process"
    elif size is not None and size < ours.vocab_size:
        remedy += f", or, if only the ids from {size} on are tokens that it lacks (added padding), give it the larger tokenizer {how}"
    raise TokenizerMismatchError(
        f"{owner}: the hash of its vocabulary is {str(theirs.vocab_hash)[:12]}{'' if size is None else f' ({size:,} ids)'}, expected {whose} "
        f"{ours.vocab_hash[:12]} ({ours.vocab_size:,} ids); the same ids may mean other tokens there, {remedy}."
    )


def vocabulary_of(scorer: TeacherScorer) -> HasVocabulary:
    """Return the scorer's tokenizer, which has a size, where the scorer states it; else its provenance."""
    tokenizer = getattr(scorer, "tokenizer_id", None)
    return tokenizer if isinstance(tokenizer, TokenizerId) and tokenizer.same_vocabulary(scorer.provenance) else scorer.provenance


def manifest_of_model(store: LogprobReader, scored: Provenance) -> Manifest:
    """Return the manifest with the policy of the round, if any, in which this model sampled."""
    sampled = (policy for policy in store.generations.values() if policy.same_weights(scored.model))
    return evolve(store.manifest, policy=next(sampled, store.manifest.policy))


def manifest_of_rows(store: LogprobReader, rows: NDArray[np.int64]) -> Manifest:
    """Return the manifest with the policy that sampled these rows, of several rounds their `mixture_id`; see `rounds_of` for what is read."""
    return evolve(store.manifest, policy=mixture_id(store.generations[generation] for generation in rounds_of(store, rows)))


def lineage_after(manifest: Manifest, teachers: Sequence[Provenance], *, graded: bool = False) -> Lineage:
    """Return what a student has been trained on after training on these rollouts.

    Without a score column the student imitates the writer of the rollouts: that is SFT, and the writer is its SFT teacher, if it is known.  Where
    its own rollouts are `graded`, and a ratio to the policy is taken, it does not imitate.
    """
    if not teachers and not graded:
        return Lineage(sft_teacher=None if UNKNOWN in manifest.policy.parts else manifest.policy)
    models = [evolve(made.model, name=f"{made.model.name} (privileged)") if made.privileged else made.model for made in teachers]
    return Lineage(sft_teacher=manifest.sft_teacher, opd_teacher=mixture_id(models) if models else None)


def check_reference(store: LogprobReader, column: str, generations: Iterable[int]) -> None:
    """Stop unless this column is of the very policies that sampled these rounds, at temperature 1.

    Raises:
        InvalidRecordError: it is not.
    """
    if column == SAMPLER_COLUMN:
        raise InvalidRecordError(
            f"{named(store)}: the reference column is {column!r}, expected log-probs at temperature 1; pass {BEHAVIOR_COLUMN!r}, and the sampler's "
            "come along."
        )
    provenance = store.columns.get(column)
    if provenance is None:  # the virtual column: of each rollout's own policy
        return
    for policy in (store.generations[generation] for generation in generations):
        if not provenance.is_of(policy):
            other = " after other prompts" * provenance.privileged
            raise InvalidRecordError(
                f"{named(store)}: column {column!r} was scored by {provenance.model}{other}, expected the policy that sampled, {policy}; "
                "a ratio to another model does not correct for what this one drew, so score the policy."
            )
