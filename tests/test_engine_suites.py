"""Our sources and scorers against the suites that other people's are judged by."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
from conftest import CONTEXT, TOKENIZER_ID, build_model, build_tokenizer
from other_stubs import CompletionsStub, SGLangStub
from served_table import MODEL
from served_table import TOKENIZER as TABLE
from suite_cases import TABLE_CONTEXT, filler, prompts_of, some_prompts, some_rollouts, told_for
from vllm_stub import EOS, VOCAB, Stub

from lopd import PrivilegedScorer
from lopd.engines import pool
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.server import Servers, ServerScorer, ServerSource
from lopd.protocols import RolloutSource, TeacherScorer
from lopd.records import Prompt, Rollout, SamplingParams, TokenizerId
from lopd.testing import ScorerConformance, SourceConformance

TOKENIZER = build_tokenizer()


class CountedModel:
    """Counts forward passes of all models of a test."""

    kind = "llama_tied"
    forwards = 0

    def model(self) -> Any:
        model = build_model(self.kind, seed=2)
        model.get_input_embeddings().register_forward_pre_hook(self._count)
        return model

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def work(self) -> int | None:
        return self.forwards


class TestHFSource(CountedModel, SourceConformance):
    def make(self, sampling: SamplingParams, generation: int) -> RolloutSource:
        return HFSource(self.model(), TOKENIZER, sampling, generation=generation, rows_per_batch=3)

    def prompts(self) -> Sequence[Prompt]:
        return some_prompts(TOKENIZER_ID.vocab_size)

    def too_long(self) -> Prompt | None:
        return Prompt("filler", [2] * CONTEXT)

    def scorer(self) -> TeacherScorer | None:
        return HFScorer(build_model(self.kind, seed=2), TOKENIZER)


class TestHFSourceWithAPaddedHead(TestHFSource):
    kind = "qwen3_padded"


class TestHFScorer(CountedModel, ScorerConformance):
    top_k = candidates = drawn = 0

    def make(self) -> TeacherScorer:
        kept = {"top_k": self.top_k, "candidates": self.candidates, "drawn": self.drawn}
        return HFScorer(self.model(), TOKENIZER, tokens_per_batch=16, rows_per_chunk=5, **kept)

    def tokenizer(self) -> TokenizerId:
        return TOKENIZER_ID

    def rollouts(self) -> Sequence[Rollout]:
        return some_rollouts(TOKENIZER_ID.vocab_size)

    def too_long(self) -> Rollout | None:
        return filler(CONTEXT + 1)


class TestHFScorerWithTopKOfAPaddedHead(TestHFScorer):
    kind, top_k = "qwen3_padded", 7


class TestHFScorerWithCandidates(TestHFScorerWithTopKOfAPaddedHead):
    candidates, drawn = 4, 3


class TestHFScorerWithDrawnCandidatesAlone(TestHFScorer):
    drawn = 5


class TestPrivilegedScorer(TestHFScorer):
    def make(self) -> TeacherScorer:
        prompts = prompts_of([*self.rollouts(), filler(CONTEXT + 1)])
        return PrivilegedScorer(super().make(), prompts, told_for(prompts), continued=True)  # the suite moves tokens into the prompt


class TestPrivilegedScorerWithCandidates(TestPrivilegedScorer):
    kind, top_k, candidates, drawn = "qwen3_padded", 3, 4, 2


class Served:
    """Two servers for each test."""

    stub: Callable[[], Stub] = Stub
    settings: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def _servers(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(pool, "backoff", lambda _: 0.01)
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        stubs = [type(self).stub(), type(self).stub()]
        self.servers = Servers([stub.url for stub in stubs], model="table", patience_s=20, timeout_s=20, **self.settings)
        self.stubs = stubs
        yield
        for stub in stubs:
            stub.close()

    def work(self) -> int | None:
        return sum(len(stub.requests) for stub in self.stubs)


class TestServerSource(Served, SourceConformance):
    def make(self, sampling: SamplingParams, generation: int) -> RolloutSource:
        return ServerSource(self.servers, TABLE, MODEL, sampling, (EOS,), generation=generation)

    def prompts(self) -> Sequence[Prompt]:
        return some_prompts(VOCAB)

    def too_long(self) -> Prompt | None:
        return Prompt("filler", [2] * TABLE_CONTEXT)

    def scorer(self) -> TeacherScorer | None:
        return ServerScorer(self.servers, TABLE, MODEL)


class TestServerScorer(Served, ScorerConformance):
    top_k = 0

    def make(self) -> TeacherScorer:
        return ServerScorer(self.servers, TABLE, MODEL, self.top_k, tokens_per_request=24)

    def tokenizer(self) -> TokenizerId:
        return TABLE

    def rollouts(self) -> Sequence[Rollout]:
        return some_rollouts(VOCAB)

    def too_long(self) -> Rollout | None:
        return filler(TABLE_CONTEXT + 1)


class TestServerScorerWithTopK(TestServerScorer):
    top_k = 4


class TestServerScorerWithCandidates(TestServerScorer):
    def make(self) -> TeacherScorer:
        return ServerScorer(self.servers, TABLE, MODEL, top_k=3, candidates=4, drawn=2)


class TestSGLangSource(TestServerSource):
    stub, settings = SGLangStub, {"speaks": "sglang"}


class TestSGLangScorerWithCandidates(TestServerScorerWithCandidates):
    stub, settings = SGLangStub, {"speaks": "sglang"}


class TestCompletionsScorerWithTopK(TestServerScorerWithTopK):
    stub, settings = CompletionsStub, {"speaks": "openai", "context": TABLE_CONTEXT}
