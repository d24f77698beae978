"""Networks in the regime of the papers: CIFAR-10, 25 epochs, the papers' attacks.

    python -m benchmarks.networks.published --list
    python -m benchmarks.networks.published --data DATA --out DIR      # half an hour a network
    python -m benchmarks.networks.published --out DIR --summary        # results/zoo_v2.json

DATA is an array file, class folders, or the folder of torchvision's copy (images.py). Weights and a
JSON a network go to DIR. Interrupt it when you like: it goes on after the last whole epoch. Started
twice, both processes work through the list. Set OMP_NUM_THREADS=1; PyTorch then needs one core.
"""

from __future__ import annotations

import argparse
import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .images import read
from .recipes import RECIPES, development
from .train import train

RESULTS = Path(__file__).parents[2] / "results" / "zoo_v2.json"


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Whether this process alone holds the lock on `file`; it ends with the process."""
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def summarise(folder: Path, results: Path) -> None:
    """Every network of the list, in its order; null for those not trained yet."""
    files = {name: folder / f"{name}.json" for name in RECIPES}
    networks = {
        name: json.loads(file.read_text()) if file.exists() else None
        for name, file in files.items()
    }
    summary = {"development": development(), "networks": networks}
    results.write_text(json.dumps(summary, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks.published", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10: .npz, class folders, or torchvision's")
    parser.add_argument("--out", type=Path, help="folder for weights and records")
    parser.add_argument("--only", nargs="+", default=[""], help="names, or parts of them")
    parser.add_argument(
        "--compile", action="store_true", help="a third faster; needs a C++ compiler"
    )
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--summary", action="store_true", help="write results/zoo_v2.json and stop")
    options = parser.parse_args()
    names = [name for name in RECIPES if any(part in name for part in options.only)]
    if options.list or options.out is None:
        print("\n".join(names))
        return
    if options.summary:
        summarise(options.out, RESULTS)
        return
    if options.data is None:
        parser.error("--data is needed to train")
    options.out.mkdir(parents=True, exist_ok=True)
    images = read(options.data)
    for name in names:
        with claimed(options.out / f"{name}.lock") as ours:
            if ours and not (options.out / f"{name}.json").exists():
                record = train(RECIPES[name], images, options.out, compiled=options.compile)
                shown = {key: record.get(key) for key in ("acc", "asr", "ra", "cpu_minutes")}
                print(name, json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
