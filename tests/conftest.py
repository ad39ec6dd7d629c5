import shutil

import pytest
from support import CHECKPOINT

import bagel_opt
from bagel_opt import Profile
from bagel_opt.export import export

TINY = Profile("tiny", rows=3, slots=768, text=64, patches=64, latents=64)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """An ONNX bundle of the golden checkpoint."""
    return export(CHECKPOINT, tmp_path_factory.mktemp("bundle") / "tiny", TINY)


@pytest.fixture(scope="session")
def eager():
    return bagel_opt.load(CHECKPOINT, device="cpu")


@pytest.fixture(scope="session", params=["eager", "compile", "onnx"])
def model(request):
    """The golden checkpoint in every runtime: the fitted shapes of eager mode, one static profile for the others."""
    if request.param == "onnx":
        return bagel_opt.load(request.getfixturevalue("bundle"))
    if request.param == "compile":
        if not shutil.which("g++") and not shutil.which("clang++"):
            pytest.skip("torch.compile needs a C++ compiler on the CPU")
        return bagel_opt.load(CHECKPOINT, device="cpu", backend="compile", profile=TINY)
    return request.getfixturevalue("eager")
