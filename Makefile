# Every target builds the environment it needs, in .venv, once; `make clean` removes all of it.
# Another Python has an environment of its own: `make test PYTHON=python3.13` makes .venv-3.13.
PYTHON ?= python3
ifeq ($(origin PYTHON),file)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN := $(VENV)/bin
# Eight CPU devices for the tests, set before JAX starts.
PYTEST = XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/python -m pytest
JOBS := --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# Many tests start processes: what Python compiles for one, the others read.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test quick lint bench peers extras docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/test.done
	$(BIN)/python examples/hyperclean_digits.py $(ARGS)

# Tests marked `compiler` take XLA as users do; the others compile in half the time. The two groups
# run side by side, so that no core waits for Ray, or for the last file; what the first one found is
# shown after the other.
test: $(VENV)/test.done
ifdef ARGS
	$(PYTEST) $(ARGS)
else
	@failed=0; set -x; \
	$(PYTEST) -m compiler >$(VENV)/compiler.txt 2>&1 & compiler=$$!; \
	trap 'kill $$compiler; exit 130' INT TERM; \
	QUICK_COMPILE=1 $(PYTEST) $(JOBS) -m "not compiler" || failed=1; \
	wait $$compiler || failed=1; cat $(VENV)/compiler.txt; \
	exit $$failed
endif

quick: $(VENV)/test.done
	QUICK_COMPILE=1 $(PYTEST) $(or $(ARGS),$(JOBS) -m "not slow")

lint: $(VENV)/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# One of benchmarks/ at a time, for they measure times: `make bench BENCH=sweep ARGS=--help`.
BENCH := step_cost
bench: $(VENV)/test.done
	$(BIN)/python benchmarks/$(BENCH).py $(ARGS)
	@echo "Others, by BENCH=…:" $(filter-out $(BENCH),$(patsubst benchmarks/%.py,%,$(sort $(shell grep -l __main__ benchmarks/*.py))))
	@echo "Against other libraries: make peers"

# The built wheel with each extra alone, in environments of their own.
extras:
	.ci/extras $(PYTHON) $(ARGS)

# Side by side with what people use today, each in an environment of its own below .venv-peers/.
peers: $(VENV)/test.done
	$(BIN)/python benchmarks/peers/compare.py $(ARGS)

# Into site/, with warnings as errors. The build needs no network, nor does a page that is opened.
docs: $(VENV)/docs.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "site/index.html"

clean:
	rm -rf .venv .venv-* build dist out site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gradhpo needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }

# One marker for each set of extras; older than pyproject.toml means: install again.
$(VENV)/%.done: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@
