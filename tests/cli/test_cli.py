"""The command line, from image files to reports."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from helpers.images import write_mnist
from helpers.settings import shorten_scan, shorten_training
from nnprune_backdoor import (
    Preprocessing,
    __version__,
    demo,
    list_criteria,
    load_weights,
    read_images,
    read_report,
)
from nnprune_backdoor.attacks import create_attack
from nnprune_backdoor.cli import choices, inputs, listing
from nnprune_backdoor.cli.base import write_page
from nnprune_backdoor.cli.main import main
from nnprune_backdoor.core.held_out import HeldOut
from nnprune_backdoor.core.scores import ChannelScores, Selection, lowest
from nnprune_backdoor.criteria import base
from nnprune_backdoor.files import read_record
from nnprune_backdoor.selectors import LowestCount
from nnprune_backdoor.utils.whole_file import write_whole

pytestmark = pytest.mark.cli

ROOT = Path(__file__).parents[2]


def test_list_names_every_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in list_criteria():
        assert re.search(rf"^{name} ", printed, re.MULTILINE)
    assert max(map(len, printed.splitlines())) <= 80
    assert "cost: not known" not in printed, "say what it costs"
    methods = answer(capsys, "list --format json")["methods"]
    assert methods.keys() == set(list_criteria())
    for name, needs in (("rnp", "labelled clean"), ("clp", "no images"), ("bnp", "BatchNorm")):
        assert needs in methods[name]["needs"]


def test_bad_names_fail_before_any_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--method", "rpn"]) == 2
    assert "did you mean 'rnp'" in capsys.readouterr().err
    assert main(["demo", "--attack", "badnet"]) == 2
    assert "did you mean 'badnets'" in capsys.readouterr().err


HTML = "<img src=x onerror=alert(1)>"  # a class of that name
NAMES = ("apple", "bear", HTML, "door")
SMALL = "--size 32 --crop-pct 1 --quiet"
CHEAP = f"{SMALL} --method clp --count 3"


def run(arguments: str, *paths: Path) -> int:
    """`{}` in the arguments stands for the paths, in turn."""
    left = iter(paths)
    return main([str(next(left)) if word == "{}" else word for word in arguments.split()])


def answer(capsys: pytest.CaptureFixture[str], arguments: str, *paths: Path) -> dict[str, Any]:
    """What --format json prints: one object, nothing else on standard output."""
    capsys.readouterr()
    assert run(arguments, *paths) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """All that went to standard error, and that nothing went elsewhere."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


class Shop:
    """Image folders, and a network with a backdoor that `attack` planted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.photos = self.write("photos", 20, seed=0)
        self.clean = self.write("clean", 12, seed=1)
        self.flat = root / "flat"
        self.flat.mkdir()
        for number, path in enumerate(sorted(self.clean.rglob("*.png"))):
            (self.flat / f"{number:03}.png").write_bytes(path.read_bytes())
        self.weights = root / "backdoored.safetensors"
        attack = (
            f"attack {{}} --arch test_resnet {SMALL} --epochs 12 --lr 0.05 --batch-size 16 "
            "--target bear --rate 0.3 --trigger-set size=6 --out {} --format json"
        )
        assert run(attack, self.photos, self.weights) == 0
        self.stranger = root / "stranger.pth"
        state = dict(load_weights(self.weights))
        torch.save({"arch": "test_resnet", "state_dict": state}, self.stranger)

    def write(self, name: str, each: int, seed: int) -> Path:
        """A pattern a class, under noise, as PNG files."""
        generator, patterns = np.random.default_rng(seed), np.random.default_rng(9)
        for label in NAMES:
            pattern = patterns.integers(40, 215, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
            (self.root / name / label).mkdir(parents=True)
            for number in range(each):
                pixels = (pattern + generator.normal(0, 20, pattern.shape)).clip(0, 255)
                path = self.root / name / label / f"{number:02}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
        return self.root / name


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def purified(shop: Shop) -> Path:
    out = shop.root / "purified"
    assert run(f"purify {{}} --clean {{}} --out {{}} {CHEAP}", shop.stranger, shop.clean, out) == 0
    return out


@pytest.mark.slow
def test_from_a_checkpoint_and_png_files_to_a_folder_and_a_page(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    before = shop.stranger.read_bytes()
    arguments = f"purify {{}} --clean {{}} --out {{}} --report {{}} {CHEAP}"
    assert run(arguments, shop.stranger, shop.clean, out, page) == 0
    printed = capsys.readouterr().out
    assert "3 of " in printed
    assert f"saved      {out}" in printed
    assert shop.stranger.read_bytes() == before
    record = read_record(out)
    assert record["architecture"]["name"] == "test_resnet"
    assert record["source"]["checkpoint"] == "stranger.pth"
    assert record["source"]["checkpoint sha256"] == hashlib.sha256(before).hexdigest()
    assert record["source"]["classes"] == sorted(NAMES)
    assert record["source"]["preprocessing"]["size"] == [32, 32]
    assert read_report(out).source == record["source"]
    assert str(tmp_path) not in page.read_text(), "a page may be passed on"
    html = page.read_text()
    assert "data:image/png" in html
    assert HTML not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html


@pytest.mark.slow
def test_the_report_of_a_folder(
    purified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("report {}", purified) == 0
    markdown = capsys.readouterr().out
    assert "Where it came from" in markdown
    assert HTML not in markdown
    found = answer(capsys, "report --format json {}", purified)
    assert found["report"] == read_report(purified).to_dict()
    assert run("report {} --format html", purified) == 0
    page = capsys.readouterr().out
    assert HTML not in page
    assert "No pictures" in page and page.isascii()


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: report.pop("limits"),
        lambda report: report.update(curve={}),
        lambda report: report.update(format=2),
        lambda report: report.update(other=1),
        lambda report: report["given"].clear(),
        lambda report: report.update(layers=[1]),
    ],
)
def test_a_damaged_report(
    purified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    report = json.loads((purified / "report.json").read_text())
    damage(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert run("report {}", tmp_path) == 1
    assert "report.json: " in said(capsys)


@pytest.mark.slow
def test_the_attack_took_and_the_folder_is_evaluated_like_a_checkpoint(
    shop: Shop, purified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a trigger by name, and with the same stamped images from a folder."""
    named = f"evaluate {{}} --clean {{}} --trigger badnets --target bear {SMALL} --format json"
    named += " --trigger-set size=6"
    rates = answer(capsys, named, shop.stranger, shop.clean)
    assert rates["target"] == sorted(NAMES).index("bear")
    assert rates["ACC"]["share"] > 0.9
    assert rates["ASR"]["share"] > 0.9
    assert rates["ASR"]["count"] == 36, "images of the target are left out"
    plain = Preprocessing(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    images = read_images(shop.clean, plain)
    stamped = create_attack("badnets", size=6)(plain.pixels(images.data.images))
    for name, pixels in zip(images.files, stamped, strict=True):
        path = tmp_path / "stamped" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy()).save(path)
        (tmp_path / "loose").mkdir(exist_ok=True)
        (tmp_path / "loose" / name.replace("/", "-")).write_bytes(path.read_bytes())
    given = f"evaluate {{}} --triggered {{}} --target bear {SMALL} --format json"
    folder = answer(capsys, given, shop.stranger, tmp_path / "stamped")
    names = ("ASR", "RA", "target", "model")
    assert {name: folder[name] for name in names} == {name: rates[name] for name in names}
    assert "ACC" not in folder
    assert rates["model"]["sha256"] == hashlib.sha256(shop.stranger.read_bytes()).hexdigest()
    assert rates["images"].keys() == {"clean"} and folder["images"].keys() == {"triggered"}
    assert (rates["kind"], rates["seed"], rates["schema_version"]) == ("evaluate", 0, 1)
    assert rates["settings"] == {"trigger": "badnets", "trigger-set": ["size=6"]}
    loose = given.replace("bear", str(rates["target"]))
    found = answer(capsys, loose, shop.stranger, tmp_path / "loose")
    assert "RA" not in found
    assert found["ASR"]["count"] == 48
    # a purified folder knows its preprocessing and its classes
    again = "evaluate {} --clean {} --trigger badnets --target bear --quiet --format json"
    assert answer(capsys, again, purified, shop.clean)["ACC"]["count"] == 48


def test_an_attack_on_a_model_that_is_there(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        f"attack {{}} --model {{}} {SMALL} --epochs 1 --batch-size 16 --out {{}} --format json"
    )
    arguments += " --trigger blended --rate 0.2"
    out = tmp_path / "b.safetensors"
    found = answer(capsys, arguments, shop.photos, shop.stranger, out)
    assert found["ACC"]["count"] == 16
    assert load_weights(out).keys() == load_weights(shop.weights).keys()


@pytest.mark.slow
def test_the_plain_command_is_the_plain_call(
    shop: Shop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten_training(monkeypatch)
    arguments = f"purify {{}} --clean {{}} --out {{}} {SMALL} --format json"
    report = answer(capsys, arguments, shop.stranger, shop.flat, tmp_path / "out")["report"]
    assert report["criterion"]["name"] == "RNP" and report["given"]["repair"] == "distil"
    assert report["selection"]["selector"] == "Agreeing"
    assert any("took the model's own answers" in line for line in report["cautions"])
    arguments = f"purify {{}} --clean {{}} --out {{}} {SMALL} --max-drop 0.1"
    assert run(arguments, shop.stranger, shop.flat, tmp_path / "other") == 2
    assert "--max-drop needs --selector" in said(capsys)


@pytest.mark.slow
def test_images_without_labels(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for choice, option in (
        ("--method rnp --selector accuracy", "--selector accuracy"),
        ("--method clp --selector trigger", "--selector trigger"),
        ("--method tac --count 2 --repair unlearn", "--repair unlearn"),
    ):
        arguments = f"purify {{}} --clean {{}} --out {{}} {SMALL} {choice}"
        assert run(arguments, shop.stranger, shop.flat, out) == 2
        assert f"{option} needs labels" in said(capsys)
        assert not out.exists()
    arguments = (
        f"purify {{}} --clean {{}} --out {{}} {SMALL} --method fp --fraction 0.02 --format json"
    )
    found = answer(capsys, arguments, shop.stranger, shop.flat, out)
    assert found["report"]["accuracy"] is None
    assert found["report"]["selection"]["neurons"] > 0
    assert run(f"evaluate {{}} --clean {{}} {SMALL}", shop.stranger, shop.flat) == 2
    assert "no class folders" in said(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["unlearn", "distil"])
def test_repair_trains_what_is_left(
    shop: Shop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    repair: str,
) -> None:
    shorten_training(monkeypatch)
    quick = "--count 2 --method tac --set target=0 --set steps=10 --set min_success=0 --format json"
    arguments = f"purify {{}} --clean {{}} --out {{}} {SMALL} {quick}"
    plain, repaired = (tmp_path / name for name in ("plain", "repaired"))
    answer(capsys, f"{arguments} --repair none", shop.stranger, shop.clean, plain)
    arguments += f" --repair {repair}"
    report = answer(capsys, arguments, shop.stranger, shop.clean, repaired)["report"]
    assert report["given"]["repair"] == repair
    assert report["size"]["drift"] <= 1e-4
    one, other = (load_weights(folder / "model.safetensors") for folder in (plain, repaired))
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_hyperparameters_are_typed(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        f"purify {{}} --clean {{}} --out {{}} {SMALL} --count 2 --method rnp --format json --paper"
    )
    arguments += " --set unlearning.epochs=3 --set unlearning.stop=none"
    arguments += " --set unlearning.milestones=1,2 --set unlearning.missed=flag"
    arguments += " --set ranking.steps=2 --set ranking.epochs=none --images 24"
    report = answer(capsys, arguments, shop.stranger, shop.clean, tmp_path / "out")["report"]
    settings = report["criterion"]["settings"]
    wanted = {"epochs": 3, "stop": None, "milestones": [1, 2], "missed": "flag", "lr": 0.01}
    assert wanted.items() <= settings["unlearning"].items(), "the learning rate of the paper"
    assert {"steps": 2, "epochs": None}.items() <= settings["ranking"].items()
    assert report["given"]["images"] == 24


IDLE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar, Self
import torch
from nnprune_backdoor import Criterion, register_criterion
from nnprune_backdoor.core.scores import ChannelScores

@register_criterion("idle_by_its_long_name")
@dataclass(frozen=True, kw_only=True)
class Idle(Criterion):
    reference: ClassVar[str] = "no paper"
    needs_labels: ClassVar[bool] = False
    shift: float = 0.0

    @classmethod
    def paper(cls) -> Self:
        return cls()

    def score(self, model, clean, sites, generator, progress):
        total = sum(site.channels for site in sites)
        return ChannelScores(sites, torch.arange(total) + self.shift, repr(self))
"""


@pytest.mark.slow
def test_a_plugins_criterion_goes_by_its_name(
    shop: Shop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered = dict(base._CRITERIA._classes)
    monkeypatch.setattr(base._CRITERIA, "_classes", registered)  # not for the other tests
    plugin = tmp_path / "random.py"  # a file may be called as another module is
    plugin.write_text(IDLE)
    out = tmp_path / "out"
    arguments = f"purify {{}} --clean {{}} --out {{}} {SMALL} --count 3 --format json"
    arguments += " --method idle_by_its_long_name --set shift=2"
    assert run(arguments, shop.stranger, shop.clean, out) == 2
    assert "unknown criterion" in said(capsys)
    arguments += " --plugin {}"
    report = answer(capsys, arguments, shop.stranger, shop.clean, out, plugin)["report"]
    assert report["criterion"]["settings"] == {"shift": 2.0}
    assert report["selection"]["neurons"] == 3
    assert run("list --plugin {} --plugin {}", plugin, plugin) == 0  # imported once
    assert re.search(r"^idle_by_its_long_name\n +no paper$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "by_its_name.py").write_text(IDLE.replace("idle_by", "other_by"))
    assert run("list --plugin by_its_name") == 0
    assert "other_by_its_long_name" in registered


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (None, "FileNotFoundError"),
        ("import there_is_none", "No module named 'there_is_none'"),
        ("def", "SyntaxError"),
        ("raise SystemExit", "SystemExit: no message"),
        (IDLE.replace("idle_by_its_long_name", "rnp"), "'rnp' is registered already"),
    ],
)
def test_a_plugin_that_cannot_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str | None, error: str
) -> None:
    plugin = tmp_path / "plugin.py"
    if code is not None:
        plugin.write_text(code)
    for _ in range(2):  # nothing is left of the first
        assert run("list --plugin {}", plugin) == 2
        message = said(capsys)
        assert f"--plugin {plugin}: cannot be imported" in message
        assert error in message
    assert run("list --plugin there_is_none") == 2
    assert "No module named 'there_is_none'" in said(capsys)


BAD = {
    "--method rpn": "did you mean 'rnp'",
    "--method rnp --set unlearning.epoch=3": "did you mean 'unlearning.epochs'",
    "--method rnp --set epochs=3": "did you mean 'unlearning.epochs'",
    "--method rnp --set unlearning.epochs=many": "expected a whole number for unlearning.epochs",
    "--method rnp --set unlearning.check=both": "expected 'step' or 'epoch' for unlearning.check",
    "--method rnp --set ranking=masks": "set one of its fields, such as ranking.stages=VALUE",
    "--method anp --set project_noise=1": "expected true or false for project_noise",
    "--method rnp --set unlearning.epochs": "expected NAME=VALUE",
    "--selector acuracy": "did you mean 'accuracy'",
    "--selector count": "--selector count needs --count",
    "--selector accuracy --count 3": "--count is not a setting of the selector 'accuracy'",
    "--count 3 --fraction 0.1": "belong to different selectors (count, fraction)",
    "--method rnp --count 3 --repair unlearn": "needs a recovered trigger",
    "--report page.txt": "expected a name ending in one of .json, .sarif, .md, .html, .cdx.json",
    "--device gpu": "--device gpu: not usable here",
    "--arch resnet_18": "did you mean 'resnet18",
    "--size 1 2 3": "one side, or height and width",
}


@pytest.mark.parametrize("options", BAD)
def test_misuse_of_purify(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str
) -> None:
    out = tmp_path / "out"
    assert (
        run(f"purify {{}} --clean {{}} --out {{}} {options}", shop.stranger, shop.clean, out) == 2
    )
    error = said(capsys)
    assert BAD[options] in error
    assert "see: nnprune-backdoor purify --help" in error
    assert not out.exists()


@pytest.mark.slow
def test_more_misuse(shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, there = tmp_path / "a.safetensors", tmp_path / "there.safetensors"
    there.write_text("x")
    bare = tmp_path / "bare.pth"
    torch.save(dict(load_weights(shop.weights)), bare)
    for arguments, paths, error in (
        ("evaluate {}", (shop.stranger,), "nothing to measure"),
        (
            "evaluate {} --clean {} --target 1",
            (shop.stranger, shop.clean),
            "give --trigger NAME or --triggered DIR",
        ),
        ("evaluate {} --triggered {}", (shop.stranger, shop.clean), "give --target LABEL"),
        ("evaluate {} --trigger badnets --target 1", (shop.stranger,), "give --clean DIR too"),
        ("evaluate {} --clean {}", (bare, shop.clean), "give --arch NAME"),
        (
            f"evaluate {{}} --clean {{}} --trigger badnets --target beer {SMALL}",
            (shop.stranger, shop.clean),
            "did you mean 'bear'",
        ),
        (
            f"evaluate {{}} --clean {{}} --trigger badnets --target 4 {SMALL}",
            (shop.stranger, shop.clean),
            "labels 0 to 3",
        ),
        ("attack {} --out {}", (shop.photos, out), "give --arch NAME"),
        ("attack {} --arch test_resnet --out a.pth", (shop.photos,), ".safetensors"),
        ("attack {} --arch test_resnet --out {}", (shop.photos, there), "exists already"),
        ("attack {} --arch test_resnet --rate 2 --out {}", (shop.photos, out), "share in (0, 1]"),
        (
            f"attack {{}} --arch test_resnet --out {{}} {SMALL}",
            (shop.flat, out),
            "no class folders",
        ),
        (
            "attack {} --arch test_resnet --trigger-set sise=3 --out {}",
            (shop.photos, out),
            "'size'",
        ),
    ):
        assert run(arguments, *paths) == 2, arguments
        assert error in said(capsys)
        assert not out.exists()


def test_failures_exit_with_one(
    shop: Shop, purified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"purify {{}} --clean {{}} --out {{}} {CHEAP}"
    inside = tmp_path / "x.html"
    (tmp_path / "file").write_text("x")
    assert run(arguments, shop.stranger, shop.clean, purified) == 2
    assert "is not empty; give another folder, or --overwrite" in said(capsys)
    for paths, error in (
        ((tmp_path / "none.pth", shop.clean, tmp_path / "out"), "no such file"),
        ((shop.stranger, tmp_path / "none", tmp_path / "out"), "no such folder"),
        ((shop.stranger, shop.clean, tmp_path / "file"), "a file is there"),
    ):
        assert run(arguments, *paths) == 1
        assert error in said(capsys)
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "two" / name / "x.png")
    assert run(arguments, shop.stranger, tmp_path / "two", tmp_path / "out") == 1
    assert "the model has 4 classes" in said(capsys)
    assert run(f"{arguments} --report {{}}", shop.stranger, shop.clean, tmp_path, inside) == 2
    assert "lies in --out" in said(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "two"]


@pytest.mark.slow
def test_a_reader_that_leaves(tmp_path: Path) -> None:
    """As in `nnprune-backdoor list | head -1`: no traceback, no message."""
    code = "from nnprune_backdoor.cli.main import main; raise SystemExit(main(['list']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
def test_a_run_replaces_its_own_folder_on_request(shop: Shop, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = f"purify {{}} --clean {{}} --out {{}} {CHEAP}"
    assert run(arguments, shop.stranger, shop.clean, out) == 0
    assert run(f"{arguments} --overwrite --seed 1", shop.stranger, shop.clean, out) == 0
    assert read_report(out).seed == 1


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.slow
def test_a_scan_says_what_it_found_by_its_exit_code(
    shop: Shop,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shorten_scan(monkeypatch)
    options = f"scan {{}} --clean {{}} {SMALL} --images 40 --label 0 --label 2"
    page = tmp_path / "scan.html"
    code = run(f"{options} --format json --report {{}}", shop.stranger, shop.clean, page)
    found = json.loads(capsys.readouterr().out)
    assert page.read_text().count("data:image/png;base64,") >= 2
    assert code == {"evidence": 3, "no evidence": 0, "cannot tell": 4}[found["outcome"]]
    found = found["diagnosis"]
    assert {item["label"] for item in found["suspicions"]} == {0, 2}
    assert {trigger["target"] for trigger in found["triggers"]} == {0, 1, 2, 3}  # to compare with
    assert "too few" in found["cannot_tell"]
    assert run(options.replace("--label 2", "--label pear"), shop.stranger, shop.clean) == 2
    assert "did you mean" in capsys.readouterr().err
    assert run(options.replace("--label 2", "--label 7"), shop.stranger, shop.clean) == 2
    assert "--label 7: no such label" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["purify", "evaluate", "scan"])
def test_a_malicious_checkpoint_does_nothing(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    sprung, out = tmp_path / "sprung", tmp_path / "out"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "x": Trap(sprung)}, tmp_path / "evil.pth")
    arguments = f"{command} {{}} --arch test_resnet --clean {{}} {SMALL}"
    arguments += " --out {}" if command == "purify" else ""
    assert run(arguments, tmp_path / "evil.pth", shop.clean, out) == 1
    assert "asks for '__builtin__.getattr', which runs code" in said(capsys)
    assert not sprung.exists()
    assert not out.exists()


def test_names_from_a_file_cannot_steer_the_terminal(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steer = "\x1b[2J\x1b]0;owned\x07\u202e"
    torch.save({"state_dict": {steer: torch.zeros(1)}, steer: 1}, tmp_path / "a.pth")
    arguments = "scan {} --clean {} --arch test_resnet --size 32"
    assert run(arguments, tmp_path / "a.pth", shop.clean) == 1
    assert "1 unexpected: ?[2J?]0;owned??" in (error := said(capsys))
    report = json.loads(json.dumps(STEERED).replace("STEER", json.dumps(steer)[1:-1]))
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert run("report {}", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "owned" in printed
    assert not set(error + printed) & {"\x1b", "\x07", "\u202e"}


STEERED: dict[str, Any] = {
    "format": 1,
    "given": {
        "architecture": "STEER", "classes": 4, "parameters": 1, "where": "cpu", "images": 1,
        "labelled": False, "parts": [1, 0, 0], "removal": "none",
        "sha256": {}, "shape": [3, 8, 8], "silencing": "zero", "repair": "none", "compute": {},
    },
    "criterion": {"name": "STEER", "reference": "", "settings": {}, "details": {}},
    "selection": {
        "selector": "", "settings": {}, "reason": "STEER", "neurons": 0, "of": 1, "details": {},
    },
    "curve": [], "triggers": [], "layers": [], "neurons": [], "accuracy": None, "size": None,
    "seconds": {}, "seed": 0, "versions": {}, "limits": ["STEER"], "source": {},
}  # fmt: skip


def test_where_nothing_can_be_written_is_said_before_any_work(
    shop: Shop, purified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out = tmp_path / "none" / "page.html", tmp_path / "out"
    weights = tmp_path / "none" / "w.safetensors"
    for arguments, paths in (
        ("purify {} --clean {} --out {} --report {}", (shop.stranger, shop.clean, out, page)),
        ("scan {} --clean {} --report {}", (shop.stranger, shop.clean, page)),
        ("attack {} --arch test_resnet --out {}", (shop.photos, weights)),
        ("demo --save {}", (page,)),
    ):
        assert run(arguments, *paths) == 2, arguments
        assert "create it first" in said(capsys)
    arguments = "scan {} --clean {} --report {} --report {}"
    made = tmp_path / "x.html"
    made.mkdir()
    assert run(arguments, shop.stranger, shop.clean, shop.root / "x.sarif", made) == 2
    assert "is a folder; give the name of a file" in said(capsys)
    assert list(tmp_path.iterdir()) == [made]


def test_a_folder_that_cannot_be_made_is_said_before_any_work(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "load", lambda *_: pytest.fail("work was begun"))
    file = tmp_path / "file"
    file.write_text("x")
    arguments = f"purify {{}} --clean {{}} --out {{}} {CHEAP}"
    for out in (file / "a" / "b", tmp_path / ("a" * 250), Path("/proc/a/b")):
        assert run(arguments, shop.stranger, shop.clean, out) == 1
        assert "cannot be written to" in said(capsys)
    assert list(tmp_path.iterdir()) == [file]


def test_the_folder_and_the_images_lie_apart(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written among class folders would be one of them."""
    (tmp_path / "link").symlink_to(shop.clean)
    before = sorted(shop.root.rglob("*"))
    arguments = f"purify {{}} --clean {{}} --out {{}} {CHEAP} --overwrite"
    outs = (shop.clean / "out", shop.clean, shop.clean.parent, tmp_path / "link" / "out")
    for out in outs:
        assert run(arguments, shop.stranger, shop.clean, out) == 2
        assert "overlap" in said(capsys)
    assert sorted(shop.root.rglob("*")) == before


def test_the_order_of_numbered_folders_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(11):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        Image.new("RGB", (32, 32), (number,) * 3).save(tmp_path / "images" / f"{number}" / "a.png")
    model = timm.create_model("test_resnet", num_classes=11)
    torch.save({"arch": "test_resnet", "state_dict": model.state_dict()}, tmp_path / "m.pth")
    arguments = "evaluate {} --clean {} --size 32"
    assert run(arguments, tmp_path / "m.pth", tmp_path / "images") == 0
    printed = capsys.readouterr().err
    assert "by value: label 2 is 2." in printed
    assert "   10 10: 1 images" in printed


def test_a_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="the disk is full"):
            write_whole(page, b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    write_whole(page, b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.slow
def test_a_data_set_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], shop: Shop) -> None:
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    torch.save({"arch": "test_resnet", "state_dict": model.state_dict()}, tmp_path / "m.pth")
    root = write_mnist(tmp_path / "data")
    options = "--size 28 --mean 0.5 --std 0.5"
    arguments = f"evaluate {{}} --clean mnist --data-root {{}} {options} --images 20"
    found = answer(capsys, f"{arguments} --format json", tmp_path / "m.pth", root)
    assert found["ACC"]["count"] == 20
    assert run(arguments, tmp_path / "m.pth", root) == 0
    assert "mnist, test: 20 of 30 images, 10 classes" in capsys.readouterr().err
    for changed, error, code in (
        (arguments.replace("--data-root {}", ""), "give --data-root DIR", 2),
        (arguments.replace("mnist", "minst"), "did you mean 'mnist'", 2),
        (arguments.replace("--data-root {}", "--split train"), "give --data-root DIR too", 2),
        (arguments.replace("mnist", "svhn"), "no 'svhn' as torchvision lays it out", 1),
        (f"{arguments} --classes x", "has its own", 2),
    ):
        assert run(changed, tmp_path / "m.pth", root) == code, changed
        assert error in capsys.readouterr().err
    colour = "evaluate {} --clean mnist --data-root {} --size 32"
    assert run(colour, shop.stranger, root) == 1
    assert "mnist has 10 classes, and the model has 4" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("left", [True, False])
def test_purify_says_by_its_exit_code_whether_evidence_is_left(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    looks = [{"neurons": 2, "alarm": True}, {"neurons": 3, "alarm": left}]
    monkeypatch.setattr(choices, "selector_of", lambda options: Looked(3, looks))
    arguments = f"purify {{}} --clean {{}} --out {{}} {SMALL} --method clp"
    code = run(arguments, shop.stranger, shop.clean, tmp_path)
    assert code == (3 if left else 0)
    assert (tmp_path / "record.json").exists()


@dataclass(frozen=True)
class Looked(LowestCount):
    """As `auto` does it: evidence was sought at some amounts."""

    looks: Any = ()

    def __call__(self, scores: ChannelScores, held_out: HeldOut | None = None) -> Selection:
        return lowest(scores, self.count, "because", remaining=self.looks)


def test_notes_say_what_was_read(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "evaluate {} --clean {} --size 32 --crop-pct 1 --format json --images 8"
    assert run(arguments, shop.stranger, shop.clean) == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "preprocessing: 3 x 32 x 32, bilinear, crop 1 (center), mean 0.5" in captured.err
    assert "8 of 48 files, 4 classes" in captured.err
    assert re.search(r"apple: 2 images", captured.err)


@pytest.mark.slow
def test_sizes_and_channels_are_found_from_the_weights(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arch, arguments, options, shape in (
        ("test_vit", {"img_size": 32}, "", "3 x 32 x 32"),
        ("test_resnet", {"in_chans": 1}, "--mean 0.5 --std 0.5 --size 40 48", "1 x 40 x 48"),
    ):
        model = timm.create_model(arch, num_classes=4, **arguments)
        torch.save(model.state_dict(), tmp_path / "a.pth")
        command = f"evaluate {{}} --arch {arch} --clean {{}} --images 8 {options}"
        assert run(command, tmp_path / "a.pth", shop.clean) == 0
        assert f"preprocessing: {shape}" in capsys.readouterr().err
    assert run(command.replace("--mean 0.5 --std 0.5", ""), tmp_path / "a.pth", shop.clean) == 1
    assert "--mean and --std" in said(capsys)


def test_a_mean_that_does_not_fit_is_said_of_who_gave_it(
    shop: Shop, purified: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the folder's record has one."""
    for model in (shop.stranger, purified):
        arguments = "evaluate {} --clean {} --quiet --size 32 --mean 0.5 --std 0.5"
        assert run(arguments, model, shop.clean) == 1
        assert "takes 3 channel(s), and mean was given as 0.5" in said(capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "error"),
    [
        ({"preprocessing": {"size": [10**9, 1]}}, "preprocessing on record cannot be read"),
        ({"preprocessing": "x"}, "preprocessing on record cannot be read"),
        ({"classes": ["a", "b"]}, "2 class names"),
        ({"classes": [1, [], "bear", {}]}, "unknown class folder"),
        ([], "expected 'source' to be dict"),
    ],
)
def test_a_folder_from_somebody_else(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: Any, error: str
) -> None:
    """Its record says where it came from, and may say anything."""
    arguments = f"purify {{}} --clean {{}} --out {{}} {CHEAP}"
    assert run(arguments, shop.stranger, shop.clean, tmp_path / "p") == 0
    capsys.readouterr()
    record = json.loads((tmp_path / "p" / "record.json").read_text())
    record["source"] = source
    (tmp_path / "p" / "record.json").write_text(json.dumps(record))
    assert run("evaluate {} --clean {} --size 32 --quiet", tmp_path / "p", shop.clean) in (1, 2)
    assert error in said(capsys)


@pytest.mark.slow
@pytest.mark.usefixtures("photographs_cut_once")
def test_demo_prints_a_table_and_draws_a_picture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch of a tiny network on a few photographs: the plumbing, not the numbers."""
    photos = demo.photo_patches()
    few = replace(
        photos,
        train_images=photos.train_images[::16],
        train_labels=photos.train_labels[::16],
        test_images=photos.test_images[::4],
        test_labels=photos.test_labels[::4],
    )
    monkeypatch.setattr(demo, "photo_patches", lambda: few)
    picture = tmp_path / "pair.png"
    arguments = "demo --arch test_resnet --epochs 1 --method anp --clean-images 150 --quiet"
    arguments += " --selector accuracy"
    assert main([*arguments.split(), "--save", str(picture)]) == 0
    printed = capsys.readouterr().out
    for word in ("ACC", "ASR", "RA", "neurons silenced", "seconds"):
        assert word in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_pages_tell_what_ci_runs_and_every_criterion() -> None:
    readme, methods = (ROOT / name for name in ("README.md", "docs/methods.md"))
    for name in list_criteria():
        assert f"`{name}`" in methods.read_text()
    assert "<!-- test command -->" in readme.read_text()
    assert "nnprune-backdoor demo" in readme.read_text()


def test_version_is_in_the_changelog() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


# --- streams, disks, interrupts --------------------------------------------------------------

OLD = ROOT / "tests" / "files" / "purified_format_1"
COMMAND = [sys.executable, "-m", "nnprune_backdoor"]


def started(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    changed = options.pop("env", {})
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **changed},
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="surrogateescape",
        check=False,
        **options,
    )


def test_without_a_command_the_help_is_printed() -> None:
    done = started()
    assert done.returncode == 2
    assert "exit codes: 0 done" in done.stderr
    assert "required: COMMAND" in done.stderr


ASCII = [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "latin-1:strict"},
]


@pytest.mark.slow
@pytest.mark.parametrize("env", ASCII)
def test_output_that_is_not_utf_8(purified: Path, tmp_path: Path, env: dict[str, str]) -> None:
    folder = tmp_path / "purified"
    shutil.copytree(purified, folder)
    text = (folder / "report.json").read_text()
    (folder / "report.json").write_text(text.replace('"conv1"', '"caf\\u00e9 \\u2192"'))
    done = started("report", folder, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "# Purification report" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_any_text_is_printed_in_any_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    monkeypatch.setattr(listing, "_entry", lambda *a: ["a \u2192 \u4e2d"])
    assert main(["list"]) == 0
    assert rb"\u4e2d" in raw.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_standard_output() -> None:
    with Path("/dev/full").open("w") as full:
        done = started("list", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "nnprune-backdoor: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("name", ["/dev/full", "fifo"])
def test_what_is_no_regular_file_is_not_replaced(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "page.html").symlink_to(tmp_path / name)
    arguments = ["scan", "none.pth", "--clean", "none", "--report", str(tmp_path / "page.html")]
    assert main(arguments) == 2
    assert "no regular file" in said(capsys)


def test_a_disk_that_takes_no_bytes_is_found_before_any_work(tmp_path: Path) -> None:
    limited = "import resource, signal, sys; from nnprune_backdoor.cli.base import *\n" + (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: check_writable(Path(sys.argv[1]), '--out')\n"
        "except MisuseError as error: print(error)\n"
        "try: write_whole(Path(sys.argv[1]), bytes(1000))\n"
        "except PurifyError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(tmp_path / "page.html")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert re.findall("cannot be written", done.stdout) == ["cannot be written"] * 2
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_modules_are_imported() -> None:
    code = (
        "import sys, runpy\n"
        "class Stop:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'nnprune_backdoor.cli.main': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "sys.argv = ['x', 'list']\n"
        "runpy.run_module('nnprune_backdoor', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr == "nnprune-backdoor: interrupted\n"


def test_an_interrupt_while_a_command_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "_entry", interrupted)
    assert main(["list"]) == 130
    assert said(capsys) == "nnprune-backdoor: interrupted\n"


@pytest.mark.parametrize("encoded", [b"caf\xe9", b"\xff.html"])
def test_a_page_under_a_name_that_is_not_utf_8(tmp_path: Path, encoded: bytes) -> None:
    path = tmp_path / os.fsdecode(encoded + b".md")
    write_page(path, {"markdown": lambda: str(path)})
    assert path.read_bytes()


@pytest.mark.slow
def test_a_backdoor_that_did_not_take_is_said(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weak.safetensors"
    out.write_bytes(b"old")
    attack = (
        f"attack {{}} --arch test_resnet {SMALL} --epochs 4 --lr 0.02 --batch-size 16 "
        "--target bear --rate 0.02 --trigger-set size=1 --out {}"
    )
    assert run(attack, shop.photos, out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
    assert run(attack + " --overwrite", shop.photos, out) == 0
    assert "Caution: the backdoor did not take, ASR" in capsys.readouterr().out
    assert load_weights(out)


def test_images_are_taken_at_the_size_of_their_files(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate {} --clean {} --images 8", shop.stranger, shop.clean) == 0
    printed = capsys.readouterr().err
    assert "size: images are taken as the files have it, 32 x 32 pixels" in printed
    assert re.search(r"preprocessing: 3 x 32 x 32, \w+, crop 1 ", printed)
    cropped = "evaluate {} --clean {} --images 8 --crop-pct 0.8"
    assert run(cropped, shop.stranger, shop.clean) == 0
    assert re.search(r"3 x 32 x 32, \w+, crop 0\.8 ", capsys.readouterr().err)


def test_a_model_that_does_not_take_that_size_gets_its_own(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"depth": 1, "embed_dim": 48, "num_heads": 1}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, **small)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    arguments = "evaluate {} --arch vit_tiny_patch16_224 --clean {} --images 8"
    arguments += "".join(f" --arch-arg {name}={value}" for name, value in small.items())
    assert run(arguments, tmp_path / "vit.safetensors", shop.clean) == 0
    printed = capsys.readouterr().err
    assert "does not run on images of 32 x 32 pixels" in printed
    assert "preprocessing: 3 x 224 x 224" in printed


def test_files_of_the_very_size_are_not_cropped(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = timm.create_model("test_vit", num_classes=4, img_size=32)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    arguments = "evaluate {} --arch test_vit --arch-arg img_size=32 --clean {} --images 8"
    assert run(arguments, tmp_path / "vit.safetensors", shop.clean) == 0
    assert re.search(r"preprocessing: 3 x 32 x 32, \w+, crop 1 ", capsys.readouterr().err)


def test_larger_files_are_scaled_down(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in NAMES:
        (tmp_path / label).mkdir()
        Image.new("RGB", (400, 300)).save(tmp_path / label / "0.png")
    assert run("evaluate {} --clean {}", shop.stranger, tmp_path) == 0
    printed = capsys.readouterr().err
    assert "the images are 300 x 400 pixels, and are scaled down to 160 x 160" in printed


def test_purify_takes_its_scores_up_again(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = "--scores {} --selection {} --out {} --format json"
    arguments = f"purify {{}} --clean {{}} {CHEAP} {kept}"
    files = tmp_path / "scores.safetensors", tmp_path / "selection.safetensors"
    weights = []
    for out in ("first", "second"):
        answer(capsys, arguments, shop.stranger, shop.clean, *files, tmp_path / out)
        weights.append((tmp_path / out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    other = arguments.replace("--method clp", "--method magnitude")
    assert run(other, shop.stranger, shop.clean, *files, tmp_path / "third") == 1
    assert "criterion: CLP()" in said(capsys)
    assert not (tmp_path / "third").exists()
    inside = tmp_path / "third" / "scores.safetensors"
    assert run(arguments, shop.stranger, shop.clean, inside, files[1], tmp_path / "third") == 2
    assert "lies in --out" in said(capsys)


def test_piped_output_has_the_plan_and_a_line_at_each_stage(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"purify {{}} --clean {{}} {CHEAP} --out {{}}".replace("--quiet ", "")
    assert run(arguments, shop.stranger, shop.clean, tmp_path / "out") == 0
    lines = capsys.readouterr().err.splitlines()
    plan = re.compile(r"purifying: [\d,]+ neurons in \d+ layers, 4 labels, 48 images")
    assert any(map(plan.match, lines))
    assert any(line.startswith("about ") for line in lines)
    assert [line for line in lines if line.startswith("certifying")]
