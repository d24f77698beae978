"""Malicious files by the techniques of published corpora: nothing runs, and each is refused.

Each trick makes a file, the mark, when Python's own unpickler reads it; a process of its own shows
that. Another process reads all of them by `load_weights` under an audit hook, which sees imports,
compiled code, started processes and opened files.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nnprune_backdoor
from nnprune_backdoor import load_weights
from nnprune_backdoor.errors import CheckpointError
from nnprune_backdoor.files.pickle_names import is_forbidden
from nnprune_backdoor.files.unpickling import Unpickler

# --- an assembler of pickles -----------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def of(module: str, name: str) -> bytes:
    """A global, as protocols 0 to 3 write it."""
    return f"c{module}\n{name}\n".encode()


def named(module: str, name: str) -> bytes:
    """A global, as protocols from 4 on write it."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def listing(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"l"


@functools.cache
def tricks(mark: str) -> dict[str, tuple[bytes, str]]:
    """Name -> (opcodes that make the mark, the name that the refusal gives)."""
    touch, python = text(f"touch {mark}"), text(f"open({mark!r}, 'w')")
    system = call(of("os", "system"), touch)
    path = call(of("pathlib", "PosixPath"), text(mark))
    popen, command = of("subprocess", "Popen"), listing(text("touch"), text(mark))
    length = struct.pack("<Q", len(system) + 1)
    inner = system + b"."
    return {
        # how an opcode stream calls something
        "reduce": (system, "os.system"),
        "posix": (call(of("posix", "system"), touch), "posix.system"),
        "protocol 0": (f"cos\nsystem\n(S'touch {mark}'\ntR".encode(), "os.system"),
        "inst": (b"(" + touch + b"ios\nsystem\n", "os.system"),
        "obj": (b"(" + popen + command + b"o", "subprocess.Popen"),
        "newobj": (popen + b")\x81" + call(of("os", "system"), touch), "subprocess.Popen"),
        "stack_global": (call(named("os", "system"), touch), "os.system"),
        "in a frame": (b"\x80\x04\x95" + length + system, "os.system"),
        "many protocols": (b"\x80\x02\x80\x04\x80\x05" + system, "os.system"),
        # memo and stack
        "names from the memo": (
            text("system") + b"\x940" + text("os") + b"\x940h\x01h\x00\x93" + touch + b"\x85R",
            "os.system",
        ),
        "memo overwritten": (
            text("math")
            + b"q\x000"
            + text("os")
            + b"q\x000h\x00"
            + text("system")
            + b"\x93"
            + touch
            + b"\x85R",
            "os.system",
        ),
        "memo at a far index": (
            of("os", "system") + b"r\xff\xff\x0f\x000j\xff\xff\x0f\x00" + touch + b"\x85R",
            "os.system",
        ),
        "names duplicated": (
            text("os") + b"20" + text("system") + b"20\x93" + touch + b"\x85R",
            "os.system",
        ),
        "result thrown away": (system + b"0}", "os.system"),
        "result below a mark": (b"(" + system + b"1}", "os.system"),
        "as a key": (b"}" + system + b"K\x01s", "os.system"),
        "as a state": (call(of("collections", "OrderedDict")) + system + b"0}b", "os.system"),
        "then damaged": (system + b"\xff\xfe", "os.system"),
        # what it calls
        "eval": (call(of("builtins", "eval"), python), "builtins.eval"),
        "exec": (call(of("builtins", "exec"), python), "builtins.exec"),
        "names of Python 2": (call(of("__builtin__", "eval"), python), "__builtin__.eval"),
        "open": (call(of("builtins", "open"), text(mark), text("w")), "builtins.open"),
        "io.open": (call(of("io", "open"), text(mark), text("w")), "io.open"),
        "getattr of an import": (
            call(
                call(
                    of("builtins", "getattr"),
                    call(of("builtins", "__import__"), text("os")),
                    text("system"),
                ),
                touch,
            ),
            "builtins.getattr",
        ),
        "importlib": (
            call(of("importlib", "import_module"), text("this")) + b"0" + system,
            "importlib.import_module",
        ),
        "subprocess.call": (call(of("subprocess", "call"), command), "subprocess.call"),
        "shutil": (call(of("shutil", "copy"), text("/dev/null"), text(mark)), "shutil.copy"),
        "timeit": (call(of("timeit", "timeit"), text("pass"), python), "timeit.timeit"),
        "cProfile": (call(of("cProfile", "run"), python, text("/dev/null")), "cProfile.run"),
        "trace": (call(of("pdb", "run"), text("q")) + system, "pdb.run"),
        "pickle in a pickle": (
            call(of("pickle", "loads"), b"B" + struct.pack("<I", len(inner)) + inner),
            "pickle.loads",
        ),
        # around lists of forbidden modules
        "a module's own import": (
            call(named("tempfile", "_os.system"), touch),
            "tempfile._os.system",
        ),
        "through a harmless module": (
            call(named("logging", "os.system"), touch),
            "logging.os.system",
        ),
        "method of a path": (call(named("pathlib", "Path.touch"), path), "pathlib.Path.touch"),
        "method by name": (
            call(call(of("operator", "methodcaller"), text("touch")), path),
            "operator.methodcaller",
        ),
        "map": (
            call(
                of("builtins", "list"),
                call(of("builtins", "map"), of("os", "system"), listing(touch)),
            ),
            "builtins.map",
        ),
        "partial": (
            call(call(of("functools", "partial"), of("os", "system"), touch)),
            "os.system",
        ),
        "numpy's test runner": (
            call(of("numpy.testing._private.utils", "runstring"), python, b"}"),
            "numpy.testing._private.utils.runstring",
        ),
    }


NAMES = list(tricks(""))


def archive(path: Path, content: bytes, **members: bytes) -> Path:
    """An archive as torch.save writes it, of this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", b"3\n")
        for name, data in members.items():
            file.writestr(name, data)
    return path


def written(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """A plain pickle and an archive of a trick, and the mark that it would make."""
    mark = folder / "mark"
    content = tricks(str(mark))[name][0] + b"."
    (folder / "w.bin").write_bytes(content)
    return folder / "w.bin", archive(folder / "w.pth", content), mark


@pytest.mark.parametrize("name", NAMES)
def test_a_trick_is_refused_by_the_name_of_what_it_calls_and_does_nothing(
    tmp_path: Path, name: str
) -> None:
    plain, zipped, mark = written(tmp_path, name)
    for path in (plain, zipped):
        with pytest.raises(CheckpointError, match="so it is not loaded") as error:
            load_weights(path)
        assert f"asks for {tricks(str(mark))[name][1]!r}" in str(error.value)
    assert not mark.exists()


def run(code: str, *arguments: str) -> str:
    root = Path(nnprune_backdoor.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


UNGUARDED = """
import contextlib, os, pickle, sys
sys.stdin = open(os.devnull)
for folder in sys.argv[1:]:
    with contextlib.suppress(BaseException), open(folder + "/w.bin", "rb") as file:
        pickle.load(file)
"""

WATCHED = """
import sys
import torch
from nnprune_backdoor.errors import CheckpointError
from nnprune_backdoor.files import load_weights
def read(path):
    try:
        load_weights(path)
    except CheckpointError:
        return
    raise SystemExit("read " + path)
read(sys.argv[1] + "/w.bin"), read(sys.argv[1] + "/w.pth")  # what is imported when first needed
events, watching = set(), True
def hook(event, arguments):
    if watching:
        opened = [str(arguments[0]), arguments[1]] if event == "open" else []
        events.add(" ".join([event, *map(str, opened)]))
sys.addaudithook(hook)
for folder in sys.argv[1:]:
    read(folder + "/w.bin"), read(folder + "/w.pth")
watching = False
print("\\n".join(sorted(events)))
"""


def test_the_tricks_work_where_nobody_guards_and_do_nothing_here(tmp_path: Path) -> None:
    folders = {name: tmp_path / str(number) for number, name in enumerate(NAMES)}
    for name, folder in folders.items():
        folder.mkdir()
        written(folder, name)
    paths = [str(folder) for folder in folders.values()]
    for line in run(WATCHED, *paths).splitlines():
        event, _, opened = line.partition(" ")
        assert event == "open", f"reading did: {line}"
        assert opened.endswith(("/w.bin r", "/w.bin rb", "/w.pth r", "/w.pth rb")), line
    assert not [name for name, folder in folders.items() if (folder / "mark").exists()]
    run(UNGUARDED, *paths)
    harmless = {name for name, folder in folders.items() if not (folder / "mark").exists()}
    assert not harmless, "traps that are none"
    assert len(NAMES) >= 30


def test_what_runs_code_is_told_from_what_checkpoints_hold() -> None:
    forbidden = (
        "os system|nt system|builtins eval|builtins __import__|subprocess check_output|sys modules"
        "|torch load|torch.serialization load|torch.hub load|torch.jit load|torch.package Importer"
        "|torch.utils.collect_env run|torch.utils.cpp_extension load_inline|torch.storage os.system"
        "|torch.utils._config_module ConfigModule.load_config|torch._inductor.codecache compile"
        "|torch.fx.experimental.symbolic_shapes ShapeEnv.evaluate_guards_expression"
        "|torch._dynamo.guards GuardBuilder.get|torch.distributed.run main|numpy load"
        "|numpy.f2py.crackfortran getlincoef|pandas read_pickle|joblib load|ctypes CDLL"
        "|multiprocessing.util spawnv_passfds|asyncio.unix_events _UnixSubprocessTransport._start"
        "|pip main|pydoc pipepager|webbrowser open|socket create_connection|urllib.request urlopen"
        "|types FunctionType|marshal loads|copyreg add_extension|code InteractiveConsole.push"
        "|idlelib.run Executive.runcode|lib2to3.pgen2.grammar Grammar.loads|pkgutil resolve_name"
    )
    harmless = (
        "argparse Namespace|collections OrderedDict|numpy dtype|numpy._core.multiarray scalar"
        "|numpy.core.multiarray _reconstruct|pathlib PosixPath|types SimpleNamespace|enum Enum"
        "|torch._utils _rebuild_tensor_v2|torch.optim.adamw AdamW|datetime datetime|uuid UUID"
        "|omegaconf.dictconfig DictConfig|builtins set"
        "|torch.nn.parallel.distributed DistributedDataParallel|functools partial|builtins print"
        "|torch._dynamo.eval_frame OptimizedModule|models.common Conv|my.os.layers System"
    )
    for names, expected in ((forbidden, True), (harmless, False)):
        for module, _, name in (entry.partition(" ") for entry in names.split("|")):
            assert is_forbidden(module, name) == expected, (module, name)


# --- what neither runs nor is refused ---------------------------------------------------------


class Unknown:
    """Unpickled by others, its class is imported and its state is set by code."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("code of the file ran")


class Reduced:
    """Unpickled by others, a function of a module nobody knows is called."""

    def __reduce__(self) -> Any:
        return forbidden_here, ("argument",)


def forbidden_here(_: str) -> None:
    raise AssertionError("code of the file ran")


class Subclass(torch.Tensor):
    """A tensor whose numbers may mean anything."""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_unknown_objects_beside_the_weights_are_named_and_their_code_does_not_run(
    tmp_path: Path, protocol: int
) -> None:
    unknown = Unknown()
    unknown.lr = 0.1  # type: ignore[attr-defined]
    content = {"state_dict": {"w": torch.ones(2)}, "config": unknown, "x": Reduced()}
    torch.save(content, tmp_path / "w.pt", pickle_protocol=protocol)
    weights = load_weights(tmp_path / "w.pt")
    assert list(weights) == ["w"]
    text = "; ".join(weights.notes)
    assert f"{__name__}.Unknown, {__name__}.forbidden_here" in text.replace("tests.files.", "")


def test_tensors_of_a_subclass_are_refused_by_name_unless_dropped(tmp_path: Path) -> None:
    odd = torch.ones(2).as_subclass(Subclass)
    torch.save({"w": torch.ones(2), "odd": odd}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="'odd' is no plain dense tensor"):
        load_weights(tmp_path / "w.pt")
    assert list(load_weights(tmp_path / "w.pt", drop=["odd"])) == ["w"]


def test_a_subclass_that_rebuilds_itself_by_a_forbidden_function_is_refused(
    tmp_path: Path,
) -> None:
    hook = call(of("os", "system"), text(f"touch {tmp_path / 'mark'}"))
    for place in range(4):
        parts = [of("torch._utils", "_rebuild_tensor_v2"), of("torch", "Tensor"), b")", b"N"]
        parts[place] = hook
        path = archive(
            tmp_path / "w.pt", call(of("torch._tensor", "_rebuild_from_type_v2"), *parts) + b"."
        )
        with pytest.raises(CheckpointError, match=r"os\.system"):
            load_weights(path)
    assert not (tmp_path / "mark").exists()


def test_a_malicious_pickle_inside_of_another_file_stays_bytes(tmp_path: Path) -> None:
    inner = tricks(str(tmp_path / "mark"))["reduce"][0] + b"."
    torch.save({"w": torch.ones(2), "blob": inner}, tmp_path / "w.pt")
    nested = (tmp_path / "w.pt").read_bytes()
    torch.save({"w": torch.ones(2), "blob": nested}, tmp_path / "outer.pt")
    for name in ("w.pt", "outer.pt"):
        assert list(load_weights(tmp_path / name)) == ["w"]
    with zipfile.ZipFile(tmp_path / "zipped.pth", "w") as file:
        file.write(tmp_path / "w.pt", "model/w.pt")
    with pytest.raises(CheckpointError, match=r"a zip archive \(of model/w\.pt\); unpack it"):
        load_weights(tmp_path / "zipped.pth")
    assert not (tmp_path / "mark").exists()


# --- what readers may disagree about, or what would exhaust them ------------------------------


def test_archives_with_two_pickles_are_refused(tmp_path: Path) -> None:
    evil = tricks(str(tmp_path / "mark"))["reduce"][0] + b"."
    twice = archive(tmp_path / "a.pt", b"}.", **{"other/data.pkl": evil})
    with pytest.warns(UserWarning, match="Duplicate name"):
        same = archive(tmp_path / "b.pt", b"}.", **{"archive/data.pkl": evil})
    for path in (twice, same):
        with pytest.raises(CheckpointError, match="several parts of one name"):
            load_weights(path)
    assert not (tmp_path / "mark").exists()


HOSTILE = {
    "a copyreg extension": (b"\x82\x01.", "copyreg registry"),
    "out-of-band buffers": (b"\x97.", "buffers that are not in the file"),
    "names that are numbers": (b"K\x01K\x02\x93.", "a name that is no text"),
    "a call without a tuple": (of("a", "b") + b"K\x01R.", "a call without arguments"),
    "an empty stack": (b"R.", "damaged"),
    "a memo that is not there": (b"h\x07.", "damaged"),
    "an endless text": (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
    "an endless number": (b"\x8b\xff\xff\xff\x7f.", "damaged"),
    "an unknown opcode": (b"\xf0.", "damaged"),
    "an outside object": (b"K\x01Q.", "damaged"),
    "an odd storage": (
        b"("
        + text("storage")
        + of("os.path", "FloatStorage")
        + text("0")
        + text("cpu")
        + b"K\x01tQ.",
        "os.path.FloatStorage",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_pickle_is_refused(tmp_path: Path, name: str) -> None:
    content, reason = HOSTILE[name]
    (tmp_path / "plain.pt").write_bytes(b"\x80\x04" + content)
    for path in (tmp_path / "plain.pt", archive(tmp_path / "w.pt", content)):
        with pytest.raises(CheckpointError, match=reason):
            load_weights(path)


@pytest.mark.parametrize("claim", ["offset", "key", "size", "stride", "negative"])
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path: Path, claim: str) -> None:
    torch.save({"w": torch.arange(8.0)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as file:
        content = file.read("good/data.pkl")
    old, new = {
        "offset": (b"QK\x00K\x08\x85", b"QK\x01K\x08\x85"),
        "key": (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"),
        "size": (b"QK\x00K\x08\x85", b"QK\x00K\x09\x85"),
        "stride": (b"q\x08K\x01\x85", b"q\x08K\x02\x85"),
        "negative": (b"QK\x00K\x08\x85", b"QK\x00J\xff\xff\xff\xff\x85"),
    }[claim]
    assert content.count(old) == 1
    path = archive(tmp_path / "w.pt", content.replace(old, new), **{"archive/data/0": bytes(32)})
    with pytest.raises(CheckpointError, match=r"lies outside|claims shape|expected a size"):
        load_weights(path)


def test_keys_that_take_for_ever_to_hash_are_not_hashed(tmp_path: Path) -> None:
    """A tuple of two of a tuple of two, sixty deep, has a million million million leaves."""
    deep = b"K\x01" + b"2\x86" * 60
    path = archive(tmp_path / "w.pt", b"}" + deep + b"K\x01s.")
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"no weights in it \(skipped, no tensors: \(tuple\)"):
        load_weights(path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "content",
    [
        b"("
        + b"K\x01" * 5000
        + b"lq\x000"
        + (b"h\x00" + of("torch", "Size") + b"h\x00\x85R") * 2000,
        b"(" + b"}" * 60_000 + b"l",
    ],
    ids=["one list copied over and over", "many dictionaries"],
)
def test_a_pickle_cannot_fill_the_memory(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnprune_backdoor.files.unpickling._MAX_STEPS", 50_000)
    path = archive(tmp_path / "w.pt", content + b".")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="more than 50,000 steps"):
            load_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_module_that_holds_itself_over_and_over_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnprune_backdoor.files.state_dicts._MAX_PARTS", 2000)
    module: nn.Module = nn.Linear(1, 1)
    for _ in range(30):
        module = nn.Sequential(module, module)
    torch.save(module, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="a pickled module of more than 2,000 parts"):
        load_weights(tmp_path / "w.pt")


def test_the_reader_gives_what_pickle_gives_for_plain_data() -> None:
    data: Any = {
        "a": [1, -(2**70), 1.5, None, True, "é\ud800", b"\x00", (1, (2, ()))],
        3: {"b": {}},
        None: [[]],
    }
    data["again"] = data["a"]
    for protocol in range(6):
        file = io.BytesIO(pickle.dumps(data, protocol) + b"rest")
        named: set[str] = set()
        reader = Unpickler(file, makers={}, persistent=lambda _: None, named=named)
        assert reader.load() == data
        assert file.read() == b"rest"
        assert not named
