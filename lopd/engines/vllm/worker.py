"""What runs inside vLLM's worker processes; vLLM finds it by name."""

from typing import Any


class HeadCut:
    """Mixed into vLLM's worker (`worker_extension_cls`): cuts its logits to the tokenizer's vocabulary, as `lopd.engines.causal_lm.lm_head` does.

    The rows of a head beyond the tokenizer's ids are padding.  vLLM samples from them and counts their mass; with the cut, no such id is ever
    drawn and every log-prob is over the ids that exist.
    """

    get_model: Any

    def lopd_cut_head(self, vocab_size: int) -> int:
        """Cut them, and say in how many layers."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        layers = [layer for layer in self.get_model().modules() if isinstance(layer, LogitsProcessor)]
        for layer in layers:
            # vLLM's own cut of the rows that it pads a head with
            layer.org_vocab_size = vocab_size
        return len(layers)
