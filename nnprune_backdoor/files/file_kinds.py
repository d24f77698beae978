"""What a file is, by its first bytes, whatever its name says."""

from __future__ import annotations

import contextlib
import struct
import tarfile
from pathlib import Path

SAFETENSORS, ZIP, PICKLE, JSON = "safetensors", "zip", "pickle", "JSON"

_LONGEST_HEADER = 100 * 2**20  # of a safetensors file

_HEAD = 1024

# first bytes -> what such a file is, and what to do
_OTHERS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; run: git lfs pull"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it and give the file inside"),
    (b"Rar!", "a RAR archive; unpack it and give the file inside"),
    (b"\x1f\x8b", "compressed by gzip; unpack it and give the file inside"),
    (b"BZh", "compressed by bzip2; unpack it and give the file inside"),
    (b"\xfd7zXZ", "compressed by xz; unpack it and give the file inside"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it and give the file inside"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them; only PyTorch's weights are read"),
    (b"\x93NUMPY", "a NumPy array; only PyTorch's weights are read"),
    (b"GGUF", "a GGUF file, which holds quantised weights; only PyTorch's weights are read"),
    (b"%PDF", "a PDF; get the weights themselves"),
    (b"\x89PNG", "a picture; get the weights themselves"),
    (b"\xff\xd8\xff", "a picture; get the weights themselves"),
    (b"\x7fELF", "a program; get the weights themselves"),
    (b"MZ", "a program; get the weights themselves"),
    (b"#!", "a script; get the weights themselves"),
)

_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--", b"<error")


def kind_of(path: Path) -> tuple[str | None, str]:
    """SAFETENSORS, ZIP, PICKLE or JSON, and ""; or None, and what the file is instead.

    A file that begins as none of all that is known here is PICKLE too, since an old pickle may
    begin with nearly anything.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    length = struct.unpack("<Q", head[:8])[0] if len(head) > 8 else 0
    instead = next((what for begin, what in _OTHERS if head.startswith(begin)), "")
    if not head:
        instead = "empty; get the file again"
    elif path.suffix.lower() == ".onnx":  # its first bytes may be anything
        instead = "an ONNX model; only PyTorch's weights are read"
    elif text.startswith(_PAGES):
        instead = (
            "a web page, not the weights: a log-in, an error, or a page that links to the file; "
            "open the address in a browser and download the file itself"
        )
    elif head[257:262] == b"ustar":
        instead = _tar(path)
    if instead:
        return None, instead
    if head.startswith(b"PK\x03\x04"):
        return ZIP, ""
    if head[8:9] == b"{" and 2 <= length <= _LONGEST_HEADER:
        return SAFETENSORS, ""
    return (JSON if text.startswith((b"{", b"[")) else PICKLE), ""


def _tar(path: Path) -> str:
    names: list[str] = []
    with contextlib.suppress(tarfile.TarError, OSError, ValueError), tarfile.open(path, "r:") as it:
        names += [member.name for _, member in zip(range(8), it, strict=False)]
    if {"storages", "tensors"} <= set(names):
        return (
            "a checkpoint of PyTorch before 0.1.10, which cannot be read without running code; "
            "load it in a container without network and secrets, and save model.state_dict() there"
        )
    return _archive("a tar archive", names)


def kind_of_zip(names: list[str]) -> str:
    """What an archive without PyTorch's pickle is, by the names of its members."""
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays; only PyTorch's weights are read"
    if any(name.endswith("model.weights.h5") for name in names):
        return "a Keras model; only PyTorch's weights are read"
    return _archive("a zip archive", names)


def _archive(kind: str, names: list[str]) -> str:
    inside = ", ".join(name[:60] for name in names[:3]) or "nothing"
    return f"{kind} (of {inside}); unpack it and give the file inside"


def text_like(path: Path) -> str | None:
    """The beginning of the file if it is text, for messages."""
    with path.open("rb") as file:
        head = file.read(60)
    try:
        text = head.decode("ascii")
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() or "\n" in text else None
