#!/usr/bin/env bash
# Everything that docs/results/efficacy.md shows, from nothing: bash benchmarks/reproduce.sh DIR [WORKERS]
# DIR takes the weights and a JSON a run; whatever is there is not made again. Hours: see the page.
set -euo pipefail
out=$(realpath -m "${1:?usage: reproduce.sh DIR [WORKERS]}") workers=${2:-2}
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -m benchmarks.networks.zoo --models "$out/models" --workers "$workers"
python -m benchmarks.efficacy.efficacy --models "$out/models" --out "$out/runs" --workers "$workers" \
    --methods cnp tac random mnp anp rnp fp clp bnp ft informed "informed change"
python -m benchmarks.efficacy.efficacy --out "$out/runs" --collect
python -m benchmarks.efficacy.efficacy_page
