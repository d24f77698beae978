"""Write a file whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from ..errors import OutputError


def draft_of(path: Path) -> Path:
    """A new name beside a file's, under which it is written first."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write the file, or leave what was there before where that fails; raises OutputError."""
    path = Path(path)
    draft = draft_of(path)
    try:
        with draft.open("xb") as file:  # x: never through a link that somebody put there
            file.write(content)
        draft.replace(path)
    except (OSError, UnicodeError) as error:
        raise OutputError(
            f"{path}: cannot be written ({error}); free space on the disk, or give another name"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
