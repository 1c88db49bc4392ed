# make demo | test | test-fast | test-instructions | check | bench | gpu | clean. Each sets itself up first,
# in .venv or .venv-gpu.
PYTHON ?= python3
CLUSTER ?= local
RUN_DIR ?= runs/demo
SLURM ?= 1
LONG ?= 0
BUT_LONG := $(if $(filter 0,$(LONG)), and not long)
BIN := .venv/bin
USER_STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
BENCH_STAMP := .venv/.installed-bench
GPU_BIN := .venv-gpu/bin
GPU_STAMP := .venv-gpu/.installed
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.PHONY: demo test test-fast test-instructions check bench gpu clean

demo: $(USER_STAMP)
	$(BIN)/python -m trak_dist.launch problem=mnist cluster=$(CLUSTER) run_dir=$(RUN_DIR) \
	  ground_truth.subsets=100 ground_truth.seeds=3

# A process of tests on each core: threads of their own would only wait for each other.
test test-fast test-instructions: export OMP_NUM_THREADS = 1

# LONG=1 adds the tests that take longest: before a release, and where what they test was changed.
# SLURM=0 leaves out the tests on a real Slurm, whose packages are else installed where that can be done.
test: check-code slurm-packages test-instructions
	$(BIN)/pytest -n auto -m "not slurm$(BUT_LONG)"
ifneq ($(SLURM),0)
	$(BIN)/pytest -n 2 -m "slurm$(BUT_LONG)"
endif

# The numbers' tests with the instructions of older processors: each rounds otherwise in the last bit.
SSE := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem DNNL_MAX_CPU_ISA=SSE41
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell DNNL_MAX_CPU_ISA=AVX2
NUMBERS := $(BIN)/pytest -n auto -m "not slow and not long" tests/ops tests/contracts/test_projectors.py

test-instructions: $(DEV_STAMP)
	$(SSE) $(NUMBERS)
ifneq ($(LONG),0)
	$(AVX2) $(NUMBERS)
endif

# What to run before a commit: the code's checks, and the tests that are fast.
check: check-code test-fast

test-fast: $(DEV_STAMP)
	$(BIN)/pytest -n auto -m "not slow and not slurm and not long"

.PHONY: check-code
check-code: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: slurm-packages
slurm-packages:
ifneq ($(SLURM),0)
	@command -v slurmctld >/dev/null || test -x /usr/sbin/slurmctld \
	  || if test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then launch/slurm-lab install; \
	  else echo "no Slurm here, and no way to install it: its tests will be skipped"; fi
endif

# What README.md says of speed; half an hour or more on one core, nothing else running.
bench: $(BENCH_STAMP)
	$(BIN)/python -W ignore benchmarks/bench.py bench.json

# The same numbers on a GPU as on the CPU, and the times there; PYTHON=… for a torch of yours.
# Its warnings are shown: torch says there what of a model it can't repeat bit by bit.
gpu: $(GPU_STAMP)
	TEST_DEVICE=cuda $(GPU_BIN)/python -m pytest -W default -m device \
	  tests/ops tests/contracts/test_projectors.py tests/e2e/test_runs_on_device.py
	$(GPU_BIN)/python -W ignore benchmarks/featurize.py --device cuda

$(GPU_STAMP): pyproject.toml constraints.txt .ci/gpu
	@.ci/gpu $(PYTHON)

$(DEV_STAMP): pyproject.toml constraints.txt $(USER_STAMP)
	$(INSTALL) '.[dev]'
	@touch $@

$(BENCH_STAMP): pyproject.toml constraints.txt $(USER_STAMP)
	$(INSTALL) '.[bench]'
	@touch $@

$(USER_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trak_dist needs Python 3.11 or later: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (torch is large: some minutes the first time)"
	@# Compiling all of torch takes as long as the rest; what of it is imported gets compiled then.
	$(INSTALL) . --no-compile
	@touch $@

clean:
	rm -rf .venv .venv-gpu build dist *.egg-info runs
