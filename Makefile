# make demo    train a small model from scratch, about 10 to 20 minutes on two CPU cores
# make test    every check: style, types, imports, documentation, tests
# make test-processors   numerically sensitive tests, emulating other processors, under 10 minutes
# make slow    the tests that take minutes
# make test-lm-eval   compare likelihoods and prompts with EleutherAI's lm-eval, in .venv-lm-eval
# make test-llama-cpp   exported GGUF files in llama.cpp, in .venv-llama-cpp (builds it: minutes)
# make test-compatibility   model directories and ONNX graphs in onnxruntime, transformers, trl and
#              MLX, in .venv-compatibility
# make gpu-report   tests and measurements on an NVIDIA GPU, under 10 minutes: benchmarks/gpu_report.py
# make docs    the documentation site, in site/
# make book    the same, after running the scripts of the book whose outputs are stale
# make format  fix the style and rewrite generated pages
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
READY := .venv/.ready

# Modules are compiled once, whatever the shell says: the tests start many processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test types style tests tests-avx2 test-processors slow test-lm-eval test-llama-cpp test-compatibility gpu-report docs book format

demo: $(INSTALLED)
	$(BIN)/minimind demo

# Side by side: tests that wait for processes leave a core to the others.
test: $(READY)
	$(MAKE) --jobs 4 style types tests tests-avx2

tests: $(READY)
	$(BIN)/pytest --numprocesses auto --dist worksteal

# As on another processor: the tests whose kernels depend on it most.
tests-avx2: $(READY)
	$(BIN)/python -m tests.processors avx2-1 \
	  --pytest "tests/inference tests/model tests/training/objectives"

types: $(READY)
	$(BIN)/mypy

style: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/python -m docs.build --check

test-processors: $(READY)
	$(BIN)/python -m tests.processors

slow: $(READY)
	$(BIN)/pytest -m slow --timeout 3600

test-lm-eval: .venv-lm-eval/.ready
	.venv-lm-eval/bin/pytest -m slow --timeout 3600 tests/evaluation/test_against_lm_eval.py

test-llama-cpp: .venv-llama-cpp/.ready
	.venv-llama-cpp/bin/pytest -m slow --timeout 3600 tests/export/test_against_llama_cpp.py

test-compatibility: .venv-compatibility/.ready
	.venv-compatibility/bin/pytest -m slow --timeout 3600 tests/compatibility \
	  tests/export/test_against_onnxruntime.py

gpu-report: $(READY)
	$(BIN)/python -m benchmarks.gpu_report $(ARGS)

docs: $(READY)
	$(BIN)/python -m docs.build

book: $(READY)
	$(BIN)/python -m docs.book
	$(BIN)/python -m docs.build

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python -m docs.reference

# The demo needs fewer packages than the checks. tools/install.py chooses the build of torch.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) tools/install.py
	@touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) tools/install.py docs lint test
	@touch $(INSTALLED) $@

.venv-lm-eval/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install --quiet --constraint constraints.txt \
	  --editable '.[test,lm-eval]'
	@touch $@

.venv-llama-cpp/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python -m pip install --quiet --constraint constraints.txt \
	  --editable '.[test,llama-cpp]'
	@touch $@

.venv-compatibility/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-compatibility
	.venv-compatibility/bin/python -m pip install --quiet --constraint constraints.txt \
	  --editable '.[test,compatibility]'
	@touch $@
