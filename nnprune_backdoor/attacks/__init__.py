"""Attacks, for demos and benchmarks only. Nothing that purifies or scans imports this package."""

from __future__ import annotations

from .adaptive_blend import AdaptiveBlend
from .badnets import BadNets
from .base import Trigger, attack_class, create_attack, list_attacks, register_attack
from .blended import Blended
from .lowfreq import LowFreq
from .photos import Photos, photo_patches
from .poisoning import poison
from .sample_specific import SampleSpecific
from .sig import Sig
from .targets import all_to_all
from .training import Training, train_classifier
from .warp import Warp

__all__ = [
    "AdaptiveBlend",
    "BadNets",
    "Blended",
    "LowFreq",
    "Photos",
    "SampleSpecific",
    "Sig",
    "Training",
    "Trigger",
    "Warp",
    "all_to_all",
    "attack_class",
    "create_attack",
    "list_attacks",
    "photo_patches",
    "poison",
    "register_attack",
    "train_classifier",
]
