"""Text for SFT, by any writer, into a store."""

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import date as Date  # noqa: N812 -- `date` is an argument here
from pathlib import Path
from typing import Any

from lopd.backends.memory_store import MemoryStore
from lopd.errors import InvalidRecordError, LopdError, TeacherConsistencyWarning
from lopd.protocols import LogprobStore
from lopd.records.checks import check_at_least
from lopd.records.contents import check_names
from lopd.records.identity import UNKNOWN, ModelId, TokenizerId, fingerprint_tokenizer
from lopd.records.lineage import Lineage
from lopd.records.manifest import Manifest, SamplingParams
from lopd.records.optional import need
from lopd.records.rendering import Rendering
from lopd.records.texts import Fields, TooLong, make_texts
from lopd.records.warn import warn_user
from lopd.tools.interop.filling import StoreMaker, check_maker, fill, records_of


def import_text(
    texts: str | os.PathLike[str] | Iterable[Any],
    tokenizer: Any,
    *,
    teacher: str | Path | ModelId | None,
    store: StoreMaker = MemoryStore,
    field: str = "prompt",
    response: str = "response",
    template: str = "{prompt}",
    max_tokens: int | None = None,
    too_long: TooLong = "refuse",
    verbatim: bool = False,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: Date | None = None,
) -> LogprobStore:
    """Import texts for SFT into a store, one rollout each: `batches(import_text(...), teacher=None)` trains on the tokens of the responses.

    A text is a pair (prompt, response), a list of messages that ends with the assistant's, or a record, such as a row of a Hugging Face dataset,
    whole or streamed.  A record has `record[field]` and `record[response]`, or messages under `field` or "messages", which may be JSON text there.
    Prompts are what `make_prompts` makes of them, with "id", "tools" and "chat_template_kwargs"; of several answers the last is trained, and the
    others are read.  A "finish_reason" of "length" means that a response was cut: it gets no end token.

    The chat template is applied to the prompt, once.  The response follows as text, where a policy would begin to sample, and gets the tokens with
    which the template ends an answer, or else EOS, unless it has them.  A `PromptWarning` states where the template itself would write the response
    otherwise, by one response of each kind (spaces around it, a thought, tools, variables of the template), and all that `make_prompts` doubts.

    The same call again adds nothing to a store that has the texts; nothing is committed unless all of them are right.

    Args:
        texts: a file with one record per line (`.jsonl`) or row (`.parquet`), as in `read_prompts`; or texts in memory.
        tokenizer: the student's tokenizer.
        teacher: who wrote the responses, as in `Lineage.of`: a folder, a hub name, or a `ModelId`.  None means that it is not known, or that no
            model did; the student then has no SFT teacher, and `batches` asks for one before OPD.
        store: makes the store, for example `lambda manifest: ZarrStore.open_or_create("text.zarr", manifest)`.  Its `sampling` has the
            defaults: how the text was drawn is not known.
        field: key of the prompt in a record.
        response: key of the response.
        template: text around each prompt that is a string.
        max_tokens: longest text allowed, prompt and response together; None for no limit.
        too_long: what becomes of longer ones: they are refused with their number, left out, or their responses are cut.
        verbatim: texts carry the chat template already, or want none: they are tokenised as they are, and only EOS is added.
        tools: for records without tools.
        chat_template_kwargs: variables of the chat template.
        date: what the chat template reads as today.

    Warns:
        PromptWarning: texts may not be what they seem.
        TeacherConsistencyWarning: the folder of the teacher has another tokenizer, so it can never score the student's rollouts.

    Raises:
        PromptError: a text cannot be turned into tokens; it names the record.
        ContextOverflowError: texts are longer than `max_tokens`; it counts them.
        ArgumentError: the tokenizer, the teacher or the store is something else.
        InvalidRecordError: `max_tokens` or `too_long` makes no sense.
        EngineError: the teacher was not found.
        ModelError: the teacher cannot be identified.
        ManifestMismatchError: the store is of another writer or tokenizer.
        ConflictError: the store has another text under an id, or another end of one.
    """
    of = fingerprint_tokenizer(tokenizer)
    if too_long not in ("refuse", "drop", "cut"):
        raise InvalidRecordError(f"Texts: too_long is {too_long!r:.40}, expected 'refuse', 'drop' or 'cut'; pass one of them.")
    check_maker("Texts", store)
    most = None if max_tokens is None else check_at_least("Texts", "max_tokens", max_tokens, 2)
    (owner, item), found = records_of("Text", texts)
    check_names(owner, template, field=field, response=response)
    rendering = Rendering(owner, tokenizer, verbatim=verbatim, tools=tools, variables=chat_template_kwargs, day=date)
    writer = UNKNOWN if teacher is None else Lineage.of(teacher).sft_teacher or UNKNOWN
    if not isinstance(teacher, ModelId | None):
        _judge_vocabulary(teacher, writer, of)
    rollouts = make_texts((owner, item), found, rendering, Fields(field, response, template), most=most, too_long=too_long)
    rendering.warn()
    return fill(store, Manifest(of, writer, SamplingParams()), rollouts)


def _judge_vocabulary(teacher: str | Path, writer: ModelId, ours: TokenizerId) -> None:
    """Warn of a teacher that has a tokenizer in its folder, and not this one: its text can be learnt, and no scores of it."""
    finding = need("lopd.engines.finding", "Text")
    folder = finding.local_folder(teacher, weights=False)
    if not any(folder.glob("tokenizer*")):
        return
    try:
        theirs = fingerprint_tokenizer(finding.load_tokenizer(folder))
    except LopdError:
        return  # of code of its own, say: the weights wrote the text all the same
    if not theirs.same_vocabulary(ours):
        warn_user(
            f"Teacher {writer}: its tokenizer has {theirs.vocab_size:,} ids, expected the {ours.vocab_size:,} of the student's, with the same "
            "meanings; SFT on its text is right, and `score_rollouts` will refuse it as a teacher: for OPD take one with the student's tokenizer.",
            TeacherConsistencyWarning,
        )
