"""Scores and the selection in files of the caller's: read where they are there, else written."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ..core.neuron_files import check_made_from
from ..core.scores import ChannelScores, Selection
from ..core.sites import Site
from ..errors import OutputError

_T = TypeVar("_T", ChannelScores, Selection)


@dataclass(frozen=True)
class KeptIn:
    """Files in which scores and the selection are kept; None for none."""

    scores: str | os.PathLike[str] | None = None
    selection: str | os.PathLike[str] | None = None


class Kept:
    """What was there when a purification began, and where the rest is to be written.

    Args:
        files: where scores and the selection are kept.
        sites: the layers that are scored.
        made_from: what scores depend on here.
        selected_from: what a selection depends on here.

    Raises:
        DataError: a file is of other scores, or of another selection, or is damaged.
        OutputError: a file is missing, and so is the folder that it would be written to.
    """

    def __init__(
        self,
        files: KeptIn,
        sites: tuple[Site, ...],
        made_from: dict[str, str],
        selected_from: dict[str, str],
    ) -> None:
        self._files, self._sites, self._selected_from = files, sites, selected_from
        self.scores = self._read(ChannelScores, files.scores, made_from)
        self.selection = self._read(Selection, files.selection, selected_from)

    def _read(
        self, kind: type[_T], file: str | os.PathLike[str] | None, wanted: dict[str, str]
    ) -> _T | None:
        if file is None:
            return None
        if not (path := Path(file)).exists():
            if not path.parent.is_dir():
                raise OutputError(f"{path}: no such folder {path.parent}; create it first")
            return None
        found = kind.load(path)
        there = {**found.made_from, "layers": repr(found.sites)}
        check_made_from(str(path), there, {**wanted, "layers": repr(self._sites)})
        return found

    def keep_scores(self, scores: ChannelScores) -> None:
        """Write them, if that was asked for; raises OutputError."""
        if self._files.scores is not None:
            scores.save(self._files.scores)

    def keep_selection(self, selection: Selection) -> Selection:
        """Write it, if that was asked for; what comes back says what it was made from."""
        selection = replace(selection, made_from=self._selected_from)
        if self._files.selection is not None:
            selection.save(self._files.selection)
        return selection
