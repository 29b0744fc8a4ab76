"""What clients of all kinds of servers share, and the wire format of each kind."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, final

from attrs import astuple, frozen

from lopd.errors import EngineError, InvalidRecordError
from lopd.records.rollouts import Rollout, Scores

# path, what to return where the server has no such path, `must=False` if that goes for a guarded one and a page too: the JSON of its answer
Get = Callable[..., Any]


@final
@frozen
class Served:
    """What all servers must have in common.

    Args:
        version: the version of the program that serves; "" where it is not reported.
        root: the path or name that the model was loaded from.
        context: positions of a sequence.
        cached: whether it keeps the states of prompts between requests, so that what it computes may depend on their order.
        seeded: whether it draws the same tokens for the same seed.
    """

    version: str
    root: str | None
    context: int
    cached: bool = False
    seeded: bool = True


#: How messages name what differs.
WORDS = {
    "version": "version",
    "root": "model's root",
    "context": "max_model_len",
    "cached": "use of a prefix cache",
    "seeded": "use of seeds",
}


@final
@frozen
class Costs:
    """What servers were asked for, as their answers count it (`usage`); answers that never arrived are not in it.

    Args:
        requests: that were answered.
        prompt_tokens, completion_tokens: read and generated.
        cached_tokens: prompt tokens that came out of a prefix cache; hosts often charge less for them.
        uncounted: answers without counts of tokens.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    uncounted: int = 0

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))


def costs_of(usages: Sequence[Any], cached: Sequence[Any]) -> Costs:
    """Return the costs of one answer.

    Args:
        usages: a mapping with `prompt_tokens` and `completion_tokens` for each count that the answer holds; others count nothing.
        cached: cached tokens, where they are numbers.
    """
    counts = [usage for usage in usages if isinstance(usage, Mapping) and type(usage.get("prompt_tokens")) is int]
    read, made = (sum(_whole(usage.get(name)) for usage in counts) for name in ("prompt_tokens", "completion_tokens"))
    return Costs(1, read, made, sum(map(_whole, cached)), int(not counts))


def _whole(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0


@final
@frozen
class Widths:
    """What a scorer asks for.

    Args:
        vocab_size: ids are below it.
        top_k, candidates, drawn: as `ServerScorer` has them.
    """

    vocab_size: int
    top_k: int = 0
    candidates: int = 0
    drawn: int = 0

    @property
    def asks(self) -> bool:
        """Whether for ids of the rollouts' own."""
        return self.candidates + self.drawn > 0


@final
@frozen
class Draw:
    """One response that is asked for.

    Args:
        rollout_id: its name.
        generation: round of sampling.
        prompt: ids.
        room: tokens of the longest response.
        seed: the rollout's own seed.
        settings: `lopd.engines.inputs.sampling_settings`, and how many `logprobs` to report.
        vocab_size: ids are below it.
    """

    rollout_id: str
    generation: int
    prompt: list[int]
    room: int
    seed: int
    settings: Mapping[str, Any]
    vocab_size: int


@final
@frozen(eq=False)
class Probe:
    """What is asked of each server before it is used, and again after it was down.

    Args:
        bodies: requests for completions.
        judge: takes the server's name and the answers, and raises if they are not as they must be.
    """

    bodies: tuple[Mapping[str, Any], ...]
    judge: Callable[..., None]


#: Fields of a server's own that change what it draws, unless empty, None, or the value of the last three; an adapter (`lora_path`) is of the policy.
_RESHAPING = dict[str, Any].fromkeys(
    [
        *("logit_bias", "bad_words", "allowed_token_ids", "logits_processors", "custom_logit_processor", "vllm_xargs", "stop"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag", "structured_outputs"),
        "thinking_token_budget",
    ]
) | {"best_of": 1, "response_format": {"type": "text"}, "use_beam_search": False}


class Dialect(Protocol):
    """What one kind of server is asked, and what its answers mean.  What raises names the rollout."""

    #: Variable of the environment that holds the key, unless the user names another.
    key_variable: ClassVar[str]
    #: Fields that are added to each request, unless the user gives others.
    extra: ClassVar[Mapping[str, Any]] = {}
    #: Whether it scores ids that are asked for, samples, and is tried with a few tokens before it is used.
    scores_ids: ClassVar[bool] = True
    samples: ClassVar[bool] = True
    tried: ClassVar[bool] = True

    def engine(self, served: Served) -> str:
        """Return its name in the provenance of a column."""
        ...

    def served(self, name: str, model: str, context: int | None, get: Get) -> Served:
        """Return what it serves."""
        ...

    def addressed(self, model: str, body: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """Return the path that a body is sent to, and the body with the model's name where it needs it."""
        ...

    def costs(self, answer: Any) -> Costs:
        """Return the cost that an answer reports: in its `usage`, as completions do."""
        usage = answer.get("usage") if isinstance(answer, Mapping) else None
        details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
        return costs_of([usage], [details.get("cached_tokens")] if isinstance(details, Mapping) else [])

    def scoring(self, rollouts: Sequence[Rollout], widths: Widths, served: Served) -> dict[str, Any]:
        """Return a request for rollouts' log-probs; for those of one if `widths.asks`."""
        ...

    def scores(self, rollouts: Sequence[Rollout], widths: Widths, body: Mapping[str, Any], answer: Any) -> list[Scores]:
        """Return the rollout or scores in its answer."""
        ...

    def sampling(self, draw: Draw) -> dict[str, Any]:  # noqa: ARG002
        """Return a request for one response."""
        raise AssertionError  # of a server that does not sample: a source refuses it when it is made

    def rollout(self, draw: Draw, answer: Any, *, processed: bool) -> Rollout:  # noqa: ARG002
        """Return the rollout in its answer; where its log-probs are `processed`, all that are at temperature 1 are missing."""
        raise AssertionError


def check_extra(owner: str, extra: Mapping[str, Any], body: Mapping[str, Any]) -> None:
    """Check that fields which are added to a request for a response leave what is drawn as it is.

    Raises:
        InvalidRecordError: the first that the request itself has with another value, or that changes what is drawn.
    """
    for name, value in extra.items():
        if name in body and body[name] != value:
            raise InvalidRecordError(
                f"{owner}: extra of its servers has {name!r}, which every request sets itself, from SamplingParams, the prompt and Servers; "
                "leave it out."
            )
        if name in _RESHAPING and value not in (None, "", [], {}, _RESHAPING[name]):
            raise InvalidRecordError(
                f"{owner}: extra of its servers has {name!r}, which changes what is drawn, and log-probs of the policy are not those of such draws; "
                "leave it out, or draw with a source of your own that gives `sampler_logprobs`."
            )


def model_card(name: str, model: str, listed: Any, *, must: bool = True) -> Mapping[str, Any]:
    """Return the model's entry of `/v1/models`; an empty one where it may be missing.

    Raises:
        EngineError: the answer is not a list of models, or the model `must` be in it and is not.
    """
    try:
        cards = {card["id"]: card for card in listed["data"]}
    except (KeyError, TypeError):
        if not must:
            return {}
        raise EngineError(f"{name}: it lists no models, expected /v1/models; check the URL.") from None
    if must and model not in cards:
        raise EngineError(f"{name}: it serves {', '.join(map(repr, cards))}, expected {model!r}; pass the name it serves.")
    card: Mapping[str, Any] = cards.get(model, {})
    return card


def positions(name: str, said: Any, asked: int | None) -> int:
    """Return the context length: the user's, or else the server's.

    Raises:
        EngineError: neither gives one, or the server has fewer.
    """
    said = said if isinstance(said, int) else None
    context = said if asked is None else asked
    if context is None or (said is not None and context > said):
        raise EngineError(
            f"{name}: its max_model_len is {said}, expected {'a number' if asked is None else f'at least {asked}'}; "
            "pass `context=` that all servers have."
        )
    return context
