# codecssl: `make demo` shows it, `make test` proves it. Both install into .venv first. See README.md.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
AUDIO  ?=
DEMO   ?= demo
export DS_BUILD_OPS = 0
export DS_ACCELERATOR ?= cpu
# threads that wait must sleep: spinning ones take the cores of a machine that others use too
export OMP_WAIT_POLICY ?= passive

.PHONY: install demo test check gpu bench clean

install: $(VENV)/.installed

# editable, so that a change of the code needs no new install; `make install EDITABLE=` tests the regular one
EDITABLE ?= -e
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python 3.10 or newer is needed; make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-warn-script-location --disable-pip-version-check -c constraints.txt "setuptools<81" wheel
	$(BIN)/python -m pip install --quiet --no-warn-script-location --disable-pip-version-check -c constraints.txt $(EDITABLE) ".[dev,lyra,snac]"
	@touch $@

# The whole chain, each line a command that a user would type; run again, it resumes where it stopped. Where an encoder
# ships with codecssl, the short run continues from it, and both stand in the table next to the baselines.
STEPS ?= $(if $(SHIPPED),60,120)
TASKS ?= ks,sid,er,ic,pr,sound
BUDGET ?= demo
SHIPPED ?= $(if $(wildcard pretrain/weights/laptop_16khz/config.json),laptop_16khz)
RECIPE ?= $(if $(SHIPPED),clusters_laptop --data.labels $(DEMO)/labels --optim.start_from $(SHIPPED) --optim.lr 2e-4,encodecmae_tiny)
demo: install
	$(BIN)/codecssl-superb sample $(DEMO)/sample
	$(BIN)/codecssl-tokenize run $(or $(AUDIO),$(DEMO)/sample/pretrain.jsonl) --output $(DEMO)/shards --codec tiny_16khz \
		--with-mel 80
	$(BIN)/codecssl-pretrain label mfcc --cmvn --clusters 200 --data $(DEMO)/shards --output $(DEMO)/labels
	$(BIN)/codecssl-pretrain run $(RECIPE) --data $(DEMO)/shards --output $(DEMO)/run --optim.steps $(STEPS)
	$(BIN)/codecssl-pretrain export $(DEMO)/run --output $(DEMO)/model
	$(BIN)/codecssl-superb run $(addprefix --upstream ,$(SHIPPED)) --upstream $(DEMO)/model --upstream fbank \
		--upstream codes --upstream random --tasks $(TASKS) --data $(DEMO)/sample --budget $(BUDGET) --jobs 2 \
		--output $(DEMO)/superb

test: install
	$(BIN)/python -m pytest

check: install .typecheck/codecssl
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p codecssl.tokenize -p codecssl.pretrain -p codecssl.superb -p codecssl.configs -p codecssl.slurm
	$(BIN)/python -m pytest

# Checks and measurements on one GPU: gpu/gpu.json and gpu/gpu.md. DEVICE=cpu runs the same code at tiny sizes.
DEVICE ?= cuda
gpu: export DS_ACCELERATOR = $(DEVICE)
gpu: install
	$(BIN)/python tests/gpu/gpu_checks.py --output gpu --device $(DEVICE) $(if $(filter cpu,$(DEVICE)),--tiny)

bench: install
	$(BIN)/codecssl-superb sample .bench/sample
	$(BIN)/codecssl-tokenize bench .bench/sample --codec tiny_16khz

# mypy cannot see through the editable install; this link shows it the package
.typecheck/codecssl:
	mkdir -p .typecheck && ln -sfn .. $@

clean:
	rm -rf $(VENV) .typecheck build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .bench
