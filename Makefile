# Short names for what one does here. Each sets up .venv first, which takes no time once it is there.
ticker ?= SPY
options ?=
bin := .venv/bin

.PHONY: help setup train test mutants lint format types notebooks outputs readme site package coverage slow

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1: /p' Makefile

setup:
	@./setup.sh

train: setup  ## train a ticker and leave a report and a model in runs/: make train ticker=QQQ options="-p epochs 5"
	$(bin)/papermill nbs/train.ipynb "runs/$(ticker).ipynb" -p ticker "$(ticker)" $(options)

test: setup  ## every notebook, then the tests
	$(bin)/nbdev_test
	$(bin)/pytest

slow: setup  ## the tests with the long proofs
	$(bin)/pytest --slow

mutants: setup  ## deliberate faults, one at a time, that the tests must catch: make mutants options="--only memory"
	$(bin)/python tests/mutants.py $(options)

lint: setup  ## what ruff finds in notebooks and tests
	$(bin)/ruff check
	$(bin)/ruff format --check

format: setup  ## format notebooks and tests
	$(bin)/ruff check --fix
	$(bin)/ruff format

types: setup  ## the public layer as mypy sees it
	$(bin)/mypy

notebooks: setup  ## modules from notebooks, and notebooks without counts and ids
	$(bin)/nbdev_export
	$(bin)/nbdev_clean

outputs: setup  ## run the notebooks whose code changed and keep what they show: make outputs options=--all
	$(bin)/python .ci/outputs $(options)

readme: setup  ## README.md from nbs/index.ipynb
	$(bin)/python .ci/readme

site: setup  ## the site from the committed notebooks, in _site/html
	$(bin)/pip install --quiet -e ".[dev,site]" -c constraints.txt
	$(bin)/python .ci/site

package: setup  ## archive and wheel, each installed and used
	bash .ci/package

coverage: setup  ## the tests, and which lines they reach
	$(bin)/pytest --cov --cov-report=term:skip-covered
