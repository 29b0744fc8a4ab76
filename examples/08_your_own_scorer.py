"""A scorer of your own: two members, `provenance` and `score`.  Here two teachers at once, by the mean of their probabilities.

`score_rollouts` tests any scorer on a few rollouts before it pays for the rest: it must give a rollout the same scores alone and in a batch.
Test yours, clause by clause, with `lopd.testing.ScorerConformance`, as `tests/test_examples.py` tests this one.
"""

from collections.abc import Sequence

import numpy as np
from attrs import evolve, frozen
from tiny import QUESTIONS, model_folders

from lopd import ConsistencyPolicy, MemoryStore, SamplingParams, Scores, batches, collect_rollouts, score_rollouts, stored_advantages
from lopd.engines.hf import HFScorer, HFSource
from lopd.protocols import TeacherScorer
from lopd.records import ModelId, Provenance, Rollout, make_prompts


@frozen
class Ensemble:
    """log of the mean of two models' probabilities of each token.  Any two scorers of one vocabulary will do."""

    first: TeacherScorer
    second: TeacherScorer

    @property
    def provenance(self) -> Provenance:
        """Whose log-probs these are: a column belongs to one model, and another pair of models is another one."""
        revisions = sorted(scorer.provenance.model.revision for scorer in (self.first, self.second))
        mean = ModelId("mean of two", ", ".join(revisions), self.first.provenance.model.dtype)
        return evolve(self.first.provenance, model=mean, engine="ensemble of two, mean of probabilities", top_k=0)

    def score(self, rollouts: Sequence[Rollout], /) -> list[Scores]:
        """Return (T,) nats for each rollout; `Scores.of` checks length and range, and binds them to the rollout's tokens."""
        pairs = zip(rollouts, self.first.score(rollouts), self.second.score(rollouts), strict=True)
        # rounding would leave the mean of two certainties a little above 0
        return [Scores.of(rollout, np.minimum(np.logaddexp(one.logprobs, two.logprobs) - np.log(2), 0)) for rollout, one, two in pairs]


student_dir, *teacher_dirs = model_folders(teachers=2)  # replace these and QUESTIONS by your own
source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12, samples_per_prompt=4))
store = MemoryStore(source.manifest)
collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), store)
scorers = [HFScorer.from_folder(folder) for folder in teacher_dirs]
score_rollouts(store, Ensemble(*scorers))
for column, scorer in zip(("one", "two"), scorers, strict=True):
    score_rollouts(store, scorer, column=column)

for column in ("teacher", "one", "two"):
    print(f"{column:8} {store.columns[column].model}: mean advantage {stored_advantages(store, teacher=column).mean:+.3f} nats")

# The student was fine-tuned on text that one or the other wrote.  Their mean wrote none of it: `batches` asks us to confirm that we know.
steps = batches(store, rollouts_per_step=8, ref="behavior", consistency=ConsistencyPolicy.WARN)
print(f"a step learns from {steps.lineage.opd_teacher}")
