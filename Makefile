# One target per stage. `make help` lists them; variables go on the command line:
#   make precompute DATA=imagenet VIEWS=30 LABELS=labels

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MEALV2 := $(BIN)/mealv2

DATA ?= data
TEACHERS ?= senet154.gluon_in1k,resnet152s.gluon_in1k
STUDENT ?= resnet50.ram_in1k
LABELS ?= labels
PACKED ?= packed
VIEWS ?= 16
OUT ?= runs/$(STUDENT)
SEEDS ?= 3
IMAGES ?= $(DATA)/val
TO ?= timm
REPO ?= hf://USER/NAME
REPORT ?= demo/report
SHOTS ?= screenshots
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo pack precompute distill finetune transfer evaluate predict export push bench info verify docs test test-slow test-cluster test-browser screenshots check format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "variables: DATA PACKED TEACHERS STUDENT LABELS VIEWS OUT SEEDS IMAGES TO REPO REPORT SHOTS ARGS (more flags for the command)"

setup: $(VENV)/.done  ## make the virtual environment (the other targets do it by themselves)

$(VENV)/.done: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.done  ## soft against hard labels on 5,000 digits of MNIST, a few minutes (SEEDS=5 for more students)
	$(MEALV2) demo --seeds $(SEEDS) $(ARGS)

pack: $(VENV)/.done  ## re-pack the JPEGs of DATA into PACKED without loss, for faster views (needs jpegtran)
	$(MEALV2) pack --data-dir '$(DATA)' --output '$(PACKED)' $(ARGS)

precompute: $(VENV)/.done  ## stage one: label DATA with TEACHERS into LABELS
	$(MEALV2) precompute --data-dir '$(DATA)' --teacher '$(TEACHERS)' --num-views $(VIEWS) --output '$(LABELS)' $(ARGS)

distill: $(VENV)/.done  ## stage two: train STUDENT on DATA from LABELS into OUT
	$(MEALV2) distill --data-dir '$(DATA)' --labels '$(LABELS)' --model '$(STUDENT)' --output '$(OUT)' $(ARGS)

finetune: $(VENV)/.done  ## hard labels: train STUDENT on DATA into OUT
	$(MEALV2) finetune --data-dir '$(DATA)' --model '$(STUDENT)' --output '$(OUT)' $(ARGS)

transfer: $(VENV)/.done  ## train OUT further on DATA, a task of its own (ARGS='--mode frozen' for linear evaluation)
	$(MEALV2) transfer --data-dir '$(DATA)' --model '$(OUT)' $(ARGS)

evaluate: $(VENV)/.done  ## accuracy of OUT on DATA
	$(MEALV2) evaluate --data-dir '$(DATA)' --checkpoint '$(OUT)' $(ARGS)

predict: $(VENV)/.done  ## what OUT says of IMAGES (files or folders)
	$(MEALV2) predict $(IMAGES) --checkpoint '$(OUT)' $(ARGS)

export: $(VENV)/.done  ## hand OUT on: TO=timm, onnx, torchscript or hub-folder
	$(MEALV2) export '$(OUT)' --to '$(TO)' $(ARGS)

push: $(VENV)/.done  ## upload OUT to REPO on the Hugging Face Hub (ARGS='--private --space')
	$(MEALV2) push '$(OUT)' '$(REPO)' $(ARGS)

bench: $(VENV)/.done  ## the table of speeds beside their goals, some minutes (ARGS='--profile' for where time goes)
	$(MEALV2) bench $(ARGS)

info: $(VENV)/.done  ## what the label set LABELS is, finished or not
	$(MEALV2) labels info '$(LABELS)' $(ARGS)

verify: $(VENV)/.done  ## every byte of LABELS (ARGS='--data-dir DATA --relabel 1000' for its images and teachers)
	$(MEALV2) labels verify '$(LABELS)' $(ARGS)

test: $(VENV)/.done  ## the fast tests, two at a time
	$(BIN)/python -m pytest --numprocesses 2 -m 'not slow and not gpu and not cluster and not browser' $(ARGS)

test-slow: $(VENV)/.done  ## the tests that take longer, two at a time; then those that measure time
	$(BIN)/python -m pytest --numprocesses 2 -m 'slow and not timing and not gpu and not cluster and not browser' $(ARGS)
	$(BIN)/python -m pytest -m 'timing and not gpu and not cluster and not browser' $(ARGS)

test-cluster: $(VENV)/.done  ## the tests on a Slurm of virtual nodes (Linux, root; installs Debian's packages)
	$(BIN)/python -m pytest -m cluster $(ARGS)

test-browser: $(VENV)/.done  ## the report page in a headless Chromium (apt-get install chromium)
	$(BIN)/python -m pytest -m browser $(ARGS)

screenshots: $(VENV)/.done  ## every section of the report REPORT as images in SHOTS: wide, narrow, light, dark
	$(BIN)/python tests/screenshots.py '$(REPORT)' '$(SHOTS)'

docs: $(VENV)/.done  ## the site of docs/ into docs/_build/html; a warning is an error
	rm -rf docs/_build docs/reference/api docs/reference/cli
	$(BIN)/python -m sphinx -q -W --keep-going -j auto -d docs/_build/doctrees $(ARGS) docs docs/_build/html

check: $(VENV)/.done  ## style, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.done  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment, caches and the built site, nothing else
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache docs/_build docs/reference/api docs/reference/cli
