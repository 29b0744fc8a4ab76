"""VERB `evaluate`: how good is a policy?  By a verifier, and by its distance to the teacher on fresh rollouts."""

from collections.abc import Sequence
from math import comb

import numpy as np
from attrs import frozen

from lopd.errors import InvalidRecordError
from lopd.guards.consistency import check_vocabulary, vocabulary_of
from lopd.protocols import RolloutSource, TeacherScorer, Verifier
from lopd.protocols.doors import answers_of, check_noun, check_prompt_list, check_scores
from lopd.records import estimates
from lopd.records.checks import check_call
from lopd.records.estimates import Estimate
from lopd.records.glance import Glance, Glanced
from lopd.records.rollouts import Prompt, Rollout, Scores
from lopd.verbs.asking import check_rollouts

#: Nats by which an engine may compute one log-prob otherwise the second time.
_ROUNDING = 1e-3


@frozen(repr=False)
class Evaluation(Glanced):
    """What `evaluate` found; `print` shows it in a line.

    Args:
        avg_at_n: mean score over n samples of each prompt; its interval is over prompts, and Wilson's, so it has a width also where all
            scores agree.
        pass_at_k: k -> chance that one of k samples is right (scores of 1 count as right).
        n: samples per prompt.
    """

    avg_at_n: Estimate
    pass_at_k: dict[int, float]
    n: int

    def _glance(self) -> Glance:
        chances = {f"pass@{k}": self.pass_at_k[k] for k in dict.fromkeys((1, self.n))}
        return Glance("Evaluation", {f"avg@{self.n}": str(self.avg_at_n), "prompts": self.avg_at_n.clusters, **chances})


def evaluate(source: RolloutSource, prompts: Sequence[Prompt], verifier: Verifier) -> Evaluation:
    """Sample each prompt n = `samples_per_prompt` times and let the verifier judge.

    Raises:
        ArgumentError: the source is something else, or the verifier does not take a prompt and a rollout; nothing is sampled.
        InvalidRecordError: there are no prompts, two share an id, or the verifier gave something other than a number from 0 to 1; it names the
            prompt.
        SourceError: the source gave other rollouts than it was asked for, or of other prompts.

    Source: pass@k is the unbiased estimator of Chen et al., arXiv 2107.03374, eq. 1.
    """
    check_noun(source, RolloutSource)
    check_call("Verifier", verifier, "prompt, rollout")
    check_prompt_list(prompts, unique=True)
    n, rollouts = source.manifest.sampling.samples_per_prompt, _sample(source, prompts)
    scores_BN = np.array([_judged(verifier, prompts[i // n], r) for i, r in enumerate(rollouts)]).reshape(len(prompts), n)
    right_B = (scores_BN == 1).sum(axis=1)
    pass_at_k = {k: float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in right_B])) for k in range(1, n + 1)}
    return Evaluation(estimates.mean_score(scores_BN), pass_at_k, n)


def _sample(source: RolloutSource, prompts: Sequence[Prompt]) -> Sequence[Rollout]:
    rollouts = answers_of(Rollout, source.sample(prompts))
    check_rollouts(source.manifest, prompts, rollouts)
    return rollouts


def _judged(verifier: Verifier, prompt: Prompt, rollout: Rollout) -> float:
    """Return the verifier's answer, if it is one: it is the caller's own function."""
    score = verifier(prompt, rollout)
    if not isinstance(score, int | float | np.number | np.bool_) or not 0 <= score <= 1:
        raise InvalidRecordError(
            f"Prompt {prompt.prompt_id!r}: the verifier gave {score!r:.80}, expected a number from 0 to 1; 1 is right."
        )
    return float(score)


def evaluate_reverse_kl(source: RolloutSource, teacher: TeacherScorer, prompts: Sequence[Prompt]) -> Estimate:
    """Return KL(policy, teacher) per counted token, nats, on fresh rollouts of the policy: the quantity that OPD descends.

    On prompts that were trained on, give the source another `SamplingParams.seed` than those rollouts have: with theirs a trained policy draws them
    again, far more often than by itself, and the KL is too low.

    Raises:
        ArgumentError: source or teacher are something else.
        TokenizerMismatchError: the teacher's token-to-id map is not the policy's; nothing is sampled.
        InvalidRecordError: there are no prompts, two share an id, or the source does not sample at temperature 1 without a cut, or reports no
            log-probs, or others in `sampler_logprobs`.
        SourceError: the source gave other rollouts than it was asked for, or of other prompts.
        ScorerError: the teacher gave other scores than those of the rollouts, in order, or not one for each of their tokens.
    """
    check_noun(source, RolloutSource)
    check_noun(teacher, TeacherScorer)
    check_prompt_list(prompts, unique=True)
    check_vocabulary(f"Scorer {teacher.provenance.model}", vocabulary_of(teacher), "the policy's", source.manifest.tokenizer)
    sampling = source.manifest.sampling
    if not sampling.neutral:
        raise InvalidRecordError(
            f"Sampling: temperature is {sampling.temperature} and top_p {sampling.top_p}, expected 1 and 1; other samples are not the policy's own."
        )
    rollouts = _sample(source, prompts)
    student = [r.behavior_logprobs[r.loss_mask] for r in rollouts if r.behavior_logprobs is not None]
    if len(student) < len(rollouts):
        raise InvalidRecordError("Source: it reports no behavior_logprobs; score with the policy's own engine.")
    drawn_by = (own if r.sampler_logprobs is None else r.sampler_logprobs[r.loss_mask] for own, r in zip(student, rollouts, strict=True))
    if not all(np.allclose(theirs, own, atol=_ROUNDING) for theirs, own in zip(drawn_by, student, strict=True)):
        raise InvalidRecordError(
            "Source: its sampler_logprobs are not its behavior_logprobs, so another distribution than the policy's drew its rollouts; leave out what "
            "changes the draw (a bias, a grammar), or leave `sampler_logprobs` None if nothing does."
        )
    scores = answers_of(Scores, teacher.score(rollouts))
    check_scores(rollouts, scores, ())
    teachers = [s.logprobs[r.loss_mask] for r, s in zip(rollouts, scores, strict=True)]
    sums = estimates.sampled_reverse_kl(student, teachers)
    return sums.pooled(sampling.samples_per_prompt).per_token()
