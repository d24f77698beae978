"""Temporary patches of Torch-Pruning's functions.

`Ledger` needs to know what `Group.prune` removes, and `graph_fixes` corrects traced graphs. Patches
are made in memory, and undone when their last user is gone. Patches that other packages put on top
are left in place.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any


class Patch:
    """A replacement of a function, in place while it has users.

    Args:
        owner: the class or module with the function.
        name: of the function.
        make: takes the function that is there, and returns its replacement.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self._owner, self._name, self._make = owner, name, make
        self._replacements: weakref.WeakSet[Any] = weakref.WeakSet()
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        # the garbage collector may release one user while the same thread adds another
        self._lock = threading.RLock()

    @property
    def users(self) -> list[Any]:
        """Objects that hold the patch and are alive."""
        with self._lock:
            return list(self._users)

    def hold(self, user: Any) -> None:
        """Replace the function until `user` is garbage collected."""
        with self._lock:
            self._users.add(user)
            weakref.finalize(user, self._release)
            current = self._current()
            ours = self._replacements.__contains__
            if inspect.unwrap(current, stop=ours) not in self._replacements:
                replacement = functools.wraps(current)(self._make(current))
                self._replacements.add(replacement)
                setattr(self._owner, self._name, replacement)

    def _release(self) -> None:
        with self._lock:
            while not self.users and self._current() in self._replacements:
                setattr(self._owner, self._name, self._current().__wrapped__)

    def _current(self) -> Any:
        return getattr(self._owner, self._name)
