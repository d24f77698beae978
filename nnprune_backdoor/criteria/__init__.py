"""Criteria: each scores every neuron of a model. One file a method."""

from .anp import ANP
from .base import Criterion, create_criterion, criterion_class, list_criteria, register_criterion
from .cnp import CNP
from .mnp import MNP, MagnitudeSaliency, magnitude_saliency_correlation
from .rnp import RNP
from .tac import TAC

__all__ = [
    "ANP",
    "CNP",
    "MNP",
    "RNP",
    "TAC",
    "Criterion",
    "MagnitudeSaliency",
    "create_criterion",
    "criterion_class",
    "list_criteria",
    "magnitude_saliency_correlation",
    "register_criterion",
]
