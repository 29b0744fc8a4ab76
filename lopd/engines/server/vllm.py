"""Requests to a server with vLLM's extensions of the OpenAI completions, and what its answers mean: token ids both ways, never text.

Everything is looked up by token id, and nothing that is missing becomes a number.

Shape suffixes: T response tokens, K candidates a token.
"""

import math
from base64 import b64decode
from collections.abc import Mapping, Sequence
from io import BytesIO
from tokenize import TokenError
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.engines.asked import IDS, asked_scores, asking
from lopd.engines.inputs import NEUTRAL, all_ids, make_rollout
from lopd.engines.server.dialect import Costs, Dialect, Draw, Get, Served, Widths, model_card, positions
from lopd.engines.server.reading import (
    EXTENSIONS,
    check_first,
    check_read,
    check_response,
    choices_of,
    listed,
    logprob,
    most_likely,
    number,
)
from lopd.engines.supports import likely, make_scores, make_support
from lopd.errors import EngineError, InvalidRecordError
from lopd.records.rollouts import Rollout, Scores


def request_body(ids: Sequence[int] | Sequence[Sequence[int]], max_tokens: int, **more: Any) -> dict[str, Any]:
    """Return a completion that is asked for: token ids in, token ids out."""
    return {"prompt": ids, "max_tokens": max_tokens, "add_special_tokens": False, "return_token_ids": True, **NEUTRAL, **more}


@final
class VLLM(Dialect):
    """Servers with vLLM's extensions of the OpenAI completions."""

    key_variable = "VLLM_API_KEY"
    tried = False

    def engine(self, served: Served) -> str:
        """Return its name in the provenance of a column."""
        return f"vllm {served.version} served" if served.version else "served by an unnamed version"

    def served(self, name: str, model: str, context: int | None, get: Get) -> Served:
        """Return what it serves."""
        get("/health", None, must=False)
        version = get("/version", {}, must=False)
        card = model_card(name, model, get("/v1/models", {}))
        said = version.get("version") if isinstance(version, Mapping) else None
        return Served(str(said or ""), card.get("root"), positions(name, card.get("max_model_len"), context))

    def addressed(self, model: str, body: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """Return completions, or the endpoint that takes token ids to be asked about."""
        return "/inference/v1/generate" if "token_ids" in body else "/v1/completions", {"model": model, **body}

    def scoring(self, rollouts: Sequence[Rollout], widths: Widths, served: Served) -> dict[str, Any]:  # noqa: ARG002  # all have it
        """Return completions of the prompts, or of the one with ids to be asked about, which only another endpoint takes (vLLM 0.32).

        The one token that vLLM insists on generating is thrown away.
        """
        if not widths.asks:
            return request_body([all_ids(rollout) for rollout in rollouts], 1, prompt_logprobs=widths.top_k, temperature=1.0, top_p=1.0)
        asked, kept = asking(rollouts[0], widths.candidates, widths.drawn), likely(widths.top_k, widths.candidates)
        settings = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "detokenize": False, "prompt_logprobs": kept}
        return {
            "token_ids": all_ids(rollouts[0]),
            "return_token_ids": True,
            "sampling_params": {**NEUTRAL, **settings, **asked, IDS: asked[IDS].tolist()},
        }

    def scores(self, rollouts: Sequence[Rollout], widths: Widths, body: Mapping[str, Any], answer: Any) -> list[Scores]:
        """Return the scores in the order of the rollouts."""
        owner, vocab_size = f"Rollout {rollouts[0].rollout_id!r}", widths.vocab_size
        choices = choices_of(owner, answer, len(rollouts))
        _check_computed(owner, self.costs(answer))
        if not widths.asks:
            parts = zip(rollouts, choices, strict=True)
            return [make_scores(rollout, *_prompt_logprobs(rollout, widths.top_k, vocab_size, choice)) for rollout, choice in parts]
        found = _prompt_logprobs(rollouts[0], likely(widths.top_k, widths.candidates), vocab_size, answer)
        ids_TA, logprobs_TA = np.array(body["sampling_params"][IDS], np.int64), _decoded(owner, answer)
        return [asked_scores(rollouts[0], ids_TA, logprobs_TA, found, candidates=widths.candidates, top_k=widths.top_k)]

    def sampling(self, draw: Draw) -> dict[str, Any]:
        """Return a request for one response."""
        return request_body(
            draw.prompt, draw.room, seed=draw.seed, skip_special_tokens=False, return_tokens_as_token_ids=True, **draw.settings
        )

    def rollout(self, draw: Draw, answer: Any, *, processed: bool) -> Rollout:
        """Return the response; where the server's log-probs are `processed`, all that are at temperature 1 are missing."""
        owner, settings = f"Rollout {draw.rollout_id!r}", draw.settings
        (choice,) = choices_of(owner, answer, 1)
        check_read(owner, choice, draw.prompt)
        ids = listed(owner, choice, "token_ids")
        check_response(owner, draw, ids, choice.get("finish_reason"))
        reported = _reported(owner, choice.get("logprobs"), ids)
        behavior, drawn = (None, reported) if processed else (reported, None)
        kept = 0 if processed else settings["logprobs"]
        if settings["temperature"] == 0:
            drawn = [0.0] * len(ids)
        support = None
        if kept:
            support = make_support(owner, *most_likely(owner, _tops(owner, choice["logprobs"], len(ids)), ids, kept, draw.vocab_size))
        prompt, named = np.array(draw.prompt, np.int32), {"stops": settings["stop_token_ids"], "generation": draw.generation}
        return make_rollout(draw.rollout_id, prompt, ids, behavior, drawn, candidates=support, **named)


def _decoded(owner: str, answer: Mapping[str, Any]) -> Any:
    """Return the array that vLLM writes as base64 of a .npy."""
    written: Any = answer.get("prompt_token_id_logprobs")
    npy: Any = np.lib.format
    try:
        file = BytesIO(b64decode(written, validate=True))
        # `np.load` opens archives too, and makes room for whatever a header names
        read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
        if dtype.itemsize and math.prod(shape) * dtype.itemsize == len(file.getbuffer()) - file.tell():
            file.seek(0)
            return npy.read_array(file, allow_pickle=False)
    # a header of many signs or brackets ends in the last two but one, and an empty array with a long side in the last
    except (TypeError, ValueError, EOFError, OSError, SyntaxError, TokenError, MemoryError, RecursionError, OverflowError):
        pass
    raise EngineError(
        f"{owner}: prompt_token_id_logprobs of the server's answer is {str(written)[:40]!r}, expected a .npy in base64; serve with vLLM 0.32 or "
        "later."
    )


def _prompt_logprobs(
    rollout: Rollout, top_k: int, vocab_size: int, choice: Any
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Return (T,) log-probs of the response tokens, and (T, K) ids and log-probs of the most likely ones."""
    owner, ids = f"Rollout {rollout.rollout_id!r}", all_ids(rollout)
    check_read(owner, choice, ids)
    first, *entries = listed(owner, choice, "prompt_logprobs", len(ids))
    check_first(owner, first)
    entries = entries[rollout.prompt_ids.size - 1 :]
    tokens = rollout.response_ids.tolist()
    logprobs = [logprob(owner, t, entry, token) for t, (entry, token) in enumerate(zip(entries, tokens, strict=True))]
    return np.array(logprobs, np.float32), *most_likely(owner, entries, tokens, top_k, vocab_size)


def _check_computed(owner: str, costs: Costs) -> None:
    """Check that every position was computed: what a prefix cache gives depends on the order of requests (vllm-project/vllm#42019).

    vLLM does not read the cache for such a request, and reports that where it was started with `--enable-prompt-tokens-details`.
    """
    if cached := costs.cached_tokens:
        raise EngineError(f"{owner}: {cached} of its tokens came out of the prefix cache, expected 0; start the server without it.")


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
