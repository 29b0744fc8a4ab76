"""A model and what runs it, as a command line or a file states it."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from attrs import evolve, fields, frozen

import lopd
from lopd.errors import InvalidRecordError

if TYPE_CHECKING:
    import torch

    from lopd.engines.server import Servers
    from lopd.protocols import RolloutSource, TeacherScorer

T = TypeVar("T")


def _shown(engine: str | list[str]) -> str | list[str]:
    from lopd.records.paths import without_secrets

    return without_secrets(engine) if isinstance(engine, str) else [without_secrets(url) for url in engine]


@frozen
class Model:
    """A model, and what runs it.

    Args:
        model: its folder, or its name in the hub.
        engine: "hf" is transformers, "vllm" is vLLM in this process, and anything else is the URL of a server, or several.
        device: where transformers runs it; None is a CUDA or ROCm GPU if there is one.
        dtype: type of the weights in use; None keeps the stored one.
        served_as: the name under which servers have it; None is `model`.
        revision: which weights they are, a commit or a hash, where these cannot be read: `model` is not the folder that servers have, or its weights
            are quantised.  It is recorded, and chooses none.
        speaks: what the servers are.
        context: tokens of the longest prompt and response together, where vLLM shall have less than the model, or a server does not report it.
        key_variable: the variable of the environment that holds the key of the servers.
        wait: seconds that servers which are being started may take to answer for the first time; None is as `Servers` has it.

    Raises:
        InvalidRecordError: an engine is something else, does not read a setting, or `revision` comes without `dtype`.
    """

    model: str
    engine: str | list[str] = "hf"
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    served_as: str | None = None
    revision: str | None = None
    speaks: Literal["vllm", "sglang", "openai"] = "vllm"
    context: int | None = None
    key_variable: str | None = None
    wait: float | None = None

    def __attrs_post_init__(self) -> None:
        if not self.urls and self.engine not in ("hf", "vllm"):
            raise InvalidRecordError(
                f"Model: engine is {_shown(self.engine)!r:.80}, expected 'hf', 'vllm' or the URLs of servers; pass one of them."
            )
        if self.wait is not None and self.wait <= 0:
            raise InvalidRecordError(f"Model: wait is {self.wait}, expected more than 0; pass such a number.")
        if self.revision and not self.dtype:
            raise InvalidRecordError("Model: revision is given without dtype, expected both: they state which model it is; pass its dtype.")
        unread = {
            "served_as": self.served_as and not self.urls,
            "key_variable": self.key_variable and not self.urls,
            "wait": self.wait is not None and not self.urls,
            "speaks": self.speaks != "vllm" and not self.urls,
            "context": self.context is not None and self.engine == "hf",
            "device": self.device is not None and self.engine != "hf",
        }
        for name in filter(unread.get, unread):
            raise InvalidRecordError(f"Model: {name} is given, and this engine does not read it; leave it out, or choose another engine.")

    @property
    def urls(self) -> list[str]:
        """Those of the servers; empty if it runs in this process."""
        given = [self.engine] if isinstance(self.engine, str) else self.engine
        return given if given and all("://" in url for url in given) else []

    @property
    def folder(self) -> Path:
        """Its folder, with `~` expanded; nothing is there where `model` is a name in the hub."""
        from lopd.records.paths import local_path

        return local_path("Model", self.model)

    @property
    def torch_dtype(self) -> "torch.dtype | None":
        """The dtype of the weights in use; None is what is stored."""
        import torch

        return None if self.dtype is None else getattr(torch, self.dtype)

    @property
    def place(self) -> str:
        """The device of a model that runs on transformers."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def stated(self) -> "lopd.ModelId | None":
        """Which model it is said to be; None if its folder shows it."""
        return lopd.ModelId(self.model, self.revision, self.dtype) if self.revision and self.dtype else None

    def together(self, samples: int) -> int:
        """Return prompts that are sampled in one call: an engine that fills itself waits for the longest response of each.

        vLLM in this process holds the log-probs of a call as Python objects: for it, prompts that have so many responses in all.
        """
        return {"hf": 64, "vllm": max(1024 // samples, 1)}.get(str(self.engine), 1024)

    def fitted(self, longest: int) -> "Model":
        """Return a model whose vLLM takes memory for rollouts of so many tokens, and not for the longest that it could read."""
        if self.engine != "vllm" or self.context is not None:
            return self
        from lopd.records.optional import need

        finding = need("lopd.engines.finding", "Model")
        finding.check_whole(self.folder)
        whole = getattr(finding.described(self.model).get_text_config(), "max_position_embeddings", None)
        # it adds a token to what it scores
        return evolve(self, context=longest + 1 if whole is None else min(longest + 1, whole))

    def tokenizer(self) -> Any:
        """Load its tokenizer."""
        from lopd.records.optional import need

        return need("lopd.engines.finding", "Model").load_tokenizer(self.model)

    def source(self, sampling: "lopd.SamplingParams", rows: int = 64) -> "RolloutSource":
        """Start it for sampling; transformers samples so many `rows` side by side, and other engines as many as they can."""
        if self.urls:
            from lopd.engines.server import ServerSource

            return ServerSource.from_folder(self._servers(), self.model, self.identity(), sampling)
        if self.engine == "vllm":
            from lopd.engines.vllm import VLLMSettings, VLLMSource

            return VLLMSource.from_folder(self.model, sampling, VLLMSettings(self.torch_dtype, self.context), identity=self.stated)
        from lopd.engines.hf import HFSource

        source = HFSource.from_folder(self.model, sampling, self.torch_dtype, self.place, rows_per_batch=rows)
        return evolve(source, identity=self.stated) if self.stated else source

    def scorer(self, top_k: int = 0, candidates: int = 0, drawn: int = 0) -> "TeacherScorer":
        """Start it for scoring; what is kept beside each token is as in `HFScorer`."""
        if self.urls:
            from lopd.engines.server import ServerScorer

            return ServerScorer(self._servers(), self.tokenizer(), self.identity(), top_k, candidates=candidates, drawn=drawn)
        kept = {"top_k": top_k, "candidates": candidates, "drawn": drawn}
        if self.engine == "vllm":
            from lopd.engines.vllm import VLLMScorer, VLLMSettings

            return VLLMScorer.from_folder(self.model, VLLMSettings(self.torch_dtype, self.context), identity=self.stated, **kept)
        from lopd.engines.hf import HFScorer

        scorer = HFScorer.from_folder(self.model, self.torch_dtype, self.place, **kept)
        return evolve(scorer, identity=self.stated) if self.stated else scorer

    def _servers(self) -> "Servers":
        from lopd.engines.server import Servers

        how: dict[str, Any] = {"context": self.context, "speaks": self.speaks, "key_variable": self.key_variable}
        if self.wait is not None:
            how["first_contact_s"] = self.wait
        return Servers(tuple(self.urls), self.served_as or self.model, **how)

    def identity(self) -> "lopd.ModelId":
        """Return which model it is: what is stated, or the hash of its folder.  Servers do not report it."""
        if self.stated:
            return self.stated
        if self.urls and not self.folder.is_dir():
            raise InvalidRecordError(
                f"Model {self.model!r}: revision is missing, expected a commit or a hash of the served weights, which servers do not report; "
                "pass it with dtype, or the folder that is served as the model."
            )
        from lopd.engines.identity import folder_model_id

        return folder_model_id(self.model, self.torch_dtype)


@contextmanager
def running(engine: T) -> Iterator[T]:
    """Close an engine at the end, if it is one that is closed."""
    try:
        yield engine
    finally:
        if close := getattr(engine, "close", None):
            close()


def add_model(parser: ArgumentParser, role: str) -> None:
    """Declare `--teacher` (or another role) and how it is run."""
    parser.add_argument(f"--{role}", dest="model", required=True, metavar="MODEL", help="its folder, or its name in the hub")
    parser.add_argument(
        "--engine", action="append", metavar="ENGINE", help="hf (the default), vllm, or the URL of a server; may be repeated for several"
    )
    parser.add_argument("--device", help="where transformers runs it (a CUDA or ROCm GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="that it runs in (as the weights are stored)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of the longest prompt and response together")
    parser.add_argument(
        "--revision", help="which weights they are, if MODEL is not the folder that servers have, or is quantised; recorded, with --dtype"
    )
    served = parser.add_argument_group("servers", "Keys are read from the environment: VLLM_API_KEY, SGLANG_API_KEY or OPENAI_API_KEY.")
    served.add_argument("--served-as", metavar="NAME", help="the name that servers know it by (MODEL)")
    served.add_argument("--speaks", choices=("vllm", "sglang", "openai"), default="vllm", help="what they are (vllm)")
    served.add_argument("--key-variable", metavar="NAME", help="another variable of the environment that holds the key")
    served.add_argument(
        "--wait", type=float, metavar="SECONDS", help="until they answer for the first time, where they are being started (10)"
    )


def model_of(options: Namespace) -> Model:
    """Return the model that the options describe."""
    given = {f.name: getattr(options, f.name) for f in fields(Model)}
    engines = options.engine or ["hf"]
    return Model(**{**given, "engine": engines[0] if len(engines) == 1 else engines})
