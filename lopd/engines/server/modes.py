"""Of which distribution a server's log-probs of sampled tokens are: it is asked, and its answers show it."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from attrs import define, field

from lopd.engines.server.reading import EXTENSIONS, NO_PROBABILITY, choices_of
from lopd.engines.server.vllm import request_body
from lopd.errors import EngineError

# a probe: how many candidates, the highest temperature that vLLM takes, a small top_p, and nats by which two answers may differ by rounding
_PROBED, _HOT, _CUT, _TOLERANCE = 5, 2.0, 0.1, 0.5


def probe_bodies(ids: Sequence[int]) -> tuple[dict[str, Any], ...]:
    """Return three requests for one token, as it is, heated, and cut: what a server reports of them shows its `logprobs_mode`."""
    same: dict[str, Any] = {"logprobs": _PROBED, "return_tokens_as_token_ids": True}
    return tuple(request_body(ids, 1, temperature=t, top_p=p, **same) for t, p in ((1.0, 1.0), (_HOT, 1.0), (1.0, _CUT)))


@final
@define(eq=False)
class ModeJudge:
    """Takes servers' answers to `probe_bodies`: all must report the log-probs of sampled tokens in one of the two ways, and in the same.

    Either at temperature 1, whatever the sampling ("raw_logprobs"); or those of what is drawn, after temperature and top_p
    ("processed_logprobs"): the differences of two heated ones are halved, and what a cut leaves is renormalised.
    """

    _first: dict[str, tuple[bool, str]] = field(factory=dict, init=False)

    @property
    def processed(self) -> bool:
        """Whether after temperature and top_p; False as long as no server was asked."""
        return self._first.get("mode", (False, ""))[0]

    def __call__(self, owner: str, *answers: Any) -> None:
        """Judge one server.

        Raises:
            EngineError: its log-probs are neither, or are not as those of the server that was asked first.
        """
        plain, hot, cut = (_candidates(owner, answer) for answer in answers)
        processed = not (_agree(plain, hot) and _agree(plain, cut))
        if processed and not (_agree(plain, hot, slope=_HOT) and _is_renormalised(plain, cut)):
            raise EngineError(
                f"{owner}: its log-probs are neither those at temperature 1 nor those of what is drawn, expected one of the two; "
                "start it with `--logprobs-mode processed_logprobs`."
            )
        first, whose = self._first.setdefault("mode", (processed, owner))
        if processed != first:
            names = {True: "processed_logprobs", False: "raw_logprobs"}
            raise EngineError(
                f"{owner}: its logprobs_mode is {names[processed]!r}, expected {names[first]!r} as of {whose}; start all servers with one mode."
            )


def _agree(plain: Mapping[str, float], other: Mapping[str, float], slope: float = 0.0) -> bool:
    """Return whether two answers have the same log-probs; with a slope, whether those of the first differ from one another so many times as much."""
    shared = [name for name in plain if name in other]
    if len(shared) < 2:
        return False
    one, two = (np.array([answer[name] for name in shared]) for answer in (plain, other))
    gaps = slope * (two - two[0]) - (one - one[0]) if slope else two - one
    return bool(np.abs(gaps).max() <= _TOLERANCE * max(slope, 1.0))


def _is_renormalised(plain: Mapping[str, float], cut: Mapping[str, float]) -> bool:
    """Return whether the cut left the most likely tokens, which gained the probability of the others."""
    left = {name: value for name, value in cut.items() if value > NO_PROBABILITY}
    gained = [value - plain[name] for name, value in left.items() if name in plain]
    if not gained or max(gained) - min(gained) > _TOLERANCE:
        return False
    # where all candidates are left, so are many more tokens, and together they had little more than `_CUT`
    return gained[0] > 1.0 if len(left) >= _PROBED else abs(np.log(np.exp(list(left.values())).sum())) <= _TOLERANCE


def _candidates(owner: str, answer: Any) -> dict[str, float]:
    try:
        top = choices_of(owner, answer, 1)[0]["logprobs"]["top_logprobs"][0]
        return {str(name): float(value) for name, value in top.items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise EngineError(f"{owner}: its answer holds no top_logprobs; {EXTENSIONS}.") from None
