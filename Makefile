# Each target first makes .venv and installs what it needs, unless an environment with this checkout installed is active.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
ACTIVE := $(shell cd / && python -c "import sys, pathlib, workbench as w; pathlib.Path(w.__file__).relative_to('$(CURDIR)'); print(sys.executable)" 2>/dev/null)
BIN := $(if $(ACTIVE),$(dir $(ACTIVE)),.venv/bin/)
READY := $(if $(ACTIVE),,.venv/.ready)
WB := $(BIN)workbench

RECIPE ?= recipes/starter-ties.yaml
FULL ?=
FUZZ ?= 80
# What draws anew every day, and which tenth of the nightly tests runs: DAY=2026-12-02 repeats a day.
export WORKBENCH_DAY := $(or $(DAY),$(shell date -u +%F))
TODAY := --nightly tenth --hypothesis-seed $(subst -,,$(WORKBENCH_DAY))
MINUTES ?= 10
ROOM ?=
PYTEST := python -m pytest -n 2 --dist worksteal --durations=10 --durations-min=1
# A room's tests, and every file of tests that imports the room: what may fail when it changes.
TESTS = $(if $(ROOM),$(sort $(or $(wildcard tests/$(ROOM)),$(error ROOM=$(ROOM): there is no folder tests/$(ROOM))) $(shell grep -rlE "workbench\.$(subst /,.,$(ROOM))\b" tests --include='test_*.py')))
# The demo's recipes: three bricks of three skills, merged in two ways and routed. FULL=1 runs every recipe on all items.
DEMO := recipes/starter-task-arithmetic.yaml recipes/starter-ties.yaml recipes/starter-route.yaml
SUITES := $(if $(FULL),--suite starter --suite retention --suite facts --suite conflict,--suite smoke)
ITEMS := $(if $(FULL),$(wildcard recipes/*.yaml),$(DEMO))
REPORT := reports/$(if $(FULL),full,demo).html

.PHONY: help setup demo assistant test slow nightly fuzz faults mutants check run eval search report bricks data docs notebooks site bench gpu clean
help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv and install the workbench with all extras and its development tools

# Modules are compiled when they are first imported: most never are, and compiling all takes as long as installing them.
.venv/.ready: pyproject.toml constraints.txt
	@echo "setup   .venv (once)" && $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

bricks/starter/base/config.json: | $(READY)
	@$(WB) brick fetch starter

bricks/reverse-full/checkpoint/config.json: bricks/starter/base/config.json
	@$(WB) brick train reverse-full

demo: bricks/starter/base/config.json $(if $(FULL),bricks/reverse-full/checkpoint/config.json)  ## starter base, demo recipes scored, report written (FULL=1: every recipe, all items)
	@$(WB) eval $(ITEMS) $(SUITES)
	@$(WB) report $(ITEMS) $(SUITES) -o $(REPORT)

test: bricks/starter/base/config.json  ## run the tests: ROOM=merge those of one room and what depends on it, FULL=1 slow ones and today's tenth of the nightly ones, too
	@$(if $(FULL),WORKBENCH_FUZZ_EXAMPLES=8 WORKBENCH_FUZZ_RANDOM=1) $(BIN)$(PYTEST) $(if $(FULL),$(TODAY),-m "not slow") $(TESTS) $(ARGS)

slow: bricks/starter/base/config.json  ## run all but the nightly tests, and write the list of slow ones anew
	@$(BIN)$(PYTEST) --write-slow $(ARGS)

nightly: bricks/starter/base/config.json  ## run the nightly tests: simulations of error rates, every family, notebooks, faults, FUZZ examples of damaged files a test
	@WORKBENCH_FUZZ_EXAMPLES=$(FUZZ) $(BIN)$(PYTEST) -m nightly --nightly all $(ARGS)

fuzz: $(READY)  ## damaged files of every kind: FUZZ examples a command and ten times as many a reader, 258 x FUZZ in all
	@WORKBENCH_FUZZ_EXAMPLES=$(FUZZ) $(BIN)$(PYTEST) tests/fuzz --nightly all $(ARGS)

faults: $(READY)  ## fail each call of each command to the system in turn, which takes hours: WORKBENCH_FAULTS=N tries N a command; ARGS=--write
	@$(BIN)python benchmarks/faults.py $(ARGS)

mutants: $(READY)  ## mutation score of ten folders, or of ROOM (SINCE=commit: only changed lines; MINUTES=10)
	@$(BIN)python -c "import coverage, libcst, mutmut" 2>/dev/null || $(BIN)python -m pip install --quiet --disable-pip-version-check -c constraints.txt coverage libcst mutmut
	@$(BIN)python benchmarks/mutants.py $(if $(ROOM),--room $(ROOM)) $(if $(SINCE),--since $(SINCE)) --minutes $(MINUTES) $(ARGS)

check: $(READY)  ## lint, format, types, generated files
	@$(BIN)ruff check . && $(BIN)ruff format --check . && $(BIN)mypy && $(BIN)python docs/build.py --check && $(BIN)python docs/notebook_outputs.py --check && $(BIN)python evals/skills/build.py --check

run: bricks/starter/base/config.json  ## write the model of RECIPE
	@$(WB) run $(RECIPE)

eval: bricks/starter/base/config.json  ## score RECIPE and its controls
	@$(WB) eval $(RECIPE)

assistant: bricks/starter/base/config.json  ## six skills routed over a base with edited facts: scored, one skill added, one removed, scored again, served
	@$(BIN)python benchmarks/assistant.py $(ARGS)

search: bricks/starter/base/config.json  ## search the starter recipe: best weights of three skills
	@$(WB) search recipes/starter-search.yaml

report: bricks/starter/base/config.json  ## write the report of every scored recipe
	@$(WB) report

bricks: bricks/starter/base/config.json  ## train the starter bricks again
	@$(WB) brick train $(patsubst %/train.yaml,%,$(filter-out bricks/%-full/train.yaml,$(wildcard bricks/*/train.yaml)))

data: $(READY)  ## generate training and test items again
	@$(BIN)python evals/skills/build.py

docs: $(READY)  ## write the generated pages and README tables
	@$(BIN)python docs/build.py

notebooks: bricks/starter/base/config.json  ## run the notebooks and store what their cells show
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)python docs/notebook_outputs.py

site: $(READY)  ## build the documentation site in site/; a broken link is an error
	@$(BIN)python -m sphinx -W --keep-going -q -b html -c docs . site
	@echo "site    site/index.html"

bench: bricks/starter/base/config.json  ## measure the page on speed again, on an idle machine
	@$(BIN)python benchmarks/merge.py --size S --methods linear task_arithmetic slerp ties dare lora
	@for name in core_space edit_solve startup train eval search route; do $(BIN)python benchmarks/$$name.py || exit 1; done

gpu: bricks/starter/base/config.json  ## tests and benchmarks on a CUDA device, in under nine minutes; skipped with a line where there is none
	@$(BIN)python benchmarks/gpu.py $(ARGS)

clean:  ## remove runs, reports, the site and the cache (not the starter base, not .venv)
	@rm -rf runs reports site .workbench .mypy_cache .ruff_cache .pytest_cache
