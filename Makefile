# Every target makes the virtual environment it needs. The interpreter's own torch is used if it has one.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*.cpp csrc/*/*.h)
FORMATTED := $(wildcard csrc/*/*.cpp csrc/*/*.h tests/native/*.cpp tests/native/*.h)

.DEFAULT_GOAL := help
.PHONY: help test bench demo lint format cpu-check clean

help:  ## show what each target does
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | column -t -s @

$(BIN)/python:
	@$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -qq $(TORCH) numpy

# Installed in place, with build isolation; built again where a source is newer.
$(VENV)/installed: $(BIN)/python $(SOURCES)
	@echo "installing kfac2 into $(VENV)"
	@$(BIN)/pip install -qq --disable-pip-version-check -e '.[test,lint]'
	@mkdir -p build
	@touch $@

test: $(VENV)/installed  ## run all tests (about 4 minutes on 2 cores)
	@$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) > build/native.log || (cat build/native.log; false)
	@$(BIN)/ninja -C build/native --quiet
	@$(BIN)/ctest --test-dir build/native --output-on-failure | tail -n 4
	@$(BIN)/pytest -n 2 --dist worksteal -p no:benchmark

bench: $(VENV)/installed  ## compare kernels with plain torch (pytest-benchmark)
	@$(BIN)/pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-sort=mean

demo: $(VENV)/installed  ## train two networks with SGD, Adam, one- and two-level K-FAC; draw demo.png
	@$(BIN)/python bench/demo.py $(ARGS)

lint: $(VENV)/installed  ## check formats, names, docstrings and types
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	@$(BIN)/mypy --no-error-summary

format: $(VENV)/installed  ## format all sources
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .
	@$(BIN)/clang-format -i $(FORMATTED)

clean:  ## delete what was built, and the environment
	@rm -rf $(VENV) build *.egg-info kfac2/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
