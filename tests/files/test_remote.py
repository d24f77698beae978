"""Addresses are refused, and the answer says how to fetch by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnprune_backdoor import load_model, load_purified
from nnprune_backdoor.cli.main import main
from nnprune_backdoor.errors import CheckpointError
from nnprune_backdoor.files.remote import refuse_address


@pytest.mark.parametrize(
    ("address", "lines"),
    [
        (
            "hf://org/name",
            [
                "  hf download org/name --local-dir name",
                "  nnprune-backdoor scan name --arch hf --clean DIR",
            ],
        ),
        (
            "https://example.org/a/model.pth?download=true",
            [
                "  curl -L -o model.pth 'https://example.org/a/model.pth?download=true'",
                "  nnprune-backdoor scan model.pth --arch NAME --clean DIR",
            ],
        ),
    ],
)
def test_addresses_are_refused_with_two_lines(
    address: str, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for call in (
        lambda: load_model(address, "resnet18"),
        lambda: load_model(address, "hf"),
        lambda: load_purified(address),
        lambda: refuse_address(Path(address)),  # which has lost a slash
    ):
        with pytest.raises(CheckpointError, match="nothing is downloaded") as caught:
            call()
        assert str(caught.value).splitlines()[1:] == lines
    for command in ("scan", "evaluate"):
        assert main([command, address, "--arch", "hf", "--clean", str(tmp_path)]) == 1
        assert lines[0] in capsys.readouterr().err


@pytest.mark.parametrize("path", ["model.pth", "a/b", "/a/b:c", "C:/a", r"C:\a", "a:b"])
def test_paths_are_no_addresses(path: str) -> None:
    refuse_address(path)


def test_a_name_of_the_hub_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hf download org/name --local-dir name"):
        load_model("org/name", "hf")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "none", "hf")
