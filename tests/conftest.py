import shutil

import pytest

pytest.register_assert_rewrite("support")

from support import CHECKPOINT, ODD  # noqa: E402  after the rewrite is registered

import bagel_opt  # noqa: E402
from bagel_opt import Profile  # noqa: E402
from bagel_opt.export import export  # noqa: E402
from bagel_opt.loading import shipped_model  # noqa: E402
from bagel_opt.profile import load_profile  # noqa: E402

PROFILES = {
    CHECKPOINT: Profile("tiny", rows=3, slots=768, text=64, patches=64, latents=64),
    ODD / "checkpoint": Profile("odd", rows=3, slots=768, text=64, patches=100, latents=144),
    shipped_model(): load_profile("demo"),
}
BUNDLES = ("onnx", "aoti", "export")
BACKENDS = ("eager", "compile", *BUNDLES)


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """load(checkpoint, backend): fitted shapes in eager mode, one static profile for the others. Each is made once."""
    models = {}

    def make(checkpoint, backend):
        profile = PROFILES[checkpoint]
        if backend in ("compile", "aoti") and not shutil.which("g++") and not shutil.which("clang++"):
            pytest.skip(f"{backend} needs a C++ compiler on the CPU")
        if backend in BUNDLES:
            folder = tmp_path_factory.mktemp("bundle") / profile.name
            return bagel_opt.load(export(checkpoint, folder, profile, format=backend))
        return bagel_opt.load(
            checkpoint, device="cpu", backend=backend, profile=None if backend == "eager" else profile
        )

    def cached(checkpoint, backend):
        if (checkpoint, backend) not in models:
            models[checkpoint, backend] = make(checkpoint, backend)
        return models[checkpoint, backend]

    return cached


@pytest.fixture(scope="session")
def eager(load):
    return load(CHECKPOINT, "eager")


@pytest.fixture(scope="session")
def bundle(load):
    """The folder of an ONNX bundle of the golden checkpoint."""
    return load(CHECKPOINT, "onnx").runtime.folder


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """The folder of a bundle of two profiles."""
    small = Profile("small", rows=2, slots=160, text=16, patches=16, latents=16)
    large = Profile("large", rows=3, slots=512, text=16, patches=16, latents=64)
    return export(CHECKPOINT, tmp_path_factory.mktemp("two") / "bundle", [large, small], format="export")
