"""A store in a bucket: the path is a URL, and nothing else changes.

    export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... AWS_REGION=...
    export AWS_ENDPOINT=http://localhost:9000 AWS_ALLOW_HTTP=true    # both, for MinIO and its like; neither, for AWS itself
    python examples/05_s3.py s3://bucket/run.zarr

Several machines may fill one store at once: each commit is all or nothing.  `gs://` and `az://` work likewise, and a plain path does too.
"""

import argparse

import torch
from tiny import QUESTIONS, model_folders

from lopd import CausalLMStudent, FusedOPDLoss, SamplingParams, ZarrStore, batches, collect_rollouts, opd_steps, score_rollouts
from lopd.engines.hf import HFScorer, HFSource, load_model
from lopd.records import make_prompts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("url", help="of the store: s3://bucket/run.zarr")
url = parser.parse_args().url

student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own

# Where the student's GPUs are.
source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12))
collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), ZarrStore.open_or_create(url, source.manifest))

# Where the teacher's are: another machine, which knows the URL and nothing else.
score_rollouts(ZarrStore.open(url), HFScorer.from_folder(teacher_dir))

# Where training happens.
store = ZarrStore.open(url)
model, tokenizer = load_model(student_dir, torch.float32)
student = CausalLMStudent(model, tokenizer)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
steps = batches(store, rollouts_per_step=8, ref="behavior")[:4]
for metrics in opd_steps(student, steps, FusedOPDLoss(ratio_to_ref=True), optimizer):
    print(f"step {metrics.step}: gap to the teacher {metrics.reverse_kl:+.3f}")
for commit in store.history():
    print(f"commit {commit.number}: {commit.rows} {commit.kind}, {commit.tokens} tokens")
