"""Criteria: each scores every neuron of a model. One file a method."""

from __future__ import annotations

from .anp import ANP
from .base import Criterion, create_criterion, criterion_class, list_criteria, register_criterion
from .bnp import BNP
from .clp import CLP
from .cnp import CNP
from .fp import FP
from .magnitude import Magnitude
from .mnp import MNP
from .random import Random
from .rnp import RNP
from .tac import TAC

__all__ = [
    "ANP",
    "BNP",
    "CLP",
    "CNP",
    "FP",
    "MNP",
    "RNP",
    "TAC",
    "Criterion",
    "Magnitude",
    "Random",
    "create_criterion",
    "criterion_class",
    "list_criteria",
    "register_criterion",
]
