# In a fresh clone: `make demo` or `make test`. No other step is needed.
# Every target creates .venv and installs what it needs there once, pinned by constraints.txt;
# test-all also creates .venv-numpy.
#
#   make test PYTHON=python3.12 VENV=.venv312     another interpreter, in its own environment
#   make test ARGS="-k rounding"                  options for the command that is run
#   make test JOBS=0                              one process; the default is one per core
#
# Paths are relative and programs run as `python -m`, so a checkout may lie below a folder
# with spaces in its name.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= auto

PY := $(VENV)/bin/python
ALONE := $(VENV)-numpy
CUDA12 := $(VENV)-cuda12
BUILD := $(VENV)-build
# The toolkit that compiles a wheel's GPU kernels; they run with drivers for CUDA 12 and 13.
TOOLKIT := cuda-bindings==12.9.10 cuda-core==1.2.2 cuda-toolkit[nvcc,nvjitlink,nvrtc]==12.9.2.0 \
  numba-cuda==0.30.4 numba==0.68.1
# `--device cpu` needs no toolkit.
ASKED := $(patsubst --device=%,%,$(filter cpu gpu --device=cpu --device=gpu,$(ARGS)))
COMPILER := $(if $(filter-out cpu,$(or $(ASKED),gpu)),$(CUDA12),$(BUILD))
PYTEST := -m pytest -n $(JOBS) --dist worksteal --durations=25 --durations-min=1
# A stamp newer than these files means that the environment was installed from them.
PINS := pyproject.toml constraints.txt Makefile
SAY = @printf '\n==> %s\n'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two concurrent pips would break an environment.
.NOTPARALLEL:
.PHONY: help demo test test-all test-full bench bench-quick gpu-check compiled wheel wheel-cpu wheel-check docs lint format dev clean \
  ci-environment release-check

help:
	@echo "make demo         train a small model on real data, with and without its average"
	@echo "make test         the tests: PyTorch, NumPy, JAX, Keras; eight minutes on two cores"
	@echo "make test-all     the same, then slow tests, TensorFlow, NumPy alone; seventeen minutes"
	@echo "make test-full    every combination of test parameters; most of an hour"
	@echo "make bench-quick  the benchmarks in short, under three minutes"
	@echo "make bench        the benchmarks in full; fifty minutes"
	@echo "make gpu-check    on a machine with a CUDA GPU: build, test, benchmark; eight minutes"
	@echo "make compiled ARGS=\"--device cpu\"  CPU kernels for this checkout: no first update compiles; ten minutes"
	@echo "make wheel-cpu    wheel in dist/ for Linux on x86-64, with compiled kernels of CPUs alone; ten minutes"
	@echo "make wheel        sdist and wheel in dist/, with compiled kernels of CPUs and GPUs; twenty minutes"
	@echo "make wheel-check  a wheel with a few kernels, tried in an empty environment; a minute"
	@echo "make docs         the documentation as a site, in site/; half a minute"
	@echo "make lint         ruff check, ruff format --check, mypy"
	@echo "make release-check  all of it, then wheel and sdist in empty environments; an hour"
	@echo "make format       let ruff rewrite what it can"
	@echo "make dev          all of the tools in $(VENV), and the pre-commit hooks"
	@echo "make clean        remove $(VENV), $(ALONE), $(BUILD), $(CUDA12), caches and build products"

demo: $(VENV)/.demo
	$(SAY) "fastema demo $(ARGS)"
	@$(VENV)/bin/fastema demo $(ARGS)

test: $(VENV)/.test $(VENV)/.timm
	$(SAY) "pytest $(ARGS)"
	@$(PY) $(PYTEST) -m "not slow and not tensorflow" $(ARGS)

# Slow tests, TensorFlow, and an environment with NumPy alone. There, tests may skip what is missing,
# also in continuous integration (CI= unset).
test-all: test $(VENV)/.test-all $(ALONE)/.made
	$(SAY) "pytest, the slow tests"
	@$(PY) $(PYTEST) -m "slow and not tensorflow"
	$(SAY) "pytest, the tests that need TensorFlow"
	@$(PY) $(PYTEST) -m tensorflow
	$(SAY) "pytest with NumPy alone"
	@env -u CI $(ALONE)/bin/python $(PYTEST) tests/bridges tests/average tests/test_light_import.py

test-full: $(VENV)/.test-all $(VENV)/.timm
	$(SAY) "pytest --full $(ARGS)"
	@$(PY) $(PYTEST) --full -m "not tensorflow" $(ARGS)
	$(SAY) "pytest --full, the tests that need TensorFlow"
	@$(PY) $(PYTEST) --full -m tensorflow $(ARGS)

bench-quick: $(VENV)/.bench $(VENV)/.timm
	$(SAY) "python -m bench --quick $(ARGS)"
	@$(PY) -m bench --quick $(ARGS)

# The question about GPU kernels needs their compilers, which test-all installs.
bench: $(VENV)/.test-all $(VENV)/.timm
	$(SAY) "python -m bench all $(ARGS)"
	@$(PY) -m bench all $(ARGS)

# Uses the installed Python and packages: GPU machines come with a torch that fits their driver.
gpu-check:
	$(SAY) "python -m bench gpu $(ARGS)"
	@PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m bench gpu $(ARGS)

# Also useful in a checkout: `make compiled ARGS="--device cpu"`.
compiled: $(COMPILER)/.made
	$(SAY) "compiling kernels: fastema.engine.build_kernels $(ARGS)"
	@$(COMPILER)/bin/python -m fastema.engine.build_kernels $(ARGS)

# Runs in an empty folder: Python would import a `build` folder beside pyproject.toml as the tool.
wheel: compiled $(VENV)/.test
	$(SAY) "building the sdist and the wheel"
	@root="$$PWD"; cd "$$(mktemp -d)" && \
	  FASTEMA_RELEASE=1 "$(abspath $(PY))" -m build --no-isolation --outdir "$$root/dist" "$$root"

# A wheel for the platform that its kernels are for; GPU kernels are compiled at first use, by fastema[cuda].
wheel-cpu: $(BUILD)/.made
	$(SAY) "compiling the kernels of processors"
	@$(BUILD)/bin/python -m fastema.engine.build_kernels --device cpu $(ARGS)
	$(SAY) "building the wheel"
	@root="$$PWD"; cd "$$(mktemp -d)" && \
	  FASTEMA_RELEASE=cpu "$(abspath $(BUILD))/bin/python" -m build --wheel --no-isolation --outdir "$$root/dist" "$$root"

# Kernels that a wheel's first update needs; `make release-check` compiles and tries them all.
wheel-check: $(VENV)/.test
	$(SAY) ".ci/wheel_check"
	@.ci/wheel_check $(PY)

# Dead links and anchors are errors. Nothing is downloaded to build or read the site.
docs: $(VENV)/.docs
	$(SAY) "mkdocs build --strict"
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet && echo "site/index.html"

lint: $(VENV)/.dev
	$(SAY) "ruff check"
	@$(PY) -m ruff check .
	$(SAY) "ruff format --check"
	@$(PY) -m ruff format --check .
	$(SAY) "mypy (half a minute where there is no cache yet)"
	@$(PY) -m mypy
	$(SAY) "mypy --strict of what users write"
	@$(PY) -m mypy --strict tests/typing/user_code.py

# All tests and benchmarks, the site, the linters, the wheel with all kernels, and the built artifacts
# in empty environments of every installed Python.
release-check: test-all bench-quick docs lint wheel
	$(SAY) ".ci/release_check dist"
	@.ci/release_check dist

format: $(VENV)/.dev
	$(SAY) "ruff check --fix, ruff format"
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

dev: $(VENV)/.dev
	$(SAY) "pre-commit install"
	@$(PY) -m pre_commit install

# The first step of .ci/run.
ci-environment: $(VENV)/.ci

clean:
	$(SAY) "removing $(VENV), $(ALONE), $(BUILD), $(CUDA12), caches and build products"
	@rm -rf $(VENV) $(ALONE) $(BUILD) $(CUDA12) fastema/compiled build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/.made:
	$(SAY) "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment: install its venv module" \
	       "(python3-venv on Debian), or name another one: make PYTHON=python3.12"; exit 1; }
	@touch "$@"

# Some tests compare with the peers of the benchmarks.
$(VENV)/.test: EXTRAS = test,bench

$(ALONE)/.made: $(PINS)
	$(SAY) "making $(ALONE), with what fastema itself depends on"
	@$(PYTHON) -m venv $(ALONE)
	@$(ALONE)/bin/python -m pip install -c constraints.txt -e . hypothesis pytest pytest-xdist
	@touch "$@"

$(BUILD)/.made: $(PINS)
	$(SAY) "making $(BUILD), with the compilers of CPU kernels and wheels"
	@$(PYTHON) -m venv $(BUILD)
	@$(BUILD)/bin/python -m pip install -c constraints.txt -e . build hatchling
	@touch "$@"

$(CUDA12)/.made: Makefile pyproject.toml
	$(SAY) "making $(CUDA12), with the compilers of CUDA 12.9"
	@$(PYTHON) -m venv $(CUDA12)
	@$(CUDA12)/bin/python -m pip install -e . $(TOOLKIT)
	@touch "$@"

# What continuous integration needs, at once: each pip on its own would resolve and build again.
$(VENV)/.ci: $(PINS) | $(VENV)/.made
	$(SAY) "installing fastema[test-all,docs,dev] into $(VENV), pinned by constraints.txt"
	@$(PY) -m pip install -c constraints.txt -e ".[test-all,docs,dev]"
	@touch $(addprefix $(VENV)/.,demo test test-all bench docs dev ci)

$(VENV)/.demo $(VENV)/.test $(VENV)/.test-all $(VENV)/.bench $(VENV)/.docs $(VENV)/.dev: $(VENV)/.%: $(PINS) | $(VENV)/.made
	$(SAY) "installing fastema[$(or $(EXTRAS),$*)] into $(VENV), pinned by constraints.txt"
	@$(PY) -m pip install -c constraints.txt -e ".[$(or $(EXTRAS),$*)]"
	@touch "$@"

# timm requires torchvision, which its averages do not use; a torchvision built for another torch breaks
# the import of diffusers. So timm is installed without dependencies, and last, to keep pip quiet.
$(VENV)/.timm: constraints.txt | $(VENV)/.made
	$(SAY) "installing timm without its dependencies"
	@$(PY) -m pip install -c constraints.txt --no-deps timm
	@touch "$@"
