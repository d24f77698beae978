"""scan-many and purify-many: a table of models on the command line."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm import create_model

from helpers.states import assert_same_state
from nnprune_backdoor import fleets
from nnprune_backdoor.cli.base import ExitCode
from nnprune_backdoor.cli.main import main
from nnprune_backdoor.cli.manifest import _hash_of, read_manifest
from nnprune_backdoor.fleets import Fleet, run_many
from nnprune_backdoor.fleets.table import Row

pytestmark = pytest.mark.cli

ARGUMENTS = "channels=(8,8,8,8) layers=(1,1,0,0)"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small networks, a damaged one, and images."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name in "abc":
        network = create_model("resnet18", num_classes=5, channels=(8,) * 4, layers=(1, 1, 0, 0))
        save_file(network.state_dict(), root / f"{name}.safetensors")
    (root / "damaged.pth").write_bytes(b"PK\x03\x04 nothing more")
    (root / "images").mkdir()
    for number in range(12):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
    return root


def manifest(folder: Path, *rows: str, name: str = "manifest.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(rows) + "\n")
    return path


def wrong(path: Path, command: str = "scan") -> list[str]:
    return [job.wrong for job in read_manifest(path, command)]


def test_a_row_is_a_command_line(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        "model,arch,clean,size,label,seed,images,drop",
        'a.pth,resnet18,images,"32 48",0 "a cat",7,20,',
    )
    (options,) = (job.options() for job in read_manifest(path, "scan"))
    assert options.model == tmp_path / "a.pth", "beside the manifest"
    assert options.clean == tmp_path / "images"
    assert (options.size, options.label) == ([32, 48], ["0", "a cat"])
    assert (options.seed, options.images, options.drop) == (7, 20, [])


def test_switches_and_settings_of_a_method(tmp_path: Path) -> None:
    head = "name,model,clean,method,set,paper,mean"
    row = "one,/m/a.pth,images,rnp,unlearning.lr=0.02 ranking.stages=3,{},-0.5 0 0.5"
    path = manifest(tmp_path, head, row.format("yes"), row.format("no").replace("one", "two"))
    first, second = (job.options() for job in read_manifest(path, "purify"))
    assert first.set == ["unlearning.lr=0.02", "ranking.stages=3"]
    assert first.mean == [-0.5, 0, 0.5]
    assert (first.paper, second.paper) == (True, False)
    assert first.checkpoint == Path("/m/a.pth")
    (found,) = wrong(manifest(tmp_path, head, row.format("maybe")), "purify")
    assert found == "paper: expected yes or no, got 'maybe' (line 2)"


def test_a_name_of_a_data_set_is_no_path(tmp_path: Path) -> None:
    path = manifest(tmp_path, "model,clean,data-root", "a.pth,cifar10,data")
    (options,) = (job.options() for job in read_manifest(path, "scan"))
    assert (str(options.clean), options.data_root) == ("cifar10", tmp_path / "data")


def test_rows_that_cannot_be_used_say_why_in_a_line(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        "model,clean,seed,label",
        "good.pth,images,0,",
        "short.pth,images",
        'open.pth,"images,0,',
        "",
        "seed.pth,images,x,",
        ",images,0,",
        "noimages.pth,,0,",
        "quote.pth,images,0,it's",
        "good.pth,images,1,",
        "last.pth,images,0,",
    )
    assert wrong(path) == [
        "",
        "2 cells, where the first line has 4",
        "unexpected end of data",
        "--seed: expected a whole number in [0, 2^63), got 'x' (line 6)",
        "nothing in the column 'model'",
        "the following arguments are required: --clean (line 8)",
        'label: No closing quotation in "it\'s" (line 9)',
        "the name 'good.pth' stands in line 2 already; give each row its own in the column 'name'",
        "",
    ]
    names = [job.name for job in read_manifest(path, "scan")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], "no rows; give a line of column names, then a line a model"),
        (["model,clean"], "no rows"),
        (["model,clean", ",", "  "], "no rows"),
        (["clean,arch", "images,resnet18"], "no column 'model'"),
        (["model,clean,clean", "a,b,c"], "the column 'clean' is there twice"),
        (['model,"clean', "a,b"], "the line of column names is damaged"),
        (["model,plugin,clean", "a,evil.py,b"], "unknown column of .*manifest.csv 'plugin'"),
        (["model,config,clean", "a,b.toml,c"], "unknown column of .*manifest.csv 'config'"),
        (["model,print-config,clean", "a,yes,b"], "unknown column of .*'print-config'"),
        (["model,exit-codes,clean", "a,modelscan,b"], "unknown column of .*'exit-codes'"),
        (["model,format,clean", "a,sarif,b"], "unknown column of .*manifest.csv 'format'"),
        (["model,claen", "a,b"], "did you mean 'clean'"),
    ],
)
def test_a_table_that_says_nothing_ends_it(
    tmp_path: Path, rows: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = manifest(tmp_path, *rows)
    assert main(["scan-many", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, "one line, and where help is"
    assert re.search(error, said[0])
    assert not (tmp_path / "out").exists()


def test_misuse_and_folders_that_cannot_be_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(manifest(tmp_path, "model,clean", "a,b"))
    assert main(["scan-many", str(tmp_path / "gone.csv"), "--out", str(tmp_path)]) == 2
    assert "gone.csv: cannot be read (No such file or directory)" in capsys.readouterr().err
    assert main(["scan-many", path, "--out", str(tmp_path), "--workers", "0"]) == 2
    assert main(["scan-many", path, "--out", "/proc/results"]) == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("nnprune-backdoor: /proc/results: no results can be written there (")
    )
    for shard in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit) as stopped:
            main(["scan-many", path, "--out", str(tmp_path), "--shard", shard])
        assert stopped.value.code == 2
    assert "expected I/N such as 1/8, got 'a/b'" in capsys.readouterr().err


def key_of(root: Path, row: str, head: str = "model,clean,arch,seed") -> str:
    (job,) = read_manifest(manifest(root, head, row), "scan")
    return job.key()


def test_a_key_is_of_weights_images_and_settings_wherever_they_are(
    root: Path, tmp_path: Path
) -> None:
    row = "a.safetensors,images,resnet18,0"
    key = key_of(root, row)
    there = shutil.copytree(root, tmp_path / "there")
    (there / "a.safetensors").rename(there / "renamed.safetensors")
    assert key_of(there, row.replace("a.safe", "renamed.safe")) == key
    assert key_of(root, "a.safetensors,images,resnet18,", "model,clean,arch,seed") == key
    assert key_of(root, row.replace(",0", ",1")) != key
    assert key_of(root, row.replace("a.safe", "b.safe")) != key
    picture = there / "images" / "0.png"
    changed = bytearray(picture.read_bytes())
    changed[-20] ^= 1  # as long as before
    picture.write_bytes(changed)
    other = key_of(there, row.replace("a.safe", "renamed.safe"))
    assert other != key
    (there / "images" / "more.png").write_bytes(b"more")
    assert key_of(there, row.replace("a.safe", "renamed.safe")) not in (key, other)


def test_a_key_is_of_the_descriptions_beside_weights_too(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    shutil.copy(root / "a.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "resnet18"}')
    row = f"{folder},{root / 'images'},,0"
    key = key_of(tmp_path, row)
    (folder / "config.json").write_text('{"architecture": "resnet34"}')
    assert key_of(tmp_path, row) != key


def test_images_are_read_once_for_all_models(root: Path) -> None:
    _hash_of.cache_clear()
    for model in "abc":
        key_of(root, f"{model}.safetensors,images,resnet18,0")
    assert _hash_of.cache_info().misses == 12
    assert _hash_of.cache_info().hits == 24


def test_purify_many_does_what_purify_does(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = manifest(
        root,
        "name,model,clean,arch,arch-arg,method,count",
        f"first,a.safetensors,images,resnet18,{quoted(ARGUMENTS)},clp,3",
        f"broken,damaged.pth,images,resnet18,{quoted(ARGUMENTS)},clp,3",
        f"second,b.safetensors,images,resnet18,{quoted(ARGUMENTS)},clp,2",
    )
    out = tmp_path / "out"
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(2) as executor:
        fleet = run_many(read_manifest(path, "purify"), out, executor=executor, progress=False)
    assert torch.get_num_threads() == threads
    assert [row.name for row in fleet.rows] == ["first", "second", "broken"]
    assert "damaged.pth" in fleet.rows[2].says
    result = json.loads((out / str(fleet.rows[0].file)).read_text())
    command = f"purify {root}/a.safetensors --clean {root}/images --arch resnet18 --method clp"
    alone = tmp_path / "alone"
    arguments = [f"--arch-arg={word}" for word in ARGUMENTS.split()]
    command += f" --count 3 --quiet --format json --out {alone}"
    assert main([*command.split(), *arguments]) == 0
    written = load_file(out / Path(str(fleet.rows[0].file)).stem / "model.safetensors")
    assert_same_state(written, load_file(alone / "model.safetensors"))
    printed = json.loads(capsys.readouterr().out)
    assert same(result["data"]) == same(printed)
    assert fleet.rows[0].facts["silenced"] == 3


def timeless(document: dict[str, Any], part: str) -> dict[str, Any]:
    """Without when it was made and how long that took."""
    return {**document, "date": None, part: {**document[part], "seconds": None}}


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ("done", ExitCode.DONE),
        ("done, cannot tell", ExitCode.UNKNOWN),
        ("cannot tell, failed, done", ExitCode.FAILED),
        ("cannot tell, missing", ExitCode.FAILED),
        ("missing, failed, cannot tell, done, evidence", ExitCode.EVIDENCE),
    ],
)
def test_the_gravest_that_is_known_is_the_exit_code(
    states: str, code: ExitCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tuple(
        Row(
            state,
            None if state == "missing" else "file.json",
            failed=state == "failed",
            alarm=state == "evidence",
            unknown=state == "cannot tell",
        )
        for state in states.split(", ")
    )
    fleet = Fleet(rows, rows, 0, tmp_path / "summary.html")
    monkeypatch.setattr(fleets, "run_many", lambda *_, **__: fleet)
    path = manifest(tmp_path, "model,clean", "a,b")
    words = ["scan-many", str(path), "--out", str(tmp_path), "--quiet"]
    assert main(words) == code
    theirs = {ExitCode.EVIDENCE: 1, ExitCode.FAILED: 2, ExitCode.UNKNOWN: 3, ExitCode.DONE: 0}
    assert main([*words, "--exit-codes", "modelscan"]) == theirs[code]


def quoted(text: str) -> str:
    return f'"{text}"'


def same(document: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from run to run: dates, times, and what was written where."""
    report = document["report"]
    size = {
        name: entry for name, entry in report["size"].items() if name not in ("before", "after")
    }
    report = {**report, "seconds": None, "size": size, "given": {**report["given"], "date": None}}
    output = document["output"]["files"]["model.safetensors"]
    return {**document, "date": None, "report": report, "output": output}


@pytest.mark.slow
def test_scan_many_in_processes_says_what_scan_says(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = manifest(
        root,
        "model,clean,arch,arch-arg,label",
        *(f"{m},images,resnet18,{quoted(ARGUMENTS)},1" for m in ("a.safetensors", "damaged.pth")),
    )
    many = ["scan-many", str(path), "--out", str(tmp_path / "out"), "--workers", "2"]
    many += ["--format", "json"]
    assert main(many) == 1
    printed = capsys.readouterr()
    assert "2 of 2  " in printed.err
    good, damaged = json.loads(printed.out)["models"]
    assert (good["state"], damaged["state"]) == ("cannot tell", "failed")
    result = json.loads((tmp_path / "out" / good["file"]).read_text())["data"]
    command = f"scan {root}/a.safetensors --clean {root}/images --arch resnet18 --label 1"
    arguments = [f"--arch-arg={word}" for word in ARGUMENTS.split()]
    assert main([*command.split(), *arguments, "--quiet", "--format", "json"]) == 4
    alone = json.loads(capsys.readouterr().out)
    assert timeless(alone, "diagnosis") == timeless(result, "diagnosis")
    manifest(root, *path.read_text().splitlines()[:2])
    assert main(many) == 4, "without the damaged one"
    assert json.loads(capsys.readouterr().out)["worked"] == 0
