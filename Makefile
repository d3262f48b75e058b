# Each target creates .venv and installs what it needs: `make demo` and `make test` are the whole set-up of a machine that
# has Python 3.11 (with venv), gcc and pip. `make PYTHON=/path/to/python3.11 ...` picks another interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-exhaustive parity lint format bench bench-loss bench-step bench-data bench-checkpoint bench-convert bench-fp8 bench-demo plan-check cuda-check te-check clean

VENV := .venv
TE_VENV ?= $(VENV)-te
BIN := $(VENV)/bin
IS_PYTHON_311 := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3.11 python3 python; do $$p $(IS_PYTHON_311) && echo $$p && exit; done; echo python3.11)
CONSTRAINTS := .ci/constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint $(CONSTRAINTS)
# What the editable install depends on: requirements, and everything that is compiled into the extension.
INSTALL_INPUTS := setup.py pyproject.toml $(CONSTRAINTS) $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Two files at a time: most tests keep one core busy, and a job's ranks wait for one another.
SIDE_BY_SIDE := -n 2 --dist loadfile
# Architectures the CUDA sources must compile for; nvcc needs no GPU.
NVCC ?= $(shell command -v nvcc || echo $${CUDA_HOME:-/usr/local/cuda}/bin/nvcc)
CUDA_ARCHITECTURES := sm_80 sm_90a sm_100

help:
	@echo "make demo        data, teacher, student, evaluation and a report, in runs/demo"
	@echo "make test        every test that needs no GPU"
	@echo "make test-fast   unit and kernel tests, without the slow ones"
	@echo "make test-exhaustive  a hundred kills of a saving run, and every format's round trip at full size (five minutes)"
	@echo "make parity      20 steps of every layout, model and task beside a single process, as a table (six minutes)"
	@echo "make lint        ruff, mypy, codespell          make format   let ruff rewrite"
	@echo "make bench       the native operators beside plain PyTorch"
	@echo "make bench-loss  the contrastive loss beside open_clip's, on one process, two and four, and alone at 4 sizes (an hour)"
	@echo "make bench-step  a training step beside open_clip, plain PyTorch, and uncut captions; its parts (half an hour)"
	@echo "make bench-data  the loader beside webdataset and Pillow (two minutes)"
	@echo "make bench-checkpoint  what training waits for a save that is written beside it (two minutes)"
	@echo "make bench-convert  conversions of 10 GB beside cp (five minutes, 30 GB of disk)"
	@echo "make bench-fp8   the demo's chain in fp32, bf16 and emulated FP8 over three seeds (an hour and a half)"
	@echo "make bench-demo  the demo over three seeds with its controls (long)"
	@echo "make plan-check  the planner's memory beside fourteen CPU runs, at most 5 % off (three minutes)"
	@echo "make cuda-check  compile the CUDA kernels for $(CUDA_ARCHITECTURES) (needs nvcc, no GPU)"
	@echo "make te-check    hold the Transformer Engine backend to the real package, without a GPU (builds it once in $(TE_VENV),"
	@echo "                 twenty minutes; make te-check TE_VENV=... takes an environment that has it)"
	@echo "make clean       remove .venv and build output; runs/ and data/ stay"

demo: $(VENV)/.demo
	$(BIN)/megaeva demo

bench-demo: $(VENV)/.demo
	$(BIN)/megaeva demo --bench

test: $(VENV)/.test
	$(PYTEST) $(SIDE_BY_SIDE) -m "not gpu and not exhaustive"

test-fast: $(VENV)/.test
	$(PYTEST) $(SIDE_BY_SIDE) -m "not gpu and not slow and not exhaustive" tests/unit tests/kernels

test-exhaustive: $(VENV)/.test
	$(PYTEST) -m exhaustive

parity: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.parity.run_parity
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.parity.run_lamb

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megaeva
	$(BIN)/codespell

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.demo
	$(BIN)/megaeva bench normalize-pack

bench-loss: $(VENV)/.demo
	$(BIN)/megaeva bench loss --batch 16384 --dim 1024 --peer open_clip
	$(BIN)/megaeva bench loss --batch 16384 --dim 1024 --peer open_clip --precision bf16
	$(BIN)/megaeva bench loss --batch 8192 --dim 1024 --peer open_clip --ranks 2
	$(BIN)/megaeva bench loss --batch 8192 --dim 1024 --peer open_clip --ranks 4
	$(BIN)/megaeva bench loss --batch 16384 --batch 32768 --batch 65536 --batch 131072 --peer none --rounds 1

# L-14 and its peer need all of 24 GB; elsewhere give it a smaller --batch.
bench-step: $(VENV)/.demo
	$(BIN)/megaeva bench step --peer open_clip --precision bf16 --model EVA02-B-16
	$(BIN)/megaeva bench step --peer open_clip --precision bf16 --model ViT-B-16
	$(BIN)/megaeva bench step --peer open_clip --precision bf16 --model EVA02-L-14 --rounds 2
	$(BIN)/megaeva bench step --peer plain
	$(BIN)/megaeva bench step --peer padded
	$(BIN)/megaeva bench step --profile --precision bf16 --model EVA02-B-16 --batch 64 --rounds 5
	$(BIN)/megaeva bench step --profile --precision bf16 --model EVA02-B-16 --batch 64 --rounds 5 --optimizer lamb
	$(BIN)/megaeva bench step --profile --precision bf16 --model EVA02-L-14 --optimizer lamb --rounds 3

bench-data: $(VENV)/.test
	$(BIN)/megaeva bench data --peer webdataset

bench-checkpoint: $(VENV)/.demo
	$(BIN)/megaeva bench checkpoint

bench-convert: $(VENV)/.demo
	$(BIN)/megaeva bench convert

bench-fp8: $(VENV)/.demo
	test -f data/emoji/index.json || $(BIN)/megaeva data emoji data/emoji
	$(BIN)/megaeva bench fp8

plan-check: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/megaeva bench plan-check

cuda-check:
	@mkdir -p build/cuda-check
	@test -x "$(NVCC)" || { echo "cuda-check: SKIPPED, nothing compiled: no nvcc on PATH or under CUDA_HOME; install the CUDA toolkit 13." >&2; exit 0; }; \
	for source in csrc/*/*_cuda.cu; do for architecture in $(CUDA_ARCHITECTURES); do \
	  echo "nvcc $$architecture $$source"; \
	  $(NVCC) -std=c++20 -O3 -Werror all-warnings -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__ -arch=$$architecture -I csrc -c $$source \
	    -o build/cuda-check/$$(basename $$source .cu).$$architecture.o; done; done

te-check: $(VENV)/.test
	OMP_NUM_THREADS=1 tools/te_without_gpu.sh $(VENV) $(TE_VENV) python -m pytest tests/te_check

clean:
	rm -rf $(VENV) $(VENV)-te build dist *.egg-info megaeva/ops/*.so

# ------------------------------------------------------------------------------------------------------------ set-up

# torch comes first: the extension is compiled against it.
$(VENV)/.torch: $(CONSTRAINTS)
	@$(PYTHON) $(IS_PYTHON_311) || { echo "make: $(PYTHON) is not a Python 3.11; install one with venv and pip, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || echo "make: no C++ compiler; install gcc and g++ for the native operators (plain PyTorch runs without them)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) -m venv failed; install its venv module (Debian: apt install python3.11-venv)" >&2; exit 1; }
	@echo "make: installing torch into $(VENV) (about a minute)"
	@$(PIP_INSTALL) torch torchvision setuptools wheel ninja
	@touch $@

$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: $(VENV)/.torch $(INSTALL_INPUTS)
	@echo "make: installing megaeva[$*] into $(VENV), compiling csrc/"
	@$(PIP_INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@
