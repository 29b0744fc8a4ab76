"""Served models as a RolloutSource and as a TeacherScorer: any server that speaks vLLM's extensions of the OpenAI completions (`vllm serve`).

Token ids in, token ids out, never text.  A server does not say which weights it serves, nor which tokenizer its ids are of: you do, with
`identity` and `tokenizer`, and `from_folder` reads both from the folder that is served.

Start servers with `--generation-config vllm` (lopd sends every sampling field all the same), for sampling with a temperature or top_p other
than 1 with `--logprobs-mode processed_logprobs`, and for scoring

- with `--max-logprobs` of at least `top_k`, and so for sampling with candidates;
- with `--max-num-batched-tokens` so small that float32 logits of that many tokens fit beside the model;
- with `--skip-tokenizer-init`: no text is wanted, and a server that spells out `top_k` candidates a token took twice the time (tiny model,
  top_k = 20, vLLM 0.32 on a CPU);
- for scoring candidates, with vLLM 0.32, `--enable-scale-out`, its second model runner (VLLM_USE_V2_MODEL_RUNNER=1) and `--max-logprobs` of
  at least `candidates + top_k` and one more than `candidates + drawn`.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, final

from attrs import define, evolve, field

from lopd.engines.asked import check_drawn
from lopd.engines.inputs import (
    SEED_BITS,
    budgeted,
    check_prompts,
    check_rollouts,
    check_support,
    check_top_k,
    in_order,
    sampling_settings,
    stop_ids,
    stream_seed,
)
from lopd.engines.server.modes import ModeJudge, probe_bodies
from lopd.engines.server.servers import Probe, Servers
from lopd.engines.server.wire import asking_body, read_asked, read_rollout, read_scores, sampling_body, scoring_body
from lopd.engines.supports import provenance_of
from lopd.engines.workers import Request
from lopd.errors import InvalidRecordError
from lopd.records.checks import check_at_least, check_kind, own_numbers
from lopd.records.identity import ModelId, TokenizerId, fingerprint_tokenizer
from lopd.records.lineage import Lineage
from lopd.records.manifest import Manifest, Provenance, SamplingParams
from lopd.records.optional import need
from lopd.records.paths import read_regular
from lopd.records.rollouts import Prompt, Rollout, Scores, rollout_id

_PROBE_TOKENS = 16


def _id_set(ids: Iterable[int]) -> frozenset[int]:
    return frozenset(ids)


@final
@define(eq=False, slots=False)
class ServerScorer:
    """Reads rollouts with a served model.

    A rollout may have one token less than the context: the server insists on generating one.  A model whose head is padded gives its
    padding ids a little probability there, which `HFScorer` cuts off.
    A log-prob of exactly -inf, which servers write as -9999, becomes the floor of `lopd.floor_logprobs`, and is counted.

    Args:
        servers: that serve the model.
        tokenizer: whose ids the model reads.
        identity: of the model; name a revision that says which weights they are.
        top_k: how many of the model's own most likely tokens, outside of the candidates, are kept at each response token.
        candidates: how many of each rollout's candidates are scored: the first of `Rollout.candidates`, which are the policy's most likely.
        drawn: how many of its drawn candidates are scored: the last.
        tokens_per_request: short rollouts share a request, up to so many tokens, the longest times how many.

    Raises:
        InvalidRecordError: `top_k`, `candidates` or both together are less than 0, or more than there are tokens; `drawn` is less than 0; or
            `tokens_per_request` is less than 1.
    """

    servers: Servers
    tokenizer_id: TokenizerId = field(converter=fingerprint_tokenizer, alias="tokenizer")
    identity: ModelId
    top_k: int = 0
    tokens_per_request: int = 2048
    candidates: int = 0
    drawn: int = 0

    def __attrs_post_init__(self) -> None:
        own_numbers(self, "ServerScorer")
        check_support("ServerScorer", self.tokenizer_id, self.top_k, self.candidates, self.drawn)
        check_at_least("ServerScorer", "tokens_per_request", self.tokens_per_request, 1)

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are; the servers are asked for their version.

        Raises:
            EngineError: they do not agree, or none is up.
        """
        version = self.servers.served.version
        engine = f"vllm {version} served" if version else "served by an unnamed version"
        return provenance_of(self.identity, self.tokenizer_id, engine, top_k=self.top_k, candidates=self.candidates, drawn=self.drawn)

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """(T_i,) log-probs, nats, of each rollout's response tokens, in the order given.

        Raises:
            ContextOverflowError: a rollout is too long; it names the rollout, and nothing is sent.
            InvalidRecordError: an id is outside the vocabulary, a rollout lacks candidates, or a log-prob is missing or none.
            EngineError: the servers failed, disagree, do not speak the extensions, or cannot score candidates.
        """
        check_rollouts(rollouts, self.tokenizer_id, self.servers.served.context - 1, self.candidates, self.drawn)
        # a request that asks for ids is about one rollout
        budget = 1 if self.candidates or self.drawn else self.tokens_per_request
        groups = budgeted([len(rollout) for rollout in rollouts], budget)
        scores = self.servers.ask([self._request([rollouts[i] for i in group]) for group in groups])
        return in_order([i for group in groups for i in group], scores)

    def _request(self, group: Sequence[Rollout]) -> Request[Scores]:
        owner, vocab_size = f"Rollout {group[0].rollout_id!r}", self.tokenizer_id.vocab_size
        if self.candidates or self.drawn:
            (rollout,) = group
            body = asking_body(rollout, self.top_k, self.candidates, self.drawn)
            widths = {"top_k": self.top_k, "candidates": self.candidates, "vocab_size": vocab_size}
            return Request(owner, body, lambda answer: read_asked(rollout, body, answer, **widths))
        parts = [self._request([rollout]) for rollout in group] if len(group) > 1 else []
        return Request(owner, scoring_body(group, self.top_k), lambda answer: read_scores(group, self.top_k, vocab_size, answer), parts)


@final
@define(eq=False, slots=False)
class ServerSource:
    """Samples from a served model.

    Each (seed, prompt, sample, generation) is a request with a seed of its own, so a rollout depends on what it was batched with only as far
    as the server's rounding does.

    Args:
        servers: that serve the model.
        tokenizer: whose ids the model reads.
        identity: of the model; name a revision that says which weights they are.
        sampling: how to draw.
        eos_ids: end a response where `sampling.stop_ids` is empty.  A server does not say its own, and the tokenizer's alone is not enough:
            many models have several (`eos_token_id` in their generation_config.json).
        lineage: what the model was trained on.
        generation: round of sampling.

    Raises:
        InvalidRecordError: neither `eos_ids` nor `sampling.stop_ids` says how a response ends; or `sampling` asks for drawn candidates, or for
            more candidates than there are tokens.
    """

    servers: Servers
    tokenizer_id: TokenizerId = field(converter=fingerprint_tokenizer, alias="tokenizer")
    identity: ModelId
    sampling: SamplingParams = field(factory=SamplingParams)
    eos_ids: frozenset[int] = field(default=frozenset(), converter=_id_set)
    lineage: Lineage = field(factory=Lineage)
    generation: int = 0

    @classmethod
    def from_folder(cls, servers: Servers, folder: str | Path, identity: ModelId, sampling: SamplingParams) -> "ServerSource":
        """A source whose tokenizer, EOS ids and SFT teacher are read from a local copy of the folder that is served, or its hub name.

        Raises:
            EngineError: the folder is not there, or cannot be read.
            MissingDependencyError: transformers is not installed.
        """
        transformers = need("transformers", "ServerSource")
        from lopd.engines.identity import local_folder, looking_for

        path = local_folder(folder, weights=False)
        with looking_for(folder):
            tokenizer = fingerprint_tokenizer(transformers.AutoTokenizer.from_pretrained(path))
            return cls(servers, tokenizer, identity, sampling, _eos_ids(path, tokenizer), Lineage.read(path))

    def __attrs_post_init__(self) -> None:
        check_kind("ServerSource: sampling", self.sampling, SamplingParams, "make it: `SamplingParams(...)`")
        check_drawn("ServerSource", self.sampling)
        check_top_k("ServerSource", self.sampling.candidates, self.tokenizer_id, "candidates")
        if not self.stop_ids:
            raise InvalidRecordError(
                "ServerSource: eos_ids and sampling.stop_ids are empty, expected ids that end a response; "
                "pass those of the model's generation_config.json."
            )

    @property
    def manifest(self) -> Manifest:
        """What a store of these rollouts must say."""
        return Manifest(self.tokenizer_id, self.identity, self.sampling, self.lineage.sft_teacher, self.generation)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a response: those asked for, or the model's EOS."""
        return frozenset(self.sampling.stop_ids) or self.eos_ids

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """`samples_per_prompt` rollouts for each prompt, in their order.

        Where temperature or top_p change the distribution, each server is asked first whether its log-probs are those at temperature 1, or
        those of what is drawn.  With the former `sampler_logprobs` stay None, unless the temperature is 0; with the latter the rollouts are
        read once more for those at temperature 1.  In either case a rollout has at most one token less than the context.

        Raises:
            ContextOverflowError: a prompt leaves no room for a response; it names the prompt, and nothing is sent.
            InvalidRecordError: an id is outside the vocabulary, or a log-prob is missing or none.
            EngineError: the servers failed, disagree, do not speak the extensions, or report log-probs of some other kind.
        """
        if not prompts:
            return []
        check_prompts(prompts, self.tokenizer_id, self._context)
        judge = ModeJudge()
        probe = None if self.sampling.neutral else Probe(probe_bodies(prompts[0].token_ids[:_PROBE_TOKENS].tolist()), judge)
        samples = range(self.sampling.samples_per_prompt)
        rollouts = self.servers.ask([self._request(prompt, sample, judge) for prompt in prompts for sample in samples], probe)
        if not judge.processed:
            return rollouts
        scores = ServerScorer(self.servers, self.tokenizer_id, self.identity, self.sampling.candidates).score(rollouts)
        return [evolve(r, behavior_logprobs=s.logprobs, candidates=s.top_k) for r, s in zip(rollouts, scores, strict=True)]

    @property
    def _context(self) -> int:
        """Tokens of the longest rollout; one that may be read once more leaves room for the token that servers insist on."""
        return self.servers.served.context - (not self.sampling.neutral)

    def _request(self, prompt: Prompt, sample: int, judge: ModeJudge) -> Request[Rollout]:
        name = rollout_id(prompt.prompt_id, sample, self.generation)
        room = min(self.sampling.max_new_tokens, self._context - prompt.token_ids.size)
        settings = sampling_settings(self.sampling, self.stop_ids, self.tokenizer_id) | {"logprobs": self.sampling.candidates}
        body = sampling_body(prompt.token_ids.tolist(), room, stream_seed(self.sampling, name, SEED_BITS), settings)

        def read(answer: Any) -> list[Rollout]:
            return [read_rollout(name, self.generation, self.tokenizer_id.vocab_size, body, answer, processed=judge.processed)]

        return Request(f"Rollout {name!r}", body, read)


def _eos_ids(folder: Path, tokenizer: TokenizerId) -> frozenset[int]:
    """Those of generation_config.json, or else config.json, and the tokenizer's."""
    files = [folder / name for name in ("generation_config.json", "config.json") if (folder / name).exists()]
    configured = next((ids for file in files if (ids := json.loads(read_regular(file)).get("eos_token_id")) is not None), None)
    return stop_ids(SamplingParams(), configured, tokenizer)
