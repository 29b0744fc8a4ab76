"""The parquet rows that the code of the Lightning OPD paper reads, as rollouts and one column of scores.

A row is `prompt` (the chat template already applied, as text) and `metadata` with `response_tokens`, `loss_mask` and `teacher_log_probs`.
Much that a store states about itself is not in such a file; `AuthorsReport.not_vouched_for` lists it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from lopd.backends import admission
from lopd.backends.files import StorageOptions, StorePath
from lopd.errors import CorruptStoreError, InvalidRecordError
from lopd.guards.consistency import check_vocabulary
from lopd.protocols import LogprobStore
from lopd.protocols.doors import check_noun
from lopd.protocols.reading import named
from lopd.records.checks import check_kind
from lopd.records.contents import name_of
from lopd.records.identity import fingerprint_tokenizer
from lopd.records.manifest import Provenance
from lopd.records.rollouts import FinishReason, Rollout, Scores, rollout_id
from lopd.tools.interop.arrow_table import refuse_other
from lopd.tools.interop.parquet import open_parquet, read_batches

_ARRAYS = ("response_tokens", "loss_mask", "teacher_log_probs")
_NOT_VOUCHED_FOR = (
    "token ids: the response was decoded to text and encoded again, so its ids may not be those that were sampled",
    "EOS: it was dropped with the other special tokens, so no token here teaches the student to stop",
    "prompt: it was tokenised here, from text and without adding special tokens; the scorer may have done otherwise",
    "teacher: its model, revision, dtype, engine and tokenizer are what the caller said",
    "sampling: the policy, its temperature, top-p and cap on tokens are what the caller said in the manifest",
    "behavior log-probs: none were kept, so the importance ratio to what sampled cannot be known",
)


@frozen
class AuthorsReport:
    """What was imported, and what cannot be vouched for.

    Args:
        rollouts, response_tokens: in the file, without refused rows; also those that the store had already.
        masked_tokens: response tokens that do not count.
        finish_reasons: how many of each.
        refused: one sentence for each row that was left out.
        not_vouched_for: what such rows do not state, or lost; one sentence each.
    """

    rollouts: int
    response_tokens: int
    masked_tokens: int
    finish_reasons: Mapping[str, int]
    refused: tuple[str, ...]
    not_vouched_for: tuple[str, ...]


def import_authors_parquet(
    path: StorePath,
    store: LogprobStore,
    tokenizer: Any,
    teacher: Provenance,
    *,
    column: str = "teacher",
    finish_reason: FinishReason | None = None,
    leave_out_refused: bool = False,
    rows_per_commit: int = 256,
    storage_options: StorageOptions | None = None,
) -> AuthorsReport:
    """Append the rows of a file of the paper's release, and the teacher's scores in it; run it again to resume.

    Prompts are tokenised once, from their text, without adding special tokens.  A rollout is named after the tokens of its prompt; equal
    prompts are numbered in the order of the file.  The i-th log-prob belongs to the i-th response token, whatever the mask is: the
    original code takes as many from the end as the mask has ones, so a zero in the mask shifted all of them.

    Args:
        path: local, or any URL that fsspec opens.
        store: created with a manifest that states what the file does not: who sampled and how, and who wrote the policy's SFT data.
        tokenizer: a transformers tokenizer, that of the manifest and of the teacher.
        teacher: who computed `teacher_log_probs`, and how.
        column: where these go.
        finish_reason: the one of all rows; None infers "length" where a response has the manifest's `max_new_tokens` or more, else "stop".
        leave_out_refused: go on without rows that are refused, and name them in the report, instead of stopping at the first.
        rows_per_commit: rollouts appended together; bounds memory.
        storage_options: options of fsspec.

    Returns:
        Counts, and what the file cannot prove; show it to those who train on the store.

    Raises:
        ArgumentError: the store or the teacher is something else.
        TokenizerMismatchError: tokenizer, manifest and teacher do not share one vocabulary; nothing is imported.
        InvalidRecordError: a row has lengths that disagree, or something that is not a log-prob; it names the row.
        StoreNotFoundError: the file is not there.
        StoreReadError: the storage fails, also midway.
        CorruptStoreError: it is damaged, or has other fields.
        ConflictError: other content or values are under an id, or another model under the column, of the store.
    """
    check_noun(store, LogprobStore)
    check_kind("Teacher", teacher, Provenance, "pass a `lopd.records.Provenance`, such as `scorer.provenance`")
    ours = store.manifest.tokenizer
    check_vocabulary("Tokenizer", fingerprint_tokenizer(tokenizer), "the store's", ours)
    check_vocabulary(f"Teacher {teacher.model}", teacher, "the store's", ours)
    seen: Counter[str] = Counter()
    tokens, masked, reasons, refused = 0, 0, Counter[str](), list[str]()
    for batch in _rows(path, rows_per_commit, storage_options):
        rollouts, scores = list[Rollout](), list[Scores]()
        for name, row in batch:
            try:
                rollout = _rollout(row, tokenizer, store, finish_reason, seen)
                scores.append(Scores.of(rollout, row["metadata"]["teacher_log_probs"]))
            except InvalidRecordError as error:
                if not leave_out_refused:
                    raise InvalidRecordError(f"{name}: {error}") from error
                refused.append(f"{name}: {error}")
                continue
            rollouts.append(rollout)
            tokens += rollout.response_ids.size
            masked += int((~rollout.loss_mask).sum())
            reasons[rollout.finish_reason] += 1
        # what the file states: the ids are compared by every append
        rows = [{"rollout_id": score.rollout_id, f"logprobs/{column}": score.logprobs} for score in scores]
        refuse_other(store, rows, {column: teacher})
        store.append(rollouts)
        store.append_scores(column, teacher, scores)
    said = "what the caller said" if finish_reason else f"inferred from the length, {store.manifest.sampling.max_new_tokens} tokens or less"
    return AuthorsReport(
        reasons.total(), tokens, masked, dict(reasons), tuple(refused), (*_NOT_VOUCHED_FOR, f"finish reason: it is {said}")
    )


def _rows(path: StorePath, rows: int, storage_options: StorageOptions | None) -> Iterator[list[tuple[str, Mapping[str, Any]]]]:
    """Yield batches of rows, each with the name that messages give it."""
    with open_parquet(path, storage_options) as (file, owner):
        names = file.schema_arrow.names
        if not {"prompt", "metadata"} <= set(names):
            raise CorruptStoreError(f"{owner}: its fields are {names}, expected 'prompt' and 'metadata'; check that it is such a file.")
        number = 0
        for table in read_batches(file, rows, owner):
            batch = table.select(["prompt", "metadata"]).to_pylist()
            yield [(f"{owner}, row {number + i}", row) for i, row in enumerate(batch)]
            number += len(batch)


def _rollout(
    row: Mapping[str, Any], tokenizer: Any, store: LogprobStore, finish_reason: FinishReason | None, seen: Counter[str]
) -> Rollout:
    prompt, metadata = row["prompt"], row["metadata"]
    if not isinstance(prompt, str) or not isinstance(metadata, Mapping):
        raise InvalidRecordError(f"prompt is {prompt!r:.40} and metadata {metadata!r:.40}, expected text and a mapping; fix the row.")
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    digest = name_of(prompt_ids)
    # counted also when the row is refused below, so that the names of others do not depend on it
    seen[digest] += 1
    sizes = {field: len(metadata[field]) if isinstance(metadata.get(field), list) else None for field in _ARRAYS}
    length = sizes["response_tokens"]
    if length is None or set(sizes.values()) != {length}:
        raise InvalidRecordError(f"the lengths are {sizes}, expected three that agree; score the row again.")
    rollout = Rollout(
        rollout_id=rollout_id(digest, seen[digest] - 1, store.manifest.generation),
        prompt_ids=prompt_ids,
        response_ids=metadata["response_tokens"],
        loss_mask=metadata["loss_mask"],
        finish_reason=finish_reason or ("length" if length >= store.manifest.sampling.max_new_tokens else "stop"),
        generation=store.manifest.generation,
    )
    admission.new_rollouts(named(store), [rollout], vocab_size=store.manifest.tokenizer.vocab_size, generations=store.generations, known={})
    return rollout
