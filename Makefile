# make demo       ternarises a small FLUX model, paints with it in a real ComfyUI, writes output/demo.png
# make test       runs the whole test suite
# make test-fast  runs the tests that take no more than a second each, of every module
# make lint       checks style, format and types
#
# Each sets up what it needs on its first run: a virtual environment in .venv (or the active one, or PYTHON=...), torch,
# ComfyUI in .cache (or the one at COMFYUI_PATH), and Chromium with apt-get where there is no browser (or the one at CHROME).

ifdef VIRTUAL_ENV
PYTHON ?= $(VIRTUAL_ENV)/bin/python
else
PYTHON ?= .venv/bin/python
endif

PIP := $(PYTHON) -m pip install --disable-pip-version-check --progress-bar on
# An environment of the user's keeps its versions; our own gets the tested ones.
ifeq ($(PYTHON),.venv/bin/python)
PIP += --constraint tests/constraints.txt
endif

SETUP := .cache/setup$(subst /,-,$(PYTHON))

# A file's tests share fixtures, so each file stays with one of the two processes.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint setup
.DELETE_ON_ERROR:

setup: $(SETUP)

demo: $(SETUP)
	$(PYTHON) -m benchmarks.miniature.demo

test: $(SETUP)
	$(PYTEST)

test-fast: $(SETUP)
	$(PYTEST) -m "not slow and not server and not codegen"

# The type checker needs the folder under its package's name.
lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	mkdir -p .cache/types && ln -sfn ../.. .cache/types/ternary_flux
	$(PYTHON) -m mypy

$(SETUP): requirements.txt tests/requirements.txt tests/requirements-torch.txt tests/constraints.txt benchmarks/requirements.txt benchmarks/comfyui.py tests/chromium.py
	@test -x $(PYTHON) || (echo "creating .venv" && python3 -m venv .venv)
	@$(PYTHON) -c "import torch, torchvision, torchaudio" 2>/dev/null || $(PIP) --requirement tests/requirements-torch.txt
	comfyui=$$($(PYTHON) benchmarks/comfyui.py) && \
	$(PIP) --requirement $$comfyui/requirements.txt --requirement requirements.txt --requirement tests/requirements.txt \
		--requirement benchmarks/requirements.txt
	@$(PYTHON) tests/chromium.py
	@mkdir -p .cache && touch $@
