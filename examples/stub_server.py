"""A server to try lopd's engine for servers with: it answers as `vllm serve`, or a host of completions with `echo`, where they score a prompt.

    python examples/tiny.py                                # makes two models
    python examples/stub_server.py runs/tiny/teacher       # serves one of them under that name, until Ctrl-C

It is not for work: it reads one prompt at a time, asks for no key, and does not sample.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class StubServer(ThreadingHTTPServer):
    """Listens on this machine alone.

    Args:
        folder: folder of a transformers model; it is served under this name.
        port: 0 takes a free one.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.name, self.url, self.lock = str(folder), f"http://127.0.0.1:{self.server_port}", Lock()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return what a completion answers: nothing but log-probs of the prompts."""
        prompts = request["prompt"] if isinstance(request["prompt"][0], list) else [request["prompt"]]
        with self.lock:
            choices = [{"index": i, **self._choice(request, ids)} for i, ids in enumerate(prompts)]
        return {"choices": choices, "usage": {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 0}}

    @torch.no_grad()
    def _choice(self, request: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        rows = self.model(torch.tensor([ids])).logits[0].log_softmax(-1).tolist()
        rows = list(zip(rows, ids[1:], strict=False))  # what may stand at each place but the first, and what does
        if (k := request.get("prompt_logprobs")) is not None:  # of vLLM
            entries = [{str(token): {"logprob": row[token]} for token in (own, *_most_likely(row, k))} for row, own in rows]
            return {"prompt_token_ids": ids, "prompt_logprobs": [None, *entries]}
        tops = [{f"token_id:{token}": row[token] for token in _most_likely(row, request["logprobs"])} for row, _ in rows]
        values = [row[own] for row, own in rows]
        names = [f"token_id:{token}" for token in ids]
        return {"logprobs": {"tokens": names, "token_logprobs": [None, *values], "top_logprobs": [None, *tops]}}


def _most_likely(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=row.__getitem__, reverse=True)[:k]


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def do_GET(self) -> None:
        """Say what is served."""
        card = {"id": self.server.name, "root": self.server.name, "max_model_len": self.server.model.config.max_position_embeddings}
        pages = {"/health": {}, "/version": {"version": "stub"}, "/v1/models": {"data": [card]}}
        self._reply(200 if self.path in pages else 404, pages.get(self.path, {}))

    def do_POST(self) -> None:
        """Score prompts."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions" and request.get("max_tokens") == 1:
            self._reply(200, self.server.complete(request))
        else:
            self._reply(404, {"error": {"message": "this stub scores prompts, and does nothing else"}})

    def _reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Print nothing for each request."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a transformers model; it is served under this name")
    parser.add_argument("--port", type=int, default=8000, help="8000 by default")
    options = parser.parse_args()
    server = StubServer(options.folder, options.port)
    print(f"{server.url} serves {server.name}, until Ctrl-C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
