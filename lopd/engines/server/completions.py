"""Requests to a server of plain OpenAI completions, such as a hosted model, and what its answers mean.

A prompt of token ids is echoed with its log-probs (`echo`, `logprobs`), and one token is generated, since not all take `max_tokens` 0.
Text is never read: an answer must name its tokens by id, in one of three ways.

- `token_id:17` in place of text (vLLM's `return_tokens_as_token_ids`); the only way that names the most likely tokens too;
- a list `token_ids` beside the log-probs (Fireworks documents it);
- a list `prompt_token_ids` in the choice (`return_token_ids`, of vLLM and Fireworks).

Shape suffixes: T response tokens, K candidates a token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import numpy as np

from lopd.engines.inputs import all_ids
from lopd.engines.server.answers import AllNullError
from lopd.engines.server.dialect import Dialect, Get, Served, Widths, model_card, positions
from lopd.engines.server.reading import check_first, choices_of, listed, most_likely, named_id, number
from lopd.engines.supports import make_scores
from lopd.errors import EngineError, InvalidRecordError
from lopd.records.rollouts import Rollout, Scores

_ID = "token_id:"
_REMEDY = "use a host whose completions echo prompts of token ids with log-probs and name tokens by id, as vLLM's do"


@final
class Completions(Dialect):
    """The OpenAI completions, with `echo` and `logprobs`."""

    key_variable = "OPENAI_API_KEY"
    scores_ids = False
    samples = False
    extra: ClassVar[Mapping[str, Any]] = {"return_tokens_as_token_ids": True}

    def engine(self, served: Served) -> str:
        """Return its name in the provenance of a column."""
        return f"completions of {served.root}"

    def served(self, name: str, model: str, context: int | None, get: Get) -> Served:
        """Return the model under its name: a host reports little of what it runs, and may not list it, nor let it be asked."""
        card = model_card(name, model, get("/v1/models", {}, must=context is None), must=False)
        return Served("", model, positions(name, card.get("max_model_len", card.get("context_length")), context))

    def addressed(self, model: str, body: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """Return one endpoint for all."""
        return "/v1/completions", {"model": model, **body}

    def scoring(self, rollouts: Sequence[Rollout], widths: Widths, served: Served) -> dict[str, Any]:  # noqa: ARG002  # all have it
        """Return prompts to be echoed."""
        prompts = [all_ids(rollout) for rollout in rollouts]
        return {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": widths.top_k, "temperature": 1.0, "top_p": 1.0, "n": 1}

    def scores(self, rollouts: Sequence[Rollout], widths: Widths, body: Mapping[str, Any], answer: Any) -> list[Scores]:  # noqa: ARG002  # all have it
        """Return the scores in the order of the rollouts."""
        choices = choices_of(f"Rollout {rollouts[0].rollout_id!r}", answer, len(rollouts))
        return [_scores(rollout, widths, choice) for rollout, choice in zip(rollouts, choices, strict=True)]


def _scores(rollout: Rollout, widths: Widths, choice: Mapping[str, Any]) -> Scores:
    owner, ids, first = f"Rollout {rollout.rollout_id!r}", all_ids(rollout), rollout.prompt_ids.size
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        raise EngineError(f"{owner}: the server's answer holds no logprobs; {_REMEDY}.")
    values = listed(owner, logprobs, "token_logprobs")
    if len(values) not in (len(ids), len(ids) + 1):
        raise EngineError(
            f"{owner}: the server gives {len(values)} token_logprobs, expected {len(ids)} of the echoed prompt, and at most 1 more; {_REMEDY}."
        )
    read = _ids(owner, choice, logprobs)
    if read[: len(ids)] != ids:
        place = next((i for i, (one, two) in enumerate(zip(read, ids, strict=False)) if one != two), len(read))
        raise EngineError(f"{owner}: the server read other tokens than were sent from token {place} on; {_REMEDY}.")
    if len(read) != len(values) and read is not choice.get("prompt_token_ids"):
        raise EngineError(f"{owner}: the server names {len(read)} tokens beside {len(values)} token_logprobs, expected as many; {_REMEDY}.")
    if len(values) == len(ids):  # one more is of the generated token, and leaves no room for a shift
        check_first(owner, values[0])
    if len(ids) > 2 and all(value is None for value in values[1 : len(ids)]):  # a single one may be a NaN
        raise AllNullError(
            f"{owner}: the server gives null for all log-probs of the echoed prompt, expected numbers; {_REMEDY}, or check the model for NaN."
        )
    tokens = rollout.response_ids.tolist()
    own = [number(owner, t, value) for t, value in enumerate(values[first : len(ids)])]
    tops = _tops(owner, listed(owner, logprobs, "top_logprobs", len(values))[first : len(ids)]) if widths.top_k else [{}] * len(tokens)
    return make_scores(rollout, np.array(own, np.float32), *most_likely(owner, tops, tokens, widths.top_k, widths.vocab_size))


def _ids(owner: str, choice: Mapping[str, Any], logprobs: Mapping[str, Any]) -> list[Any]:
    """Return the ids of the tokens that an answer is about."""
    tokens = logprobs.get("tokens")
    if isinstance(tokens, list) and tokens and all(isinstance(token, str) and token.startswith(_ID) for token in tokens):
        return [named_id(token[len(_ID) :]) for token in tokens]
    for holder, name in ((logprobs, "token_ids"), (choice, "prompt_token_ids")):
        named = holder.get(name)
        if isinstance(named, list) and named:
            return named
    raise EngineError(f"{owner}: the server names its tokens by text alone, expected token ids; {_REMEDY}.")


def _tops(owner: str, tops: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the most likely tokens of each position, by id."""
    for t, top in enumerate(tops):
        if not isinstance(top, Mapping):
            raise InvalidRecordError(f"{owner}: response token {t} has {str(top)[:40]!r}, expected its most likely tokens; score it again.")
        if text := next((name for name in top if not name.startswith(_ID)), None):
            raise EngineError(
                f"{owner}: the server names its most likely tokens by text ({text[:20]!r}), expected token ids; pass `top_k=0`, or {_REMEDY}."
            )
    return [{name[len(_ID) :]: {"logprob": value} for name, value in top.items()} for top in tops]
