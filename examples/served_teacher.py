"""Score a store with a teacher that is served: phase 2 where the GPUs are elsewhere.

    vllm serve Qwen/Qwen3-32B --revision COMMIT --max-logprobs 20 --generation-config vllm       # on each machine
    python examples/served_teacher.py runs/rollouts.zarr http://gpu1:8000 http://gpu2:8000 \
        --model Qwen/Qwen3-32B --revision COMMIT --top-k 20

One URL or several: requests go to the least busy, a server that dies leaves its requests to the others and is used again when it is back, and
all must serve the same model with the same version.  Run it again to resume: what is committed stays.  A key is read from VLLM_API_KEY.
`--speaks sglang` or `--speaks openai` for SGLang or a hosted model, whose key is in SGLANG_API_KEY, OPENAI_API_KEY, or the variable of
`--key-variable`.
"""

import argparse

from lopd import ModelId, open_store, score_rollouts
from lopd.engines.hf import load_tokenizer
from lopd.engines.server import Servers, ServerScorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="path or URL of a store with rollouts in it")
    parser.add_argument("urls", nargs="+", help="servers of the teacher")
    parser.add_argument("--model", required=True, help="the name it is served under")
    parser.add_argument("--revision", required=True, help="which weights they are: a server does not report it, so a commit or a hash")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights in use there")
    parser.add_argument("--tokenizer", help="folder or hub name of its tokenizer; by default MODEL")
    parser.add_argument("--column", default="teacher")
    parser.add_argument("--top-k", type=int, default=0, help="keep so many of the most likely tokens, with the mass of all others")
    parser.add_argument("--speaks", choices=("vllm", "sglang", "openai"), default="vllm", help="what the servers are")
    parser.add_argument("--context", type=int, help="positions of a sequence, where a host does not report it")
    parser.add_argument("--key-variable", help="variable of the environment that holds the key")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.tokenizer or args.model)
    servers = Servers(args.urls, args.model, context=args.context, speaks=args.speaks, key_variable=args.key_variable)
    scorer = ServerScorer(servers, tokenizer, ModelId(args.model, args.revision, args.dtype), args.top_k)
    report = score_rollouts(open_store(args.store), scorer, column=args.column)
    print(f"{scorer.provenance.engine}: column {args.column!r} is complete; {report.floored} log-probs were -inf")
    print(servers.costs)


if __name__ == "__main__":
    main()
