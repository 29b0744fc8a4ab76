"""What becomes of conversations under the chat templates of real models, as `docs/howto/trajectories.md` has it."""

import re
import warnings
from pathlib import Path

import pytest
from chat_tokenizers import SPECIAL, byte_tokenizer

from lopd import ModelId, SamplingParams, import_trajectories
from lopd.errors import PromptError

PAGE = (Path(__file__).parents[1] / "docs" / "howto" / "trajectories.md").read_text()
VERSION = re.search(r"trl (\d+\.\d+\.\d+)", PAGE)[1]
ROWS = {row[0]: row[1:] for row in re.findall(r"^\| `([\w.]+)` \| ([\w ]+) \| ([\w ]+) \| ([\w ]+) \|$", PAGE, re.MULTILINE)}
#: What ends an answer, by how the name of a template begins.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm": "<|user|>",
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
}
ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}


def answer(text="", **more):
    return {"role": "assistant", "content": text, **more}


def user(text):
    return {"role": "user", "content": text}


RESULT = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "5"}
#: Conversations by the columns of the table.
CHATS = (
    {"messages": [user("hello"), answer("hi there"), user("bye"), answer("so long")]},
    {"messages": [user("2 + 3?"), answer(tool_calls=[CALL]), RESULT, answer("It is 5.")], "tools": [ADD]},
    {"messages": [user("hello"), answer("hi there", reasoning_content="greet them"), user("bye"), answer("so long")]},
)


def real_tokenizer(folder, name):
    """Make a tokenizer of bytes with a model's chat template, and the special tokens that this names."""
    template, end = (folder / f"{name}.jinja").read_text(), next(end for start, end in ENDS.items() if name.startswith(start))
    found = set(re.findall(r"<\|[^<>|\s'\"{}]+\|>|<｜[^<>\s'\"]+?｜>|<[a-z_]+_of_[a-z_]+>|<\|?turn\|?>", template))
    return byte_tokenizer(template, eos=end, special=(*SPECIAL, *sorted({*found, end} - {*SPECIAL})))


def outcome(record, tokenizer):
    """Return the word of the table."""
    for turns, word in (("together", "one rollout"), ("each", "each turn")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                import_trajectories([record], tokenizer, policy=ModelId("p", "1", "float32"), sampling=SamplingParams(), turns=turns)
            except PromptError as error:
                if "record their ids" in str(error):
                    return "ids needed"
                if "the history was rewritten" not in str(error):
                    raise
            else:
                return word
    raise AssertionError("a turn alone has no history to rewrite")


def test_the_table_names_templates():
    assert len(ROWS) > 10


@pytest.mark.parametrize("name", ROWS)
def test_conversations_become_what_the_table_says(name):
    trl = pytest.importorskip("trl", reason="its templates are those of the table: pip install trl")
    if trl.__version__ != VERSION:
        pytest.skip(f"the table is of the templates of trl {VERSION}, and this is {trl.__version__}")
    tokenizer = real_tokenizer(Path(trl.__file__).parent / "chat_templates", name)
    assert tuple(outcome(record, tokenizer) for record in CHATS) == ROWS[name]
