"""The efficacy benchmark takes a criterion of one's own; what it measures is for its pages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.efficacy import efficacy
from nnprune_backdoor.criteria import base
from nnprune_backdoor.errors import UnknownNameError
from nnprune_backdoor.selectors import TriggerGone

OWN = """
from helpers.criteria import Arbitrary
from nnprune_backdoor import register_criterion

register_criterion("mine")(type("Mine", (Arbitrary,), {}))
"""


def test_a_plugins_criterion_runs_by_the_rules_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base._CRITERIA, "_classes", dict(base._CRITERIA._classes))

    pools: list[tuple[Any, ...]] = []

    class Pool(efficacy.ProcessPoolExecutor):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            pools.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(efficacy, "ProcessPoolExecutor", Pool)
    plugin = tmp_path / "own.py"
    plugin.write_text(OWN)
    given = ["efficacy.py", "--models", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*given, "--methods", "mine", "rnp paper", "informed", "ft"])
    with pytest.raises(SystemExit):
        efficacy.main()
    assert "unknown criterion 'mine'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--plugin", str(plugin)])
    efficacy.main()  # there are no networks in the folder, so nothing to run
    (pool,) = pools
    assert pool[2:] == (efficacy.load_plugins, ([str(plugin)],)), "workers import it too"
    assert type(efficacy.criterion_of("mine")).__name__ == "Mine"
    assert efficacy.criterion_of("rnp paper") is efficacy.CRITERIA["rnp paper"]
    with pytest.raises(UnknownNameError):
        efficacy.criterion_of("nobody's")
    assert efficacy.selectors_of("mine") == {**efficacy.SELECTORS, "trigger": TriggerGone()}
    assert efficacy.selectors_of("anp") == efficacy.selectors_of("informed") == efficacy.SELECTORS
