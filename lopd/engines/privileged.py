"""A scorer that reads more than the policy did: another prompt before the same response tokens.

Shape suffixes: P prompt tokens.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import final

import numpy as np
from attrs import evolve, field, frozen
from numpy.typing import NDArray

from lopd.errors import ContextOverflowError, InvalidRecordError
from lopd.protocols import TeacherScorer
from lopd.protocols.doors import answers_of, check_noun, check_prompt_list, check_scores
from lopd.records.checks import check_kind
from lopd.records.manifest import PRIVILEGED, Provenance
from lopd.records.rollouts import Prompt, Rollout, Scores


@final
@frozen(eq=False)
class PrivilegedScorer:
    """Any scorer, with privileged prompts: it scores the tokens that the policy drew after one prompt as they stand after another.

    The teacher may be the student itself, told the solution, a hint or a system prompt (self-distillation, OPSD).  `told[i]` stands in for
    `prompts[i]`, so what each reads is plain Python over its records:

        told = make_prompts([f"{p.text}  The answer is {p.answer}." for p in prompts], tokenizer)
        score_rollouts(store, PrivilegedScorer(HFScorer.from_folder("student"), prompts, told), column="told")

    A prompt is found by its tokens, which are all that stands before a response.  Where turns of a trajectory are rollouts of their own
    (`import_trajectories(turns="each")`, or numbers), a prompt is only the beginning of that: state it with `continued=True`.

    The column has an identity of its own (`Provenance.logprobs_mode`): that of the plain scorer, or of other prompts, does not continue it.
    `batches` draws a warning unless `ConsistencyPolicy.PRIVILEGED` states that it is meant.

    Args:
        scorer: the teacher; its context has to hold the privileged prompt and the response.
        prompts: what the policy read.
        told: what the teacher reads in the place of each, made with the same tokenizer.
        continued: rollouts may be later turns, whose prompts begin with one of these and go on; what follows it is read as it stands.

    Raises:
        ArgumentError: the scorer or the prompts are something else.
        InvalidRecordError: there are not as many of both, they are the same, or one prompt has two others.
    """

    scorer: TeacherScorer
    prompts: Sequence[Prompt] = field(repr=False)
    told: Sequence[Prompt] = field(repr=False)
    continued: bool = field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        check_noun(self.scorer, TeacherScorer)
        for prompts in (self.prompts, self.told):
            check_prompt_list(prompts)
        if len(self.prompts) != len(self.told):
            raise InvalidRecordError(
                f"Privileged prompts: there are {len(self.told)} for {len(self.prompts)} prompts; make both from like records."
            )
        if all(key == _key(told) for key, told in self._told.items()):
            raise InvalidRecordError(
                f"Privileged prompts: all {len(self.told)} have the tokens of the prompts themselves, expected more to read; pass what it is told."
            )

    @cached_property
    def _told(self) -> Mapping[bytes, NDArray[np.int32]]:
        """The tokens of a prompt -> (P,) those that stand in for it."""
        found = dict[bytes, NDArray[np.int32]]()
        for prompt, told in zip(self.prompts, self.told, strict=True):
            first = found.setdefault(_key(prompt.token_ids), told.token_ids)
            if not np.array_equal(first, told.token_ids):
                raise InvalidRecordError(
                    f"Privileged prompts: prompt {prompt.prompt_id!r} has the tokens of one before it, and another privileged prompt, expected the "
                    "same; keep one of the two."
                )
        return found

    @cached_property
    def _lengths(self) -> list[int]:
        return sorted({prompt.token_ids.size for prompt in self.prompts}, reverse=True)

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are: the scorer's, after these prompts.

        Raises:
            InvalidRecordError: the scorer's are not raw.
        """
        provenance = self.scorer.provenance
        if provenance.logprobs_mode != "raw":
            raise InvalidRecordError(
                f"Scorer {provenance.model}: its log-probs are {provenance.logprobs_mode!r}, expected 'raw'; give one scorer all privileged prompts."
            )
        digest = blake2b(digest_size=16)
        for key, told in sorted(self._told.items()):
            digest.update(b"%d|%d|%b%b" % (len(key), told.size, key, _key(told)))
        return evolve(provenance, logprobs_mode=f"{PRIVILEGED} {digest.hexdigest()}")

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """Return (T_i,) log-probs, nats, of each rollout's response tokens after its privileged prompt, in the order given.

        Raises:
            ContextOverflowError: a privileged prompt and a response are longer than the context; it names the rollout, and nothing is computed.
            InvalidRecordError: a rollout's prompt is not among the prompts, or what the scorer refuses.
            ScorerError: the scorer gave other scores than those of the rollouts, in order, or not one for each of their tokens.
        """
        told = [self._tell(rollout) for rollout in rollouts]
        try:
            scores = answers_of(Scores, self.scorer.score(told))
        except ContextOverflowError as error:
            raise ContextOverflowError(
                f"{str(error).rstrip('.')}; these are the privileged prompt and the response, so leave the rollout out, or shorten that prompt and "
                "score all of its rollouts (`rows=`) into a column of their own, for `batches(teacher={COLUMN: PROMPTS, ...})`."
            ) from error
        check_scores(told, scores, ())
        # bound to the rollout as it was sampled
        return [evolve(score, content_hash=rollout.content_hash) for score, rollout in zip(scores, rollouts, strict=True)]

    def _tell(self, rollout: Rollout) -> Rollout:
        """Return the rollout with its privileged prompt; what follows the prompt before a later turn stays."""
        check_kind("Rollout", rollout, Rollout, "pass those that a source sampled, or `record.rollout` of a store's records")
        ids_P = rollout.prompt_ids
        # the longest first: one prompt may begin like another
        length = next((length for length in self._lengths if length <= ids_P.size and _key(ids_P[:length]) in self._told), 0)
        if length and (self.continued or length == ids_P.size):
            return evolve(rollout, prompt_ids=np.concatenate([self._told[_key(ids_P[:length])], ids_P[length:]]))
        like = next((prompt.prompt_id for prompt in self.prompts if np.array_equal(prompt.token_ids, ids_P[:length])), None)
        begins = f", but begins like prompt {like!r} and goes on by {ids_P.size - length} tokens" if length else ""
        raise InvalidRecordError(
            f"Rollout {rollout.rollout_id!r}: its prompt of {ids_P.size} tokens is not among the {len(self.prompts)} that have a privileged "
            f"one{begins}; make them from the records, the tokenizer and the template of the rollouts"
            f"{', or pass `continued=True` for later turns of trajectories' if length else ''}."
        )


def _key(ids_P: NDArray[np.int32]) -> bytes:
    return ids_P.astype("<i4", copy=False).tobytes()
