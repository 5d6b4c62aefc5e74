# Two commands matter: `make quickstart` and `make test`. Both set everything up and may be repeated.
VENV   := .venv
PYTHON := $(VENV)/bin/python
UV     := $(VENV)/bin/uv
BASE_PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell $(p) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1 && echo $(p))))
FLAVOUR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
DATA   := .cache/data
SEED   ?= 0
RECIPE := recipes/nano/grpo_long_audio.yaml

# pip's own link folder is handed on to uv; without one, the CPU build of torch has its own index
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
OVERRIDES := --override requirements/overrides.txt
ifeq ($(FLAVOUR),cpu)
  OVERRIDES += --override requirements/cpu-overrides.txt
  ifeq ($(PIP_FIND_LINKS),)
    INDEX := --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match
  endif
endif

.PHONY: setup data quickstart test lint lock clean help

help:
	@echo "make quickstart   set up, get data, train AF-Next-nano with GRPO, print a table"
	@echo "make test         set up and run all tests"
	@echo "make setup        create $(VENV) and install everything ($(FLAVOUR))"
	@echo "make lint         ruff, formatter, type checker"
	@echo "make lock         renew requirements/$(FLAVOUR).txt"

setup: $(VENV)/.installed-$(FLAVOUR)

$(VENV)/.installed-$(FLAVOUR): requirements/$(FLAVOUR).txt requirements/name_vllm.py pyproject.toml
	@test -n "$(BASE_PYTHON)" || { echo "error: python 3.11 or 3.12 is needed; install one or set BASE_PYTHON=/path/to/python3"; exit 1; }
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	test -x $(UV) || $(PYTHON) -m pip install --quiet uv
	$(UV) pip install --python $(PYTHON) $(INDEX) $(OVERRIDES) --no-deps -r requirements/$(FLAVOUR).txt
	$(UV) pip install --python $(PYTHON) --quiet --no-deps --editable .
	test $(FLAVOUR) = cuda || $(PYTHON) requirements/name_vllm.py
	@echo "compiling byte code once, so that workers start fast"
	@PYTHONDONTWRITEBYTECODE= $(PYTHON) -m compileall -q -j 0 $(VENV)/lib/python3*/site-packages >/dev/null 2>&1 || true
	@touch $@

data: setup
	$(PYTHON) -m data_recipes.quickstart --out $(DATA)

quickstart: setup data
	$(PYTHON) -m posttrain.quickstart $(RECIPE) --seed $(SEED)

test: setup
	$(PYTHON) -m pytest --cov=posttrain --cov=reward_models --cov=data_recipes --cov-report=term

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

lock:
	$(UV) pip compile pyproject.toml $(INDEX) --extra $(FLAVOUR) --extra dev --extra tracking $(OVERRIDES) \
	  --python-version 3.11 --no-emit-find-links --no-annotate -o requirements/$(FLAVOUR).txt

clean:
	rm -rf $(VENV) .cache build *.egg-info
