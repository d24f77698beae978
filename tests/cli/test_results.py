"""What other programs get of a run: formats, reports beside it, exit codes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.networks import build
from helpers.results import diagnosis, suspicion
from nnprune_backdoor import load_purified
from nnprune_backdoor.cli.main import main
from nnprune_backdoor.errors import DataError, UnsupportedModelError
from nnprune_backdoor.evidence import scanning

pytestmark = pytest.mark.cli

PURIFY = ["--method", "clp", "--fraction", "0.3", "--size", "32", "--crop-pct", "1", "--quiet"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `models/a.pth`, and images in `clean`."""
    root = tmp_path_factory.mktemp("root")
    (root / "models").mkdir()
    torch.save(
        {"arch": "test_resnet", "model": build("test_resnet").state_dict()}, root / "models/a.pth"
    )
    (root / "clean").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / "clean" / f"{number}.png")
    return root


@pytest.fixture
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In that folder."""
    monkeypatch.chdir(root)
    return root


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The JSON object that a command prints."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_purification_in_every_format(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ends = (".html", ".md", ".json", ".sarif", ".cdx.json", ".intoto.json")
    reports = [option for end in ends for option in ("--report", tmp_path / f"r{end}")]
    found = printed(
        capsys, "purify", "models/a.pth", "--clean", "clean", "--out", out, *PURIFY, *reports,
        "--format", "json",
    )  # fmt: skip
    pages = {end: (tmp_path / f"r{end}").read_text() for end in ends}
    assert pages[".html"].startswith("<!doctype html>")
    assert "Before and after on a few images" in pages[".html"]
    assert pages[".md"].startswith("# Purification report\n\n**")
    assert json.loads(pages[".json"]) == found
    assert found["model"]["file"] == "models/a.pth"
    assert found["model"]["sha256"] == sha256(here / "models" / "a.pth")
    assert found["output"]["folder"] == "out", "the place of the folder is nobody else's business"
    assert found["output"]["files"] == {path.name: sha256(path) for path in out.iterdir()}
    assert (
        json.loads(pages[".sarif"])["runs"][0]["artifacts"][0]["location"]["uri"] == "models/a.pth"
    )
    bom = json.loads(pages[".cdx.json"])
    assert bom["metadata"]["component"]["hashes"][0]["content"] == sha256(out / "model.safetensors")
    statement = json.loads(pages[".intoto.json"])
    assert statement["predicate"] == found
    # the same again from the folder, but for how the folder was named
    assert printed(capsys, "report", out, "--format", "json") == found
    assert printed(capsys, "report", out, "--format", "cyclonedx") == bom
    assert printed(capsys, "report", out, "--format", "in-toto") == statement
    assert printed(capsys, "report", out, "--format", "sarif") == json.loads(pages[".sarif"])
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == pages[".md"]


def test_a_report_without_clean_images(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["models/a.pth", "--clean", "clean", "--out", str(tmp_path / "out"), *PURIFY]
    assert main(["purify", *words, "--no-examples", "--format", "html"]) == 0
    page = capsys.readouterr().out
    assert "Neurons by layer" in page
    assert "Before and after on a few images" not in page


def test_the_card_beside_the_weights_is_no_hindrance(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["purify", "models/a.pth", "--clean", "clean", "--out", str(out), *PURIFY]
    assert main(command) == 0
    card = (out / "README.md").read_text()
    assert sha256(out / "model.safetensors") in card
    assert sha256(here / "models" / "a.pth") in card
    assert str(tmp_path) not in card
    assert "models/a.pth" in card
    images = torch.rand(2, 3, 32, 32)
    before = load_purified(out)(images)
    again = ["purify", str(out), "--clean", "clean", "--out", str(tmp_path / "twice"), *PURIFY]
    assert main(again) == 0
    assert main([*command, "--overwrite"]) == 0
    assert torch.equal(before, load_purified(out)(images))


OURS = {"evidence": 3, "none": 0, "undecided": 4, "too few": 4, "failed": 1, "unsupported": 5}
THEIRS = {"evidence": 1, "none": 0, "undecided": 3, "too few": 3, "failed": 2, "unsupported": 3}


@pytest.mark.parametrize("ends", OURS)
def test_exit_codes_of_a_scan(
    here: Path, monkeypatch: pytest.MonkeyPatch, ends: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes: dict[str, Any] = {
        "evidence": lambda: diagnosis(True),
        "none": lambda: diagnosis(False),
        "undecided": lambda: diagnosis(False, suspicions=(suspicion(False, universal=0.95),)),
        "too few": lambda: diagnosis(True, cannot_tell="too few"),
    }

    def found(*_: Any, **__: Any) -> Any:
        if ends == "failed":
            raise DataError("no")
        if ends == "unsupported":
            raise UnsupportedModelError("no")
        return outcomes[ends]()

    monkeypatch.setattr(scanning, "scan", found)
    command = ["scan", "models/a.pth", "--clean", "clean", "--size", "32", "--quiet"]
    assert main(command) == OURS[ends]
    assert main([*command, "--exit-codes", "modelscan"]) == THEIRS[ends]
    assert main([*command, "--exit-codes=modelscan", "--format", "sarif"]) == THEIRS[ends]


def test_exit_codes_of_misuse(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = ["scan", "models/a.pth", "--exit-codes", "modelscan"]
    for line, ours in ((scan[:2], 2), (scan, 4), ([*scan, "--clen", "clean"], 4)):
        with pytest.raises(SystemExit) as stopped:
            main(line)  # what argparse finds
        assert stopped.value.code == ours
    assert main([*scan, "--clean", "clean", "--report", "x.txt"]) == 4
    with pytest.raises(SystemExit) as stopped:
        main([*scan, "--help"])
    assert stopped.value.code == 0


def test_a_scan_prints_each_format(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scanning, "scan", lambda *_, **__: diagnosis(True))
    command = ["scan", "models/a.pth", "--clean", "clean", "--size", "32", "--quiet", "--format"]
    begins = {
        "text": "verdict    evidence of a backdoor",
        "json": '{"schema_version": 1, "kind": "scan"',
        "sarif": '{\n "$schema": ',
        "markdown": "# Scan for a backdoor\n\n**Evidence of a backdoor with target 1",
        "html": "<!doctype html>",
    }
    for form, begin in begins.items():
        assert main([*command, form]) == 3
        captured = capsys.readouterr()
        assert captured.out.startswith(begin)
        assert captured.err == ""
    with pytest.raises(SystemExit):
        main([*command, "cyclonedx"])  # a scan makes nothing to bill
    assert main([*command, "text", "--report", "x.cdx.json"]) == 2
