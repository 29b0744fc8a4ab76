"""Served models as a RolloutSource and as a TeacherScorer: vLLM, SGLang, or any server of the OpenAI completions (`Servers.speaks`).

Token ids in, token ids out, never text.  A server does not report which weights it serves, nor which tokenizer its ids are of: you state that, with
`identity` and `tokenizer`, and `from_folder` reads both from the folder that is served.

Start vLLM with `--generation-config vllm` (lopd sends every sampling field all the same), for sampling with a temperature or top_p other
than 1 with `--logprobs-mode processed_logprobs`, and for scoring

- with `--max-logprobs` of at least `top_k`, and so for sampling with candidates;
- with `--max-num-batched-tokens` so small that float32 logits of that many tokens fit beside the model;
- with `--skip-tokenizer-init`: text is not wanted, and a server that spells out `top_k` candidates a token took twice the time (tiny model,
  top_k = 20, vLLM 0.32 on a CPU);
- for scoring candidates, with vLLM 0.32, `--enable-scale-out`, its second model runner (VLLM_USE_V2_MODEL_RUNNER=1) and `--max-logprobs` of
  at least `candidates + top_k` and one more than `candidates + drawn`.

Start it for a model with LongRoPE with a `--max-model-len` of at most `original_max_position_embeddings`: above it vLLM turns the positions of all
texts by the long factors, and transformers only those of texts that are longer.

Start SGLang with `--disable-radix-cache` for scoring, else it is asked for the log-probs of prompts too; and for sampling with
`--enable-deterministic-inference`, without which it takes no seeds.
"""

from collections.abc import Callable, Iterable, Sequence
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
    stream_seed,
)
from lopd.engines.server.answers import AllNullError, NotANumberError
from lopd.engines.server.dialect import Draw, Probe, Widths, check_extra
from lopd.engines.server.modes import ModeJudge, probe_bodies
from lopd.engines.server.servers import Servers
from lopd.engines.supports import provenance_of
from lopd.engines.workers import Request
from lopd.errors import EngineError, InvalidRecordError, LopdError
from lopd.records.checks import check_kind, own_numbers
from lopd.records.identity import ModelId, TokenizerId, fingerprint_tokenizer
from lopd.records.lineage import Lineage
from lopd.records.manifest import Manifest, Provenance, SamplingParams
from lopd.records.optional import need
from lopd.records.rollouts import Prompt, Rollout, Scores, rollout_id

_PROBE_TOKENS = 16


def _id_set(ids: Iterable[int]) -> frozenset[int]:
    return frozenset(ids)


def _check_parts(owner: str, servers: object, identity: object) -> None:
    """Refuse a URL for the servers, and a name for the identity, which no server can be asked for."""
    check_kind(f"{owner}: servers", servers, Servers, "make them: `Servers(url, model)`")
    check_kind(f"{owner}: identity", identity, ModelId, "make it: `ModelId(name, commit, dtype)` of the weights that are served")


@final
@define(eq=False, slots=False)
class ServerScorer:
    """Reads rollouts with a served model.

    A rollout may have one token less than the context, where the server insists on generating one, and with SGLang 7 less than the context or
    its cache.  Ids that the tokenizer lacks keep their probability there, which `HFScorer` cuts off: a little for the padding of a head, and more for
    tokens of a larger tokenizer, such as `<think>` beyond the student's.
    SGLang and servers of the OpenAI completions are tried with a few tokens in each call, before anything else is asked: one that does not echo,
    names tokens by text, or gives fewer most likely tokens than `top_k` is refused by name.
    A log-prob of exactly -inf, which servers write as -9999, becomes the floor of `lopd.floor_logprobs`, and is counted.

    Args:
        servers: that serve the model.
        tokenizer: whose ids the model reads.
        identity: the model's identity; its revision must name the weights.
        top_k: how many of the model's own most likely tokens, outside of the candidates, are kept at each response token.
        candidates: how many of each rollout's candidates are scored: the first of `Rollout.candidates`, which are the policy's most likely.
        drawn: how many of its drawn candidates are scored: the last.
        tokens_per_request: short rollouts share a request, up to so many tokens, the longest times how many.

    Raises:
        InvalidRecordError: `top_k`, `candidates` or both together are less than 0, or more than there are tokens; `drawn` is less than 0;
            `tokens_per_request` is less than 1; or the servers' kind cannot score candidates.
    """

    servers: Servers
    tokenizer_id: TokenizerId = field(converter=fingerprint_tokenizer, alias="tokenizer")
    identity: ModelId
    top_k: int = 0
    tokens_per_request: int = 2048
    candidates: int = 0
    drawn: int = 0
    _gave_numbers: bool = field(default=False, init=False, repr=False)  # whether a probe did: what lacks them later may be the rollout

    def __attrs_post_init__(self) -> None:
        _check_parts("ServerScorer", self.servers, self.identity)
        own_numbers(self, "ServerScorer", tokens_per_request=1)
        check_support("ServerScorer", self.tokenizer_id, self.top_k, self.candidates, self.drawn)
        if self._widths.asks and not self.servers.dialect.scores_ids:
            raise InvalidRecordError(
                f"ServerScorer: candidates is {self.candidates} and drawn {self.drawn}, expected 0 of servers that speak {self.servers.speaks!r}, "
                "which cannot be asked for given ids; keep `top_k` of the model's own, or score with vLLM or SGLang."
            )

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are; the servers are asked for their version.

        Raises:
            EngineError: they do not agree, or none is up.
        """
        engine = self.servers.dialect.engine(self.servers.served)
        return provenance_of(self.identity, self.tokenizer_id, engine, top_k=self.top_k, candidates=self.candidates, drawn=self.drawn)

    def score(self, rollouts: Sequence[Rollout], /) -> Sequence[Scores]:
        """Return (T_i,) log-probs, nats, of each rollout's response tokens, in the order given.

        Raises:
            ContextOverflowError: a rollout is too long; it names the rollout, and nothing is sent.
            InvalidRecordError: an id is outside the vocabulary, a rollout lacks candidates, or a log-prob is missing or none.
            EngineError: the servers failed, disagree, lack the extensions, or cannot score candidates.
        """
        check_rollouts(rollouts, self.tokenizer_id, self.servers.served.context - 1, self.candidates, self.drawn)
        # a request that asks for ids is about one rollout
        budget = 1 if self._widths.asks else self.tokens_per_request
        groups = budgeted([len(rollout) for rollout in rollouts], budget)
        requests = [self._request([rollouts[i] for i in group]) for group in groups]
        scores = self.servers.ask(requests, self._probe(rollouts[0]) if requests and self.servers.dialect.tried else None)
        return in_order([i for group in groups for i in group], scores)

    @property
    def _widths(self) -> Widths:
        return Widths(self.tokenizer_id.vocab_size, self.top_k, self.candidates, self.drawn)

    def _request(self, group: Sequence[Rollout]) -> Request[Scores]:
        dialect, widths = self.servers.dialect, self._widths
        body = dialect.scoring(group, widths, self.servers.served)
        parts = [self._request([rollout]) for rollout in group] if len(group) > 1 else []
        read = lambda answer: dialect.scores(group, widths, body, answer)  # noqa: E731
        return Request(f"Rollout {group[0].rollout_id!r}", body, read, parts)

    def _probe(self, rollout: Rollout) -> Probe:
        """Return the beginning of a rollout, to see whether a server can do what it is asked for."""
        ids = [*rollout.prompt_ids[-_PROBE_TOKENS:].tolist(), *rollout.response_ids[:_PROBE_TOKENS].tolist()][:_PROBE_TOKENS]
        few = Rollout(rollout.rollout_id, ids[:1], ids[1:], [True] * (len(ids) - 1), "length")
        dialect, widths = self.servers.dialect, evolve(self._widths, candidates=0, drawn=0)
        body = dialect.scoring([few], widths, self.servers.served)
        if self._widths.asks and self.servers.speaks == "sglang":
            # some versions end where requests with such ids and without are read together
            body["token_ids_logprob"] = [sorted(set(ids))]

        def judge(owner: str, answer: Any) -> None:
            try:
                dialect.scores([few], widths, body, answer)
            except LopdError as error:
                known = self._gave_numbers or not isinstance(error, AllNullError)
                kind = NotANumberError if isinstance(error, NotANumberError) and known else EngineError
                raise kind(f"{owner}: {error}") from error
            self._gave_numbers = True

        return Probe((body,), judge)


@final
@define(eq=False, slots=False)
class ServerSource:
    """Samples from a served model.

    Each (seed, prompt, sample, generation) is a request with a seed of its own, so a rollout depends on what it was batched with only as far
    as the server's rounding does.

    Args:
        servers: that serve the model.
        tokenizer: whose ids the model reads.
        identity: the model's identity; its revision must name the weights.
        sampling: how to draw.
        eos_ids: end a response where `sampling.stop_ids` is empty.  A server does not report its own, and the tokenizer's alone is not enough:
            many models have several (`eos_token_id` in their generation_config.json).
        lineage: what the model was trained on.
        generation: round of sampling.

    Raises:
        InvalidRecordError: neither `eos_ids` nor `sampling.stop_ids` states how a response ends; or `sampling` asks for drawn candidates, or for
            more candidates than there are tokens; or a field in `extra` of the servers changes what is drawn, or is not what lopd asks for.
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
        """Return a source whose tokenizer, EOS ids and SFT teacher are read from a local copy of the folder that is served, or its hub name.

        Raises:
            EngineError: the folder is not there, or cannot be read; or its adapters do not say what ends a response, and their base is not there.
            MissingDependencyError: transformers is not installed.
        """
        need("transformers", "ServerSource")
        from lopd.engines.finding import load_tokenizer, local_folder, looking_for, served_eos

        path = local_folder(folder, weights=False)
        tokenizer = fingerprint_tokenizer(load_tokenizer(path))
        with looking_for(folder):
            # those that are asked for take the place of the model's; SGLang ends at those of both files, and cannot be told not to
            asked, of_both = getattr(sampling, "stop_ids", ()), servers.speaks == "sglang"
            ends = frozenset[int]() if asked else served_eos(path, tokenizer, of_both=of_both)
            return cls(servers, tokenizer, identity, sampling, ends, Lineage.read(path))

    def __attrs_post_init__(self) -> None:
        _check_parts("ServerSource", self.servers, self.identity)
        check_kind("ServerSource: sampling", self.sampling, SamplingParams, "make it: `SamplingParams(...)`")
        if not self.servers.dialect.samples:
            raise InvalidRecordError(
                f"ServerSource: the servers speak {self.servers.speaks!r}, which returns text and not the sampled ids, expected 'vllm' or 'sglang'; "
                "sample with one of these."
            )
        check_drawn("ServerSource", self.sampling)
        check_top_k("ServerSource", self.sampling.candidates, self.tokenizer_id, "candidates")
        if not self.stop_ids:
            raise InvalidRecordError(
                "ServerSource: eos_ids and sampling.stop_ids are empty, expected ids that end a response; "
                "pass those of the model's generation_config.json."
            )
        dialect = self.servers.dialect
        check_extra("ServerSource", self.servers.extra, dialect.addressed(self.servers.model, dialect.sampling(self._draw("", [], 0)))[1])

    @property
    def manifest(self) -> Manifest:
        """The manifest of a store of these rollouts."""
        return Manifest(self.tokenizer_id, self.identity, self.sampling, self.lineage.sft_teacher, self.generation)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a response: those asked for, or the model's EOS."""
        return frozenset(self.sampling.stop_ids) or self.eos_ids

    def sample(self, prompts: Sequence[Prompt], /) -> Sequence[Rollout]:
        """Return `samples_per_prompt` rollouts for each prompt, in their order.

        Where temperature or top_p change the distribution, each server is asked first whether its log-probs are those at temperature 1, or
        those of what is drawn.  With the former `sampler_logprobs` stay None, unless the temperature is 0; with the latter the rollouts are
        read once more for those at temperature 1.  In either case a rollout has at most one token less than the context.  SGLang's are after the
        temperature and before top_p, so they are left out, and its rollouts are read once more too.

        Raises:
            ContextOverflowError: a prompt leaves no room for a response; it names the prompt, and nothing is sent.
            InvalidRecordError: an id is outside the vocabulary, or a log-prob is missing or none.
            EngineError: the servers failed, disagree, lack the extensions, report log-probs of some other kind, or take no seeds.
        """
        if not prompts:
            return []
        check_prompts(prompts, self.tokenizer_id, self._context)
        if not self.servers.served.seeded:
            raise EngineError(
                "ServerSource: the servers do not take seeds, so one seed would not give the same rollouts again; start SGLang with "
                "`--enable-deterministic-inference`."
            )
        asks_mode = not self.sampling.neutral and self.servers.speaks == "vllm"
        judge = ModeJudge()
        probe = Probe(probe_bodies(prompts[0].token_ids[:_PROBE_TOKENS].tolist()), judge) if asks_mode else None

        def processed() -> bool:
            return judge.processed if asks_mode else not self.sampling.neutral

        samples = range(self.sampling.samples_per_prompt)
        rollouts = self.servers.ask([self._request(prompt, sample, processed) for prompt in prompts for sample in samples], probe)
        if not processed():
            return rollouts
        scores = ServerScorer(self.servers, self.tokenizer_id, self.identity, self.sampling.candidates).score(rollouts)
        return [evolve(r, behavior_logprobs=s.logprobs, candidates=s.top_k) for r, s in zip(rollouts, scores, strict=True)]

    @property
    def _context(self) -> int:
        """Tokens of the longest rollout; one that may be read once more leaves room for the token that servers insist on."""
        return self.servers.served.context - (not self.sampling.neutral)

    def _request(self, prompt: Prompt, sample: int, processed: Callable[[], bool]) -> Request[Rollout]:
        name, dialect = rollout_id(prompt.prompt_id, sample, self.generation), self.servers.dialect
        room = min(self.sampling.max_new_tokens, self._context - prompt.token_ids.size)
        draw = self._draw(name, prompt.token_ids.tolist(), room)
        read = lambda answer: [dialect.rollout(draw, answer, processed=processed())]  # noqa: E731
        return Request(f"Rollout {name!r}", dialect.sampling(draw), read)

    def _draw(self, name: str, prompt: list[int], room: int) -> Draw:
        settings = sampling_settings(self.sampling, self.stop_ids, self.tokenizer_id) | {"logprobs": self.sampling.candidates}
        seed = stream_seed(self.sampling, name, SEED_BITS)
        return Draw(name, self.generation, prompt, room, seed, settings, self.tokenizer_id.vocab_size)
