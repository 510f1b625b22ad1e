.PHONY: setup test demo format

setup:
	@.ci/setup

test: setup
	@for step in "ruff format --check ." "ruff check ." "mypy" "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder"; do \
	  .venv/bin/$$step || { echo "test: FAILED: $$step"; exit 1; }; \
	done; \
	echo "test: OK"

demo: setup
	@.venv/bin/python -m bench.demo

format: setup
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .
