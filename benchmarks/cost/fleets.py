"""What a fleet costs above the bare scans, and that one worker and two give the same results.

    python -m benchmarks.cost.fleets             # writes benchmarks/results/fleets.json
    python -m benchmarks.cost.fleets --render

200 untrained networks of a few layers, each scanned as `scan-many` does it, but in very few steps:
what is measured is all that happens around a scan. Processor time is compared within one run, the
scans' own with that of all processes together, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.render import DOCS, RESULTS
from nnprune_backdoor.cli.manifest import CommandJob, read_manifest
from nnprune_backdoor.evidence import Scan
from nnprune_backdoor.fleets import Outcome, run_many
from nnprune_backdoor.triggers import Inversion, UniversalPerturbation

RESULT = RESULTS / "fleets.json"
MODELS, IMAGES, PIXELS = 200, 16, 16
ARGUMENTS = {"channels": (8, 8, 8, 8), "layers": (1, 1, 0, 0)}
FEW = Scan(
    search=Inversion(steps=4, batch_size=4),
    universal=UniversalPerturbation(steps=4, batch_size=4),
    starts=1,
    candidates=1,
    compared=1,
)


class FewSteps(CommandJob):
    """A row of `scan-many`, scanned in few steps."""

    def run(self, folder: Path, threads: int) -> Outcome:
        taken: list[float] = []

        def timed(run: Any, options: argparse.Namespace) -> Any:
            start = time.process_time()
            with mock.patch("nnprune_backdoor.evidence.scanning.scan", FEW):
                result = run(options)
            taken.append(time.process_time() - start)
            return result

        whole = self.options

        def options() -> argparse.Namespace:
            found = whole()
            run = found.run
            found.run = lambda given: timed(run, given)
            return found

        object.__setattr__(self, "options", options)
        outcome = super().run(folder, threads)
        outcome.facts["bare"] = taken[0]
        return outcome


def write_fleet(root: Path) -> Path:
    """Networks, images and a manifest."""
    torch.manual_seed(0)
    (root / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, PIXELS, PIXELS, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    arguments = " ".join(f"{k}={v}".replace(" ", "") for k, v in ARGUMENTS.items())
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "arch", "arch-arg", "clean"])
        for number in range(MODELS):
            network = timm.create_model("resnet18", num_classes=5, **ARGUMENTS)
            save_file(network.state_dict(), root / f"{number}.safetensors")
            writer.writerow([f"{number}.safetensors", "resnet18", arguments, "images"])
    return root / "manifest.csv"


def run(manifest: Path, out: Path, workers: int) -> None:
    """One fleet, in this process and its workers."""
    jobs = [FewSteps(**vars(job)) for job in read_manifest(manifest, "scan")]
    print(run_many(jobs, out, workers=workers, progress=False).worked)


def measured(manifest: Path, out: Path, workers: int) -> dict[str, Any]:
    """Seconds of a fleet: on the wall, of the processor, and of the processor in bare scans."""
    command = [sys.executable, "-m", "benchmarks.cost.fleets", "--one", str(manifest), str(out)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, str(workers)], stdout=subprocess.PIPE, text=True)
    with process:
        worked = int((process.stdout or sys.stdin).read())
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0
    facts = [json.loads(path.read_text())["facts"] for path in out.glob("*.json")]
    return {
        "workers": workers,
        "models": len(facts),
        "worked": worked,
        "wall": round(time.perf_counter() - start, 1),
        "processor": round(used.ru_utime + used.ru_stime, 1),
        "bare": round(sum(fact["bare"] for fact in facts), 1) if worked else 0.0,
    }


def default_scan(manifest: Path) -> float:
    """Processor seconds of one scan of such a network with the default settings."""
    job = read_manifest(manifest, "scan")[0]
    start = time.process_time()
    job.run(manifest.parent / "default", threads=1)
    return round(time.process_time() - start, 1)


def found(out: Path) -> dict[str, Any]:
    """Key -> document, without dates and times."""
    results = {path.stem: json.loads(path.read_text())["data"] for path in out.glob("*.json")}
    for result in results.values():
        del result["date"], result["diagnosis"]["seconds"]
    return results


def page(report: dict[str, Any]) -> str:
    rest = report["runs"][-1]
    ready = 1000 * rest["processor"] / rest["models"]
    first = report["runs"][0]
    above = 1000 * (first["processor"] - first["bare"]) / first["models"]
    lines = [
        "# Many models",
        "",
        f"**A fleet costs {above:.0f} ms a model above the scan.** A default scan of such a",
        f"network, with as few images, takes {report['default']:.1f} s of the processor: that is",
        f"{above / 10 / report['default']:.1f} % of it, and of the few steps measured here",
        f"{above / 10 / first['bare'] * first['models']:.0f} %.",
        "",
        f"{report['runs'][0]['models']} untrained networks of a few layers, scanned by `scan-many`",
        f"([how](../fleets.md)) on {IMAGES} images of {PIXELS} pixels, in very few steps:",
        "what is measured is all that happens around the scans. One worker and two gave",
        ("the same results." if report["same"] else "**different results.**"),
        "The last line is the same command once more, when all results were there: it starts",
        f"processes and hashes files, {ready:.0f} ms a model.",
        "",
        "| workers | models done | on the wall | of the processor | of that in the scans "
        "| above the scans, a model |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["runs"]:
        above = 1000 * (row["processor"] - row["bare"]) / row["models"]
        cells = [row["workers"], row["worked"], f"{row['wall']:.0f} s"]
        cells += [f"{row['processor']:.0f} s", f"{row['bare']:.0f} s", f"{above:.0f} ms"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Processor time is that of all processes together. Above the scans are the start of the",
        "processes, reading the table, hashes, claims, and writing results and the summary.",
        "",
        "`python -m benchmarks.cost.fleets`, then with `--render`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--one", nargs=3, metavar=("MANIFEST", "OUT", "WORKERS"))
    parser.add_argument("--render", action="store_true", help="write docs/results/fleets.md")
    options = parser.parse_args()
    if options.one:
        run(Path(options.one[0]), Path(options.one[1]), int(options.one[2]))
        return
    if options.render:
        (DOCS / "fleets.md").write_text(page(json.loads(RESULT.read_text())))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        manifest = write_fleet(root)
        runs = []
        for out, workers in (("out1", 1), ("out2", 2), ("out1", 1)):  # at last, all is there
            runs.append(measured(manifest, root / out, workers))
            print(json.dumps(runs[-1]), flush=True)
        same = found(root / "out1") == found(root / "out2")
        usual = default_scan(manifest)
    report = {
        "runs": runs,
        "same": same,
        "default": usual,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
