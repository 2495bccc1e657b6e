# `make demo` and `make test` each work on a fresh clone: they need Python 3.10 or newer and make, nothing else.

PORT   ?= 7860
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV   := .venv
# Page and wheel need no torch: where the full environment is not there, they have a small one of their own.
LIGHT  := .venv-light
DEMO   := $(if $(wildcard $(VENV)/.installed),$(VENV),$(LIGHT))
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Extra flags for one run, for example `make test PYTEST="-k vocabulary -x"`.
PYTEST ?=

.DELETE_ON_ERROR:
.PHONY: help demo wheel test test-all fuzz lint format weights weights-photo photos-named bench doctor setup setup-dev lock clean

help:
	@echo "make demo      serve the page on http://127.0.0.1:$(PORT) (PORT= to change); sets up without torch"
	@echo "make test      set up, lint, types, and all tests but the long ones"
	@echo "make test-all  the same with the long ones"
	@echo "make fuzz      give damaged files to the readers, 50,000 to nine tests (FUZZ_EXAMPLES= to change)"
	@echo "make lint      ruff and mypy"
	@echo "make weights-photo PHOTOS=FOLDER   weights of photographs from photos of your own, stage by stage"
	@echo "make weights   rebuild the sticker weights from nothing; stops and resumes at any point"
	@echo "make bench     run the benchmarks and print their tables"
	@echo "make wheel     dist/wordbox-*.whl: page, predict and label without torch"
	@echo "make doctor    say what is installed and what is wrong"
	@echo "make lock      write the lock files again from pyproject.toml (needs uv)"
	@echo "make clean     remove .venv, .venv-light, caches and build folders"

demo: $(DEMO)/.installed
	$(DEMO)/bin/python app.py --port $(PORT)

test: lint
	$(BIN)/python -m pytest $(PYTEST)

test-all: lint
	$(BIN)/python -m pytest -m "" $(PYTEST)

FUZZ_EXAMPLES ?= 5560
fuzz: setup-dev
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/fuzz --timeout 0 $(PYTEST)

lint: setup-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

format: setup-dev
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

weights: $(VENV)/.installed-rebuild
	$(BIN)/python scripts/make_weights.py

PICODET ?= picodet/model.pdmodel
weights-photo: photos-named $(VENV)/.installed-rebuild
	$(BIN)/python scripts/make_photo_weights.py "$(PHOTOS)" --picodet "$(PICODET)"

photos-named:
	@test -d "$(PHOTOS)" || { echo "error: name the folder of your photos: make weights-photo PHOTOS=FOLDER ('$(PHOTOS)' is none)" >&2; exit 2; }

bench: setup-dev
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit $$?; done

wheel: $(DEMO)/.installed
	$(DEMO)/bin/python scripts/build_wheel.py

doctor: setup
	$(BIN)/python -m ovd.doctor

lock:
	$(PYTHON) scripts/lock.py

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

# Each stamp is younger than the files it was made from; a changed lock file installs again, anything else is quick.
$(VENV)/.python $(LIGHT)/.python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 or newer found; install one, or run make PYTHON=/path/to/python3" >&2; exit 2; }
	@"$(PYTHON)" -m venv --clear $(@D) || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@touch $@

# Every file must have a hash of the lock file, and what builds the three packages that have no wheel is a locked file
# too: without --no-build-isolation pip would fetch the newest setuptools for it, unchecked.
LOCKED := PIP_USE_PEP517=1 $(PIP) install --require-hashes --no-build-isolation

$(VENV)/.installed: $(VENV)/.python requirements.lock pyproject.toml ovd/build_detectron2.py
	grep '^setuptools==' requirements.lock > $(VENV)/setuptools.lock
	$(LOCKED) --no-deps -r $(VENV)/setuptools.lock
	$(LOCKED) -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --quiet --editable .
	$(BIN)/python -m ovd.build_detectron2
	@touch $@

# The graphs of the default detector are put together from its weights, which takes a second.
$(LIGHT)/.installed: $(LIGHT)/.python requirements-light.lock pyproject.toml weights/vild-photo-graphs.zip
	$(LIGHT)/bin/python -m pip --disable-pip-version-check --no-input install --require-hashes --no-deps -r requirements-light.lock
	$(LIGHT)/bin/python -m pip --disable-pip-version-check --no-input install --no-deps --no-build-isolation --quiet --editable .
	$(LIGHT)/bin/python -m ovd.export
	@touch $@

# --no-deps: the lock file is complete, and leaves out the second OpenCV that trackers asks for.
$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock
	$(LOCKED) --no-deps -r requirements-dev.lock
	@touch $@

$(VENV)/.installed-rebuild: $(VENV)/.installed requirements-rebuild.lock
	$(LOCKED) -r requirements-rebuild.lock
	@touch $@

clean:
	rm -rf $(VENV) $(LIGHT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
