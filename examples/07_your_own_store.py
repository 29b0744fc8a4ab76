"""A store of your own: the methods of `LogprobStore` and nothing else, here on SQLite.  Several processes may write to one file.

lopd's `MemoryStore` answers the questions; the file keeps every accepted call, and a call is accepted if MemoryStore accepts it.
Test yours with the suite that tests lopd's own stores:

    class TestSqliteStore(lopd.testing.StoreConformance):
        def make(self, manifest): return SqliteStore(new_path(), manifest)
        def reopen(self, store): return SqliteStore(store.path, store.manifest)
"""

# ruff: noqa: D102, S301  # the protocol documents what the methods give, and a file of pickles is for those who trust whoever wrote it

import pickle
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from tiny import QUESTIONS, model_folders

from lopd import Manifest, MemoryStore, ModelId, Rollout, SamplingParams, Scores, batches, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.errors import StoreWriteError
from lopd.records import Provenance, make_prompts


class SqliteStore:
    """A log of calls in one table: its first row is the manifest, each other one a call that was accepted."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as log:
            log.execute("CREATE TABLE IF NOT EXISTS calls (number INTEGER PRIMARY KEY, call BLOB)")
            log.execute("INSERT OR IGNORE INTO calls VALUES (0, ?)", [pickle.dumps(manifest)])
            self._replay(log)  # if another manifest is there, `collect_rollouts` raises

    def __repr__(self) -> str:
        return f"SqliteStore {self.path}"

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def manifest(self) -> Manifest:
        return self._rows.manifest

    @property
    def columns(self) -> Mapping[str, Provenance]:
        return self._rows.columns

    @property
    def generations(self) -> Mapping[int, ModelId]:
        return self._rows.generations

    def begin_generation(self, generation: int, policy: ModelId, /) -> None:
        self._write("begin_generation", generation, policy)

    def append(self, rollouts: Sequence[Rollout], /) -> None:
        self._write("append", list(rollouts))

    def append_scores(self, column: str, provenance: Provenance, scores: Sequence[Scores], /) -> None:
        self._write("append_scores", column, provenance, list(scores))

    def quarantine(self, column: str, provenance: Provenance, reasons: Mapping[str, str], /) -> None:
        self._write("quarantine", column, provenance, dict(reasons))

    def _connect(self) -> sqlite3.Connection:
        log = sqlite3.connect(self.path, isolation_level=None, timeout=60)
        log.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
        return log

    def _write(self, method: str, *values: object) -> None:
        with closing(self._connect()) as log:
            try:
                log.execute("BEGIN IMMEDIATE")  # one writer at a time; closing without COMMIT takes everything back
                self._catch_up(log)
                if values[-1]:  # nothing to add is checked, and not kept
                    log.execute("INSERT INTO calls VALUES (?, ?)", [self._seen, pickle.dumps((method, values))])
                getattr(self._rows, method)(*values)  # raises what the contract demands, before anything changes
                log.execute("COMMIT")
                self._seen += bool(values[-1])
            except sqlite3.Error as error:
                self._replay(log)
                raise StoreWriteError(f"{self!r}: writing failed with {error}, expected a file that can be written to.") from error

    def _replay(self, log: sqlite3.Connection) -> None:
        (manifest,) = log.execute("SELECT call FROM calls WHERE number = 0").fetchone()
        self._seen, self._rows = 1, MemoryStore(pickle.loads(manifest))
        # reading is MemoryStore's
        self.find, self.lengths, self.scored = self._rows.find, self._rows.lengths, self._rows.scored
        self.quarantined, self.read = self._rows.quarantined, self._rows.read
        self._catch_up(log)

    def _catch_up(self, log: sqlite3.Connection) -> None:
        for (call,) in log.execute("SELECT call FROM calls WHERE number >= ? ORDER BY number", [self._seen]):
            method, values = pickle.loads(call)
            getattr(self._rows, method)(*values)
            self._seen += 1


if __name__ == "__main__":
    student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own
    source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12))
    store = SqliteStore(Path("runs/07/store.sqlite"), source.manifest)
    collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), store, prompts_per_batch=4)
    score_rollouts(store, HFScorer.from_folder(teacher_dir))
    again = SqliteStore(store.path, source.manifest)
    print(f"{again!r} holds {len(again)} rollouts, {int(again.scored('teacher').sum())} of them scored by {again.columns['teacher'].model}")
    step = batches(again, rollouts_per_step=8, ref="behavior").step(0)
    print(f"a step of it has {sum(int(batch.segment_ids[-1]) + 1 for batch in step.batches)} rollouts")
