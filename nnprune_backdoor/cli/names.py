"""Names that the help texts show. Looking them up in the registries would import torch."""

from __future__ import annotations

CRITERIA = ("anp", "bnp", "clp", "cnp", "fp", "magnitude", "mnp", "random", "rnp", "tac")

SELECTORS = ("accuracy", "auto", "below", "count", "fraction", "outlier", "trigger")

ATTACKS = ("adaptive_blend", "badnets", "blended", "lowfreq", "sample_specific", "sig", "warp")

DATASETS = ("cifar10", "cifar100", "fashion_mnist", "gtsrb", "mnist", "stl10", "svhn")
