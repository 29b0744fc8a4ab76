"""Small worlds in which everything can be enumerated: bigram models with exact KL, and makers of stores, records, batches and heads.

Shape suffixes as in lopd; R is the number of enumerated responses.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import final

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from lopd import collate
from lopd.backends.memory_store import MemoryStore
from lopd.protocols import OPDLoss
from lopd.records import (
    Batch,
    LMHead,
    LossOutput,
    Manifest,
    ModelId,
    Provenance,
    Rollout,
    SamplingParams,
    ScoredRollout,
    Scores,
    TokenizerId,
    Weighting,
    by_rollout,
    by_token,
)
from lopd.testing.loss_cases import map_batch

SFT_TEACHER = ModelId("big-teacher", "weights:teacher-weights", "bfloat16")
OTHER_TEACHER = ModelId("other-teacher", "weights:other-weights", "bfloat16")
POLICY = ModelId("sft-student", "weights:policy-weights", "bfloat16")
TOKENIZER_ID = TokenizerId("vocabulary", 1000, None, None, None, "")


@final
class BigramLM(nn.Module):
    """A float64 `Student` whose next token depends on the last one only.  The last id of the vocabulary ends a response."""

    def __init__(self, vocab: int, dim: int, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=random, dtype=torch.float64))

        self.embedding_VD = draw(vocab, dim)
        self.head_VD = draw(vocab, dim)
        self.bias_V = draw(vocab)

    @property
    def vocab(self) -> int:
        return self.bias_V.numel()

    @property
    def tokenizer(self) -> TokenizerId:
        return TOKENIZER_ID

    def forward(self, batch: Batch, loss: OPDLoss) -> LossOutput:
        return loss(self.embedding_VD[batch.inputs], LMHead(self.head_VD, self.bias_V), batch)

    def logprobs_VV(self) -> Tensor:
        """Return a table: row, the last token; column, the next one.  Carries the gradient, and uses nothing of lopd."""
        logits_VV = self.embedding_VD @ self.head_VD.T + self.bias_V
        return logits_VV - logits_VV.exp().sum(-1, keepdim=True).log()

    def drifted(self, seed: int, distance: float) -> "BigramLM":
        """Make a model of the same shape at this distance from here, in a random direction."""
        direction = BigramLM(self.vocab, self.embedding_VD.shape[1], seed)
        norm = torch.cat([p.flatten() for p in direction.parameters()]).norm()
        with torch.no_grad():
            for there, here in zip(direction.parameters(), self.parameters(), strict=True):
                there.mul_(distance / norm).add_(here)
        return direction


Response = tuple[tuple[int, ...], tuple[int, ...]]


@frozen(eq=False)
class BigramWorld:
    """Equally likely prompts, and all responses of up to `horizon` tokens, each of which is in the batch once.

    Args:
        vocab, horizon: ids 0 to vocab - 1; a response ends at `horizon` tokens or with id vocab - 1.
        prompts: token ids; of different lengths, so that a wrong offset shows.
    """

    vocab: int
    horizon: int
    prompts: tuple[tuple[int, ...], ...] = ((0,), (1, 0, 1))
    responses: tuple[Response, ...] = field(init=False)

    @responses.default
    def _enumerate(self) -> tuple[Response, ...]:
        ended = {ids[: ids.index(self.vocab - 1) + 1] if self.vocab - 1 in ids else ids for ids in self._full_length()}
        return tuple((prompt, response) for prompt in self.prompts for response in sorted(ended))

    def _full_length(self) -> Iterable[tuple[int, ...]]:
        return product(range(self.vocab), repeat=self.horizon)

    def per_response(self, values_VV: Tensor) -> list[Tensor]:
        """Return for each response the (T,) entries of a (last, next) table at its tokens."""
        return [values_VV[torch.tensor((prompt[-1], *response[:-1])), torch.tensor(response)] for prompt, response in self.responses]

    def probabilities_R(self, model: BigramLM) -> Tensor:
        """Return the joint probability of prompt and response, detached; sums to 1."""
        sums_R = torch.stack([t.sum() for t in self.per_response(model.logprobs_VV().detach())])
        return sums_R.exp() / len(self.prompts)

    def kl(self, student: BigramLM, teacher: BigramLM) -> float:
        """Return KL(student, teacher) between whole responses, nats, by summing over all of them."""
        gaps_VV = (student.logprobs_VV() - teacher.logprobs_VV()).detach()
        gaps_R = torch.stack([gap_T.sum() for gap_T in self.per_response(gaps_VV)])
        return float((self.probabilities_R(student) * gaps_R).sum())

    def visits_V(self, model: BigramLM) -> Tensor:
        """Return (V,) how often, on average, a response of this model predicts a token after each token; detached, by forward recursion."""
        transition_VV = model.logprobs_VV().detach().exp()
        now_V = torch.zeros(self.vocab, dtype=torch.float64)
        for prompt in self.prompts:
            now_V[prompt[-1]] += 1 / len(self.prompts)
        visits_V = torch.zeros_like(now_V)
        for _ in range(self.horizon):
            visits_V += now_V
            now_V = now_V @ transition_VV
            now_V[-1] = 0.0
        return visits_V

    def objective(self, student: BigramLM, teacher: BigramLM, states_of: BigramLM) -> Tensor:
        """Return minus the exact KL of the next-token distributions, summed over the states that `states_of` visits.

        It has no sampled token in it.
        """
        log_s, log_t = student.logprobs_VV(), teacher.logprobs_VV().detach()
        return -(self.visits_V(states_of) * (log_s.exp() * (log_s - log_t)).sum(-1)).sum()

    def batch(self, weights_R: Tensor, teacher: BigramLM, ref: BigramLM) -> Batch:
        """Collate all responses, each token weighted by its response's weight, with float64 weights and log-probs."""
        columns = {name: self.per_response(model.logprobs_VV().detach()) for name, model in (("teacher", teacher), ("ref", ref))}
        records = [
            scored(make_rollout(f"r{i}", prompt, response), {name: values[i].clamp(max=0.0).tolist() for name, values in columns.items()})
            for i, (prompt, response) in enumerate(self.responses)
        ]
        packed = collate(records, by_token, teacher="teacher", ref="ref")
        exact = {f"{name}_logprobs": _exact(packed, name, model) for name, model in (("teacher", teacher), ("ref", ref))}
        return evolve(packed, weight=weights_R[packed.segment_ids] * packed.weight, **exact)


def _exact(packed: Batch, name: str, model: BigramLM) -> Tensor:
    """Return a column in float64, after a check that collate put the same values into the same places."""
    exact_N = model.logprobs_VV().detach()[packed.inputs, packed.targets] * (packed.weight > 0)
    torch.testing.assert_close(getattr(packed, f"{name}_logprobs").double(), exact_N, rtol=1e-6, atol=1e-6)
    return exact_N


def flat_gradient(model: nn.Module, value: Tensor) -> Tensor:
    """Return the gradient of a scalar with respect to all parameters, as one vector."""
    gradients = torch.autograd.grad(value, list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


def make_rollout(rollout_id: str, prompt: Sequence[int], response: Sequence[int], loss_mask: Sequence[bool] | None = None) -> Rollout:
    """Make a rollout; every response token counts unless a mask is given."""
    return Rollout(rollout_id, prompt, response, [True] * len(response) if loss_mask is None else loss_mask, "stop")


def scored(rollout: Rollout, scores: Mapping[str, Sequence[float]]) -> ScoredRollout:
    """Make a record as a store would give it."""
    return ScoredRollout(rollout, {name: Scores.of(rollout, values).logprobs for name, values in scores.items()})


def random_rollouts(seed: int, count: int, vocab: int = 5, longest: int = 5, masked: float = 0.0) -> list[Rollout]:
    """Make rollouts of 1 to `longest` prompt and response tokens; a share `masked` of the response tokens does not count."""
    random = np.random.default_rng(seed)
    rollouts = []
    for i in range(count):
        prompt, response = (random.integers(0, vocab, random.integers(1, longest + 1)) for _ in range(2))
        mask = random.random(response.size) >= masked
        mask[random.integers(response.size)] = True
        rollouts.append(Rollout(f"r{i}", prompt, response, mask, "stop"))
    return rollouts


def random_records(seed: int, count: int, vocab: int = 5, longest: int = 5, masked: float = 0.3) -> list[ScoredRollout]:
    """Make random rollouts with a `teacher` and a `ref` column of random log-probs, 0 to about -6 nats."""
    random = np.random.default_rng((seed, 1))
    return [
        scored(r, {name: (-2.0 * random.exponential(size=r.response_ids.size)).tolist() for name in ("teacher", "ref")})
        for r in random_rollouts(seed, count, vocab, longest, masked)
    ]


def random_batch(
    seed: int = 0, count: int = 4, vocab: int = 5, weighting: Weighting = by_rollout, dtype: torch.dtype = torch.float64
) -> Batch:
    """Make a packed batch of random records, with weights and log-probs in this dtype."""
    return to_dtype(collate(random_records(seed, count, vocab), weighting, teacher="teacher", ref="ref"), dtype)


def to_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return the same batch with weights and log-probs in another dtype."""
    return map_batch(batch, ("weight", "teacher_logprobs", "ref_logprobs", "sampler_logprobs"), lambda column: column.to(dtype))


def random_head(
    seed: int = 0, vocab: int = 5, dim: int = 3, *, dtype: torch.dtype = torch.float64, softcap: float | None = None, scale: float = 1.0
) -> LMHead:
    """Make a head with bias, whose weight and bias require a gradient."""
    random = torch.Generator().manual_seed(seed)
    weight_VD, bias_V = (torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype) for shape in ((vocab, dim), (vocab,)))
    return LMHead(weight_VD.requires_grad_(), bias_V.requires_grad_(), softcap, scale)


def random_hidden(batch: Batch, dim: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Make (N, D) hidden states that require a gradient."""
    random = torch.Generator().manual_seed(seed + 1)
    return torch.randn(batch.inputs.numel(), dim, generator=random, dtype=torch.float64).to(dtype).requires_grad_()


def make_manifest(sft_teacher: ModelId | None = SFT_TEACHER, vocab_size: int = 1000) -> Manifest:
    """Make a manifest of rollouts that `POLICY` sampled."""
    return Manifest(evolve(TOKENIZER_ID, vocab_size=vocab_size), POLICY, SamplingParams(), sft_teacher)


def make_provenance(model: ModelId = SFT_TEACHER) -> Provenance:
    """Make the provenance of a column."""
    return Provenance(model, TOKENIZER_ID.vocab_hash, "tests 1.0")


def make_store(
    records: Sequence[ScoredRollout],
    *,
    columns: Sequence[str] = ("teacher", "ref"),
    manifest: Manifest | None = None,
    provenance: Callable[[str], Provenance] = lambda column: make_provenance(POLICY if column == "ref" else SFT_TEACHER),
) -> MemoryStore:
    """Make a memory store with these records and, of their scores, these columns."""
    store = MemoryStore(manifest or make_manifest())
    store.append([record.rollout for record in records])
    for column in columns:
        store.append_scores(column, provenance(column), [Scores.of(r.rollout, r.scores[column]) for r in records if column in r.scores])
    return store
