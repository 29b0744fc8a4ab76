"""What comes of one HTTP request: an answer, trouble after which it may be sent again, or a refusal that is final."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from lopd.errors import ContextOverflowError, EngineError, InvalidRecordError, LopdError

_BUSY = (408, 425, 429)
# vLLM's words for a prompt that is longer than the context, and for one that fills it
_TOO_LONG = ("maximum context length", "max_tokens must be at least 1")

# and for ids that it is asked to score and cannot
_CANNOT_ASK = ("--enable-scale-out", "requires the V2 model runner")


class Trouble(Exception):  # noqa: N818  # never leaves the engine: it becomes an EngineError, or nothing at all
    """A request that may succeed if it is sent again.

    Args:
        what: happened, as a part of a sentence.
        pause: seconds for which the server asks to be left alone.
    """

    def __init__(self, what: str, pause: float = 0.0) -> None:
        super().__init__(what)
        self.pause = pause


def accepted(owner: str, url: str, response: httpx2.Response) -> Any:
    """The JSON of an answer of 200; NaN and infinities are read as such, and judged by whoever reads the numbers."""
    status = response.status_code
    if status in _BUSY or status >= 500:
        raise Trouble(f"{url} answers {status} ({_message(response)})", _retry_after(response))
    if not response.is_success:
        raise refusal(owner, url, status, _message(response))
    try:
        return response.json()
    except ValueError:
        raise Trouble(f"{url} answers {status} with what is no JSON") from None


def _message(response: httpx2.Response) -> str:
    """What the server says of an error, in one line."""
    try:
        said = response.json()
        said = said.get("error", said)
        said = said.get("message", said) if isinstance(said, dict) else said
    except (ValueError, AttributeError):
        said = response.text
    return " ".join(str(said).split())[:300]


def _retry_after(response: httpx2.Response) -> float:
    """Seconds; a server may say them, or a date."""
    said = response.headers.get("Retry-After", "")
    try:
        return max(
            float(said) if said.replace(".", "", 1).isdecimal() else (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds(), 0
        )
    except (ValueError, TypeError):
        return 0.0


def refusal(owner: str, url: str, status: int, message: str) -> LopdError:
    """What a status of 3xx or 4xx means: sending the same again would be refused again."""
    if any(words in message for words in _CANNOT_ASK) or (status == 404 and "/inference/" in url):
        return EngineError(
            f"{owner}: {url} answers {status} ({message}), expected log-probs of the candidates; serve with vLLM 0.32 or later, "
            "`--enable-scale-out` and its second model runner (VLLM_USE_V2_MODEL_RUNNER=1, which needs Triton), or score them with HFScorer or "
            "VLLMScorer."
        )
    if status in (401, 403):
        return EngineError(f"Server {url}: it answers {status}, expected to be let in; pass `api_key=` or set VLLM_API_KEY.")
    said = f"{owner}: {url} answers {status} ({message})"
    if status == 400 and any(words in message for words in _TOO_LONG):
        return ContextOverflowError(f"{said}, expected it to fit; use a server with a longer context or drop it.")
    if status == 400 and "out of vocabulary" in message:
        return InvalidRecordError(f"{said}, expected ids that the model knows; tokenise with this model's tokenizer.")
    if status == 400 and "max allowed" in message:
        return EngineError(f"{said}, expected its log-probs; start the server with a larger `--max-logprobs`.")
    return EngineError(f"{said}, expected 200; check URL, model name and the version of the server.")
