"""transformers as a TeacherScorer: the truth that faster engines are compared with.

Shape suffixes: B rows, S positions, M response tokens of a batch, R of a chunk, T of a rollout, A ids asked for, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import transformers
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from lopd.engines.causal_lm import candidate_logprobs, context_length, cut_to_head, evaluating, lm_head, row_hidden_states
from lopd.engines.hf.loading import load_model
from lopd.engines.hf.source import HFSource, OnModel
from lopd.engines.identity import check_unchanged, model_name
from lopd.engines.inputs import asked_ids, budgeted, check_rollouts, check_support, in_order
from lopd.engines.probes import check_scoring
from lopd.engines.supports import arrange, likely, make_scores, provenance_of
from lopd.guards.consistency import check_vocabulary
from lopd.records.checks import check_kind, own_numbers
from lopd.records.collate import target_slice
from lopd.records.estimates import RolloutSums
from lopd.records.identity import ModelId
from lopd.records.manifest import Provenance
from lopd.records.rollouts import Rollout, Scores

_ENGINE = f"transformers {transformers.__version__}"


@final
@define(eq=False, slots=False)
class HFScorer(OnModel):
    """Reads rollouts with a transformers model: length-sorted batches under a token budget, float32 log-softmax in chunks of rows.

    A log-prob of exactly -inf (a head that rules a token out) becomes the floor of `lopd.floor_logprobs`, and is counted.
    Memory beyond the model: activations of `tokens_per_batch` positions, and `rows_per_chunk` * V logits; never a (B, S, V) tensor.

    Args:
        model: a causal LM; it is put in eval mode for as long as it computes here.
        tokenizer: its own.
        tokens_per_batch: padded positions of one forward pass.
        rows_per_chunk: response tokens whose logits exist at once.
        identity: the model's identity; by default a hash of its function (`lopd.engines.identity.model_id`).
        top_k: how many of the model's own most likely tokens, outside of the candidates, are kept beside each response token.
        candidates: how many of each rollout's candidates are scored: the first of `Rollout.candidates`, which are the policy's most likely.
        drawn: how many of its drawn candidates are scored: the last.

    A support has the candidates first, then the model's own, then the drawn ones, and the probability of all tokens but the first two.

    Warns:
        ModelWarning: see `lopd.engines.probes.check_scoring`.

    Raises:
        InvalidRecordError: `tokens_per_batch` or `rows_per_chunk` is less than 1; or `top_k`, `candidates` or both together are not 0 to V.
        ModelError: see `lopd.engines.probes.check_scoring`.
    """

    model: Any = field(repr=model_name)
    tokenizer: Any = field(repr=False)
    tokens_per_batch: int = 8192
    rows_per_chunk: int = 512
    identity: ModelId | None = None
    top_k: int = 0
    candidates: int = 0
    drawn: int = 0

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        *,
        top_k: int = 0,
        candidates: int = 0,
        drawn: int = 0,
    ) -> "HFScorer":
        """Return a scorer on a model folder or hub name."""
        model, tokenizer = load_model(folder, dtype, device)
        return cls(model, tokenizer, top_k=top_k, candidates=candidates, drawn=drawn)

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "HFScorer", tokens_per_batch=1, rows_per_chunk=1)
        check_support("HFScorer", self._known, self.top_k, self.candidates, self.drawn)
        check_scoring(self.model, self._known.vocab_size)

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are."""
        return provenance_of(
            self._identified.identity, self.tokenizer_id, _ENGINE, top_k=self.top_k, candidates=self.candidates, drawn=self.drawn
        )

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """Return (T_i,) log-probs, nats, of each rollout's response tokens, in the order given.

        Raises:
            ContextOverflowError: a rollout is longer than the context; nothing is computed.
            InvalidRecordError: an id is outside the vocabulary, a rollout lacks candidates, or the model gives something that is not a log-prob.
        """
        check_rollouts(rollouts, self._known, context_length(self.model), self.candidates, self.drawn)
        check_unchanged("HFScorer", self.model, self._identified)
        parts = budgeted([len(rollout) for rollout in rollouts], self.tokens_per_batch)
        scores = [made for part in parts for made in self._score_batch([rollouts[i] for i in part])]
        return in_order([i for part in parts for i in part], scores)

    @torch.inference_mode()
    def _score_batch(self, rollouts: Sequence[Rollout]) -> list[Scores]:
        hidden_MD, targets_M = _response_hidden(self.model, rollouts)
        head = lm_head(self.model, self._known.vocab_size).float()
        asked = [asked_ids(rollout, self.candidates, self.drawn) for rollout in rollouts]
        asked_MA = torch.from_numpy(np.concatenate(asked).astype(np.int64)).to(targets_M.device)
        most = likely(self.top_k, self.candidates)
        columns = candidate_logprobs(hidden_MD, head, torch.cat([targets_M[:, None], asked_MA], dim=1), most, self.rows_per_chunk)
        parts = zip(rollouts, asked, *(_split(column.cpu().numpy(), rollouts) for column in columns), strict=True)
        return [self._make_scores(rollout, ids_TA, *part) for rollout, ids_TA, *part in parts]

    def _make_scores(self, rollout: Rollout, ids_TA: NDArray[Any], logprobs_TA: NDArray[Any], *own: NDArray[Any]) -> Scores:
        support = arrange(ids_TA, logprobs_TA[:, 1:], *own, candidates=self.candidates, top_k=self.top_k)
        return make_scores(rollout, logprobs_TA[:, 0], *support, self.drawn)


class _Student:
    """What `exact_reverse_kl` reads of a source: the model itself."""

    model = tokenizer = None


class _Teacher(_Student):
    """What it reads of a scorer, besides."""

    tokens_per_batch = rows_per_chunk = None


@torch.inference_mode()
def exact_reverse_kl(student: HFSource, teacher: HFScorer, rollouts: Sequence[Rollout]) -> RolloutSums:
    r"""Return KL(student, teacher) in nats over the whole vocabulary, summed over the tokens of each rollout of the student that count (`loss_mask`).

    \(\sum_v \pi_\theta(v|s_t)\,(\log\pi_\theta(v|s_t) - \log\pi_T(v|s_t))\) at the state \(s_t\) of each such token: the mean that
    `evaluate_reverse_kl` estimates from sampled tokens alone, at the price of having both models in memory; its interval is narrower.
    It is infinite where the student has a token that the teacher's head lacks.

    Args:
        student: the policy that sampled.
        teacher: reads both, in its own `tokens_per_batch` and `rows_per_chunk`; the logits of a chunk exist for both models at once.
        rollouts: fresh ones of the student.

    Raises:
        ArgumentError: student or teacher are something else, such as a server's or a `PrivilegedScorer`.
        TokenizerMismatchError: the teacher's token-to-id map is not the student's.
        ContextOverflowError: a rollout is longer than the context of one of them.
        InvalidRecordError: there are no rollouts, or no token of theirs counts.
    """
    check_kind("Student", student, _Student, "pass an HFSource; for another source take `evaluate_reverse_kl`")
    check_kind("Teacher", teacher, _Teacher, "pass an HFScorer; for another scorer take `evaluate_reverse_kl`")
    check_vocabulary("Teacher", teacher.tokenizer_id, "the student's", student.tokenizer_id)
    models = student.model, teacher.model
    known = cut_to_head(student.model, student.tokenizer), cut_to_head(teacher.model, teacher.tokenizer)
    check_rollouts(rollouts, min(known, key=lambda ids: ids.vocab_size), min(map(context_length, models)))
    sums = np.zeros(len(rollouts))
    heads = [lm_head(model, ids.vocab_size).float() for model, ids in zip(models, known, strict=True)]
    for part in budgeted([len(rollout) for rollout in rollouts], teacher.tokens_per_batch):
        batch = [rollouts[i] for i in part]
        chunks = [_response_hidden(model, batch)[0].split(teacher.rows_per_chunk) for model in models]
        kl_M = torch.cat([_kl(heads[0].logits(s_RD), heads[1].logits(t_RD)) for s_RD, t_RD in zip(*chunks, strict=True)])
        kls = _split(kl_M.cpu().numpy(), batch)
        sums[part] = [float(kl_T[r.loss_mask].astype(np.float64).sum()) for r, kl_T in zip(batch, kls, strict=True)]
    return RolloutSums(sums, np.array([r.loss_mask.sum() for r in rollouts], np.float64))


def _kl(student_logits_RV: Tensor, teacher_logits_RV: Tensor) -> Tensor:
    student_RV = student_logits_RV.log_softmax(-1)
    teacher_RV = teacher_logits_RV.log_softmax(-1).to(student_RV.device)  # each may have a card of its own
    # an added token may have a row in one head alone: the other gives it no probability
    teacher_RV = torch.nn.functional.pad(teacher_RV, (0, student_RV.shape[-1] - teacher_RV.shape[-1]), value=-torch.inf)
    # a token that the student rules out adds nothing, also where 0 * (-inf - -inf) would be NaN
    gaps_RV = (student_RV - teacher_RV).masked_fill(student_RV == -torch.inf, 0.0)
    return (student_RV.exp() * gaps_RV).sum(-1)


def _response_hidden(model: Any, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Return (M, D) hidden states that predict the response tokens, and those tokens."""
    device = next(model.parameters()).device
    ids_N = torch.from_numpy(np.concatenate([ids for r in rollouts for ids in (r.prompt_ids, r.response_ids)]).astype(np.int64)).to(device)
    lengths = [len(r) for r in rollouts]
    positions_N = torch.cat([torch.arange(length, device=device) for length in lengths])
    targets_M = torch.cat([torch.from_numpy(r.response_ids.astype(np.int64)) for r in rollouts]).to(device)
    with evaluating(model):
        parts = row_hidden_states(model, ids_N, positions_N, lengths).split(lengths)
    return torch.cat([part_SD[target_slice(r)] for r, part_SD in zip(rollouts, parts, strict=True)]), targets_M


def _split(values_M: NDArray[Any], rollouts: Sequence[Rollout]) -> list[NDArray[Any]]:
    return np.split(values_M, np.cumsum([r.response_ids.size for r in rollouts])[:-1])
