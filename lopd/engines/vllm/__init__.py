"""vLLM, in this process."""

from lopd.records.optional import needing as _needing

with _needing("transformers", __name__, "vllm"):
    from lopd.engines.vllm.engine import VLLMEngine as VLLMEngine
    from lopd.engines.vllm.nouns import VLLMScorer as VLLMScorer
    from lopd.engines.vllm.nouns import VLLMSource as VLLMSource
    from lopd.engines.vllm.settings import VLLMSettings as VLLMSettings
