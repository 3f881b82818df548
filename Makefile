# The commands to use and to develop vmexit with; what they need of the machine is set up by tools/setup, once.

BIN := .venv/bin
# Further arguments for pytest: make test ARGS='-k msrwrite'
ARGS :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench picture wheel clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

setup: ## get everything that demo and test need, and stop there
	@tools/setup test

demo: ## boot a real Linux kernel and trap its MSR writes
	@tools/setup demo
	@$(BIN)/vmexit demo

test: ## run every test
	@tools/setup test
	@$(BIN)/pytest -q -n auto --dist worksteal $(ARGS)

lint: ## check the Python and the C sources
	@tools/setup lint
	@$(BIN)/ruff check -q --output-format concise .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy --no-error-summary
	@CFLAGS=-fanalyzer $(BIN)/python setup.py -q build_ext --build-lib build/lint

bench: ## measure the cost of a trap, beside gdb and Unicorn
	@tools/setup bench
	@$(BIN)/python -m benchmarks

picture: ## take docs/pictures/report.png anew: a Linux boots, is recorded, and its page looked at in a browser
	@tools/setup test
	@$(BIN)/vmexit demo --record build/boot.rec >build/picture.log
	@$(BIN)/python -m tests.report.picture build/boot.rec docs/pictures/report.png

wheel: ## build dist/vmexit-*.whl
	@tools/setup lint
	@rm -rf build/lib* build/bdist*  # or the wheel would hold modules that are no longer there
	@$(BIN)/python -m pip -q --disable-pip-version-check wheel --no-deps -w dist .
	@ls dist/*.whl

clean: ## remove all that was built here (the kernel in the cache stays)
	rm -rf .venv build dist src/*.egg-info src/vmexit/agent/agent.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
