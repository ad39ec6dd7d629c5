"""AOTInductor packages, compiled from the archives of an "export" bundle."""

import shutil
import zipfile
from pathlib import Path

import bundles
import pytest
import torch
from bundles import PROFILES
from support import CHECKPOINT, relative
from torch.utils._pytree import tree_unflatten

from bagel_opt.export import processes
from bagel_opt.export.torch_packages import compile_all
from bagel_opt.runtime.torch_bundle import open_package

CPU = torch.device("cpu")


FEW = {None: ("text.layer.pt2", "choose-3.whole.pt2"), "int4": ("text.layer.pt2", "decode.layer.pt2")}


@pytest.fixture(scope="module", params=[None, pytest.param("int4", marks=pytest.mark.second)])
def kind(request):
    """In which the model is quantised."""
    return request.param


@pytest.fixture(scope="module")
def archives(kind):
    few = {"programs": ("text", "decode"), "quantization": kind, "name": kind} if kind else {}
    return bundles.cached_export(CHECKPOINT, PROFILES[CHECKPOINT], format="export", **few)


@pytest.fixture(params=[0, 1])
def package(request, kind, archives, compiled):
    """An archive and the package that was made of it."""
    name = FEW[kind][request.param]
    return archives / name, compiled / name


@pytest.fixture(scope="module")
def compiled(kind, archives, tmp_path_factory):
    """A program's layer and a whole program, or two layers: compiling all of a bundle takes minutes."""
    bundles.needs_compiler("aoti")
    folder = tmp_path_factory.mktemp("packages")
    for name in FEW[kind]:
        shutil.copy(archives / name, folder)
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.os, "cpu_count", lambda: 1)  # two would import torch's compiler twice
        compile_all(folder, lambda *progress: told.append(progress))
    assert told == [("compiling", 1, 2), ("compiling", 2, 2)]
    return folder


def random_like(fake):
    if fake.dtype.is_floating_point:
        return torch.randn(fake.shape, dtype=fake.dtype)
    if fake.dtype == torch.bool:
        return torch.ones(fake.shape, dtype=torch.bool)
    return torch.full(fake.shape, 3, dtype=fake.dtype)


def test_a_package_gives_what_its_archive_gives(package):
    torch.manual_seed(0)
    program = torch.export.load(package[0])
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    given = [torch.empty([int(side) for side in v.shape], dtype=v.dtype, device="meta") for v in values.values()]
    for _ in range(2):
        inputs = [random_like(fake) for fake in given]
        arguments, keywords = tree_unflatten([x.clone() for x in inputs], program.call_spec.in_spec)
        want = program.module(check_guards=False)(*arguments, **keywords)
        got = open_package(package[1], CPU).run([x.clone() for x in inputs])
        assert len(got) == len(want) > 0
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b) if not a.dtype.is_floating_point else relative(a, b) < 1e-5


def test_a_package_holds_the_name_by_which_torch_211_finds_its_metadata(package):
    names = [Path(name).name for name in zipfile.ZipFile(package[1]).namelist()]
    (library,) = (name for name in names if name.endswith(".wrapper.so"))
    stem = library.removesuffix(".so")
    assert {f"{stem}.cpp", f"{stem}_metadata.json"} <= set(names)
