"""The C++ compiler of this machine: whether there is one, and what to do where there is none."""

import os
import shutil
import sys

from lowvram_lab.files import cache_dir, not_kept


def compiler() -> str | None:
    """The C++ compiler that would be used; ``None`` without one, without a cache folder or with LOWVRAM_COMPILE=0."""
    there = os.environ.get("LOWVRAM_COMPILE") != "0" and shutil.which(compiler_command().split()[0])
    return compiler_command() if there and not not_kept(cache_dir() / "compiled") else None


def without_compiler() -> str:
    """What to do where nothing can be compiled, in words; nothing where it can, or nobody wants it."""
    if os.environ.get("LOWVRAM_COMPILE") == "0" or compiler():
        return ""
    if shutil.which(compiler_command().split()[0]):
        return not_kept(cache_dir() / "compiled")
    install = "run xcode-select --install" if sys.platform == "darwin" else "install one (apt-get install g++)"
    return f"found no C++ compiler {compiler_command()!r}; {install}, or name yours in CXX"


def compiler_command() -> str:
    """How the compiler is called, there or not; as torch looks for it."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
