"""The command line and README's blocks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nnprune_backdoor import __version__, list_criteria
from nnprune_backdoor.cli import main

ROOT = Path(__file__).parent.parent


def test_list_names_every_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in list_criteria():
        assert re.search(rf"^{name} ", printed, re.MULTILINE)
    for needs in ("rnp .*needs labelled", "clp .*no images", "bnp .*no labels, BatchNorm"):
        assert re.search(f"^{needs}", printed, re.MULTILINE)


def test_bad_names_fail_before_any_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--method", "rpn"]) == 1
    assert "did you mean 'rnp'" in capsys.readouterr().err
    assert main(["demo", "--attack", "badnet"]) == 1
    assert "did you mean 'badnets'" in capsys.readouterr().err


def test_misuse_exits_with_two() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--no-such-option"])
    assert stopped.value.code == 2


def test_demo_prints_a_table_and_draws_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One epoch of a tiny network: the plumbing, not the numbers."""
    picture = tmp_path / "pair.png"
    arguments = "demo --arch test_resnet --epochs 1 --method anp --clean-images 150 --quiet"
    arguments += " --selector accuracy"
    assert main([*arguments.split(), "--save", str(picture)]) == 0
    printed = capsys.readouterr().out
    for word in ("ACC", "ASR", "RA", "neurons silenced", "seconds"):
        assert word in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_readme_tells_what_ci_runs_and_every_criterion() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in list_criteria():
        assert f"| `{name}` |" in readme
    assert "<!-- test command -->" in readme
    assert "nnprune-backdoor demo" in readme


def test_version_is_in_the_changelog() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
