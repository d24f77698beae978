"""Jobs without a network, which note in a file that they ran, and commands that do them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnprune_backdoor.errors import CheckpointError, DataError
from nnprune_backdoor.fleets import Job, Outcome, run_many

HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Stub(Job):
    """Sleeps, and says that it did.

    Attributes:
        name: Of the model.
        log: File that gets a line, this name, when the work begins.
        seconds: To sleep.
        does: "work", "refuse", "break" with an error of no kind of ours, "run out" of memory,
            "say nothing" that JSON could hold, "die" with the whole process, or "vanish": there is
            nothing to read.
        evidence: That it finds.
        content: What its key is made of; its name if empty.
    """

    name: str
    log: str
    seconds: float = 0.0
    does: str = "work"
    evidence: float | None = 0.0
    content: str = ""

    def key(self) -> str:
        if self.does == "vanish":
            raise CheckpointError(f"{self.name}: no such file; check the path")
        return hashlib.sha256((self.content or self.name).encode()).hexdigest()

    def run(self, folder: Path, threads: int) -> Outcome:
        with Path(self.log).open("a") as file:
            file.write(f"{self.name}\n")  # short enough to be written as a whole
        time.sleep(self.seconds)
        match self.does:
            case "say nothing":
                return Outcome("", math.nan)
            case "refuse":
                raise DataError("these images do not fit")
            case "break":
                raise RuntimeError("a library's error\nof two lines")
            case "run out":
                raise MemoryError
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
        alarm = (self.evidence or 0) > 0.7
        says, unknown = f"looked at {self.name}", self.evidence is None
        return Outcome(says, self.evidence, alarm, {"target": 3}, {"n": [1, 2]}, unknown)


def ran(log: Path) -> list[str]:
    """The names of those that began, once for each time."""
    return log.read_text().splitlines() if log.exists() else []


def started(out: Path, log: Path, count: int, seconds: float, **how: Any) -> subprocess.Popen[str]:
    """A process that does so many stubs by workers of its own, and prints how many it did."""
    given = json.dumps([str(out), str(log), count, seconds, how])
    code = "import sys; from helpers.fleets import begin; begin(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    return subprocess.Popen(
        [sys.executable, "-c", code, given],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that an interrupt can be sent to all of it
    )


def stubs(log: Path, count: int, seconds: float = 0.0) -> list[Stub]:
    return [Stub(f"model{number}", str(log), seconds) for number in range(count)]


def begin(given: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    out, log, count, seconds, how = json.loads(given)
    fleet = run_many(stubs(Path(log), count, seconds), out, progress=False, **how)
    print(fleet.worked)
