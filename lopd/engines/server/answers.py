"""What comes of one HTTP request: an answer, trouble after which it may be sent again, or a refusal that is final."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import monotonic
from typing import Any

import httpx2

from lopd.engines.server.access import Key
from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError, LopdError
from lopd.records.paths import without_secrets

# bytes of a body: log-probs of a long text with a large support take some hundred million, what a server is takes few
_LARGEST, _LARGEST_FACT = 4 << 30, 16 << 20
# what holds of a body as it was sent, and not of one that was read
_OF_BODY = ("content-encoding", "content-length", "transfer-encoding")
_BUSY = (408, 425, 429)
# of a proxy whose server did not answer in time; the second is Cloudflare's own
_WAITED = (504, 524)
_PROXY = (
    "raise the limit of the proxy before it that gave up waiting (nginx: `proxy_read_timeout`) to `timeout_s`, name the servers themselves in "
    "`urls`, or sample fewer tokens"
)
# OpenAI's word for an account without credit, which waiting does not change
_SPENT = ("insufficient_quota",)
# the code of an error in an answer of 200, where it is a status; and what the letters of its code and type mean, first what passes
_CODE = re.compile("[45][0-9][0-9]")
_MEANT = {
    429: re.compile("ratelimit|toomanyrequests|resourceexhausted"),
    503: re.compile("overload|unavailable"),
    401: re.compile("invalidapikey|authenticat|unauthorized"),
    402: re.compile("payment|billing"),
    403: re.compile("permission|forbidden"),
    # not an invalid response, as a router gets from a host that may give a valid one
    400: re.compile("invalid(?!.*respon)|unsupported|notsupported|notfound|badrequest"),
}
# What x-ratelimit headers are about, and parts of a duration as OpenAI writes it: 6m0s, 1.5s, 20ms
_LIMITED = ("requests", "tokens")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# words of vLLM and SGLang for a prompt that is longer than the context, and for one that fills it, or almost
_TOO_LONG = (
    "maximum context length",
    "max_tokens must be at least 1",
    "longer than the model's context length",
    "exceeds the maximum allowed length",
)
# and for ids that it is asked to score and cannot
_CANNOT_ASK = ("--enable-scale-out", "requires the V2 model runner")
# the error of Python's writer of JSON over a NaN, which vLLM answers as a fault of its own (500), or of the request (400)
_NAN = "not JSON compliant"


class Trouble(Exception):  # noqa: N818  # never leaves the engine: it becomes an EngineError, or nothing at all
    """A request that may succeed if it is sent again.

    Args:
        what: happened, as a part of a sentence.
        pause: seconds for which the server asks to be left alone.
        busy: whether it limits how much it is asked, and would take the request later.
        remedy: what to do where no attempt is left.
    """

    def __init__(self, what: str, pause: float = 0.0, *, busy: bool = False, remedy: str = "look at the server's log") -> None:
        super().__init__(what)
        self.pause, self.busy, self.remedy = pause, busy, remedy


class NotANumberError(InvalidRecordError):
    """Something in the place of a log-prob: the model is at fault, or what it reads."""


class AllNullError(NotANumberError):
    """A server gave null for each log-prob: for the first text it is asked about, it cannot give any; for a later one, the text may be the cause."""


def received(url: str, response: httpx2.Response, started: float, within_s: float | None) -> httpx2.Response:
    """Return a streamed response with its body, decompressed and of bounded size.

    Where there is a time, as for what a server is, the body ends within it, counted from the start of the request; headers that drip are noticed
    when they are there.  A body of log-probs has no such time: only its silences are bounded.
    """
    size, parts, most = 0, list[bytes](), _LARGEST if within_s is None else _LARGEST_FACT
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > most:
            raise Trouble(f"{url} answers with more than {most:,} bytes")
        if within_s is not None and monotonic() - started > within_s:
            raise Trouble(f"{url} has not answered in full after {within_s:.0f} s")
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in _OF_BODY]
    return httpx2.Response(response.status_code, headers=headers, content=b"".join(parts), request=response.request)


def reported(owner: str, url: str, response: httpx2.Response, key: Key, missing: Any, *, must: bool, first: bool) -> Any:
    """Return the JSON of what a server reports of itself, or `missing` where it has no such path.

    Unless it `must`, a refusal and other than JSON are as good as none: gateways guard such paths, or lack them and answer with a page.
    """
    status = response.status_code
    if status == 404 or (response.is_success and not response.content):
        return missing
    if must or status in _BUSY or status >= 500:
        return accepted(owner, url, response, key, first=first)
    try:
        return response.json() if response.is_success else missing
    except (ValueError, RecursionError):
        return missing


def accepted(owner: str, url: str, response: httpx2.Response, key: Key, *, first: bool = False) -> Any:
    """Return the JSON of an answer of 200 that is not an error; NaN and infinities are read as such, and judged where the numbers are read.

    Args:
        owner: how an error names what was asked for.
        url: that answers.
        response: the server's response.
        key: that was sent; it is not repeated where a server does.
        first: whether the server was never heard of before: what is not JSON, nor the beginning of it, then comes from something else.
    """
    answer = _parsed(owner, url, response, first=first) if response.is_success else None
    status, message = _outcome(response, answer, key.value)
    if status == 402 or (status == 429 and any(word in response.text for word in _SPENT)):
        raise EngineError(
            f"{owner}: {url} answers {status} ({message}), expected credit; look at the account of the key, and run this again."
        )
    if _NAN in message:
        raise NotANumberError(
            f"{owner}: {url} answers {status} ({message}), expected log-probs that are numbers; check the model for NaN (float16 of an AWQ or GPTQ "
            "model overflows), or drop it."
        )
    if status in _WAITED:
        raise Trouble(f"{url} answers {status} ({message})", _retry_after(response), remedy=_PROXY)
    if status in _BUSY or status >= 500:
        raise Trouble(f"{url} answers {status} ({message})", _retry_after(response) or rest_of(response), busy=status == 429)
    if status >= 300:
        raise refusal(owner, url, status, message, key)
    return answer


def _parsed(owner: str, url: str, response: httpx2.Response, *, first: bool) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError) as error:
        begun = isinstance(error, ValueError) and response.text.strip()[:1] in ("", "{", "[")
        if first and not begun:
            kind = response.headers.get("Content-Type", "text").partition(";")[0]
            raise EngineError(
                f"{owner}: {url} answers {response.status_code} with {kind:.40}, expected the JSON of a model server; check host, port and path, "
                "and `speaks`."
            ) from None
        raise Trouble(f"{url} answers {response.status_code} with something that is not JSON") from None


def _outcome(response: httpx2.Response, answer: Any, key: str | None) -> tuple[int, str]:
    """Return the status and the error's message; of a 200 with an error, as routers send once a model has begun, what its words mean."""
    status = response.status_code
    if response.is_success:
        held = answer if isinstance(answer, Mapping) and not (answer.get("choices") or answer.get("meta_info")) else {}
        if not (error := held.get("error")):
            return status, ""
        message = _message(response, key)
        words = [str(error.get(name)) for name in ("code", "type")] if isinstance(error, Mapping) else [""]
        if _CODE.fullmatch(words[0]):
            meant = int(words[0])
        elif any(word in response.text for word in _SPENT):
            meant = 402
        elif any(part in message for part in _TOO_LONG):
            meant = 400
        else:
            joined = ["".join(filter(str.isalpha, word.lower())) for word in words]
            meant = next((status for status, found in _MEANT.items() if any(map(found.search, joined))), 500)
        return meant, f"in a 200: {message}"
    return status, _message(response, key)


def _message(response: httpx2.Response, key: str | None) -> str:
    """Return the server's error message, in one line and without the key; where it sends elsewhere, that place."""
    if response.has_redirect_location:
        return f"go to {without_secrets(response.headers['Location'])}"[:300]
    if "html" in response.headers.get("Content-Type", ""):
        return "a page of HTML"
    try:
        said = response.json()
        said = said.get("error", said)
        said = said.get("message", said) if isinstance(said, dict) else said
    except (ValueError, AttributeError, RecursionError):
        said = response.text
    return " ".join((str(said).replace(key, "...") if key else str(said)).split())[:300]


def rest_of(response: httpx2.Response) -> float:
    """Return seconds until the server's exhausted limits are reset (`x-ratelimit-remaining-...`, `x-ratelimit-reset-...`)."""
    headers = response.headers
    used_up = [name for name in _LIMITED if headers.get(f"x-ratelimit-remaining-{name}", "").strip() == "0"]
    return max((_seconds(headers.get(f"x-ratelimit-reset-{name}", "").strip()) for name in used_up), default=0.0)


def _seconds(said: str) -> float:
    """Return a duration of at most a day: a number of seconds, or parts with units; 0 for what is neither."""
    if said.replace(".", "", 1).isdecimal():
        seconds = float(said)
    elif said and not _PART.sub("", said):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(said))
    else:
        return 0.0
    return seconds if seconds <= _UNITS["d"] else 0.0


def _retry_after(response: httpx2.Response) -> float:
    """Return seconds; a server may give them, or a date."""
    said = response.headers.get("Retry-After", "")
    try:
        return max(
            float(said) if said.replace(".", "", 1).isdecimal() else (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds(), 0
        )
    except (ValueError, TypeError):
        return 0.0


def refusal(owner: str, url: str, status: int, message: str, key: Key) -> LopdError:
    """Return what a status of 3xx or 4xx means: sending the same again would be refused again."""
    if any(words in message for words in _CANNOT_ASK) or (status == 404 and url.endswith("/inference/v1/generate")):
        return EngineError(
            f"{owner}: {url} answers {status} ({message}), expected log-probs of the candidates; serve with vLLM 0.32 or later, "
            "`--enable-scale-out` and its second model runner (VLLM_USE_V2_MODEL_RUNNER=1, which needs Triton), or score them with HFScorer or "
            "VLLMScorer."
        )
    if status in (401, 403):
        return EngineError(f"Server {url}: it answers {status} ({message}): {key.refused if status == 401 else key.forbidden}.")
    said = f"{owner}: {url} answers {status} ({message})"
    if status == 400 and any(words in message for words in _TOO_LONG):
        return ContextOverflowError(f"{said}; use a server with a longer context or drop it.")
    if status == 400 and "out of vocabulary" in message:
        return InvalidRecordError(f"{said}, expected ids that the model knows; tokenise with this model's tokenizer.")
    if status == 400 and "max allowed" in message:
        return EngineError(f"{said}, expected its log-probs; start the server with a larger `--max-logprobs`.")
    remedy = ", expected 200; check URL, model name, `speaks` and the version of the server"
    if status == 413:
        remedy = (
            "; raise the limit of the proxy before it on the size of a request (nginx: `client_max_body_size`), or name the servers "
            "themselves in `urls`"
        )
    if "return_tokens_as_token_ids" in message:
        remedy = ", expected ids of tokens; pass `extra=` with the host's own field for them, as {'return_token_ids': True}"
    return EngineError(f"{said}{remedy}.")
