"""Criteria: each scores every neuron of a model. One file a method."""

from __future__ import annotations

from .anp import ANP
from .base import Criterion, create_criterion, criterion_class, list_criteria, register_criterion
from .bnp import BNP
from .clp import CLP
from .cnp import CNP, PlateauTraining
from .fp import FP
from .magnitude import Magnitude
from .mnp import MNP
from .parts.mask_training import MaskTraining
from .parts.response import Response
from .parts.unlearning import Unlearning
from .random import Random
from .rnp import RNP
from .tac import TAC, ActivationChange

__all__ = [
    "ANP",
    "BNP",
    "CLP",
    "CNP",
    "FP",
    "MNP",
    "RNP",
    "TAC",
    "ActivationChange",
    "Criterion",
    "Magnitude",
    "MaskTraining",
    "PlateauTraining",
    "Random",
    "Response",
    "Unlearning",
    "create_criterion",
    "criterion_class",
    "list_criteria",
    "register_criterion",
]
