"""The same run on LanceDB: one line is another, and the tables can be queried, here for the responses that the teacher likes least."""

import numpy as np
from tiny import QUESTIONS, model_folders

from lopd import LanceStore, SamplingParams, batches, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.records import make_prompts

student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own
source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12))
store = LanceStore.open_or_create("runs/04/store.lance", source.manifest)  # instead of ZarrStore.open_or_create(...)
collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), store)
score_rollouts(store, HFScorer.from_folder(teacher_dir))

# LanceDB's own tables: one of rollouts, and one for each column of scores; `row` joins them.  They take queries and no writes, which are the
# store's alone, because each row carries checksums of its bytes.
rollouts, scores = store.table(), store.table("teacher")
print(f"columns of the scores: {', '.join(scores.schema.names)}")

# A filter that LanceDB runs, on the short columns alone: which responses were cut?
cut = rollouts.search().where("finish_reason = 'length'").select(["row", "rollout_id", "response_length"]).limit(1000).to_arrow()
print(f"{len(cut)} of {rollouts.count_rows()} responses were cut at {max(cut['response_length'].to_pylist(), default=0)} tokens")

# An id is UTF-8 in bytes.
first = rollouts.search().where("CAST(rollout_id AS STRING) LIKE '%/s0/g0'").limit(1000).to_arrow()
print(f"{len(first)} responses are the first of their prompt")

# A column fetched as a whole: which response does the teacher like least?
table = scores.search().select(["row", "logprobs"]).limit(1000).to_arrow()
mean_logprob = {row: float(np.mean(values)) for row, values in zip(table["row"].to_pylist(), table["logprobs"].to_pylist(), strict=True)}
least = min(mean_logprob, key=mean_logprob.__getitem__)
response = source.tokenizer.decode(store.read([least])[0].rollout.response_ids.tolist())
print(f"row {least} has {mean_logprob[least]:.2f} nats a token: {response!r}")

# Training reads the store as it reads any other.
step = batches(store, rollouts_per_step=8, ref="behavior").step(0)
print(f"a step has {sum(int(batch.segment_ids[-1]) + 1 for batch in step.batches)} rollouts")
