"""Attacks, for drills and benchmarks only: no criterion or selector may import this package."""

from .badnets import BadNets
from .base import Trigger, attack_class, create_attack, list_attacks, register_attack
from .blended import Blended
from .photos import Photos, photo_patches
from .training import poison, train_classifier

__all__ = [
    "BadNets",
    "Blended",
    "Photos",
    "Trigger",
    "attack_class",
    "create_attack",
    "list_attacks",
    "photo_patches",
    "poison",
    "register_attack",
    "train_classifier",
]
