"""transformers, in this process: the engine that runs anywhere, and the truth that faster engines are compared with."""

from lopd.records.optional import needing as _needing

with _needing("transformers", __name__):
    from lopd.engines.finding import load_tokenizer as load_tokenizer
    from lopd.engines.hf.loading import load_model as load_model
    from lopd.engines.hf.scorer import HFScorer as HFScorer
    from lopd.engines.hf.scorer import exact_reverse_kl as exact_reverse_kl
    from lopd.engines.hf.source import HFSource as HFSource
    from lopd.engines.identity import folder_model_id as folder_model_id
    from lopd.engines.identity import model_id as model_id
