"""Read a pickle without running it: nothing that it names is imported, looked up or called.

The opcodes are decoded by `pickletools` and carried out on plain lists and dictionaries. What a
pickle would make by a call becomes a `StandIn`, which only remembers what was asked for.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

from .pickle_objects import (
    PLAIN_MAKERS,
    BadPickleError,
    ForbiddenNameError,
    Maker,
    Name,
    StandIn,
    checked_name,
    pairs,
)

MAX_BYTES = 32 * 2**20  # of one pickle, which holds names and shapes; tensors lie elsewhere

_MAX_INDEX = 2**32  # of the memo; larger ones can be chosen so that it becomes slow

_MAX_STEPS = 5_000_000  # 10,000 tensors take half a million

_BYTES_PER_STEP = 100  # roughly what each may take in memory


class Unpickler:
    """Reads one pickle.

    Args:
        file: stays behind the pickle's last opcode.
        makers: "module.name" -> what stands for a call of it; TypeError or ValueError for
            arguments that do not fit. Nothing else is called.
        persistent: what stands for an object outside the pickle, by its id.
        named: the names of everything that became a stand-in are added here.
    """

    def __init__(
        self,
        file: IO[bytes],
        *,
        makers: Mapping[str, Maker],
        persistent: Callable[[Any], Any],
        named: set[str],
    ) -> None:
        self._file: Any = _Bounded(file)
        self._makers = {**PLAIN_MAKERS, **makers}
        self._persistent = persistent
        self._named = named
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}
        self._left = _MAX_STEPS

    def load(self) -> Any:
        """The object, of plain data, `Name`, `StandIn`, and what makers and persistent ids gave.

        Sets come back as lists. Keys that could be slow to hash become stand-ins.

        Raises:
            ForbiddenNameError, BadPickleError: see there.
        """
        try:
            for opcode, argument, _ in pickletools.genops(self._file):
                self._spend(1)
                if opcode.name in _LITERALS:
                    self._stack.append(argument)
                else:
                    _STEPS[opcode.name](self, argument)
            return self._stack.pop()
        except (ForbiddenNameError, BadPickleError):
            raise
        except Exception as error:  # a hostile file may cause any kind
            text = next(iter(str(error).splitlines()), "")[:200]
            raise BadPickleError(text or type(error).__name__) from None

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise BadPickleError(
                f"more than {_MAX_STEPS:,} steps; it may be there to fill the memory"
            )

    # --- the steps; the second argument is what pickletools decoded after the opcode

    def _nothing(self, _: Any) -> None:
        pass

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _tuple(self, count: int) -> None:
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _put(self, index: int) -> None:
        if not 0 <= index < _MAX_INDEX:
            raise BadPickleError("an index that no pickle needs")
        self._memo[index] = self._stack[-1]

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(checked_name(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise BadPickleError("a name that is no text")
        self._stack.append(checked_name(module, name))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._call(function, arguments)

    def _new(self, _: Any) -> None:
        arguments, kind = self._stack.pop(), self._stack.pop()
        self._call(kind, arguments)

    def _new_with_names(self, _: Any) -> None:
        named, arguments, kind = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._spend(len(arguments) + len(named))
        self._call(kind, (*arguments, *named.items()))

    def _instance(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        arguments = self._since_mark()
        self._call(checked_name(module, name), tuple(arguments))

    def _object(self, _: Any) -> None:
        kind, *arguments = self._since_mark()
        self._call(kind, tuple(arguments))

    def _call(self, function: Any, arguments: Any) -> None:
        """Push what stands for the result of a call."""
        if type(arguments) is not tuple:
            raise BadPickleError("a call without arguments")
        if isinstance(function, Name) and str(function) in _RECONSTRUCTORS and arguments:
            function, arguments = arguments[0], ()  # an object of that class
        name = str(function) if isinstance(function, Name) else _kind(function)
        maker = self._makers.get(name) if isinstance(function, Name) else None
        made = None
        if maker is not None:
            self._spend(sum(map(_length, arguments)))  # it may copy them
            made = maker(*arguments)
        if made is None:
            self._named.add(name)
            made = StandIn(name, arguments)
        self._stack.append(made)

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], StandIn):  # attributes of all else are of no use
            self._stack[-1].state = state

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        (target.items if isinstance(target, StandIn) else _of_type(target, list)).extend(items)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _set_items(self, _: Any) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        entries = target.entries if isinstance(target, StandIn) else _of_type(target, dict)
        entries.update(pairs(items[::2], items[1::2]))

    def _dictionary(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(pairs(items[::2], items[1::2]))

    def _persistent_text(self, argument: str) -> None:
        self._stack.append(self._persistent(argument))

    def _persistent_object(self, _: Any) -> None:
        self._stack.append(self._persistent(self._stack.pop()))

    def _refuse_extension(self, code: Any) -> None:
        raise ForbiddenNameError(f"extension {code} of the copyreg registry")

    def _refuse_buffer(self, _: Any) -> None:
        raise BadPickleError("it needs buffers that are not in the file")


class _Bounded:
    """A file of which no more than MAX_BYTES are read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = MAX_BYTES

    def read(self, count: int) -> bytes:
        if count > self._left:
            raise BadPickleError(f"over the limit of {MAX_BYTES:,} bytes for names and shapes")
        self._left -= count
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise BadPickleError(f"over the limit of {MAX_BYTES:,} bytes for names and shapes")
        return line


def _kind(value: Any) -> str:
    return value.name if isinstance(value, StandIn) else type(value).__name__


def _length(value: Any) -> int:
    """Steps that a copy of it counts as: by what it takes in memory."""
    if isinstance(value, str | bytes | bytearray):
        return len(value) // _BYTES_PER_STEP
    return len(value) if isinstance(value, list | tuple | dict) else 0


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise BadPickleError(f"expected a {kind.__name__}, got {type(value).__name__}")
    return value


_RECONSTRUCTORS = frozenset(
    f"{module}.{name}"
    for module in ("copyreg", "copy_reg")
    for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
)

_LITERALS = frozenset(
    """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    """.split()  # noqa: SIM905
)

_STEPS: dict[str, Callable[[Unpickler, Any], None]] = {
    "PROTO": Unpickler._nothing,
    "FRAME": Unpickler._nothing,
    "STOP": Unpickler._nothing,
    "NONE": lambda self, _: self._push(None),
    "NEWTRUE": lambda self, _: self._push(True),
    "NEWFALSE": lambda self, _: self._push(False),
    "EMPTY_TUPLE": lambda self, _: self._push(()),
    "EMPTY_LIST": lambda self, _: self._push([]),
    "EMPTY_SET": lambda self, _: self._push([]),
    "EMPTY_DICT": lambda self, _: self._push({}),
    "MARK": Unpickler._mark,
    "POP": Unpickler._pop,
    "POP_MARK": Unpickler._pop_mark,
    "DUP": lambda self, _: self._push(self._stack[-1]),
    "TUPLE": lambda self, _: self._push(tuple(self._since_mark())),
    "TUPLE1": lambda self, _: self._tuple(1),
    "TUPLE2": lambda self, _: self._tuple(2),
    "TUPLE3": lambda self, _: self._tuple(3),
    "LIST": lambda self, _: self._push(self._since_mark()),
    "FROZENSET": lambda self, _: self._push(self._since_mark()),
    "DICT": Unpickler._dictionary,
    "GET": Unpickler._get,
    "BINGET": Unpickler._get,
    "LONG_BINGET": Unpickler._get,
    "PUT": Unpickler._put,
    "BINPUT": Unpickler._put,
    "LONG_BINPUT": Unpickler._put,
    "MEMOIZE": lambda self, _: self._put(len(self._memo)),
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._new,
    "NEWOBJ_EX": Unpickler._new_with_names,
    "INST": Unpickler._instance,
    "OBJ": Unpickler._object,
    "BUILD": Unpickler._build,
    "APPEND": Unpickler._append,
    "APPENDS": Unpickler._appends,
    "ADDITEMS": Unpickler._appends,
    "SETITEM": Unpickler._set_item,
    "SETITEMS": Unpickler._set_items,
    "PERSID": Unpickler._persistent_text,
    "BINPERSID": Unpickler._persistent_object,
    "EXT1": Unpickler._refuse_extension,
    "EXT2": Unpickler._refuse_extension,
    "EXT4": Unpickler._refuse_extension,
    "NEXT_BUFFER": Unpickler._refuse_buffer,
    "READONLY_BUFFER": Unpickler._refuse_buffer,
}
