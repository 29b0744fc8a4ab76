"""A teacher behind a URL: the scorer asks a server, and everything else stays.

The server is `stub_server.py` on this machine, so that this page runs without vLLM, a host or a key.  With a real one, start it yourself and put its
URL and the name of its model in place of the stub's; docs/howto/served-teachers.md has the kinds of servers.
"""

from threading import Thread

from stub_server import StubServer
from tiny import QUESTIONS, model_folders

from lopd import MemoryStore, SamplingParams, collect_rollouts, score_rollouts
from lopd.engines.hf import HFScorer, HFSource
from lopd.engines.identity import folder_model_id
from lopd.engines.server import Servers, ServerScorer
from lopd.records import make_prompts
from lopd.tools.doctor import compare_columns

student_dir, teacher_dir = model_folders()  # replace these and QUESTIONS by your own
source = HFSource.from_folder(student_dir, SamplingParams(max_new_tokens=12))
store = MemoryStore(source.manifest)
collect_rollouts(source, make_prompts(QUESTIONS, source.tokenizer), store)

served = StubServer(teacher_dir)
Thread(target=served.serve_forever, daemon=True).start()

# A server does not report which weights it has.  The folder that it serves does, so `batches` can compare it with the teacher of SFT.
teacher = folder_model_id(teacher_dir)
for column, speaks in (("teacher", "vllm"), ("hosted", "openai")):
    servers = Servers(served.url, served.name, speaks=speaks)
    scorer = ServerScorer(servers, source.tokenizer, teacher, top_k=4)
    score_rollouts(store, scorer, column=column)
    print(f"{column}: {scorer.provenance.engine}, {servers.costs.requests} requests, {servers.costs.prompt_tokens} tokens read")
served.shutdown()
served.server_close()

score_rollouts(store, HFScorer.from_folder(teacher_dir), column="here")
for column in ("teacher", "hosted"):
    print(f"{column}: at most {compare_columns(store, store, column, 'here').max:.0e} nats from the same weights in this process")
