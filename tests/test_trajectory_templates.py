"""What becomes of conversations under the chat templates of real models, as `docs/howto/trajectories.md` has it."""

import re
import warnings
from pathlib import Path

import pytest
from chat_tokenizers import SPECIAL, byte_tokenizer

from lopd import ModelId, SamplingParams, import_text, import_trajectories
from lopd.errors import PromptError

PAGE = (Path(__file__).parents[1] / "docs" / "howto" / "trajectories.md").read_text()
VERSION = re.search(r"trl (\d+\.\d+\.\d+)", PAGE)[1]
ROWS = {row[0]: row[1:] for row in re.findall(r"^\| `([\w.]+)` \| ([\w ]+) \| ([\w ]+) \| ([\w ]+) \|$", PAGE, re.MULTILINE)}
#: EOS of the published tokenizers, by how the name of a template begins; Phi's ends a whole conversation, and `<|end|>` an answer.
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
    "phi3": "<|endoftext|>",
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


@pytest.fixture
def templates():
    """Give the folder of the templates that the table is of."""
    trl = pytest.importorskip("trl", reason="its templates are those of the table: run `make test-templates`")
    if trl.__version__ != VERSION:
        pytest.skip(f"the table is of the templates of trl {VERSION}, and this is {trl.__version__}")
    return Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize("name", ROWS)
def test_conversations_become_what_the_table_says(name, templates):
    tokenizer = real_tokenizer(templates, name)
    assert tuple(outcome(record, tokenizer) for record in CHATS) == ROWS[name]


@pytest.mark.filterwarnings("ignore:.*see that sampling stops at both")
@pytest.mark.parametrize(("name", "end"), [("phi3_5", "<|end|>"), ("cohere2", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>")])
def test_a_text_ends_as_its_template_ends_an_answer(name, end, templates):
    tokenizer = real_tokenizer(templates, name)
    store = import_text([("hello", "hi there")], tokenizer, teacher=ModelId("w", "1", "float32"))
    assert tokenizer.decode(store.read([0])[0].rollout.response_ids.tolist()) == f"hi there{end}"
