"""Texts for SFT by any writer, and conversations of a policy as an agent framework recorded them, into a store."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date as Date  # noqa: N812 -- `date` is an argument here
from pathlib import Path
from typing import Any

from lopd.backends import admission
from lopd.backends.memory_store import MemoryStore
from lopd.errors import ArgumentError, InvalidRecordError, LopdError, TeacherConsistencyWarning
from lopd.protocols import LogprobStore
from lopd.records.checks import a_kind, check_at_least, check_kind
from lopd.records.contents import check_names, several
from lopd.records.files import named_file, read_records
from lopd.records.identity import UNKNOWN, ModelId, TokenizerId, fingerprint_tokenizer
from lopd.records.lineage import Lineage
from lopd.records.manifest import Manifest, SamplingParams
from lopd.records.optional import need
from lopd.records.rendering import Rendering
from lopd.records.rollouts import Rollout
from lopd.records.texts import Fields, TooLong, make_texts
from lopd.records.trajectories import Choice, Recorded, Turns, make_trajectories
from lopd.records.warn import warn_user
from lopd.tools.interop.arrow_table import FIELDS, refuse_other

_ROWS_PER_COMMIT = 1024
#: Makes the store of an import.
StoreMaker = Callable[[Manifest], LogprobStore]


def check_maker(owner: str, store: object) -> None:
    """Refuse a store in the place of what makes one.

    Raises:
        ArgumentError: it cannot be called.
    """
    if not callable(store):
        raise ArgumentError(f"{owner}: store is {a_kind(store)}; pass `lambda manifest: ZarrStore.open_or_create(PATH, manifest)`.")


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
    (owner, item), found = _records_of("Text", texts)
    check_names(owner, template, field=field, response=response)
    rendering = Rendering(owner, tokenizer, verbatim=verbatim, tools=tools, variables=chat_template_kwargs, day=date)
    writer = UNKNOWN if teacher is None else Lineage.of(teacher).sft_teacher or UNKNOWN
    if not isinstance(teacher, ModelId | None):
        _judge_vocabulary(teacher, writer, of)
    rollouts = make_texts((owner, item), found, rendering, Fields(field, response, template), most=most, too_long=too_long)
    rendering.warn()
    return _fill(store, Manifest(of, writer, SamplingParams()), rollouts)


def import_trajectories(
    trajectories: str | os.PathLike[str] | Iterable[Any],
    tokenizer: Any,
    *,
    policy: str | Path | ModelId,
    sampling: SamplingParams,
    lineage: Lineage | None = None,
    store: StoreMaker = MemoryStore,
    turns: Turns = "together",
    logprobs: Recorded | None = None,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: Date | None = None,
) -> LogprobStore:
    """Import multi-turn and tool-using conversations into a store, as rollouts of the policy: what it drew counts, what others wrote does not.

    A record has token ids as an agent framework recorded them, or messages; `docs/howto/trajectories.md` has the keys of verl, verifiers,
    prime-rl and agent-lightning.  Recorded ids stay as they are, and are compared with the text beside them.  Messages are rendered turn by turn:
    a turn reads what the chat template makes of all before it, and its answer is tokenised as a policy would draw it.  Tokens of tools and users
    between turns are in the response with `loss_mask` False: teachers score them, and no loss reads them.

    Turns make one rollout only where each reads the turns before it as they were drawn.  A history that was rewritten is refused by name.

    Like `import_text`: the same call again adds nothing, and nothing is committed unless all records are right.  "id", "finish_reason", "tools" and
    "chat_template_kwargs" of a record are read; without an id it is named after its first prompt, and its rollouts are samples of that.

    Args:
        trajectories: a file with one record per line (`.jsonl`) or row (`.parquet`), as in `read_prompts`; or records in memory.
        tokenizer: the policy's tokenizer.
        policy: who drew: a folder or a hub name, whose weights are read for their identity, or a `ModelId`.
        sampling: how it drew; a cut to the top k or by a least probability has no place there, and such log-probs are of another distribution.
        lineage: what the policy was trained on; None is the lineage in its folder, and nothing for a `ModelId`.
        store: makes the store, for example `lambda manifest: ZarrStore.open_or_create("run.zarr", manifest)`.
        turns: "together" for one rollout of all turns; "each" for a rollout each, whose prompt is all before it; or the numbers of some (from 0,
            or from the end as -1), each a rollout too (prefix replay).
        logprobs: what recorded log-probs are of, where temperature or top-p is not 1: "sampler" for the distribution that drew, "behavior" for
            the policy's own.
        tools: for records of messages without tools.
        chat_template_kwargs: variables of the chat template, for messages.
        date: what the chat template reads as today, for messages.

    Raises:
        PromptError: a record cannot be read, its parts or turns do not fit together, or its text is not that of its ids; it names the record.
        InvalidRecordError: something is not a token id of the vocabulary, a mask or a log-prob; or `turns` or `logprobs` makes no sense.
        ArgumentError: the tokenizer, the sampling, the lineage or the store is something else.
        EngineError: there is no such policy.
        ModelError: the policy cannot be identified.
        ManifestMismatchError: the store is of another policy, sampling or tokenizer.
        ConflictError: the store has another rollout under an id, or the same with other log-probs, without them, or with another end.
    """
    of = fingerprint_tokenizer(tokenizer)
    check_kind("Trajectories: sampling", sampling, SamplingParams, "make it: `SamplingParams(...)`")
    check_maker("Trajectories", store)
    choice = Choice(turns, sampling, logprobs)
    called, records = _records_of("Trajectory", trajectories)
    rendering = Rendering(called[0], tokenizer, verbatim=False, tools=tools, variables=chat_template_kwargs, day=date)
    drew = Lineage.of(policy).sft_teacher or UNKNOWN
    rollouts = make_trajectories(called, records, rendering, choice)
    rendering.warn()
    return _fill(store, Manifest(of, drew, sampling, _trained(policy, lineage).sft_teacher), rollouts)


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


def _trained(policy: str | Path | ModelId, lineage: Lineage | None) -> Lineage:
    """Return what the policy was trained on, as it was passed or as its folder records."""
    if lineage is not None:
        check_kind("Trajectories: lineage", lineage, Lineage, "pass `Lineage(sft_teacher=...)`, or leave it out")
        return lineage
    if isinstance(policy, ModelId):
        return Lineage()
    return Lineage.read(need("lopd.engines.finding", "import_trajectories").local_folder(policy, weights=False))


def _records_of(kind: str, records: str | os.PathLike[str] | Iterable[Any]) -> tuple[tuple[str, str], Iterable[tuple[int, Any]]]:
    """Return how messages name all records, and one, before its number; and the records with their numbers, of a file or in memory.

    Args:
        kind: kind of record, for example "Text".
        records: a path or a URL, or many of them.

    Raises:
        PromptError: the file cannot be read, or they are something else.
    """
    if isinstance(records, str | os.PathLike):
        path, owner = named_file(f"{kind} file", records)
        item, found = read_records(owner, path)
        return (owner, item), found
    many = f"{kind.removesuffix('y')}ies" if kind.endswith("y") else f"{kind}s"
    return (many, f"{kind} number"), enumerate(several(many, records, "a path"))


def _fill(store: StoreMaker, manifest: Manifest, rollouts: Sequence[Rollout]) -> LogprobStore:
    """Return the store with all rollouts; none is committed unless all of them can be.

    Raises:
        InvalidRecordError: a token id is outside the vocabulary.
        ManifestMismatchError: the store is of another writer or tokenizer.
        ConflictError: it has another rollout under an id, or the same with other log-probs or another end.
    """
    vocab_size, generations = manifest.tokenizer.vocab_size, {manifest.generation}
    admission.new_rollouts("Import", rollouts, vocab_size=vocab_size, generations=generations, known={})
    made = store(manifest)
    refuse_other(made, [{name: getattr(rollout, name) for name in FIELDS} for rollout in rollouts], {})
    for first in range(0, len(rollouts), _ROWS_PER_COMMIT):
        made.append(rollouts[first : first + _ROWS_PER_COMMIT])
    return made
