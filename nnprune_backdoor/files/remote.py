"""Addresses in place of paths: refused, with the lines that fetch by hand."""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath

from ..errors import CheckpointError

# "://" may have lost a slash, if the text went through a Path
_ADDRESS = re.compile(r"(\w[\w+.-]+):/{1,2}([^/].*)")

_HUB = "hf"


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError for hf://org/name and URLs, since nothing is ever downloaded."""
    match = _ADDRESS.fullmatch(os.fspath(path))
    if match is None or len(match[1]) < 2:  # one letter: a drive
        return
    scheme, rest = match[1], match[2].rstrip("/")
    if scheme == _HUB:
        lines = how_to_fetch(rest)
    else:
        file = PurePosixPath(rest.partition("?")[0]).name
        lines = (
            f"  curl -L -o {file} '{scheme}://{rest}'\n"
            f"  nnprune-backdoor scan {file} --arch NAME --clean DIR"
        )
    raise CheckpointError(f"{scheme}://{rest}: nothing is downloaded; fetch it yourself:\n{lines}")


def how_to_fetch(repository: str) -> str:
    """The two lines that fetch a model "org/name" from the hub and use it."""
    parts = repository.split("/")
    folder = parts[min(1, len(parts) - 1)]
    return (
        f"  hf download {'/'.join(parts[:2])} --local-dir {folder}\n"
        f"  nnprune-backdoor scan {folder} --arch hf --clean DIR"
    )
