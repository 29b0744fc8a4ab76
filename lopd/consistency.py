"""Whether what is about to be combined belongs together: the teacher with the policy, and token ids with the model that reads them.

Teacher consistency: the teacher that scores must be the teacher whose text trained the policy that sampled.
With another teacher the offline gradient has a bias that does not vanish at the start and does not shrink with training
(Lightning OPD, arXiv 2604.13010v2, theorem 3.8 and table 4: 69.9 against 63.1 on AIME 2024).
Judged from recorded weights, never from names that somebody typed.
"""

import warnings
from collections.abc import Sequence
from enum import Enum

from lopd.errors import TeacherConsistencyError, TeacherConsistencyWarning, TokenizerMismatchError
from lopd.manifest import HasVocabulary, Lineage, Manifest, ModelId, Provenance, TokenizerId


class ConsistencyPolicy(Enum):
    """What to do when the scoring teacher is not the recorded SFT teacher, or none is recorded.

    RESIDUALISE trains on another teacher's scores if its habits were taken out of them (`lopd.residual.residualise`), and stops otherwise.
    """

    ERROR = "error"
    WARN = "warn"
    RESIDUALISE = "residualise"


def check_teacher_consistency(manifest: Manifest, teacher: Provenance, policy: ConsistencyPolicy = ConsistencyPolicy.ERROR) -> None:
    """Stop (or warn) unless the teacher of this column wrote the SFT text of the policy that sampled.

    Raises:
        TeacherConsistencyError: another teacher, or an unknown one, under policy ERROR, or under RESIDUALISE if its scores are raw.
    """
    verdict = inconsistency(manifest, teacher)
    if verdict is None or (policy is ConsistencyPolicy.RESIDUALISE and teacher.residual):
        return
    if policy is ConsistencyPolicy.RESIDUALISE:
        raise TeacherConsistencyError(
            f"{verdict}; its scores are {teacher.logprobs_mode}, expected a residual: write one with `lopd.residual.residualise`."
        )
    remedy = "score with the SFT teacher, or SFT on text of this one, or train on a residual of its scores (`lopd.residual.residualise`)"
    if manifest.sft_teacher is None:
        remedy = (
            "if that teacher wrote the SFT text, say so beside the weights before you sample (`Lineage(sft_teacher=scorer.provenance.model)"
            ".write(FOLDER)`), else find out who wrote the SFT text (`lopd.audit`) and score with that teacher"
        )
    message = f"{verdict}; {remedy}, or pass `consistency=ConsistencyPolicy.WARN` if you know why they differ."
    if policy is ConsistencyPolicy.ERROR:
        raise TeacherConsistencyError(message)
    warnings.warn(message, TeacherConsistencyWarning, stacklevel=3)


def inconsistency(manifest: Manifest, teacher: Provenance) -> str | None:
    """What is wrong with this teacher for this policy, in one clause; None if it is the recorded SFT teacher."""
    if manifest.sft_teacher is not None and manifest.sft_teacher.same_weights(teacher.model):
        return None
    sft = "not recorded" if manifest.sft_teacher is None else str(manifest.sft_teacher)
    return f"Policy {manifest.policy}: its SFT teacher is {sft}, expected the scoring teacher {teacher.model}"


def verdict(manifest: Manifest, scored: Provenance) -> str:
    """What a column's model is to the policy, for people.

    >>> from lopd.testing import tiny_manifest, tiny_provenance
    >>> verdict(tiny_manifest(), tiny_provenance("other"))
    'not consistent: its SFT teacher is not recorded'
    """
    if manifest.policy.same_weights(scored.model):
        return "the policy itself"
    if inconsistency(manifest, scored) is None:
        return "consistent: it is the SFT teacher"
    teacher = "its SFT teacher is not recorded" if manifest.sft_teacher is None else f"the SFT teacher is {manifest.sft_teacher}"
    return f"not consistent: {teacher}{', but these scores are residuals' if scored.residual else ''}"


def check_vocabulary(owner: str, theirs: HasVocabulary, whose: str, ours: TokenizerId) -> None:
    """Stop unless the ids of both are of one vocabulary.  Its size proves nothing: two vocabularies of one size are still two.

    Raises:
        TokenizerMismatchError: they are not.
    """
    if not ours.same_vocabulary(theirs):
        raise TokenizerMismatchError(
            f"{owner}: the hash of its vocabulary is {str(theirs.vocab_hash)[:12]}, expected {whose} {ours.vocab_hash[:12]}; the same ids mean "
            "other tokens there, use a teacher, a student and rollouts of one tokenizer."
        )


def lineage_after(manifest: Manifest, teachers: Sequence[Provenance]) -> Lineage:
    """What a student has been trained on after training on these rollouts.

    Without a score column the student imitates whoever wrote the rollouts: that is SFT, and the writer is its SFT teacher.
    """
    if not teachers:
        return Lineage(sft_teacher=manifest.policy)
    return Lineage(sft_teacher=manifest.sft_teacher, opd_teacher=mixture_id([teacher.model for teacher in teachers]))


def mixture_id(models: Sequence[ModelId]) -> ModelId:
    """The identity of several models together, in whatever order; of one model its own."""
    distinct = {(model.name, model.revision): model for model in models}
    if len(distinct) == 1:
        return next(iter(distinct.values()))
    ordered = [distinct[key] for key in sorted(distinct)]
    name, revision, dtype = (" + ".join(getattr(model, part) for model in ordered) for part in ("name", "revision", "dtype"))
    return ModelId(name, revision, dtype)
