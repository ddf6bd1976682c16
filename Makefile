# codecssl: `make demo` shows it, `make test` proves it. Both install into .venv first. See README.md.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
AUDIO  ?=
DEMO   ?= demo
export DS_BUILD_OPS = 0
export DS_ACCELERATOR ?= cpu

.PHONY: install demo test check bench clean

install: $(VENV)/.installed

# editable, so that a change of the code needs no new install; `make install EDITABLE=` tests the regular one
EDITABLE ?= -e
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed; make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "setuptools<81" wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) ".[dev,lyra]"
	@touch $@

demo: install
	PATH="$(abspath $(BIN)):$$PATH" bash slurm/demo.sh "$(DEMO)" "$(AUDIO)"

test: install
	$(BIN)/python -m pytest

check: install .typecheck/codecssl
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p codecssl.tokenize -p codecssl.pretrain -p codecssl.superb -p codecssl.configs
	$(BIN)/python -m pytest

bench: install
	$(BIN)/codecssl-superb sample .bench/sample
	$(BIN)/codecssl-tokenize bench .bench/sample/audio --codec tiny_16khz

# mypy cannot see through the editable install; this link shows it the package
.typecheck/codecssl:
	mkdir -p .typecheck && ln -sfn .. $@

clean:
	rm -rf $(VENV) .typecheck build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .bench
