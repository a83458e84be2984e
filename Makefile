# Everything runs in .venv, which is set up once and again when pyproject.toml or constraints.txt change.

# The first Python on the path that is new enough.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# Further arguments for pytest: make test ARGS="-k messages".
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# One thread for each of pytest's two processes: threads that outnumber the cores only fight. What is imported is
# compiled once, not in each process that a test starts, even where Python is told to keep nothing.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist worksteal

# Stand in for other CPUs than this one: how far torch, MKL and oneDNN may go.
OTHER_CPUS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
	MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2

# Runs the tests of some marks, with a setting if one is named, and says how long that took.
define job
@echo "--- $(strip $(1) $(2))"; began=$$(date +%s); env $(2) $(PYTEST) -m "$(1)" $(ARGS); code=$$?; \
	echo "--- $(strip $(1) $(2)): $$(($$(date +%s) - began)) s"; exit $$code

endef

# An environment of its own for clients, which looks into the main one for torch and transformers.
CLIENTS := .venv-clients
CLIENTS_INSTALLED := $(CLIENTS)/.installed

# Likewise for the systems that lambda-split is measured beside.
PEERS := .venv-peers
PEERS_INSTALLED := $(PEERS)/.installed

.PHONY: help demo demo-image test test-long test-nightly test-clients bench-peers lint clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# The stamp is written last, so that an interrupted set-up is taken up again. torch comes first and from its
# constraint alone: a build made for this machine (say 2.13.0+cpu) then counts as that version.
$(INSTALLED): pyproject.toml constraints.txt
	@rm -f $@
	@test -n "$(PYTHON)" || { echo "lambda-split needs Python 3.11 or newer" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## Split a small model between this process and a worker, over an encrypted queue.
	$(BIN)/lambda-split demo

demo-image: $(INSTALLED) ## Make a sheet of images by a small diffusion model that is split in the same way.
	$(BIN)/lambda-split demo --image

test: $(INSTALLED) ## Run the tests; pass pytest's arguments as ARGS="...".
	$(PYTEST) -m "not long and not nightly" $(ARGS)

test-long: $(INSTALLED) ## Run the longer tests, and those that compare numbers as on other CPUs.
	$(call job,long and not nightly,)
	$(foreach cpu,$(OTHER_CPUS),$(call job,numbers and not long and not nightly,$(cpu)))

test-nightly: $(INSTALLED) ## Run what takes too long for every change.
	$(call job,nightly,)

# instructor comes last and alone: it asks for an older jiter than openai does. npm is not on every machine.
$(CLIENTS_INSTALLED): tests/clients/requirements.txt $(INSTALLED)
	@rm -f $@
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet -r $<
	$(CLIENTS)/bin/pip install --quiet --no-deps instructor
	$(BIN)/python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1]); print(pathlib.Path("common").resolve())' \
		> "$$($(CLIENTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	-npm install --silent --no-audit --no-fund --prefix $(CLIENTS) @openai/codex
	@touch $@

test-clients: $(CLIENTS_INSTALLED) ## Let released clients ask a server: openai, anthropic, LangChain, lm-eval, Codex and others.
	$(CLIENTS)/bin/pytest -c tests/clients/pytest.ini --confcutdir=tests/clients tests/clients $(ARGS)

# What pip finds in the main environment, torch above all, it does not fetch. llama.cpp is built, without what only its
# own programs use, and its source is kept for the converter. What cannot be installed, the benchmark names; `make clean`
# has it tried again.
$(PEERS_INSTALLED): benchmarks/systems/requirements.txt $(INSTALLED)
	@rm -rf $(PEERS)
	$(PYTHON) -m venv $(PEERS)
	$(BIN)/python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
		> "$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	-for released in $$(grep '^[a-z]' $< | grep -v '^llama'); do $(PEERS)/bin/pip install --quiet --no-warn-conflicts $$released; done
	-$(PEERS)/bin/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(PEERS)/source "$$(grep '^llama' $<)" && \
		tar xzf $(PEERS)/source/*.tar.gz --strip-components 1 -C $(PEERS)/source && \
		sed -i 's/LLAMA_BUILD_COMMON ON/LLAMA_BUILD_COMMON OFF/' $(PEERS)/source/CMakeLists.txt && \
		CMAKE_ARGS=-DLLAVA_BUILD=OFF nice $(PEERS)/bin/pip install --quiet $(PEERS)/source
	@touch $@

bench-peers: $(PEERS_INSTALLED) ## Measure beside CTranslate2, llama.cpp and Language Pipes.
	$(BIN)/python -m benchmarks.peers $(ARGS)

lint: $(INSTALLED) ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove the virtual environment and all caches.
	rm -rf $(VENV) $(CLIENTS) $(PEERS) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
