"""A server on loopback that answers as `vllm serve` does, from a table in place of a model, and that fails on demand.

The log-prob of a token names the token, its position and the token before it, so anything that is off by one shows.

    stub.fail(2, answer(503))                         the next two completions answer 503
    stub.fail(1, answer(429, {"Retry-After": "1"}))
    stub.fail(1, cut)                                 half of the answer, then the connection is closed
    stub.fail(1, late(0.5))                           the answer comes late
    stub.fail(1, changed(lambda body: ...))           another answer
"""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

VOCAB, EOS = 32, 0
Fault = Callable[["_Handler", int, bytes], None]


def table(ids: list[int]) -> np.ndarray:
    """Return (len(ids) + 1, VOCAB) log-probs of what may stand at each position from 1 on, and after the end; row 0 is meaningless."""
    places = np.arange(len(ids) + 1)[:, None]
    before = np.array([0, *ids])[:, None]
    logits = ((places * 7 + before * 3 + np.arange(VOCAB) * 13) % 31) / 4.0
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def answer(status: int, headers: dict[str, str] | None = None, body: Any = None) -> Fault:
    """Answer something else."""
    return lambda handler, _status, _data: handler.reply(status, json.dumps(body or {"error": {"message": "planned"}}).encode(), headers)


def changed(change: Callable[[Any], Any]) -> Fault:
    """Answer what `change` makes of the JSON; it may change it in place, or give bytes."""

    def strike(handler: "_Handler", status: int, data: bytes) -> None:
        body = json.loads(data)
        result = change(body)
        made = body if result is None else result
        handler.reply(status, made if isinstance(made, bytes) else json.dumps(made).encode())

    return strike


def late(seconds: float) -> Fault:
    """Answer late."""

    def strike(handler: "_Handler", status: int, data: bytes) -> None:
        time.sleep(seconds)
        with suppress(OSError):
            handler.reply(status, data)

    return strike


def cut(handler: "_Handler", status: int, data: bytes) -> None:
    """Send half of the answer, then close the connection."""
    handler.reply(status, data, half=True)
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


class Stub:
    """Listens from the moment it is made until `close`.

    Args:
        model, root, version, context, max_logprobs, mode: what it serves, and how it was started.
        scores_ids: whether it scores ids that it is asked for; what it answers instead.
        key: that it asks for, or None.
        defaults: what its generation_config.json holds.
        port: 0 is any.
    """

    def __init__(
        self,
        *,
        model: str = "table",
        root: str = "/models/table",
        version: str = "0.32.0",
        context: int = 64,
        max_logprobs: int = 20,
        mode: str = "raw_logprobs",
        scores_ids: tuple[int, str] = (200, ""),
        key: str | None = None,
        defaults: dict[str, Any] | None = None,
        port: int = 0,
    ) -> None:
        self.model, self.root, self.version, self.context = model, root, version, context
        self.max_logprobs, self.mode, self.key, self.defaults = max_logprobs, mode, key, defaults or {}
        self.scores_ids = scores_ids
        self.requests: list[dict[str, Any]] = []
        self.busy = self.busiest = self.checks = self.broken = 0
        self.healthy, self.says = True, b""
        self.guards: dict[str, tuple[int, bytes]] = {}  # what something before it answers at a path
        self._faults: list[tuple[int, Callable[[dict[str, Any]], bool], Fault]] = []
        self._lock = threading.Lock()
        self._listener = _Listener(("127.0.0.1", port), _Handler)
        self._listener.stub = self
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._listener.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def connections(self) -> list[socket.socket]:
        """Those that are open here."""
        return list(self._listener.open)

    def close(self) -> None:
        """Stop listening, and drop the connections that are open."""
        self._listener.shutdown()
        self._thread.join()
        self._listener.drop_connections()
        self._listener.server_close()

    def fail(self, n: int, fault: Fault, when: Callable[[dict[str, Any]], bool] = lambda _: True) -> None:
        """End the next `n` completions whose request fits like this."""
        self._faults.append((n, when, fault))

    def next_fault(self, request: dict[str, Any]) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for i, (left, when, fault) in enumerate(self._faults):
                if left and when(request):
                    self._faults[i] = (left - 1, when, fault)
                    return fault
        return None

    def enter(self, step: int) -> None:
        with self._lock:
            self.busy += step
            self.busiest = max(self.busiest, self.busy)

    # --- what vLLM does -----------------------------------------------------------------------------------------------------------

    def pages(self) -> dict[str, Any]:
        """Return the pages that the server shows of itself."""
        card = {"id": self.model, "object": "model", "root": self.root, "max_model_len": self.context}
        return {"/version": {"version": self.version}, "/v1/models": {"object": "list", "data": [card]}}

    def complete(self, request: dict[str, Any]) -> tuple[int, Any]:
        prompts = request["prompt"] if isinstance(request["prompt"][0], list) else [request["prompt"]]
        if request["model"] != self.model:
            return 404, _error(404, f"The model `{request['model']}` does not exist.")
        for ids in prompts:
            if refused := self._refusal(request, ids):
                return 400, _error(400, refused)
        choices = [{"index": i, **self._choice(request, ids)} for i, ids in enumerate(prompts)]
        usage = {"prompt_tokens": sum(map(len, prompts))}
        return 200, {"object": "text_completion", "model": self.model, "choices": choices, "usage": usage}

    def score_ids(self, request: dict[str, Any]) -> tuple[int, Any]:
        """Answer `/inference/v1/generate`."""
        status, said = self.scores_ids
        if status != 200:
            return status, _error(status, said)
        params, ids = request["sampling_params"], request["token_ids"]
        asked, first, k = np.array(params["prompt_logprob_token_ids"]), params["prompt_logprob_start"], params["prompt_logprobs"]
        refused = self._refusal({**params, "prompt_logprobs": max(k, asked.shape[1])}, ids)
        if len(asked) != len(ids) - 1 - first:
            refused = f"prompt_logprob_token_ids has {len(asked)} rows, but the prompt has {len(ids) - 1 - first} scored rows"
        if refused:
            return 400, _error(400, refused)
        rows, written = table(ids)[1:-1], io.BytesIO()
        np.save(written, np.take_along_axis(rows[first:], asked, 1).astype(np.float32))
        return 200, {
            "choices": [{"index": 0, "finish_reason": "length", "token_ids": [EOS]}],
            "prompt_token_ids": ids,
            "prompt_logprobs": [None, *(_entry(row, t, k) for row, t in zip(rows, ids[1:], strict=True))],
            "prompt_token_id_logprobs": base64.b64encode(written.getvalue()).decode(),
            "usage": {"prompt_tokens": len(ids)},
        }

    def _choice(self, request: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        k, wanted = request.get("prompt_logprobs"), min(request.get("max_tokens", 16), self.context - len(ids))
        wanted = min(wanted, self.defaults.get("max_new_tokens", wanted))
        settings = {"temperature": 1.0, "top_p": 1.0, **self.defaults, **{n: request[n] for n in ("temperature", "top_p") if n in request}}
        sampled, reports, reason = self._generate(request, ids, wanted, settings)
        choice = {
            "text": "never read this",
            "finish_reason": reason,
            "prompt_logprobs": None if k is None else [None, *(_entry(row, t, k) for row, t in zip(table(ids)[1:], ids[1:], strict=False))],
            "logprobs": None if request.get("logprobs") is None else _reported(sampled, reports, request["logprobs"]),
        }
        return choice | ({"token_ids": sampled, "prompt_token_ids": ids} if request.get("return_token_ids") else {})

    def _refusal(self, request: dict[str, Any], ids: list[int]) -> str:
        """Return vLLM 0.32's words for a request that it refuses."""
        wanted = min(request.get("max_tokens", 16), self.context - len(ids))
        k = max(request.get("prompt_logprobs") or 0, request.get("logprobs") or 0)
        refusals = {
            f"Token id {max(ids)} is out of vocabulary": max(ids) >= VOCAB,
            f"This model's maximum context length is {self.context} tokens. However, your prompt contains more.": len(ids) > self.context,
            f"max_tokens must be at least 1, got {wanted}.": wanted < 1,
            f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}": k > self.max_logprobs,
            "temperature must be in [0, 2]": not 0 <= request.get("temperature", 1.0) <= 2,
            "stop_token_ids contain out-of-vocab token ids": max(request.get("stop_token_ids", ()), default=0) >= VOCAB,
        }
        return next((message for message, holds in refusals.items() if holds), "")

    def _generate(
        self, request: dict[str, Any], ids: list[int], wanted: int, settings: dict[str, float]
    ) -> tuple[list[int], list[Any], str]:
        stops = {
            *request.get("stop_token_ids", ()),
            *self.defaults.get("stop_token_ids", ()),
            *(() if request.get("ignore_eos") else (EOS,)),
        }
        random = np.random.default_rng(request.get("seed"))
        sampled: list[int] = []
        reports = []
        while len(sampled) < wanted and not (sampled and sampled[-1] in stops):
            raw = table([*ids, *sampled])[-1]
            processed = drawn_from(raw, settings["temperature"], settings["top_p"])
            sampled.append(int(random.choice(VOCAB, p=np.exp(processed))))
            reports.append(raw if self.mode == "raw_logprobs" else processed)
        return sampled, reports, "stop" if sampled[-1] in stops else "length"


def drawn_from(raw: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Return log-probs after temperature and top_p."""
    if temperature == 0:
        return np.where(np.arange(VOCAB) == raw.argmax(), 0.0, -np.inf)
    scaled = raw / temperature
    probs = np.exp(scaled - np.log(np.exp(scaled).sum()))
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    with np.errstate(divide="ignore"):
        return np.log(probs / probs.sum())


def _entry(row: np.ndarray, token: int, k: int) -> dict[str, Any]:
    """Return the prompt token first, then the k most likely ones, once each."""
    order = np.argsort(-row, kind="stable")
    ranks = {int(t): r + 1 for r, t in enumerate(order)}
    chosen = dict.fromkeys([token, *(int(t) for t in order[:k])])
    return {str(t): {"logprob": max(float(row[t]), -9999.0), "rank": ranks[t], "decoded_token": "?"} for t in chosen}


def _reported(sampled: list[int], reports: list[np.ndarray], k: int) -> dict[str, Any]:
    entries = [_entry(row, token, k) for row, token in zip(reports, sampled, strict=True)]
    return {
        "tokens": [f"token_id:{t}" for t in sampled],
        "token_logprobs": [entry[str(t)]["logprob"] for entry, t in zip(entries, sampled, strict=True)],
        "top_logprobs": [{f"token_id:{t}": value["logprob"] for t, value in entry.items()} for entry in entries],
    }


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    stub: Stub

    def __init__(self, *args: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.stub.broken += 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: _Listener
    inside = False

    def do_GET(self) -> None:
        stub = self.server.stub
        stub.checks += 1
        if self.path.startswith("/v1") and not self._let_in():
            return
        found = stub.pages()
        if self.path in stub.guards:
            self.reply(*stub.guards[self.path])
        elif self.path == "/health" and self.path not in found:
            self.reply(200 if stub.healthy else 503, stub.says)
        elif self.path in found:
            self.reply(200, json.dumps(found[self.path]).encode())
        else:
            self.reply(404, b'{"detail":"Not Found"}')

    def do_POST(self) -> None:
        stub = self.server.stub
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._let_in():
            return
        stub.enter(1)
        self.inside = True
        try:
            fault = stub.next_fault(request)
            try:
                status, body = stub.score_ids(request) if self.path == "/inference/v1/generate" else stub.complete(request)
            except Exception as error:  # a mistake of the stub's is to be seen
                status, body = 500, _error(500, f"the stub fails: {error!r}")
            data = json.dumps(body).encode()
            if fault is None:
                self.reply(status, data)
            else:
                fault(self, status, data)
        finally:
            self.leave()

    def leave(self) -> None:
        """Count the request as answered: before it is, as the client may send the next one then."""
        if self.inside:
            self.inside = False
            self.server.stub.enter(-1)

    def _let_in(self) -> bool:
        stub = self.server.stub
        if stub.key is None or self.headers.get("Authorization") == f"Bearer {stub.key}":
            return True
        self.reply(401, b'{"error":"Unauthorized"}')
        return False

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, half: bool = False) -> None:
        self.leave()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if half else data)
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        """Print nothing."""
