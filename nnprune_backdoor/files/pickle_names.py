"""Names in pickles that only an attack, or a program, has a use for.

Nothing that a pickle names is imported or called, whether it stands here or not (see `unpickling`).
The list is for the reader of the message: a file that names one of these is no mere checkpoint.
"""

from __future__ import annotations

import re

# top-level modules that run programs, load code, open files or use the network
_MODULES = frozenset(
    """
    _aix_support _ctypes _imp _osx_support _pickle _posixsubprocess _pyrepl _socket _testcapi
    _thread _winapi _winreg _xxsubinterpreters aiohttp asyncio atexit bdb cPickle cProfile cffi
    cloudpickle code codeop commands compileall concurrent ctypes dill distutils doctest ensurepip
    faulthandler fileinput ftplib gc glob http httpx idlelib imaplib imp importlib joblib lib2to3
    linecache marshal mmap msvcrt multiprocessing nt ntpath nturl2path os paramiko pdb pexpect
    pickle pickletools pip pkg_resources pkgutil platform popen2 poplib posix posixpath profile
    psutil pty py_compile pydoc requests resource runpy setuptools shelve shutil signal site smtplib
    socket socketserver sqlite3 ssl subprocess sys sysconfig tarfile telnetlib tempfile threading
    timeit trace tracemalloc urllib urllib2 urllib3 venv webbrowser winreg xmlrpc zipfile zipimport
    """.split()  # noqa: SIM905
)

# functions of modules that also have harmless names
_FUNCTIONS = re.compile(
    r"(builtins|__builtin__|__main__\.__builtins__) (__import__|__build_class__|apply|breakpoint"
    r"|compile|delattr|dir|eval|exec|execfile|exit|file|filter|getattr|globals|help|input|locals"
    r"|map|open|quit|raw_input|reduce|reload|setattr|vars)"
    r"|operator (attrgetter|itemgetter|methodcaller)|_operator (attrgetter|itemgetter|methodcaller)"
    r"|functools reduce|_functools reduce|(io|_io) (open\w*|\w*FileIO|Buffered\w+|TextIOWrapper)"
    r"|types (CodeType|FunctionType|MethodType|ModuleType)"
    r"|(copyreg|copy_reg) (add_extension|pickle|constructor)|codecs open|logging\.config \w+"
    r"|pathlib \w+\.\w+|uuid _\w+|test\.\S+ \S+"
    r"|numpy (load|loads|fromfile|memmap|save\w*|genfromtxt|loadtxt)|numpy\.(f2py|distutils)\S* \S+"
    r"|numpy\.testing\._private\.utils \S+|numpy\.lib\.npyio \S+|pandas (read_pickle|eval)"
    r"|torch (load|save|compile|package\S*)|torch\.serialization (load|save|_?legacy_load)"
    r"|torch\.(hub|jit|package|testing|multiprocessing|_inductor|_dynamo\.guards|fx\.experimental"
    r"|distributed\.(rpc|run|launch|elastic)|utils\.(cpp_extension|collect_env|bottleneck"
    r"|_config_module|data\.datapipes))\S* \S+",
    re.ASCII,
)


def is_forbidden(module: str, name: str) -> bool:
    """Whether a checkpoint that asks for `name` of `module` is refused."""
    outer = [
        module.partition(".")[0],
        *name.split(".")[:-1],
    ]  # a dotted name may pass through modules
    return not _MODULES.isdisjoint(outer) or bool(_FUNCTIONS.fullmatch(f"{module} {name}"))
