"""Tiny causal LMs that do something the usual ones do not."""

import copy

import torch
import transformers

VOCAB = 96
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 5.0, 8.0, 12.0],
    "factor": 4.0,
}


def odd_model(name, **fields):
    """Make a random model of transformers' class `<name>ForCausalLM` in eval mode, whose logits are far from flat."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config")
    known = set(kind().to_dict()) | set(kind.attribute_map) | {"attn_implementation"}
    config = kind(**{key: value for key, value in {**SHAPE, **fields}.items() if key in known})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


class _After(torch.nn.Module):
    """A norm, and then a function of its result."""

    def __init__(self, norm, function):
        super().__init__()
        self.norm, self.function = norm, function

    def forward(self, hidden_BSD):
        return self.function(self, self.norm(hidden_BSD))


def tampered(model, function):
    """Return a copy of a llama whose last norm is followed by `function(module, hidden_BSD)`, in the whole model and in the cut one alike."""
    model = copy.deepcopy(model)
    model.model.norm = _After(model.model.norm, function)
    return model


def with_logits(model, function):
    """Return a copy of a llama that hands `function` of its logits to its caller; its configuration does not show it."""
    kind = type("Odd", (type(model),), {"forward": _changed_forward(type(model).forward, function)})
    model = copy.deepcopy(model)
    model.__class__ = kind
    return model


def _changed_forward(forward, function):
    def changed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = function(output.logits)
        return output

    return changed
