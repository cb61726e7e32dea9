# Every target makes the virtual environment it needs. The interpreter's own torch is used if it has one.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUDA_TORCH ?= torch==2.11.0
OUT ?= bench/results
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)
FORMATTED := $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h tests/native/*.cpp tests/native/*.h \
	tests/emulation/*.cpp tests/emulation/*.h)

.DEFAULT_GOAL := help
.PHONY: help test native emulated kernels bench demo deep-linear resnet grid coarse study quality memory figures cuda-build-check device-tests gpu-check roofline lint format clean

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

test: native $(VENV)/installed  ## run all tests (about 10 minutes on 2 cores)
	@$(BIN)/pytest -n 2 --dist worksteal -p no:benchmark

native: $(VENV)/installed  ## test the C++ kernels and the emulated CUDA kernels, under sanitizers
	@$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) > build/native.log \
		|| (cat build/native.log; false)
	@$(BIN)/ninja -C build/native --quiet
	@$(BIN)/ctest --test-dir build/native --output-on-failure > build/native.log || (cat build/native.log; false)
	@tail -n 3 build/native.log

emulated: $(VENV)/installed  ## run the tests for a device through Python and the bindings, on emulated CUDA kernels: ARGS="-k solves"
	@$(BIN)/python tests/emulation/run_tests.py $(ARGS)

kernels: $(BIN)/python  ## compile the CUDA kernels with nvcc for three architectures; print registers and spills
	@$(BIN)/python tests/native/compile_with_nvcc.py

bench: $(VENV)/installed  ## compare kernels and whole steps with the paper's way, plain torch and peers (20 minutes)
	@$(BIN)/python bench/report.py $(ARGS)

demo: $(VENV)/installed  ## train five networks with KFAC(model), nothing tuned, beside AdamW and SGD; draw demo.png
	@$(BIN)/python bench/demo.py $(ARGS)

deep-linear: $(VENV)/installed  ## the paper's figure 2, on the deep linear network; writes to build/results
	@$(BIN)/python bench/experiment.py deep-linear $(ARGS)

resnet: $(VENV)/installed  ## the paper's figure 3, on a ResNet: ARGS="--data cifar10 --folder DIR --layers 20"
	@$(BIN)/python bench/experiment.py resnet $(ARGS)

grid: $(VENV)/installed  ## the paper's grid search, for every optimizer alike: ARGS="resnet --layers 20"
	@$(BIN)/python bench/experiment.py --grid $(or $(ARGS),deep-linear)

coarse: $(VENV)/installed  ## where the gain of the second level comes from
	@$(BIN)/python bench/experiment.py coarse $(ARGS)

# SOAP is of an extra that is installed here only.
study: $(VENV)/installed  ## rivals over fifteen problems with an equal search (hours; goes on where stopped): ARGS="--jobs 2"
	@$(BIN)/python -c 'import pytorch_optimizer' 2>/dev/null || $(BIN)/pip install -qq pytorch_optimizer
	@$(BIN)/python bench/study.py $(ARGS)

quality: $(VENV)/installed  ## how good directions are: K-FAC, EKFAC, coarse spaces against the dense Fisher (12 minutes)
	@$(BIN)/python bench/quality.py $(ARGS)

memory: $(VENV)/installed  ## peaks of memory of SGD's and K-FAC's steps, in bytes of live tensors: ARGS="--batch 16"
	@$(BIN)/python bench/memory.py $(ARGS)

figures: $(VENV)/installed  ## draw figures and tables from bench/results/records, or ARGS="--out build/results"
	@$(BIN)/python bench/experiment.py figures $(ARGS)

cuda-build-check:  ## prove the CUDA build without a device: a venv with a CUDA torch, pip install ., the CPU tests
	@rm -rf .venv-cuda && $(PYTHON) -m venv .venv-cuda
	@.venv-cuda/bin/pip install -qq $(CUDA_TORCH) numpy
	@.venv-cuda/bin/pip install -qq '.[test]'
	@cd tests && ../.venv-cuda/bin/python -c 'import kfac2; i = kfac2.build_info(); print(i); assert i["cuda"]'
	@.venv-cuda/bin/pytest -n 2 -p no:benchmark -m 'not slow'

device-tests:  ## build the emulated tests for a CUDA device, without torch: build/device-tests/device_tests runs them
	@$(PYTHON) tests/emulation/build_device_tests.py

gpu-check:  ## on a machine with a CUDA device: build, test and measure there, 8 minutes; write the record to OUT
	@$(PYTHON) bench/gpu_check.py --out $(OUT) $(ARGS)

roofline: $(VENV)/installed  ## predict the time of each op on an H100 and an H200, beside a record: ARGS="--record FILE"
	@$(BIN)/python bench/roofline.py $(ARGS)

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
	@rm -rf $(VENV) .venv-cuda build *.egg-info kfac2/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
