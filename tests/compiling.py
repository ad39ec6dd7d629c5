"""AOTInductor packages for the tests' bundles, compiled for less: in this process, the part of the C++ that is alike in all of
them once, and without vector instructions. `export/test_packages.py` has packages that are compiled as users' are."""

import contextlib
import hashlib
import logging
import re
import shlex
import subprocess
import types
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from bagel_opt.export import torch_packages

END = '} // extern "C"\n'  # of what torch writes at the head of each package's C++: the functions by which it is called
BASE = "template class torch::aot_inductor::AOTInductorModelBase<torch::aot_inductor::AOTInductorModel>;\n"


@contextlib.contextmanager
def compiled_here(only: Sequence[str] = ()) -> Iterator[None]:
    """Packages are compiled so meanwhile. only: the programs whose archives are; if none is named, all."""
    from torch._inductor import config as inductor
    from torch._inductor import cpp_builder

    compile_as_told = cpp_builder.run_compile_cmd

    def here(_: str, common: object, paths: list[str], most: int) -> Iterator[str]:
        chosen = [path for path in paths if not only or Path(path).name.partition(".")[0] in only]
        return torch_packages.compile_files(common, chosen)

    def run(line: str, cwd: str) -> None:
        words = shlex.split(line)
        source = next((Path(word) for word in words if word.endswith(".wrapper.cpp")), None)
        head, end, own = source.read_text().partition(END) if source and "-c" in words else ("", "", "")
        if end:
            with contextlib.suppress(subprocess.CalledProcessError):  # another torch's C++ may not come apart so
                return compile_in_two(words, source, head + end, own)
        compile_as_told(line, cwd)

    # choosing what to vectorise takes a quarter of the compiler's time
    with inductor.patch("cpp.simdlen", 1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_packages, "in_processes", here)
        patch.setattr(cpp_builder, "run_compile_cmd", run)
        before = logging.root.manager.disable
        try:
            yield
        finally:
            logging.disable(before)  # as those processes' own it is never put back


@contextlib.contextmanager
def partly_compiled() -> Iterator[set[str]]:
    """Bundles of which some archives were not compiled load meanwhile, and run those as they are. -> the programs of which
    packages are loaded"""
    from bagel_opt.runtime import torch_bundle

    open_package, compiled = torch_bundle.open_package, set()

    def opened(path: Path, device: torch.device) -> object:
        if any(name.endswith(".so") for name in zipfile.ZipFile(path).namelist()):
            compiled.add(path.name.partition(".")[0])
            return open_package(path, device)
        call = torch_bundle._flat(torch.export.load(path))
        return types.SimpleNamespace(run=lambda given: call(given, ()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_bundle, "open_package", opened)
        yield compiled


def compile_in_two(words: list[str], source: Path, head: str, own: str) -> None:
    """What g++ does with a package's C++, of which the head takes three quarters of the time. words: the command's."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    target = Path(words[words.index("-o") + 1])

    def compiled(text: str, to: Path) -> Path:
        to.with_suffix(".cpp").write_text(text)
        told = {str(source): str(to.with_suffix(".cpp")), str(target): str(to)}
        subprocess.run([told.get(word, word) for word in words], check=True, capture_output=True)
        return to

    # the compiler's version is in a header's name
    flags = [word for word in words if word not in (str(source), str(target))]
    name = hashlib.sha256(repr((flags, head, BASE)).encode()).hexdigest()[:24]
    once = Path(cache_dir()) / f"{name}.head.o"
    if not once.exists():
        compiled(head + BASE, target.with_suffix(".head.o")).rename(once)
    includes = [line for line in re.findall("^#include .*\n", head, re.M) if "model_container" not in line]
    mine = compiled("".join(includes) + f"extern {BASE}" + own, target.with_suffix(".own.o"))
    subprocess.run([words[0], "-r", "-nostdlib", "-o", target, mine, once], check=True, capture_output=True)
