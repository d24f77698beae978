"""`purify`: the whole job in one call."""

from .purify import purify

__all__ = ["purify"]
