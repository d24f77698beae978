.PHONY: test quick lint docs bench pages

test:
	python -m pytest

quick:
	python -m pytest -m "not slow"

lint:
	ruff check .
	ruff format --check .
	mypy

docs:
	mkdocs build --strict --quiet

# seconds of each criterion on one small network, against the published loops
bench:
	mkdir -p build
	OMP_NUM_THREADS=1 python -m benchmarks.cost.speed --only "ResNet-18, 32 px" --rounds 1 --out build/speed.json

# docs/results and the table of README, from benchmarks/results
pages:
	python -m benchmarks.render
	python -m benchmarks.efficacy.efficacy_page
	python -m benchmarks.evidence.calibration
	python -m benchmarks.cost.speed_page
