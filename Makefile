# A newcomer needs two commands: make demo, make test. Both set .venv up first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A smaller version of a benchmark: make bench-prune QUICK=--quick
QUICK ?=
# Which runtimes and readers come along; every runtime: make runtimes.
EXTRAS ?= onnxruntime,keras,transformers
PARALLEL := --numprocesses logical --maxprocesses 4 --dist worksteal
RUNTIMES := onnxruntime,openvino,litert,executorch,mnn,ncnn,coreml,ray

.PHONY: setup runtimes demo test test-full check bench bench-quantize bench-prune bench-train bench-fit bench-size bench-nets fashion clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS),dev]"
	touch $(STAMP)

# Every runtime there is and what scales out, some 2 GB; the one for browsers where npm is.
runtimes: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(RUNTIMES)]"
	@if command -v npm > /dev/null; then \
	  npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(VENV) onnxruntime-web@1.30.0; \
	else echo "no npm here: runtime onnxruntime-web is left out"; fi

demo: setup
	$(BIN)/featherweight demo --out demo --force

# One process a core, up to four, and one thread in each.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not network" $(PARALLEL)

test-full: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

check: setup
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow and not network" -x --quiet tests/test_formats.py tests/test_recipe.py tests/test_outcome.py

bench: runtimes
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/int8.py
	$(BIN)/python benchmarks/runtimes.py

# Quantization in depth beside the runtimes' own quantizers; some pictures are fetched by pip and apt.
bench-quantize: runtimes
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/quantize.py

# Pruned networks beside Torch-Pruning's, real networks pruned, factors; hours on two cores, and they go on.
bench-prune: runtimes fashion
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/prune.py $(QUICK)
	$(BIN)/python benchmarks/prune_real.py $(QUICK)
	$(BIN)/python benchmarks/low_rank.py $(QUICK)

# What training gives back: students, low bits, zeros.
bench-train: runtimes fashion
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/train.py $(QUICK)

# How small downloads get; hours on two cores, and it goes on.
bench-size: setup fashion
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/size.py $(QUICK)

# New networks: a supernet beside networks of their own, students, merged tasks, and robustness; hours, and it
# goes on.
bench-nets: runtimes fashion
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/supernet.py $(QUICK)
	$(BIN)/python benchmarks/student.py --seeds 0 1 2 $(QUICK)
	$(BIN)/python benchmarks/merge.py --seeds 0 1 2 --rate 0.1 $(QUICK)
	$(BIN)/python benchmarks/robustness.py $(QUICK)

# What fit chooses by itself, beside the runtimes' own quantizers (70 minutes); the search beside chance (hours),
# one worker beside two, and what is left of searches that are stopped.
bench-fit: runtimes fashion
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/search.py $(QUICK)
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/stopped.py

# The training set of Fashion-MNIST, from Debian's package.
fashion:
	@test -f /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz || apt-get install -y -qq dataset-fashion-mnist

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache .mypy_cache
