"""Requests to an SGLang server (`/generate`), and what its answers mean.  Read from the source of SGLang 0.5.23; no such server was run.

- Log-probs of a prompt begin at `logprob_start_len`, and the first of them is null: it would be of the token there, given what is before.
- A prefix cache is read up to `logprob_start_len` only.  So lopd asks from token 0 on where the cache is on, and reads what it needs.
- NaN and -inf are both null in SGLang's JSON: a null is an error, never a number.
- `token_ids_logprob` is one list for all positions, so a request for candidates asks for all that a rollout has.
- `ignore_eos` would turn off `stop_token_ids` too: the model's own EOS ends a response, and must be among the stop ids.
- A prompt must be shorter than `max_req_input_len`: 6 tokens less than the context, or than the cache of keys and values where that is smaller.
  A response ends 2 tokens before these.
- Seeds count where the server was started with `--enable-deterministic-inference` only.

Shape suffixes: T response tokens, K candidates a token, A ids asked for a token, U distinct ids asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lopd.engines.asked import IDS, asked_scores, asking
from lopd.engines.inputs import NEUTRAL, all_ids, make_rollout
from lopd.engines.server.access import Key
from lopd.engines.server.answers import Trouble, refusal
from lopd.engines.server.dialect import Costs, Dialect, Draw, Get, Served, Widths, costs_of, model_card, positions
from lopd.engines.server.reading import check_read, check_response, listed, most_likely, number
from lopd.engines.supports import likely, make_scores, make_support
from lopd.errors import EngineError, InvalidRecordError
from lopd.records.rollouts import Rollout, Scores

#: Log-probs of ids asked for that one answer may hold: about 30 bytes of JSON each.
_MOST_ASKED = 4_000_000
_NEUTRAL = {**NEUTRAL, "top_k": -1}
#: Tokens, where a server does not tell its `max_req_input_len`.
_KEPT_FREE = 6
_ANSWERS = "serve with SGLang 0.5.23 or later, and with no proxy that changes its answers"


@final
class SGLang(Dialect):
    """SGLang's own API."""

    key_variable = "SGLANG_API_KEY"

    def engine(self, served: Served) -> str:
        """Return its name in the provenance of a column."""
        return f"sglang {served.version or 'of an unnamed version'} served"

    def served(self, name: str, model: str, context: int | None, get: Get) -> Served:
        """Return what it serves.  A weight version that was set is part of the model's root."""
        get("/health", None, must=False)
        card = model_card(name, model, get("/v1/models", {}))
        served, settings = (get(path, {}) for path in ("/model_info", "/server_info"))
        if not served and not settings:
            raise EngineError(f"{name}: it has neither /model_info nor /server_info, which SGLang has; check the URL and `speaks`.")
        if not (isinstance(served, Mapping) and isinstance(settings, Mapping)):
            raise EngineError(f"{name}: /model_info and /server_info hold other than objects; check the URL.")
        version = served.get("weight_version", "default")
        root = str(served.get("model_path")) + ("" if version == "default" else f" ({version})")
        cached, seeded = not settings.get("disable_radix_cache"), bool(settings.get("enable_deterministic_inference"))
        length, most = positions(name, card.get("max_model_len"), context), settings.get("max_req_input_len")
        length = min(length, most if isinstance(most, int) else length - _KEPT_FREE)
        return Served(str(settings.get("version") or ""), root, length, cached, seeded)

    def addressed(self, model: str, body: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:  # noqa: ARG002  # all have it
        """Return the body as it is: the server has one model, so no field names it."""
        return "/generate", body

    def costs(self, answer: Any) -> Costs:
        """Return the counts in the `meta_info` of each prompt."""
        metas = [item.get("meta_info") for item in (answer if isinstance(answer, list) else [answer]) if isinstance(item, Mapping)]
        return costs_of(metas, [meta.get("cached_tokens") for meta in metas if isinstance(meta, Mapping)])

    def scoring(self, rollouts: Sequence[Rollout], widths: Widths, served: Served) -> dict[str, Any]:
        """Return prompts alone: nothing is generated."""
        starts = [0 if served.cached else rollout.prompt_ids.size - 1 for rollout in rollouts]
        asked = {"token_ids_logprob": [_distinct(rollouts[0], widths).tolist()]} if widths.asks else {}
        return {
            "input_ids": [all_ids(rollout) for rollout in rollouts],
            "sampling_params": {**_NEUTRAL, "max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0},
            "return_logprob": True,
            "logprob_start_len": starts,
            "top_logprobs_num": likely(widths.top_k, widths.candidates),
            "return_prompt_token_ids": True,
            **asked,
        }

    def scores(self, rollouts: Sequence[Rollout], widths: Widths, body: Mapping[str, Any], answer: Any) -> list[Scores]:
        """Return the scores in the order of the rollouts."""
        if not isinstance(answer, list) or len(answer) != len(rollouts):
            owner = f"Rollout {rollouts[0].rollout_id!r}"
            raise EngineError(f"{owner}: the server's answer is not a list of {len(rollouts)}; {_ANSWERS}.")
        parts = zip(rollouts, body["logprob_start_len"], answer, strict=True)
        return [_scores(rollout, widths, start, item) for rollout, start, item in parts]

    def sampling(self, draw: Draw) -> dict[str, Any]:
        """Return one response."""
        settings = draw.settings
        return {
            "input_ids": draw.prompt,
            "sampling_params": {
                **_NEUTRAL,
                **{name: settings[name] for name in ("temperature", "top_p", "n", "stop_token_ids")},
                "min_new_tokens": 0,
                "max_new_tokens": draw.room,
                "ignore_eos": False,
                "sampling_seed": draw.seed,
            },
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": settings["logprobs"],
            "return_prompt_token_ids": True,
        }

    def rollout(self, draw: Draw, answer: Any, *, processed: bool) -> Rollout:
        """Return the response; where it was not sampled at temperature 1 and top_p 1, its log-probs are after the temperature and before top_p: left
        out.
        """
        owner, settings = f"Rollout {draw.rollout_id!r}", draw.settings
        meta = _meta(owner, draw.prompt, answer)
        ids = listed(owner, answer, "output_ids")
        check_response(owner, draw, ids, meta["finish_reason"].get("type"))
        entries = listed(owner, meta, "output_token_logprobs", len(ids))
        logprobs = [number(owner, t, _pair(owner, t, entry, token)) for t, (entry, token) in enumerate(zip(entries, ids, strict=True))]
        kept, drawn = 0 if processed else settings["logprobs"], [0.0] * len(ids) if settings["temperature"] == 0 else None
        support = None
        if kept:
            tops = _keyed(owner, listed(owner, meta, "output_top_logprobs", len(ids)))
            support = make_support(owner, *most_likely(owner, tops, ids, kept, draw.vocab_size))
        behavior, prompt = None if processed else logprobs, np.array(draw.prompt, np.int32)
        named = {"stops": settings["stop_token_ids"], "generation": draw.generation}
        return make_rollout(draw.rollout_id, prompt, ids, behavior, drawn, candidates=support, **named)


def _scores(rollout: Rollout, widths: Widths, start: int, item: Any) -> Scores:
    owner, ids, tokens = f"Rollout {rollout.rollout_id!r}", all_ids(rollout), rollout.response_ids.tolist()
    meta, first = _meta(owner, ids, item), rollout.prompt_ids.size - start
    if cached := meta.get("cached_tokens"):
        raise EngineError(
            f"{owner}: {cached} of its tokens came out of the prefix cache, expected 0; start the server with `--disable-radix-cache`."
        )

    def rows(name: str) -> list[Any]:
        return listed(owner, meta, name, len(ids) - start)[first:]

    entries = rows("input_token_logprobs")
    # SGLang 0.5.23 reports the last id of the vocabulary as 0
    names = [0 if token == widths.vocab_size - 1 and _id(entry) == 0 else token for token, entry in zip(tokens, entries, strict=True)]
    values = [number(owner, t, _pair(owner, t, entry, name)) for t, (entry, name) in enumerate(zip(entries, names, strict=True))]
    kept = likely(widths.top_k, widths.candidates)
    tops = _keyed(owner, rows("input_top_logprobs")) if kept else [{}] * len(tokens)
    found = np.array(values, np.float32), *most_likely(owner, tops, tokens, kept, widths.vocab_size)
    if not widths.asks:
        return make_scores(rollout, *found)
    ids_TA, ids_U = asking(rollout, widths.candidates, widths.drawn)[IDS], _distinct(rollout, widths)
    table_TU = _table(owner, rows("input_token_ids_logprobs"), ids_U)
    logprobs_TA = np.take_along_axis(table_TU, np.searchsorted(ids_U, ids_TA), 1)
    return asked_scores(rollout, ids_TA, logprobs_TA, found, candidates=widths.candidates, top_k=widths.top_k)


def _distinct(rollout: Rollout, widths: Widths) -> NDArray[np.integer]:
    """Return (U,) ids that are asked for at all positions, sorted.

    Raises:
        InvalidRecordError: the answer would hold too many.
    """
    ids_TA = asking(rollout, widths.candidates, widths.drawn)[IDS]
    ids_U = np.unique(ids_TA)
    if ids_U.size * len(ids_TA) > _MOST_ASKED:
        raise InvalidRecordError(
            f"Rollout {rollout.rollout_id!r}: it has {ids_U.size} distinct candidates, and SGLang gives all of them at each of {len(ids_TA)} "
            f"tokens, expected at most {_MOST_ASKED:,} log-probs; score candidates with vLLM or HFScorer."
        )
    return ids_U


def _table(owner: str, rows: Sequence[Any], ids_U: NDArray[np.integer]) -> NDArray[np.float32]:
    """Return (T, U) log-probs of the ids, nats."""
    expected, table_TU = ids_U.tolist(), np.empty((len(rows), ids_U.size), np.float32)
    for t, row in enumerate(rows):
        if not isinstance(row, list) or [_id(entry) for entry in row] != expected:
            raise EngineError(f"{owner}: response token {t} has log-probs of other ids than were asked for; {_ANSWERS}.")
        table_TU[t] = [number(owner, t, entry[0]) for entry in row]
    return table_TU


def _meta(owner: str, prompt: list[int], item: Any) -> Mapping[str, Any]:
    """Return an answer's `meta_info`, if it read these very ids and was not broken off."""
    meta = item.get("meta_info") if isinstance(item, Mapping) else None
    reason = meta.get("finish_reason") if isinstance(meta, Mapping) else None
    if not isinstance(meta, Mapping) or not isinstance(reason, Mapping):
        raise EngineError(f"{owner}: the server's answer holds no meta_info with a finish_reason, expected both; {_ANSWERS}.")
    if reason.get("type") == "abort":
        status, message = reason.get("status_code"), " ".join(str(reason.get("message")).split())[:300]
        if isinstance(status, int) and 400 <= status < 500 and status != 429:
            raise refusal(owner, "the server", status, message, Key())
        raise Trouble(f"the request was aborted ({message})")
    check_read(owner, item, prompt)
    return meta


def _id(entry: Any) -> Any:
    return entry[1] if isinstance(entry, list) and len(entry) == 3 else None


def _pair(owner: str, place: int, entry: Any, token: int) -> Any:
    """Return the log-prob of an entry `[log-prob, id, text]` that must be of this token."""
    if _id(entry) != token:
        raise EngineError(f"{owner}: log-prob {place} is {str(entry)[:40]!r}, expected one of id {token}; {_ANSWERS}.")
    return entry[0]


def _keyed(owner: str, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the most likely tokens of each position, by id."""
    for t, row in enumerate(rows):
        if not isinstance(row, list) or any(_id(entry) is None for entry in row):
            raise InvalidRecordError(f"{owner}: response token {t} has {str(row)[:40]!r}, expected its most likely tokens; score it again.")
    return [{str(token): {"logprob": value} for value, token, _ in row} for row in rows]
