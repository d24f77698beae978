"""Who works on what, among processes that share nothing but a folder.

A claim is a file that one process alone can create, which network file systems keep to as well. Its
holder touches it every few seconds while it lives. The claim of a dead process is not taken away,
since of two that take it away one could hit the other's new claim: it stays, and a claim with the
next higher number is created, which again one process alone can.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

BEAT = 5.0  # seconds between two touches

SILENT = 60.0  # seconds without a touch after which a holder elsewhere is taken for dead


@dataclass(frozen=True)
class Mark:
    """The newest claim on something, as it looks now.

    Attributes:
        number: Of the claim, from 1.
        touched: When its holder last did, in nanoseconds of the file system's clock.
        holder: The machine and the process, as `_me` gives them; may be cut off.
    """

    number: int
    touched: int
    holder: str

    @property
    def dead(self) -> bool:
        """Whether its process is known to have ended; only that of this machine can be asked."""
        machine, _, process = self.holder.rpartition(" ")
        if not machine or machine != _machine() or not process.isdecimal():
            return False
        try:
            os.kill(int(process), 0)  # sends nothing
        except ProcessLookupError:
            return True
        except OSError:  # somebody else's
            return False
        return False


def newest(folder: Path, key: str) -> Mark | None:
    """The claim on `key` with the highest number; None where there is none."""
    numbers = [int(end) for path in folder.glob(f"{key}.*") if (end := path.suffix[1:]).isdecimal()]
    if not numbers:
        return None
    try:
        # opened, since network file systems may answer `stat` from memory
        with (folder / f"{key}.{max(numbers)}").open("rb") as file:
            touched = os.fstat(file.fileno()).st_mtime_ns
            return Mark(max(numbers), touched, file.read(1000).decode(errors="replace"))
    except FileNotFoundError:  # given back meanwhile
        return None


class Claim:
    """The right to work on `key`; in a `with` block it is kept alive, and given back at its end.

    Args:
        folder: of the claims.
        key: what is worked on, a name for files.
        number: of the claim.
    """

    def __init__(self, folder: Path, key: str, number: int) -> None:
        self._folder, self._key, self._number = folder, key, number
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    @classmethod
    def take(cls, folder: Path, key: str, given_up: int = 0) -> Self | None:
        """A claim on `key`; None where another process has one.

        Args:
            given_up: claims up to this number are of dead processes, as the caller knows.
        """
        mark = newest(folder, key)
        if mark is not None and mark.number > given_up and not mark.dead:
            return None
        number = 1 if mark is None else mark.number + 1
        try:
            with (folder / f"{key}.{number}").open("x") as file:
                file.write(f"{_machine()} {os.getpid()}")
        except FileExistsError:
            return None
        return cls(folder, key, number)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._path(self._number).unlink(missing_ok=True)

    @property
    def held(self) -> bool:
        """Whether nobody else took this process for dead."""
        return self._path(self._number).exists() and not self._path(self._number + 1).exists()

    def clear(self) -> None:
        """Remove those of dead processes too, once there is a result."""
        for number in range(self._number - 1, 0, -1):
            self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._key}.{number}"

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path(self._number))


@dataclass
class Watch:
    """Tells when others' claims are free, by what has changed since it last looked.

    Clocks of other machines are not asked: a claim is free when it was not touched for `SILENT`
    seconds of this machine's clock.
    """

    folder: Path
    _seen: dict[str, tuple[Mark, float]] = field(default_factory=dict)

    def free(self, key: str) -> int | None:
        """None while its holder lives; else up to which number claims are given up."""
        mark, now = newest(self.folder, key), time.monotonic()
        if mark is None or mark.dead:
            return 0 if mark is None else mark.number
        before, since = self._seen.get(key, (None, now))
        if mark != before:
            self._seen[key] = (mark, now)
            return None
        return mark.number if now - since > SILENT else None


def _machine() -> str:
    """This boot of this machine and its processes' name space; empty where they cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
