"""What else is installed here, and whether it works: libraries that one can do without, and compilers."""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from bagel_opt.errors import reason

ABSENT = "not installed"
KERNELS = {"flash_attention": "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "quack": "QUACK_CACHE_DIR"}
FLASH = "pip install 'bagel-opt[flash]'"


def version(distribution: str) -> str | None:
    """Of what pip calls so; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def titled(distribution: str) -> str:
    """Its name, with the version where that is known: a module may lie there by itself."""
    return f"{distribution} {version(distribution) or ''}".strip()


def out_of_bounds() -> dict[str, tuple[str, str]]:
    """Libraries that lie here in versions that this package does not ask for: by name, which it asks for, as "<2,>=1.5", and
    which is here. A package installer checks that once; another version may have come since. Nothing of a package that is
    not installed itself, but a folder on the path."""
    try:
        lines = importlib.metadata.requires("bagel-opt") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for asked in map(Requirement, lines):
        tests = asked.marker and asked.marker.evaluate({"extra": "test"})
        have = None if tests else version(asked.name)
        if have and not asked.specifier.contains(have, prereleases=True):
            found[asked.name] = str(asked.specifier), have
    return found


@functools.cache
def fault(module: str, *names: str) -> str | None:
    """Why a module cannot be used, or these names of it: ABSENT, or what its import says. None where it can.

    It is imported, which may take seconds: a library that is there may still lack another one, or be built for another
    version of it, and raise anything."""
    try:
        if not is_there(module):
            return ABSENT
        found = importlib.import_module(module)
    except Exception as error:
        return reason(error)
    lacking = [name for name in names if not hasattr(found, name)]
    return f"it has no {lacking[0]}" if lacking else None


def is_there(module: str) -> bool:
    """Whether it is installed, without importing it or what it lies in, which may be broken. A folder without code of its own, such as flash_attn
    where flash-attn-4 alone is installed, is no module."""
    top, *parts = module.split(".")
    found = importlib.util.find_spec(top)
    for part in parts:
        places = found.submodule_search_locations if found else None
        found = PathFinder.find_spec(f"{found.name}.{part}", places) if places else None
    return found is not None and found.origin is not None


def kernel_folder(name: str) -> Path:
    """Where FlashAttention 4 ("flash_attention") or quack-kernels ("quack") keeps what it has compiled: beside torch, unless
    its own variable says otherwise. By itself the first would compile in each process, 10 s in all. Both variables are read as
    the packages are imported, and the first imports the second, so this is to be called before."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    for folder, variable in KERNELS.items():
        os.environ.setdefault(variable, str(Path(cache_dir()) / folder))
    return Path(os.environ[KERNELS[name]])


def mend_flash() -> str:
    """What to do where flash-attn-4 or quack-kernels is installed and does not work."""
    found = importlib.util.find_spec("nvidia_cutlass_dsl")
    place = next(iter(found.submodule_search_locations or ()), None) if found else None
    if place is None or re.search(r"[/\\](site|dist)-packages[/\\]", place):
        return f"{FLASH} installs what was tried together"
    # its .pth file is not read there, and quack-kernels 0.6.5 asks for the folder's name (gemm_runtime/identity.py)
    return (
        f"nvidia-cutlass-dsl lies in {place}, and works in a folder named site-packages or dist-packages alone: install "
        f"into an environment, without pip's --target, by {FLASH}"
    )


def missing(what: str, library: str, error: Exception, extra: str) -> ImportError:
    """The error of what needs a library that `error` came of importing. extra: of this package, which brings it."""
    needed = f"{library}, which cannot be imported here ({reason(error)})"
    if isinstance(error, ModuleNotFoundError) and error.name:
        needed = library if error.name.partition(".")[0] == library.partition("-")[0] else error.name
    return ImportError(f"{what} needs {needed}: pip install 'bagel-opt[{extra}]'")


def told(why: str) -> str:
    """What `fault` says, after a library's name."""
    return "is not installed" if why == ABSENT else f"cannot be imported ({why})"


class Compiler(NamedTuple):
    """What compiles, and, where it does not work, why and what to do."""

    name: str
    why: str = ""
    do: str = ""


def compiler(device: str) -> Compiler:
    """Of torch.compile on "cpu" or "cuda". For the CPU it imports torch's compiler, which takes two seconds."""
    if device == "cuda":
        why = fault("triton")
        return Compiler("Triton", f"Triton {told(why)}", "pip install triton") if why else Compiler("Triton")
    from torch._inductor.cpp_builder import get_cpp_compiler  # which asks CXX, then g++ or clang++

    try:
        name = get_cpp_compiler()
    except RuntimeError as error:
        do = "install a C++ compiler, such as g++, or name one by CXX"
        return Compiler("a C++ compiler", reason(error), do)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if sys.platform == "linux" and not headers.exists() and not {"CPATH", "CPLUS_INCLUDE_PATH"} & os.environ.keys():
        return Compiler(name, f"there is no {headers}", "install Python's headers, such as python3-dev")
    return Compiler(name)
