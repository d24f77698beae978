"""What docs/pipelines.md shows is run as the shell it is: CI snippets, the hook, the settings."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from helpers.networks import build
from nnprune_backdoor.cli.main import _parser, main

pytestmark = pytest.mark.cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
SETTINGS = """
arch = "test_resnet"
clean = "images"
[scan]
images = 24
label = [0]
size = [32]
"""
# the command line, with searches of two steps
QUICK = """
import sys
from nnprune_backdoor.cli.main import main
from nnprune_backdoor.evidence import Scan, scanning
from nnprune_backdoor.triggers import Inversion, UniversalPerturbation

scanning.scan = Scan(
    search=Inversion(steps=2), universal=UniversalPerturbation(steps=2), starts=1
)
sys.exit(main())
"""


def block(kind: str, begins: str) -> str:
    """The code block of the page whose first line begins so."""
    found = re.findall(rf"^```{kind}\n(# {re.escape(begins)}.*?)^```$", PAGE, re.M | re.S)
    assert len(found) == 1, begins
    return str(found[0])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model, images and settings, and commands `nnprune-backdoor` and `pip` on the way."""
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(24):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{number}.png")
    torch.save(build("test_resnet").state_dict(), tmp_path / "model.safetensors")  # either is read
    (tmp_path / "nnprune-backdoor.toml").write_text(SETTINGS)
    (tmp_path / "quick.py").write_text(QUICK)
    command(tmp_path, "nnprune-backdoor", f'exec {sys.executable} quick.py "$@"')
    command(tmp_path, "pip", 'echo "$@" >> pip.txt')
    return tmp_path


def command(repository: Path, name: str, script: str) -> None:
    path = repository / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def shell(repository: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = f"{repository / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )


def github_steps() -> list[str]:
    workflow = yaml.safe_load(block("yaml", ".github/workflows/models.yml"))
    steps = workflow["jobs"]["scan"]["steps"]
    upload = steps[-1]
    assert upload["if"] == "always()" and upload["with"] == {"sarif_file": "scan.sarif"}
    return [step["run"] for step in steps if "run" in step]


@pytest.mark.slow
def test_the_github_steps(repository: Path) -> None:
    """As the runner does it: bash -e on each step, which ends with the first that fails."""
    codes = []
    for step in github_steps():
        done = shell(repository, "bash", "-e", "-c", step)
        codes.append(done.returncode)
    assert codes == [0, 4], done.stderr  # 24 images are too few to tell
    assert "verdict    cannot tell" in done.stdout
    log = json.loads((repository / "scan.sarif").read_text())
    assert log["runs"][0]["results"][0]["kind"] == "open"
    assert (repository / "pip.txt").read_text() == "install ./nnprune_backdoor\n"
    assert "`|| [ $? -eq 4 ]`" in PAGE.replace("\n", " ")
    command(repository, "nnprune-backdoor", "exit $CODE")
    for code, wanted in ((4, 0), (3, 1), (0, 0), (1, 1)):
        script = f"export CODE={code}\n{github_steps()[1].rstrip()} || [ $? -eq 4 ]"
        assert shell(repository, "bash", "-e", "-c", script).returncode == wanted


@pytest.mark.slow
def test_the_gitlab_script(repository: Path) -> None:
    """As the runner does it: all lines in one script that ends with the first that fails."""
    job = yaml.safe_load(block("yaml", ".gitlab-ci.yml"))["scan models"]
    done = shell(repository, "bash", "-eo", "pipefail", "-c", "\n".join(job["script"]))
    assert done.returncode == job["allow_failure"]["exit_codes"] == 4
    assert [(repository / name).exists() for name in job["artifacts"]["paths"]] == [True] * 2
    assert json.loads((repository / "scan.json").read_text())["outcome"] == "cannot tell"


def hook() -> dict[str, Any]:
    (found,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    shown = yaml.safe_load(block("yaml", ".pre-commit-config.yaml"))
    assert shown["repos"][0]["hooks"] == [{"id": found["id"]}]
    return dict(found)


def test_the_hook_scans_each_file(repository: Path) -> None:
    """As pre-commit does it: the entry, split, and the files after it."""
    entry = shlex.split(hook()["entry"])
    command(repository, "nnprune-backdoor", 'echo "$*" >> seen; case "$2" in bad*) exit 3;; esac')
    for files, code in ((["bad.pth", "b.pth"], 3), (["a b.pt", "b.pth"], 0), ([], 0)):
        (repository / "seen").write_text("")
        assert shell(repository, *entry, *files).returncode == code
        lines = (repository / "seen").read_text().splitlines()
        settings = "--config nnprune-backdoor.toml --quiet"
        assert lines == [f"scan {name} {settings}" for name in files]
    _parser().parse_args([*lines, *shlex.split(f"scan a.pth --clean x {settings}")])
    assert re.search(hook()["files"], "models/a.safetensors")
    assert not re.search(hook()["files"], "models/a.py")


def test_the_settings_of_the_page_are_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text(block("toml", "nnprune-backdoor.toml"))
    for name in ("scan", "purify", "evaluate"):
        words = [name, "--config", str(tmp_path / "c.toml"), "--print-config"]
        assert main(words) == 0
        assert tomllib.loads(capsys.readouterr().out)[name]["arch"] == "resnet18"


def test_the_commands_of_the_page_can_be_parsed() -> None:
    lines = re.findall(r"^nnprune-backdoor (.*)$", PAGE.replace("\\\n", " "), re.M)
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.partition(" > ")[0], comments=True)
        needed = ["--clean", "images"] if words[0] == "scan" else []  # else in the settings
        assert _parser().parse_args([*words, *needed]).command == words[0]


def test_formats_and_exit_codes_of_the_page_are_those_of_the_commands() -> None:
    for form in ("text", "json", "sarif", "markdown", "html", "cyclonedx", "in-toto"):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{form}`"))
        of = row.split("|")[3]
        for name, parser in _parser().commands.items():
            (action,) = (a for a in parser.actions if "--format" in a.option_strings)
            told = f"`{name}`" in of or of.strip() == "all"
            assert (form in (action.choices or ())) is (told and (form, name) != ("text", "report"))
    from nnprune_backdoor.cli.base import MODELSCAN, ExitCode

    rows = re.findall(r"^\| (\d+) \|.*\| (\d+) \|$", PAGE, re.M)
    assert {int(ours): int(theirs) for ours, theirs in rows} == {
        int(code): int(MODELSCAN.get(code, code)) for code in ExitCode
    }


def test_the_dockerfile_takes_files_that_exist_and_ends_without_rights() -> None:
    """It is not built here."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert "nnprune_backdoor" in copied
    assert not [name for name in copied if not (ROOT / name).exists()]
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users and users[-1] not in ("root", "0")
    (entry,) = (line for line in lines if line.startswith("ENTRYPOINT"))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"]
    assert json.loads(entry.removeprefix("ENTRYPOINT "))[0] == scripts.split("=")[0].strip()
    assert "docker build --tag nnprune-backdoor ." in PAGE
