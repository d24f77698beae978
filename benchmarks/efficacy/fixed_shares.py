"""Rankings at fixed shares of the neurons, without repair: ACC, ASR and RA of each.

    python -m benchmarks.efficacy.fixed_shares --young DIR --out OUT --only repvgg --rows rnp nwc
    python -m benchmarks.efficacy.fixed_shares --young DIR --out OUT --only vit --heads with without
    python -m benchmarks.efficacy.fixed_shares --young DIR --out OUT --only vit --kinds call

A JSON a run, resumable. A row is a registered criterion with its defaults, or `NAME paper` with its
published settings; those of tried_criteria.py are registered too. Of the kind "call" is `purify`
with that criterion and all else by default. "without" heads attention heads are no sites: they are
not scored, so they are never silenced.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.efficacy import tried_criteria  # noqa: F401 # registers them
from benchmarks.efficacy.plain_call import COMMIT, Case, young
from nnprune_backdoor import Criterion, create_criterion, purify
from nnprune_backdoor.core import prepared
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.scores import lowest
from nnprune_backdoor.core.sites import Site, find_sites
from nnprune_backdoor.criteria import criterion_class
from nnprune_backdoor.errors import PurifyError

IMAGES = 500  # clean ones, given to the criterion or the call


def criterion_of(row: str) -> Criterion:
    """`rnp` with its defaults, `rnp paper` as published."""
    name, _, published = row.partition(" ")
    return criterion_class(name).paper() if published else create_criterion(name)


def without_heads(model: nn.Module, example: Tensor) -> tuple[Site, ...]:
    """What `find_sites` finds, less the attention heads."""
    return tuple(site for site in find_sites(model, example) if site.kind != "heads")


@contextlib.contextmanager
def sites_found(heads: str) -> Iterator[None]:
    """Inside of the block, criteria and `purify` find attention heads, or do not."""
    if heads == "with":
        yield
        return
    with mock.patch.object(prepared, "find_sites", without_heads):
        yield


def pruned(case: Case, criterion: Criterion, shares: list[float]) -> dict[str, Any]:
    """ACC, ASR and RA with these shares of the ranking silent, lowest first."""
    scores = criterion(case.model, case.clean, seed=0)
    total = len(scores.flat)
    found: dict[str, Any] = {"neurons": total}
    kinds = {site.name: site.kind for site in scores.sites}
    for share in shares:
        silent = copy.deepcopy(case.model)
        selection = lowest(scores, round(share * total))
        silence_(silent, selection)
        heads = sum(kinds[neuron.site] == "heads" for neuron in selection.neurons)
        found[f"{share:g}"] = case.measure(silent) | {"heads": heads}
    return found


def run(name: str, case: Case, what: tuple[str, str, str], options: argparse.Namespace) -> None:
    """Measure one kind of one row on one network, with heads or without, unless its file is there.

    Args:
        what: kind, row, heads.
    """
    kind, row, heads = what
    file = options.out / f"{'__'.join((name, row.replace(' ', '_'), kind, heads))}.json"
    if file.exists():
        return
    start = time.process_time()
    record: dict[str, Any] = {"network": name, "row": row, "kind": kind, "heads": heads}
    record |= {"before": case.measure(case.model), "commit": COMMIT}
    try:
        with sites_found(heads):
            if kind == "call":
                result = purify(case.model, case.clean, criterion_of(row), progress=False)
                record |= {"after": case.measure(result.model)}
                record |= {"silenced": len(result.selection)}
            else:
                record |= pruned(case, criterion_of(row), options.shares)
    except PurifyError as error:
        record["refused"] = str(error)
    record["cpu_seconds"] = round(time.process_time() - start)
    file.write_text(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--young", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--out", type=Path, required=True, help="folder, a JSON each run")
    parser.add_argument("--only", nargs="+", default=[""], help="networks: names, or parts of them")
    parser.add_argument("--rows", nargs="+", default=["rnp", "anp", "random"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.1, 0.2])
    parser.add_argument("--kinds", nargs="+", choices=("fixed", "call"), default=["fixed"])
    parser.add_argument("--heads", nargs="+", choices=("with", "without"), default=["with"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, case in young(options.young, IMAGES, 0, options.only):
        for what in itertools.product(options.kinds, options.rows, options.heads):
            run(name, case, what, options)


if __name__ == "__main__":
    main()
