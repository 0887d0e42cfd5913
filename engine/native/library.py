"""Compiles the kernels for this processor and loads them.

The library is kept in the user's cache directory, under a name made of everything it
depends on: sources, compiler, flags, processor and PyTorch's OpenMP. It is linked to
that OpenMP and no other, because two of them would keep two teams of threads busy on
the same cores.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import structlog
from xxhash import xxh3_128

SOURCES = Path(__file__).parent
FLAGS = [
    *("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC", "-Wno-psabi"),
]
SECONDS = 120
"""How long the compiler may take; it takes ten on a core of 2023."""

log = structlog.get_logger()


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the kernels, compiled if need be; None, with a line in the log, where that is not possible."""
    try:
        return ctypes.CDLL(str(compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning(
            "no kernels for this processor: PyTorch's are used, which takes longer",
            reason=_reason(error),
            advice="install g++, set XDG_CACHE_HOME to a directory that can be written to, or choose --kernels torch",
        )
        return None


def compiled() -> Path:
    """Return the library's path after compiling it, if it is not there yet.

    Raises OSError if there is no compiler or no place to write to, and
    subprocess.SubprocessError if the compiler fails.
    """
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise FileNotFoundError("there is no g++")
    openmp = _openmp()
    path = _directory() / f"kernels-{_digest(compiler, openmp)}.so"
    if path.exists():
        return path
    log.info("compiling kernels for this processor, once", path=str(path))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        middle, made = (str(Path(directory) / name) for name in ("kernels.o", "kernels.so"))
        _output([compiler, "-c", str(SOURCES / "kernels.cpp"), *FLAGS, "-o", middle])
        _output([compiler, "-shared", middle, *openmp, "-o", made])
        ctypes.CDLL(made)  # what cannot be loaded is not kept
        os.replace(made, path)
    log.info("compiled", seconds=round(time.monotonic() - began, 1))
    return path


def _directory() -> Path:
    """Return a directory that only this user can write to: what lies there is executed."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise FileNotFoundError("there is no home directory to keep them in")
    path = Path(base, "prefixcache")
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{path} can be written to by others")
    return path


def _openmp() -> list[str]:
    """Return how to link to the OpenMP that PyTorch brings, or to the system's if it brings none."""
    spec = importlib.util.find_spec("torch")
    for place in (spec and spec.submodule_search_locations) or []:
        for found in sorted(Path(place, "lib").glob("lib*omp*.so*")):
            return [str(found), f"-Wl,-rpath,{found.parent}"]
    return ["-lgomp"]


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout


def _digest(compiler: str, openmp: list[str]) -> str:
    digest = xxh3_128()
    version = _output([compiler, "--version"])
    for part in (version, _processor(), *openmp, *FLAGS):
        digest.update(part.encode())
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _processor() -> str:
    """Return what `-march=native` looks at: the same cache directory may be seen by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part", "cpu family", "model\t")
    return "\n".join(line for line in lines if line.startswith(kept))


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines: list[str] = (error.stderr or "").strip().splitlines()
        return next((line for line in lines if "error" in line), str(error))
    return str(error)
