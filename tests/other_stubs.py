"""Servers on loopback that answer as SGLang 0.5.23's `/generate` does, and as hosts of the OpenAI completions do, from the table of `vllm_stub`."""

from typing import Any

import numpy as np
from vllm_stub import EOS, VOCAB, Stub, table

Reply = tuple[int, Any]


class SGLangStub(Stub):
    """Its log-probs are `[log-prob, id, null]`; the last id of the vocabulary is said to be 0 in a prompt; NaN and infinities are null.

    Args:
        cache: whether its prefix cache is on.
        deterministic: whether it takes seeds.
        pool: tokens that its cache of keys and values holds, of which it tells; None is enough, and it tells nothing.
    """

    def __init__(self, *, cache: bool = True, deterministic: bool = True, pool: int | None = None, **settings: Any) -> None:
        self.cache, self.deterministic, self.pool = cache, deterministic, pool
        super().__init__(mode="processed_logprobs", version="0.5.23", **settings)

    def pages(self) -> dict[str, Any]:
        settings = {"disable_radix_cache": not self.cache, "enable_deterministic_inference": self.deterministic}
        if self.pool is not None:
            settings |= {"max_total_num_tokens": self.pool, "max_req_input_len": self.room - 6}
        return {
            "/v1/models": {"object": "list", "data": [{"id": self.model, "root": self.model, "max_model_len": self.context}]},
            "/model_info": {"model_path": self.root, "served_model_name": self.model, "weight_version": "default"},
            "/server_info": {"version": self.version, **settings},
        }

    @property
    def room(self) -> int:
        return min(self.context, self.pool or self.context)

    def complete(self, request: dict[str, Any]) -> Reply:
        single = not isinstance(request["input_ids"][0], list)
        prompts = [request["input_ids"]] if single else request["input_ids"]
        for ids in prompts:
            if len(ids) >= self.context:
                said = f"The input ({len(ids)} tokens) is longer than the model's context length ({self.context} tokens)."
                return 400, {"error": {"message": said}}
            if len(ids) >= self.room - 6:
                said = f"Input length ({len(ids)} tokens) exceeds the maximum allowed length ({self.room - 6} tokens). Use a shorter input."
                return 400, {"error": {"message": said}}
        items = [self._item(request, i, ids, single) for i, ids in enumerate(prompts)]
        return 200, items[0] if single else items

    def _item(self, request: dict[str, Any], i: int, ids: list[int], single: bool) -> dict[str, Any]:
        params, k = request["sampling_params"], request["top_logprobs_num"]
        start = request["logprob_start_len"] if single else request["logprob_start_len"][i]
        sampled, reports = [], []
        if params["max_new_tokens"]:
            named = {"stop_token_ids": params["stop_token_ids"], "seed": params["sampling_seed"]}
            sampled, reports, _ = self._generate(named, ids, min(params["max_new_tokens"], self.room - len(ids) - 2), params)
        ended = bool(sampled) and sampled[-1] in {*params["stop_token_ids"], EOS}
        meta = {
            "finish_reason": {"type": "stop", "matched": sampled[-1]} if ended else {"type": "length", "length": len(sampled)},
            "prompt_tokens": len(ids),
            "completion_tokens": len(sampled),
            "cached_tokens": 0,
            "weight_version": "default",
            "input_token_logprobs": [],
            "output_token_logprobs": [[float(row[token]), token, None] for row, token in zip(reports, sampled, strict=True)],
            "output_top_logprobs": [_top(row, k) for row in reports],
        }
        if start >= 0:
            rows = list(zip(table(ids)[start + 1 : -1], ids[start + 1 :], strict=True))
            meta["input_token_logprobs"] = [[None, _said(ids[start]), None], *(_one(row, token) for row, token in rows)]
            meta["input_top_logprobs"] = [None, *(_top(row, k) for row, _ in rows)]
            if asked := request.get("token_ids_logprob"):
                meta["input_token_ids_logprobs"] = [None, *([[float(row[a]), a, None] for a in asked[i]] for row, _ in rows)]
        return {"text": "never read this", "output_ids": sampled, "prompt_token_ids": ids, "meta_info": meta}


def _said(token: int) -> int:
    return token if token < VOCAB - 1 else 0


def _one(row: np.ndarray, token: int) -> list[Any]:
    return [float(row[token]) if np.isfinite(row[token]) else None, _said(token), None]


def _top(row: np.ndarray, k: int) -> list[list[Any]]:
    order = np.argsort(-row, kind="stable")[:k]
    return [[float(row[t]) if np.isfinite(row[t]) else None, int(t), None] for t in order]


class CompletionsStub(Stub):
    """A host of the OpenAI completions.

    Args:
        names: how an answer names tokens: "texts", "ids" (`token_id:17`), "list" (`token_ids`), or "prompt" (`prompt_token_ids`).
        echoes: whether it echoes prompts.
        most: so many of the most likely tokens, however many are asked for.
    """

    def __init__(self, *, names: str = "ids", echoes: bool = True, most: int = 20, **settings: Any) -> None:
        self.names, self.echoes, self.most = names, echoes, most
        super().__init__(**settings)

    def pages(self) -> dict[str, Any]:
        return {"/v1/models": {"object": "list", "data": [{"id": "another", "object": "model"}]}}

    def complete(self, request: dict[str, Any]) -> Reply:
        if request["model"] != self.model:
            return 404, {"error": {"message": f"The model `{request['model']}` does not exist."}}
        choices = [{"index": i, **self._echo(request, ids)} for i, ids in enumerate(request["prompt"])]
        read = sum(map(len, request["prompt"]))
        usage = {"prompt_tokens": read, "completion_tokens": len(choices), "total_tokens": read + len(choices)}
        return 200, {"object": "text_completion", "model": self.model, "choices": choices, "usage": usage}

    def _echo(self, request: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        rows = table(ids)
        made = int(rows[-1].argmax())
        tokens = [*ids, made] if self.echoes else [made]
        rows = rows if self.echoes else rows[-1:]
        name = "token_id:{}".format if self.names == "ids" else "t{}".format
        logprobs: dict[str, Any] = {
            "tokens": [name(token) for token in tokens],
            "token_logprobs": [float(row[token]) for row, token in zip(rows, tokens, strict=True)],
            "top_logprobs": [{name(t): value for value, t, _ in _top(row, min(request["logprobs"], self.most))} for row in rows],
        }
        if self.echoes:
            logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None
        if self.names == "list":
            logprobs["token_ids"] = tokens
        named = {"prompt_token_ids": ids} if self.names == "prompt" else {}
        return {"text": "never read this", "finish_reason": "length", "logprobs": logprobs, **named}
