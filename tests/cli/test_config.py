"""Settings from a TOML file, and shell completion."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nnprune_backdoor.cli.main import _parser, main

pytestmark = pytest.mark.cli

SHARED = """
seed = 3
size = [32, 40]
arch = "resnet18"
epochs = 4  # scan has no such option

[scan]
clean = "images"
label = [0, "bear"]
crop_pct = 0.9
quiet = true
seed = 4

[purify]
threshold = -0.5
set = ["ranking.stages=3", "a=b=c"]
overwrite = false
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(SHARED)
    return path


def settings(capsys: pytest.CaptureFixture[str], command: str, *words: object) -> dict[str, Any]:
    """What --print-config says of a command."""
    assert main([command, "--print-config", *map(str, words)]) == 0
    found = tomllib.loads(capsys.readouterr().out)
    assert found.keys() == {command}
    return dict(found[command])


def test_a_file_sets_options_and_the_command_line_decides(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = settings(capsys, "scan", "--config", config, "--images", 7, "model.pth")
    wanted = {
        "seed": 4, "size": [32, 40], "arch": "resnet18", "clean": "images", "label": ["0", "bear"],
        "crop-pct": 0.9, "quiet": True, "images": 7, "format": "text",
    }  # fmt: skip
    assert wanted.items() <= found.items()
    assert "epochs" not in found and "split" not in found
    found = settings(capsys, "scan", f"--config={config}", "--seed", 5, "--label", 2)
    assert (found["seed"], found["label"]) == (5, ["0", "bear", "2"]), "repeated options add up"
    found = settings(capsys, "purify", "model.pth", "--config", config)
    assert (found["seed"], found["threshold"], found["overwrite"]) == (3, -0.5, False)
    assert found["set"] == ["ranking.stages=3", "a=b=c"]
    assert settings(capsys, "attack", "--config", config)["epochs"] == 4


def test_the_file_is_followed_not_only_printed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", "--config", str(config), str(tmp_path / "none.pth")]) == 1
    assert "none.pth: no such file" in capsys.readouterr().err
    (tmp_path / "codes.toml").write_text('exit-codes = "modelscan"\nclean = "x"\n')
    codes = str(tmp_path / "codes.toml")
    assert main(["scan", "--config", codes, str(tmp_path / "none.pth")]) == 2, "ModelScan's failure"
    with pytest.raises(SystemExit) as stopped:
        main(["scan", "--config", codes])
    assert stopped.value.code == 4, "ModelScan's misuse"


@pytest.mark.parametrize("command", list(_parser().commands))
def test_what_is_printed_is_read_again(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    takes_plugins = "--plugin" in _parser().commands[command].format_help()
    words = ["--plugin", 'a"b\\c \u00e9\x7f'] if takes_plugins else []
    assert main([command, "--print-config", *words]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.toml").write_text(printed, encoding="utf-8")
    assert main([command, "--config", str(tmp_path / "again.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert tomllib.loads(printed)[command].get("plugin", []) == words[1:]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seed = ", "cannot be read"),
        ("sed = 3", "unknown setting 'sed'; did you mean 'seed'"),
        ("[scna]\nseed = 3", "unknown command 'scna'; did you mean 'scan'"),
        ("[scan]\nimgs = 3", "unknown setting of scan 'imgs'"),
        ("[scan]\nmodel = 'a.pth'", "unknown setting of scan 'model'"),
        ("config = 'other.toml'", "unknown setting 'config'"),
        ("quiet = 'yes'", "quiet: expected true or false, got 'yes'"),
        ("[scan]\nimages = true", "images: expected a text or a number, got True"),
        ("[scan]\nimages = [1, 2]", "images: expected a text or a number, got [1, 2]"),
        ("[scan.label]\na = 1", "label: expected a text or a number"),
    ],
)
def test_a_file_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    (tmp_path / "c.toml").write_text(content)
    assert main(["scan", "a.pth", "--config", str(tmp_path / "c.toml")]) == 2
    error = capsys.readouterr().err
    assert f"--config {tmp_path}" in error and said in error


def test_argparse_checks_values_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text("images = 'many'\nclean = 'x'")
    for words in (["--config", str(tmp_path / "c.toml")], ["--config"]):
        with pytest.raises(SystemExit) as stopped:
            main(["scan", "a.pth", *words])
        assert stopped.value.code == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err
    assert main(["scan", "a.pth", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: cannot be read" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("nnprune-backdoor sc", {"scan", "scan-many"}),
        ("nnprune-backdoor scan a.pth --form", {"--format"}),
        ("nnprune-backdoor scan a.pth --format s", {"sarif"}),
    ],
)
def test_a_shell_completes_words(tmp_path: Path, line: str, wanted: set[str]) -> None:
    """As bash asks after `register-python-argcomplete`."""
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_TYPE": "9", "COMP_LINE": line,
        "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words"),
    }  # fmt: skip
    command = [sys.executable, "-m", "nnprune_backdoor"]
    done = subprocess.run(
        command, env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""
    assert {word.strip() for word in (tmp_path / "words").read_text().split("\n")} == wanted
