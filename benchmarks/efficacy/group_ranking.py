"""Neurons ranked one by one, or by groups of coupled channels: ACC, ASR and size.

    python -m benchmarks.efficacy.group_ranking --young DIR --only repvgg-badnets \
        --out benchmarks/results/group_ranking.json

Both rankings start from the same scores of `rnp`. By neuron: the lowest share is silenced, and
removed as far as the logits stay (`compact`). By group: `GroupImportance` reduces the scores over
Torch-Pruning's groups of coupled channels, and its pruner cuts the lowest share. Nothing is
trained.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from benchmarks.efficacy.plain_call import COMMIT, Case, young
from nnprune_backdoor import create_criterion
from nnprune_backdoor.core.masks import silence_
from nnprune_backdoor.core.scores import ChannelScores, Selection, lowest
from nnprune_backdoor.core.sites import find_classifiers
from nnprune_backdoor.importance import GroupImportance
from nnprune_backdoor.removal import compact

RANKINGS = ("neuron", "max", "mean", "min")
_EXAMPLES = 8


def by_neuron(case: Case, scores: ChannelScores, share: float) -> tuple[nn.Module, Selection]:
    """The given network with the lowest share of its neurons silent, and these."""
    selection = lowest(scores, round(share * len(scores.flat)))
    silent = copy.deepcopy(case.model)
    silence_(silent, selection)
    return silent, selection


def by_group(case: Case, scores: ChannelScores, share: float, reduction: Any) -> nn.Module:
    """The given network without the lowest share of its channels, counted once a group."""
    model, example = copy.deepcopy(case.model), case.clean.images[:1]
    importance = GroupImportance(model, scores, reduction, example=example)
    heads = [model.get_submodule(name) for name in find_classifiers(model, case.clean.images[:2])]
    tp.pruner.BasePruner(
        model,
        (example,),
        importance=importance,
        pruning_ratio=share,
        global_pruning=True,
        ignored_layers=heads,
    ).step()
    return model.eval()


def measured(case: Case, scores: ChannelScores, ranking: str, share: float) -> dict[str, Any]:
    """One row: what the ranking made of the network, and how large that is."""
    if ranking == "neuron":
        model, selection = by_neuron(case, scores, share)
        smaller, _ = compact(model, selection, case.clean.images[:_EXAMPLES])
    else:
        model = smaller = by_group(case, scores, share, ranking)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (case.model, smaller)]
    return {"before": case.measure(case.model), "after": case.measure(model), "parameters": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--young", type=Path, required=True, help="folder of the weights")
    parser.add_argument(
        "--only", nargs="+", required=True, help="networks: names, or parts of them"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    for name, case in young(options.young, 500, 0, options.only):
        scores = create_criterion("rnp")(case.model, case.clean, seed=0)
        for ranking in RANKINGS:
            start = time.process_time()
            row = {"network": name, "ranking": ranking, "share": options.share}
            if any(row.items() <= known.items() for known in rows):
                continue
            row |= measured(case, scores, ranking, options.share)
            row |= {"cpu_seconds": round(time.process_time() - start), "commit": COMMIT}
            rows.append(row)
            print(json.dumps(row), flush=True)
            options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
