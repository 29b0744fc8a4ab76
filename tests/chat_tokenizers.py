"""Byte-level tokenizers with chat templates of the kinds that are in use: dates, tools, thinking, strict turns, BOS in the template."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|pad|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: As in Llama 3.2: today's date, unless a variable has another.
DATED = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n" + CHATML
)
#: As in Qwen3: tools, calls, reasoning, and a switch.
THINKING = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% if m.tool_calls is defined %}{% for call in m.tool_calls %}<call>{{ call | tojson }}</call>{% endfor %}{% endif %}"
    "{% if 'name' in m %}({{ m.name }}){% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
#: As in Mistral: turns that alternate, and marks that are not special tokens.
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
#: As in Phi-4 mini: EOS is written behind a whole conversation, and each answer ends with another token.
CONCLUDED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
#: As in Cohere's Command R7B: an answer ends with two tokens, the second of which is EOS.
TWICE_ENDED = CHATML.replace("<|im_end|>", "{% if m.role == 'assistant' %}<|im_end|>{% endif %}</s>")
#: As in LLaVA: only parts are read.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content if part.type == 'text' %}{{ part.text | trim }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def byte_tokenizer(chat_template=CHATML, *, before="", after="", eos="<|im_end|>", special=SPECIAL):
    """Make a tokenizer of 256 bytes and special tokens; `before` and `after` are what it adds to plain text by itself, for example "<s>"."""
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    if before or after:
        backend.post_processor = TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=[(t, vocab[t]) for t in special])
    named = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **named)


def texts(tokenizer, prompts):
    """Return what the policy reads, as text."""
    return [tokenizer.decode(prompt.token_ids.tolist()) for prompt in prompts]
