"""Requests to a server with vLLM's extensions of the OpenAI completions, and what its answers mean: token ids both ways, never text.

Everything is looked up by token id, and nothing that is missing becomes a number.

Shape suffixes: T response tokens, K candidates a token.
"""

from base64 import b64decode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from lopd.engines.asked import IDS, asked_scores, asking
from lopd.engines.inputs import NEUTRAL, all_ids, make_rollout
from lopd.engines.server.dialect import Costs, Draw, Get, Served, Widths, model_card, positions
from lopd.engines.server.reading import (
    EXTENSIONS,
    check_end,
    check_read,
    check_sampled,
    choices_of,
    listed,
    logprob,
    most_likely,
    number,
    usage_costs,
)
from lopd.engines.supports import likely, make_scores, make_support
from lopd.errors import EngineError, InvalidRecordError
from lopd.records.rollouts import Rollout, Scores


def request_body(ids: Sequence[int] | Sequence[Sequence[int]], max_tokens: int, **more: Any) -> dict[str, Any]:
    """Return a completion that is asked for: token ids in, token ids out."""
    return {"prompt": ids, "max_tokens": max_tokens, "add_special_tokens": False, "return_token_ids": True, **NEUTRAL, **more}


def scoring_body(rollouts: Sequence[Rollout], top_k: int) -> dict[str, Any]:
    """Return a request for the log-probs of rollouts' own tokens; the one token that vLLM insists on generating is thrown away."""
    return request_body([all_ids(rollout) for rollout in rollouts], 1, prompt_logprobs=top_k, temperature=1.0, top_p=1.0)


def read_scores(rollouts: Sequence[Rollout], top_k: int, vocab_size: int, answer: Any) -> list[Scores]:
    """Return the scores in the answer to `scoring_body`, in the order of the rollouts.

    Raises:
        InvalidRecordError: a log-prob is missing or not a log-prob; it names the rollout.
        EngineError: the server read other tokens than were sent, or does not have the extensions.
    """
    owner = f"Rollout {rollouts[0].rollout_id!r}"
    choices = choices_of(owner, answer, len(rollouts))
    _check_computed(owner, answer)
    parts = zip(rollouts, choices, strict=True)
    return [make_scores(rollout, *_prompt_logprobs(rollout, top_k, vocab_size, choice)) for rollout, choice in parts]


def asking_body(rollout: Rollout, top_k: int, candidates: int, drawn: int) -> dict[str, Any]:
    """Return a request for the log-probs of a rollout's own tokens, of its candidates and of its drawn ones, and of the most likely ones.

    Only this endpoint takes ids to score (vLLM 0.32): completions do not.

    Raises:
        InvalidRecordError: the rollout has fewer.
    """
    asked = asking(rollout, candidates, drawn)
    settings = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "detokenize": False, "prompt_logprobs": likely(top_k, candidates)}
    return {
        "token_ids": all_ids(rollout),
        "return_token_ids": True,
        "sampling_params": {**NEUTRAL, **settings, **asked, IDS: asked[IDS].tolist()},
    }


def read_asked(rollout: Rollout, body: Mapping[str, Any], answer: Any, *, top_k: int, candidates: int, vocab_size: int) -> list[Scores]:
    """Return the scores in the answer to this `asking_body`.

    Raises:
        InvalidRecordError: a log-prob is missing, or is not one; it names the rollout.
        EngineError: the server read other tokens than were sent, or gives log-probs of others.
    """
    owner = f"Rollout {rollout.rollout_id!r}"
    found = _prompt_logprobs(rollout, likely(top_k, candidates), vocab_size, answer)
    _check_computed(owner, answer)
    ids_TA = np.array(body["sampling_params"][IDS], np.int64)
    return [asked_scores(rollout, ids_TA, _decoded(owner, answer), found, candidates=candidates, top_k=top_k)]


def _decoded(owner: str, answer: Mapping[str, Any]) -> Any:
    """Return the array that vLLM writes as base64 of a .npy."""
    written: Any = answer.get("prompt_token_id_logprobs")
    try:
        return np.load(BytesIO(b64decode(written, validate=True)), allow_pickle=False)
    except (TypeError, ValueError, EOFError, OSError):
        raise EngineError(
            f"{owner}: prompt_token_id_logprobs of the server's answer is {str(written)[:40]!r}, expected a .npy in base64; serve with vLLM 0.32 or "
            "later."
        ) from None


def _prompt_logprobs(
    rollout: Rollout, top_k: int, vocab_size: int, choice: Any
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Return (T,) log-probs of the response tokens, and (T, K) ids and log-probs of the most likely ones."""
    owner, ids = f"Rollout {rollout.rollout_id!r}", all_ids(rollout)
    check_read(owner, choice, ids)
    entries = listed(owner, choice, "prompt_logprobs", len(ids))[rollout.prompt_ids.size :]
    tokens = rollout.response_ids.tolist()
    logprobs = [logprob(owner, t, entry, token) for t, (entry, token) in enumerate(zip(entries, tokens, strict=True))]
    return np.array(logprobs, np.float32), *most_likely(owner, entries, tokens, top_k, vocab_size)


def _check_computed(owner: str, answer: Mapping[str, Any]) -> None:
    """Check that every position was computed: what a prefix cache gives depends on the order of requests (vllm-project/vllm#42019).

    vLLM does not read the cache for such a request, and reports that where it was started with `--enable-prompt-tokens-details`.
    """
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    if cached:
        raise EngineError(f"{owner}: {cached} of its tokens came out of the prefix cache, expected 0; start the server without it.")


def sampling_body(prompt_ids: Sequence[int], max_tokens: int, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request for one response of at most `max_tokens` tokens; `settings` are `sampling_settings`, and how many `logprobs` to report."""
    return request_body(prompt_ids, max_tokens, seed=seed, skip_special_tokens=False, return_tokens_as_token_ids=True, **settings)


def read_rollout(rollout_id: str, generation: int, vocab_size: int, body: Mapping[str, Any], answer: Any, *, processed: bool) -> Rollout:
    """Return the rollout in the answer to this `sampling_body`; where the server's log-probs are `processed`, all that are at temperature 1 are
    missing.

    Raises:
        InvalidRecordError: an id is outside the vocabulary, or a log-prob is missing or none; it names the rollout.
        EngineError: the server read another prompt, or did not stop where it was asked to, or does not have the extensions.
    """
    owner, prompt, stops = f"Rollout {rollout_id!r}", body["prompt"], body["stop_token_ids"]
    (choice,) = choices_of(owner, answer, 1)
    check_read(owner, choice, prompt)
    ids = listed(owner, choice, "token_ids")
    check_sampled(owner, ids, vocab_size)
    check_end(owner, ids, stops, body["max_tokens"], choice.get("finish_reason"))
    reported = _reported(owner, choice.get("logprobs"), ids)
    behavior, drawn = (None, reported) if processed else (reported, None)
    kept = 0 if processed else body["logprobs"]
    if body["temperature"] == 0:
        drawn = [0.0] * len(ids)
    support = make_support(owner, *most_likely(owner, _tops(owner, choice["logprobs"], len(ids)), ids, kept, vocab_size)) if kept else None
    ids_P = np.array(prompt, np.int32)
    return make_rollout(rollout_id, ids_P, ids, behavior, drawn, stops=stops, generation=generation, candidates=support)


def _reported(owner: str, logprobs: Any, ids: Sequence[int]) -> list[float]:
    """Return the (T,) log-probs of sampled tokens, each checked to be of that token."""
    tokens = listed(owner, logprobs, "tokens", len(ids))
    values = listed(owner, logprobs, "token_logprobs", len(ids))
    for place, (name, token) in enumerate(zip(tokens, ids, strict=True)):
        if name != f"token_id:{token}":
            raise EngineError(f"{owner}: log-prob {place} is of {str(name)[:40]!r}, expected 'token_id:{token}'; {EXTENSIONS}.")
    return [number(owner, place, value) for place, value in enumerate(values)]


def _tops(owner: str, logprobs: Any, length: int) -> list[dict[str, Any]]:
    """Return the most likely tokens at each sampled one, keyed by id as those of a prompt."""
    tops = listed(owner, logprobs, "top_logprobs", length)
    try:
        return [{name.removeprefix("token_id:"): {"logprob": value} for name, value in top.items()} for top in tops]
    except AttributeError:
        raise InvalidRecordError(f"{owner}: top_logprobs holds {str(tops)[:40]!r}; sample it again.") from None


@final
class VLLM:
    """Servers with vLLM's extensions of the OpenAI completions."""

    key_variable: ClassVar[str] = "VLLM_API_KEY"
    scores_ids: ClassVar[bool] = True
    samples: ClassVar[bool] = True
    tried: ClassVar[bool] = False
    extra: ClassVar[Mapping[str, Any]] = {}

    def engine(self, served: Served) -> str:
        """Return its name in the provenance of a column."""
        return f"vllm {served.version} served" if served.version else "served by an unnamed version"

    def served(self, name: str, model: str, context: int | None, get: Get) -> Served:
        """Return what it serves."""
        get("/health", None)
        version = get("/version", {})
        card = model_card(name, model, get("/v1/models", {}))
        said = version.get("version") if isinstance(version, Mapping) else None
        return Served(str(said or ""), card.get("root"), positions(name, card.get("max_model_len"), context))

    def addressed(self, model: str, body: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """Return completions, or the endpoint that takes token ids to be asked about."""
        return "/inference/v1/generate" if "token_ids" in body else "/v1/completions", {"model": model, **body}

    def costs(self, answer: Any) -> Costs:
        """Return the counts in its `usage`."""
        return usage_costs(answer)

    def scoring(self, rollouts: Sequence[Rollout], widths: Widths, served: Served) -> dict[str, Any]:  # noqa: ARG002  # all have it
        """Return `scoring_body`, or `asking_body` of the one."""
        if widths.asks:
            return asking_body(rollouts[0], widths.top_k, widths.candidates, widths.drawn)
        return scoring_body(rollouts, widths.top_k)

    def scores(self, rollouts: Sequence[Rollout], widths: Widths, body: Mapping[str, Any], answer: Any) -> list[Scores]:
        """Return `read_scores`, or `read_asked` of the one."""
        if widths.asks:
            return read_asked(rollouts[0], body, answer, top_k=widths.top_k, candidates=widths.candidates, vocab_size=widths.vocab_size)
        return read_scores(rollouts, widths.top_k, widths.vocab_size, answer)

    def sampling(self, draw: Draw) -> dict[str, Any]:
        """Return `sampling_body`."""
        return sampling_body(draw.prompt, draw.room, draw.seed, draw.settings)

    def rollout(self, draw: Draw, answer: Any, *, processed: bool) -> Rollout:
        """Return `read_rollout`."""
        return read_rollout(draw.rollout_id, draw.generation, draw.vocab_size, self.sampling(draw), answer, processed=processed)
