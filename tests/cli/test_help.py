"""Help, and mistakes that argparse finds: quick, and without torch."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import pytest

from nnprune_backdoor import list_criteria, list_selectors
from nnprune_backdoor.attacks import list_attacks
from nnprune_backdoor.cli import main as entry
from nnprune_backdoor.cli import names
from nnprune_backdoor.cli.base import Commands, Result, add_command
from nnprune_backdoor.cli.main import _parser, main
from nnprune_backdoor.files.datasets import list_datasets

pytestmark = pytest.mark.cli

COMMANDS = (
    "demo", "list", "scan", "purify", "scan-many", "purify-many", "evaluate", "report", "attack",
)  # fmt: skip
HEAVY = ("torch", "numpy", "timm", "PIL", "safetensors")
# prints the help of every command, and which heavy packages that has loaded
ALL_HELP = """
import contextlib, io, json, sys
from nnprune_backdoor.cli.main import main
commands, heavy = json.loads(sys.argv[1])
texts = {}
for name in ["", *commands]:
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*name.split(), "--help"])
    texts[name] = text.getvalue()
print(json.dumps([texts, [name for name in heavy if name in sys.modules]]))
"""


def python(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_help_needs_no_torch_and_names_what_there_is() -> None:
    texts, loaded = json.loads(python("-c", ALL_HELP, json.dumps([COMMANDS, HEAVY])))
    assert loaded == []
    words = {name: set(text.replace(",", " ").split()) for name, text in texts.items()}
    assert words[""] >= set(COMMANDS)
    assert words["purify"] >= {*names.CRITERIA, *names.SELECTORS, *names.DATASETS[:-1]}
    assert words["demo"] >= {*names.CRITERIA, *names.ATTACKS}
    assert words["attack"] >= set(names.ATTACKS)
    assert words["evaluate"] >= set(names.ATTACKS)


def test_python_m_prints_the_same_help() -> None:
    assert python("-m", "nnprune_backdoor", "--help").startswith("usage: nnprune-backdoor ")


def test_names_in_help_are_those_of_the_registries() -> None:
    assert list(names.CRITERIA) == list_criteria()
    assert list(names.SELECTORS) == list_selectors()
    assert list(names.ATTACKS) == list_attacks()
    assert list(names.DATASETS) == list_datasets()


def test_an_interrupt_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Waits:
        @staticmethod
        def add(commands: Commands) -> None:
            add_command(commands, "wait", Waits.run, does="wait", example="wait")

        @staticmethod
        def run(options: Any) -> Result:
            raise KeyboardInterrupt

    monkeypatch.setattr(entry, "_COMMANDS", (Waits,))
    assert main(["wait"]) == 130
    assert tuple(capsys.readouterr()) == ("", "nnprune-backdoor: interrupted\n")


def test_help_fits_80_columns_and_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    parser = _parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert len(commands.choices) > 5
    for name, command in commands.choices.items():
        text = command.format_help()
        assert max(map(len, text.splitlines())) <= 80
        assert f"example:\n  nnprune-backdoor {name}" in text
        example = text.split("example:\n  nnprune-backdoor ")[1].replace("\\\n", " ")
        options = parser.parse_args(example.split())  # exits where it is no command line
        assert options.command == name
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("demo --epoch 3", "did you mean --epochs"),
        ("purify a.pth --clean b --out c extra", "unknown argument 'extra'"),
        ("purify a.pth", "--clean, --out"),
        ("purify a.pth --clean b --out c --removal some", "'exact', 'group', 'none'"),
        ("scan a.pth --clean b --images many", "invalid int value: 'many'"),
        (
            "scan a.pth --clean b --seed -1",
            "--seed: expected a whole number in [0, 2^63), got '-1'",
        ),
        (f"purify a.pth --clean b --out c --seed {2**63}", "--seed: expected a whole number"),
        ("demo --seed x", "--seed: expected a whole number"),
        ("sacn a.pth", "'scan'"),
        ("", "required: COMMAND"),
    ],
)
def test_misuse_exits_with_two(
    arguments: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert error in said
    assert said.startswith("usage: nnprune-backdoor")
    assert said.rstrip().endswith("--help")
