"""Functions of Torch-Pruning that are other ones while somebody here needs it.

The only place that changes something of the installed package, in memory alone: `Ledger` listens to
`Group.prune`, `mending` corrects what a trace gives. What was there comes back when the last user
is gone; wrappers that somebody else puts on top stay.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any


class Wrapping:
    """A function held as attribute `name` of `owner`, and what to make of it.

    Args:
        owner: a class or a module.
        name: of the function.
        make: the function that was there -> the one to put in its place.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self._owner, self._name, self._make = owner, name, make
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()  # all that stand there, or stood
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def users(self) -> list[Any]:
        """Who is alive and needs it."""
        return list(self._users)

    def hold(self, user: Any) -> None:
        """Wrap the function until `user` is gone."""
        self._users.add(user)
        weakref.finalize(user, self._release)
        plain = self._current()
        if inspect.unwrap(plain, stop=self._made.__contains__) not in self._made:
            wrapper = functools.wraps(plain)(self._make(plain))
            self._made.add(wrapper)
            setattr(self._owner, self._name, wrapper)

    def _release(self) -> None:
        while not self.users and self._current() in self._made:
            setattr(self._owner, self._name, self._current().__wrapped__)

    def _current(self) -> Any:
        return getattr(self._owner, self._name)
