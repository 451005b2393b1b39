# Everything runs in .venv, made here on first use and reused. `make demo` and `make test` need Python and make only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# without an NVIDIA driver, a torch build without CUDA's gigabytes
CONSTRAINT := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)
# a file of tests stays in one process, in the order of their names: the long ones do not come last
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: install demo demo-real test test-integration test-next package docs linkcheck torture audit lint format clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sg_opd needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINT) --editable ".[dev]"
	touch $@

# one thread: models this small gain nothing from more, and lose much where something else takes the cores
demo: install
	OMP_NUM_THREADS=1 $(BIN)/python examples/arithmetic/demo.py

# a language model of 135 M parameters on word problems: downloads 93 MB, takes an hour on two cores. glibc keeps what
# is freed: giving it back and getting it again takes a fifth of the time
demo-real: install
	$(BIN)/python benchmarks/real/prepare.py
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 $(BIN)/python benchmarks/real/run.py --device cpu --minutes 55 --arms opd sg-opd --output runs/real/demo.json

# lint first: it takes a minute, and names what a test would only trip over. Without Chromium the tests of the gate view's page are skipped with the reason; SG_OPD_REQUIRE_CHROMIUM=1 makes that a failure
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not integration" $(PARALLEL)

# where vLLM cannot be installed its tests are skipped with the reason; SG_OPD_REQUIRE_VLLM=1 makes that a failure
test-integration: install
	PYTHON=$(PYTHON) bash tests/make_vllm_env.sh || echo "no vLLM environment: see the messages above"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m integration

# the newest TRL of the registry, in an environment of its own. The pin in pyproject.toml is ours alone: pip puts a newer
# TRL over the pinned one, with what that one needs, and only says that sg-opd asked for another
NEXT := .venv-next/bin/python
test-next:
	test -x $(NEXT) || $(PYTHON) -m venv .venv-next
	$(NEXT) -m pip install --quiet $(CONSTRAINT) --editable ".[dev]"
	$(NEXT) -m pip install --quiet $(CONSTRAINT) --upgrade trl
	$(NEXT) -c 'import transformers, trl; print("TRL", trl.__version__, "transformers", transformers.__version__)'
	OMP_NUM_THREADS=1 $(NEXT) -m pytest tests/project/test_package.py tests/test_trainer.py \
	    tests/training/test_losses.py tests/training/test_trl_settings.py $(PARALLEL)

# what is uploaded, in dist: built, checked, and installed into an empty environment, in which an example trains; then
# whether each extra, alone, can be installed
PACKAGE := .venv-package/bin/python
package:
	rm -rf dist .venv-package
	$(PYTHON) -m venv .venv-package
	$(PACKAGE) -m pip install --quiet build twine
	$(PACKAGE) -m build
	$(PACKAGE) -m twine check --strict dist/*
	$(PACKAGE) -m pip install --quiet $(CONSTRAINT) dist/*.whl
	OMP_NUM_THREADS=1 $(PACKAGE) examples/train.py --max_steps 2 --per_device_train_batch_size 8 --output_dir runs/package
	for extra in deepspeed vllm quantization plot tasks; do echo "extra $$extra"; \
	    $(PACKAGE) -m pip install --quiet --dry-run --ignore-installed $(CONSTRAINT) "$$(echo dist/*.whl)[$$extra]" || exit 1; done

# the pages as HTML, build/docs/index.html; a warning or a name without a target fails, as in the tests
docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -n -b html docs build/docs

# the links that leave the pages, which no test follows; needs the network
linkcheck: install
	$(BIN)/python -m sphinx -q -b linkcheck docs build/linkcheck

# random kills, a long run, hostile answers: under forty minutes on two quiet cores; writes benchmarks/results/torture.json
torture: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture.py

# advisories on what is installed (a local build's label, as in 2.9.0+cpu, is no part of a release's name); needs PyPI,
# and fails where one package could not be asked about
audit: install
	mkdir -p runs
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[A-Za-z0-9.]*$$//' > runs/audit.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement runs/audit.txt || { \
	    echo "make audit FAILED: either the advisories above hold, or, where a package 'could not be audited' or a" \
	         "connection failed, nothing was audited: this needs https://pypi.org."; exit 1; }

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-vllm .venv-next .venv-package runs build dist .pytest_cache .mypy_cache .ruff_cache
