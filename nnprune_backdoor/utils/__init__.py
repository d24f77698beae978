"""Helpers that know nothing of neurons: randomness, statistics, progress, registries."""
