# make train — set up and train the default model; make test — set up and test everything; make slow — the tests of minutes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PRESET ?= shapes
RUN ?= runs/$(shell date +%Y%m%d-%H%M%S)-$(PRESET)
# Runs of several processes that time each other, a scheduler, browsers: nothing runs beside them
ALONE := tests/test_many.py tests/test_schedulers.py tests/test_app.py tests/test_jupyterlab.py
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONDONTWRITEBYTECODE =  # some set it; hundreds of processes of the tests would compile difflit anew each

.PHONY: help install train test slow bench readme docs clean

help:
	@echo "make train    set up, train the default model (PRESET=$(PRESET)), leave an executed notebook as its report"
	@echo "make test     set up, then notebooks, tests, ruff, mypy, export in sync, notebooks clean"
	@echo "make slow     tests that take minutes"
	@echo "make bench    side-by-side benchmarks"
	@echo "make readme   README.md from nbs/index.ipynb"
	@echo "make docs     the notebooks as a web site in _docs, every link checked"

install: $(STAMP)

$(STAMP): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "difflit needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,digits,optimizers,wandb,metrics,cluster,app,explore]'
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/nbdev_install_hooks >/dev/null; fi
	@touch $(STAMP)

train: $(STAMP)
	@mkdir -p $(RUN)
	$(BIN)/papermill --log-output --no-progress-bar nbs/train.ipynb $(RUN)/report.ipynb -p preset $(PRESET) -p run_dir $(RUN) >$(RUN)/papermill.log 2>&1 \
	  || { tail -n 20 $(RUN)/papermill.log; echo "The run failed; the report so far is $(RUN)/report.ipynb"; exit 1; }
	@$(BIN)/difflit runs --one $(RUN)
	@echo "Report:  $(RUN)/report.ipynb"
	@echo "Open it: $(BIN)/jupyter lab $(RUN)/report.ipynb"

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy & types=$$!; OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 && wait $$types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal --durations 20 $(ALONE:%=--ignore %)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations 10 $(ALONE)

slow: $(STAMP)
	$(BIN)/nbdev_test --n_workers 1 --flags slow
	$(BIN)/python -m pytest tests -m slow

bench: $(STAMP)
	$(BIN)/python tests/bench/train_step.py
	$(BIN)/python tests/bench/index_rate.py
	$(BIN)/python tests/bench/loading.py --only webdataset-pil webdataset decode
	$(BIN)/python tests/bench/latent_step.py
	$(BIN)/python tests/bench/cache.py
	$(BIN)/python tests/bench/fill.py
	$(BIN)/python tests/bench/loop_overhead.py
	$(BIN)/python tests/bench/checkpoint.py
	$(BIN)/python tests/bench/metrics.py
	$(BIN)/python tests/bench/neighbours.py

readme: $(STAMP)
	$(BIN)/python tests/build_readme.py

docs: $(STAMP)
	$(BIN)/python docs/build.py

clean:
	rm -rf _docs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
