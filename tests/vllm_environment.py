"""How vLLM runs in tests: quiet, without usage reports, on as many threads as OpenMP has, with a small cache.  Import it before vLLM."""

import os

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
