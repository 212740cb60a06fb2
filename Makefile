# make reproduce   set up, run the first chapter on real text, print its claims
# make test        set up, run the whole suite
# Everything else is for contributors. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: reproduce test setup system export index docs lint

reproduce: $(READY)
	$(BIN)/lmlab run yoco --scale smoke

test: $(READY)
	$(BIN)/python -m pytest tests

setup: $(READY)

system:                 ## chromium and espeak-ng, for what needs them (apt-get, as root)
	.ci/system

$(READY): settings.ini setup.py .ci/constraints.txt $(wildcard kernels/*.cpp kernels/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lmlab needs Python 3.11 or newer; PYTHON=$(PYTHON) is" `$(PYTHON) -V`; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -U pip setuptools wheel
	$(BIN)/python -m pip install -q "`grep ^torch== .ci/constraints.txt`"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -c .ci/constraints.txt -e ".[dev,docs]"
	@touch $@

export: $(READY)        ## notebooks -> lmlab/
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/ruff format -q lmlab kernels tests setup.py
	$(BIN)/ruff check -q --fix --exit-zero lmlab kernels tests setup.py

index: $(READY)         ## front page, part pages and README.md, from the ledger as it stands
	$(BIN)/lmlab run $(patsubst nbs/%.ipynb,%,$(wildcard nbs/index.ipynb nbs/*/index.ipynb)) --save
	$(BIN)/python -c "from lmlab.core.site import write_readme; write_readme()"

docs: $(READY)          ## the site, into _docs/
	$(BIN)/lmlab docs

lint: $(READY)
	$(BIN)/ruff check lmlab kernels tests setup.py
	$(BIN)/ruff format --check lmlab kernels tests setup.py
