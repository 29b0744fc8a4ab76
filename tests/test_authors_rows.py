"""The rows that the authors of the paper published: what they become, and what they cannot vouch for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attrs import evolve

from lopd.backends.memory_store import MemoryStore
from lopd.errors import ConflictError, CorruptStoreError, InvalidRecordError, StoreNotFoundError, TokenizerMismatchError
from lopd.records import Provenance, fingerprint_tokenizer
from lopd.testing import tiny_manifest, tiny_provenance
from lopd.tools.interop import import_authors_parquet


@pytest.fixture
def teacher(tokenizer: Any) -> Provenance:
    return evolve(tiny_provenance(), vocab_hash=fingerprint_tokenizer(tokenizer).vocab_hash)


@pytest.fixture
def empty(tokenizer: Any) -> MemoryStore:
    return MemoryStore(evolve(tiny_manifest(), tokenizer=fingerprint_tokenizer(tokenizer)))


def authors_row(prompt: str = "<|user|>hi<|eos|><|assistant|>", response: Sequence[int] = (10, 11, 12), **metadata: Any) -> dict[str, Any]:
    values = {
        "is_lightning_opd": True,
        "response_tokens": list(response),
        "loss_mask": [1] * len(response),
        "response": "text",
        "teacher_log_probs": [-0.5] * len(response),
    }
    return {"prompt": prompt, "label": "0", "metadata": {**values, **metadata}}


def write_authors(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_the_authors_rows_become_rollouts_and_a_column_of_scores(
    tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    rows = [
        authors_row(),
        authors_row(response=[20]),
        authors_row("<|user|>you<|eos|><|assistant|>", range(20, 28), loss_mask=[1, 0] * 4, teacher_log_probs=np.arange(-8, 0) / 8),
    ]
    path = write_authors(tmp_path / "opd.parquet", rows)
    for _ in range(2):
        report = import_authors_parquet(path, empty, tokenizer, teacher, rows_per_commit=2)
        assert (report.rollouts, report.response_tokens, report.masked_tokens, report.refused) == (3, 12, 4, ())
        assert report.finish_reasons == {"stop": 2, "length": 1}
        assert len(empty) == 3
    read = empty.read(range(3), ("teacher",))
    assert [row.rollout.rollout_id.split("/")[1] for row in read] == ["s0", "s1", "s0"]
    assert read[0].rollout.rollout_id.split("/")[0] == read[1].rollout.rollout_id.split("/")[0]
    assert tokenizer.convert_ids_to_tokens(read[0].rollout.prompt_ids.tolist()) == ["<|user|>", "h", "i", "<|eos|>", "<|assistant|>"]
    assert read[2].rollout.loss_mask.tolist() == [True, False] * 4
    # with a zero in the mask, the i-th score still belongs to the i-th token
    assert read[2].scores["teacher"].tolist() == (np.arange(-8, 0) / 8).tolist()
    assert (empty.columns["teacher"], empty.scored("behavior").any()) == (teacher, False)


def test_mended_scores_of_the_authors_are_not_taken_for_those_that_are_there(
    tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    import_authors_parquet(write_authors(tmp_path / "opd.parquet", [authors_row()]), empty, tokenizer, teacher)
    mended = write_authors(tmp_path / "mended.parquet", [authors_row(teacher_log_probs=[-0.5, -0.5, -0.25])])
    with pytest.raises(ConflictError, match="is there with other logprobs/teacher"):
        import_authors_parquet(mended, empty, tokenizer, teacher)


def test_the_report_says_what_the_authors_rows_cannot_vouch_for(
    tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    path = write_authors(tmp_path / "opd.parquet", [authors_row()])
    inferred = import_authors_parquet(path, empty, tokenizer, teacher).not_vouched_for
    for subject in ("token ids", "EOS", "prompt", "teacher", "sampling", "behavior log-probs", "finish reason"):
        assert sum(sentence.startswith(f"{subject}: ") for sentence in inferred) == 1, subject
    assert "inferred" in inferred[-1]
    other = MemoryStore(empty.manifest)
    given_reason = import_authors_parquet(path, other, tokenizer, teacher, column="other", finish_reason="length")
    assert "the caller said" in given_reason.not_vouched_for[-1]
    assert given_reason.finish_reasons == {"length": 1}
    assert other.columns.keys() == {"other"}


@pytest.mark.parametrize("metadata", [{"response_tokens": 5, "loss_mask": 1}, {"teacher_log_probs": ["a", "b", "c"]}])
def test_fields_of_the_authors_rows_of_another_type_are_refused_by_row(
    metadata: dict[str, Any], tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    path = write_authors(tmp_path / "opd.parquet", [authors_row(**metadata)])
    with pytest.raises(InvalidRecordError, match=r"opd\.parquet, row 0: "):
        import_authors_parquet(path, empty, tokenizer, teacher)


@pytest.mark.parametrize(
    "bad",
    [
        (authors_row(loss_mask=[1, 1]), "lengths are.*'loss_mask': 2"),
        (authors_row(loss_mask=[1, 0, 1], teacher_log_probs=[-1.0, -1.0]), "'teacher_log_probs': 2"),
        (authors_row(teacher_log_probs=None), "'teacher_log_probs': None"),
        (authors_row(response=[]), "0 tokens"),
        (authors_row(""), "0 tokens"),
        (authors_row(teacher_log_probs=[-1.0, 0.25, -1.0]), r"logprobs\[1\] is 0.25"),
        (authors_row(teacher_log_probs=[-1.0, -np.inf, -1.0]), r"logprobs\[1\] is -inf"),
        (authors_row(response=[10, 96, 12]), r"response_ids\[1\] is 96"),
        ({**authors_row(), "prompt": None}, "prompt is None"),
        ({**authors_row(), "metadata": None}, "metadata None"),
    ],
)
def test_a_row_of_the_authors_that_disagrees_with_itself_is_refused_by_name(
    bad: tuple[dict[str, Any], str], tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    row, message = bad
    path = write_authors(tmp_path / "opd.parquet", [authors_row("hi"), authors_row("you"), row, authors_row("me")])
    with pytest.raises(InvalidRecordError, match=rf"opd\.parquet, row 2: .*{message}"):
        import_authors_parquet(path, empty, tokenizer, teacher, rows_per_commit=2)
    assert len(empty) == 2
    report = import_authors_parquet(path, empty, tokenizer, teacher, rows_per_commit=2, leave_out_refused=True)
    assert (report.rollouts, len(empty), len(report.refused)) == (3, 3, 1)
    assert "row 2" in report.refused[0]


def test_the_authors_rows_need_one_vocabulary(
    tokenizer: Any, swapped_tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    path = write_authors(tmp_path / "opd.parquet", [authors_row()])
    for other, provenance in ((swapped_tokenizer, teacher), (tokenizer, evolve(teacher, vocab_hash="another"))):
        with pytest.raises(TokenizerMismatchError):
            import_authors_parquet(path, empty, other, provenance)
    assert len(empty) == 0


def test_a_parquet_file_with_other_fields_is_no_file_of_the_authors(
    tokenizer: Any, teacher: Provenance, empty: MemoryStore, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "opd.parquet")
    with pytest.raises(CorruptStoreError, match="fields are"):
        import_authors_parquet(tmp_path / "opd.parquet", empty, tokenizer, teacher)
    with pytest.raises(StoreNotFoundError):
        import_authors_parquet(tmp_path / "none.parquet", empty, tokenizer, teacher)


def test_the_authors_prompts_get_no_special_tokens_added(teacher: Provenance, empty: MemoryStore, tokenizer: Any, tmp_path: Path) -> None:
    class Adding:
        chat_template, eos_token_id, pad_token_id = tokenizer.chat_template, 0, 0

        def get_vocab(self) -> Any:
            return tokenizer.get_vocab()

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            return {"input_ids": [0] * add_special_tokens + tokenizer(text, add_special_tokens=False)["input_ids"]}

    path = write_authors(tmp_path / "opd.parquet", [authors_row("hi")])
    import_authors_parquet(path, empty, Adding(), teacher)
    assert empty.read([0])[0].rollout.prompt_ids.tolist() == tokenizer("hi", add_special_tokens=False)["input_ids"]
