# Quiver: every target sets up what it needs by itself (Python 3.11+, make and g++ are enough).
export PYTHONSAFEPATH = 1
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyPI's newer torch builds for Linux bring gigabytes of CUDA libraries; this one runs on the CPU.
TORCH ?= torch==2.13.0
# Two processes with two computing threads each would stand in each other's way.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile
# The demo's base: a Llama, or with BASE=t5 a T5.
BASE ?= llama
ifneq ($(filter $(BASE),llama t5),$(BASE))
$(error BASE is $(BASE); it must be llama or t5)
endif
MINUTES ?= 30
SUFFIX := $(if $(filter t5,$(BASE)),-t5)

.PHONY: help setup demo serve test test-fast test-deploy reliability soak lint bench bench-train bench-peers lock proto \
  proto-released demo-base clean

help:  ## What can be done here.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	@(cat .ci/constraints.txt; echo "$(TORCH)") > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --progress-bar off $(TORCH)
	$(BIN)/pip install --quiet --progress-bar off --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

setup: $(VENV)/.ready  ## Make .venv with everything in it (about two minutes, mostly downloads).

demo: setup  ## Train four adapters, serve them mixed, watch (about three minutes; the second time half a minute).
	$(BIN)/python -m quiver_demo.run_demo --base $(BASE)

serve: setup  ## Leave a server with the demo's adapters running on port 50051 (run `make demo` first).
	$(BIN)/quiver serve --base trainer/demo/base$(SUFFIX) --adapters runs/demo$(SUFFIX)/adapters

lint: setup  ## Formatting, types, import arrows, the wire contract.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against proto/released.binpb

test: lint  ## Everything that CI runs: lint and all tests, a file to a core.
	$(PYTEST)

test-fast: setup  ## Unit tests only: a minute or two.
	$(PYTEST) -m 'not slow'

reliability: setup  ## Of the tests, those of tests/reliability in full size (about half an hour).
	QUIVER_RELIABILITY=full OMP_NUM_THREADS=1 $(BIN)/pytest -s tests/reliability

soak: setup  ## Everything at once against an oracle, for MINUTES=30; figures and a picture to runs/soak.*
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -W ignore -m reliability.soak --minutes $(MINUTES)

test-deploy: setup  ## Of the tests, those of the chart: helm, Envoy and, where there is one, podman.
	$(BIN)/pytest tests/helm

bench: setup  ## Measure the server over gRPC against the machine's limits (about 9 minutes; BENCH="--help" has more).
	PYTHONPATH=tests $(BIN)/python -m bench.grid $(BENCH)

bench-train: setup  ## Measure training against Hugging Face Trainer with PEFT, and many adapters at once (about 4 minutes).
	PYTHONPATH=tests $(BIN)/python -m bench.training $(BENCH)

bench-peers: setup  ## Measure it against vLLM, OpenVINO and Hugging Face in turns (installs them first; BENCH="--help").
	PYTHONPATH=tests $(BIN)/python -m bench.against $(BENCH)

# A GPU machine brings its torch with CUDA, in PYTHON; where it does not: make gpu TORCH=torch==2.13.0
.venv-gpu/.ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	$(if $(filter file,$(origin TORCH)),,.venv-gpu/bin/pip install --quiet --progress-bar off $(TORCH))
	@grep -v '^triton==' .ci/constraints.txt > .venv-gpu/constraints.txt # torch knows which Triton it needs
	@.venv-gpu/bin/python -c 'import torch; print("torch==" + torch.__version__)' >> .venv-gpu/constraints.txt
	.venv-gpu/bin/pip install --quiet --progress-bar off --constraint .venv-gpu/constraints.txt --editable '.[dev]'
	@touch $@

gpu: .venv-gpu/.ready  ## On a GPU machine: the tests that need one and a benchmark, to runs/gpu.json (under nine minutes).
	PYTHONPATH=tests .venv-gpu/bin/python -m bench.gpu --out runs/gpu.json

gpu-train: .venv-gpu/.ready  ## On a machine with GPUs: training over all of them, layout by layout, to runs/gpu-train.json.
	PYTHONPATH=tests .venv-gpu/bin/python -m bench.gpu_train

lock:  ## Take the newest versions of what Quiver stands on, and write them to .ci/constraints.txt (then `make test`).
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@echo "$(TORCH)" > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --progress-bar off $(TORCH)
	$(BIN)/pip install --quiet --progress-bar off --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@head -1 .ci/constraints.txt > $(VENV)/lock.txt
	@$(BIN)/pip freeze --exclude-editable | grep -v '^torch==' >> $(VENV)/lock.txt
	@mv $(VENV)/lock.txt .ci/constraints.txt
	@touch $(VENV)/.ready

proto: setup  ## Regenerate the committed gRPC stubs.
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --grpc_python_out=proto \
	  --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto proto/quiver/v1/*.proto

proto-released: setup  ## After a release: its wire is what `make lint` holds later changes against.
	$(BIN)/buf build --exclude-source-info --output proto/released.binpb

demo-base: setup  ## Make the bundled demo base from nothing (about half an hour; the repository holds the result).
	$(BIN)/python -m quiver_demo.pretrain.$(if $(filter t5,$(BASE)),t5,gpt) trainer/demo/base$(SUFFIX)

clean:  ## Remove the virtual environment and all that was made.
	rm -rf $(VENV) .venv-gpu runs
