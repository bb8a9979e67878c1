"""The C sources of this folder as a library in this process: compiled when it is first needed, and kept.

The C compiler is $CC, or else `cc`, `gcc` or `clang`. What it makes is kept in the user's cache folder ($XDG_CACHE_HOME, or
~/.cache), under a name that holds the processor, the compiler's options and the sources.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCES = [Path(__file__).with_name(name) for name in ("lanes.h", "neuron.c", "normed.c", "events.c", "gradients.c", "matrix.c")]
COMPILERS = ("cc", "gcc", "clang")
OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC")
"""`-ffp-contract=off`: v0*theta + I in one rounding would flip spikes."""

FUNCTIONS = (
    *("fire", "ones", "staircase", "rate_gradient", "time_gradient"),
    *("batch_moments", "normed_fire", "normed_gradient", "normed_rate_gradient", "of_channels"),
    *("pack_spikes", "unpack_spikes", "fire_bits", "sum_sets"),
)


def compiler() -> str:
    """The C compiler. Raises FileNotFoundError where there is none."""
    wanted = os.environ.get("CC")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise FileNotFoundError(f"no C compiler is here ({wanted or ', '.join(COMPILERS)})")


def load(cc: str) -> Any:
    """The library, compiled by `cc` unless it is in the cache folder; with threads where OpenMP is known."""
    errors = []
    for threads in (("-fopenmp",), ()):
        try:
            library = ctypes.CDLL(str(_built(cc, threads)))
        except (OSError, subprocess.SubprocessError) as error:
            errors.append(_first_line(error))
            continue
        place, number, size, flag = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64, ctypes.c_int
        library.fire.argtypes = [place] * 7 + [size] * 7 + [flag] * 4
        library.ones.argtypes = [place] * 2 + [size, flag]
        library.staircase.argtypes = [place] * 2 + [number] * 4 + [size, flag, flag]
        library.rate_gradient.argtypes = [place] * 5 + [number] * 2 + [size, flag, flag]
        library.time_gradient.argtypes = [place] * 4 + [number] * 2 + [size] * 5 + [flag] * 2
        library.batch_moments.argtypes = [place] * 3 + [size] * 4 + [flag] * 2
        library.normed_fire.argtypes = [place] * 5 + [number] * 2 + [size] * 3 + [flag] * 3
        library.normed_gradient.argtypes = [place] * 9 + [number] * 2 + [size] * 4 + [flag] * 3
        library.normed_rate_gradient.argtypes = [place] * 10 + [number] * 2 + [size] * 3 + [flag] * 2
        library.of_channels.argtypes = [place] * 6 + [size] * 2 + [flag] * 2
        library.convolve_matrix.argtypes = [place] * 4 + [size] * 9 + [flag]
        library.pack_spikes.argtypes = [place] * 2 + [size] * 2 + [flag] * 2
        library.unpack_spikes.argtypes = [place] * 3 + [size] * 2 + [flag]
        library.fire_bits.argtypes = [place] * 6 + [size] * 4 + [flag]
        library.sum_sets.argtypes = [place] * 2 + [size] * 3 + [flag]
        library.fire_events.argtypes = [place] * 14 + [size] * 10 + [flag] * 2
        library.weight_gradient.argtypes = [place] * 3 + [size] * 7 + [flag] * 2
        for function in FUNCTIONS:
            getattr(library, function).restype = None
        return library
    raise OSError(f"the C compiler {cc} failed ({errors[-1]})")


def _built(cc: str, threads: tuple[str, ...]) -> Path:
    options = (*OPTIONS, *threads)
    marks = "\n".join([*(source.read_text() for source in SOURCES), cc, *options, platform.platform(), _features()])
    file = f"neuron-{hashlib.sha256(marks.encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "micelab"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (folder / file).exists():
            _build(cc, options, folder / file)
    except (OSError, RuntimeError):  # no home, or not writable: for this process only
        folder = Path(tempfile.mkdtemp(prefix="micelab-"))
        _build(cc, options, folder / file)
    return folder / file


def _build(cc: str, options: tuple[str, ...], target: Path) -> None:
    """Compiles and links without naming an OpenMP library: torch's own is in the process, and two would fight for cores."""
    with tempfile.TemporaryDirectory(prefix="micelab-") as folder:
        units = {str(source): str(Path(folder) / f"{source.stem}.o") for source in SOURCES if source.suffix == ".c"}
        made = Path(folder) / "neuron.so"
        shared = ["-shared"] if platform.system() != "Darwin" else ["-shared", "-undefined", "dynamic_lookup"]
        compiling = [[cc, *options, "-c", source, "-o", part] for source, part in units.items()]
        for command in (*compiling, [cc, *shared, *units.values(), "-o", str(made)]):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        shutil.copy(made, partial)
        partial.replace(target)


def _features() -> str:
    """What tells processors apart, so that a cache folder that several machines share holds a file for each kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    marks = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(sorted(set(marks))) or platform.processor()


def _first_line(error: Exception) -> str:
    lines = (getattr(error, "stderr", None) or str(error)).splitlines()
    return lines[0] if lines else type(error).__name__
