import os

# Before torch: these models are so small that threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The C++ that calls a package's kernels takes longer to compile than the kernels, which are optimised as ever.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
os.environ.setdefault("AOT_INDUCTOR_ENABLE_LINE_TABLES", "0")
# Compilers know what the processor has; torch would try each kind of vectors for each folder of compiled code.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Two processes of the tests have the cores; torch would start more, which import it, to compile in.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import gc
import subprocess
import types
from pathlib import Path

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("support", "bundles")

import bundles  # noqa: E402  after the rewrite is registered
import zygote as zygotes  # noqa: E402
from bundles import BUNDLES, ONE, PROFILES, cached_export, few_programs  # noqa: E402
from support import CHECKPOINT  # noqa: E402

import bagel_opt  # noqa: E402
from bagel_opt import Profile  # noqa: E402
from bagel_opt.runtime import members  # noqa: E402

LONG = (
    "test_golden.py",
    "test_readmes.py",  # before demo/test_shipped_model.py, which takes a bundle that it exports
    "export/test_lance.py",
    "demo/test_shipped_model.py",
    "runtime/test_ranks.py",
    "export/test_formats.py",
    "export/test_onnx_quantized.py",
    "test_quantization.py",
    "runtime/test_onnx_gpu.py",
    "export/test_packages.py",
    "demo/test_training.py",
    "runtime/test_streaming.py",
    "export/test_onnx.py",
    "bench/test_peers.py",
    "bench/test_full_size.py",
    "sampling/test_interleaved.py",
    "export/test_quantized_bundles.py",
    "model/test_attention.py",
    "export/test_onnx_quantized_gpu.py",
    "runtime/test_adapters.py",
    "bench/test_bench.py",
    "serve/test_ray.py",
    "export/test_interrupted.py",
    "export/test_quantize.py",
    "runtime/test_without_torch.py",
    "serve/test_faults.py",
    "sampling/test_static_shapes.py",
    "demo/test_checker.py",
)  # by the time they take

settings.register_profile("second", max_examples=100, deadline=None)
settings.register_profile("first", max_examples=20, deadline=None)


def all_tiers(config):
    return config.getoption("markexpr") != "not second"


def pytest_configure(config):
    settings.load_profile("second" if all_tiers(config) else "first")  # before test files are read


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that two processes that share the files end at about the same time."""
    places = {name: place for place, name in enumerate(LONG)}
    here = Path(__file__).parent
    items.sort(key=lambda item: places.get(item.path.relative_to(here).as_posix(), len(LONG)))


def pytest_collection_finish():
    """What libraries hold is not looked through for garbage again and again: tracing takes a sixth less. What tracing and
    compiling make mostly stays: to look through it less often takes a tenth off compiling."""
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """What a file leaves, such as code that it compiled, is not looked through either: benchmarks that collect garbage took six
    times as long at the end of a run."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def thorough(request):
    """Whether what can be tried a little or a lot is to be tried a lot: wherever the second tier is not left out."""
    return all_tiers(request.config)


@pytest.fixture(scope="session")
def zygote():
    with zygotes.zygote() as made:
        yield made


@pytest.fixture(scope="module")
def quick_ranks(zygote):
    """Processes of models on several ranks need not import torch each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members, "subprocess", types.SimpleNamespace(**{**vars(subprocess), "Popen": zygote.popen}))
        yield


@pytest.fixture(scope="session")
def load():
    """load(checkpoint, backend): fitted shapes in eager mode, one static profile for the others. Each is made once."""
    models = {}

    def make(checkpoint, backend):
        profile = PROFILES[checkpoint]
        if backend in ("compile", "aoti"):
            bundles.needs_compiler(backend)
        if backend in BUNDLES:
            return bagel_opt.load(cached_export(checkpoint, profile, format=backend))
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


@pytest.fixture
def two():
    """The folder of a bundle of two profiles, with what it takes to draw, decode and read pictures; it loads in this test."""
    programs = ("text", "decode", "vit", "generate", "generate_row", "step", "vae_encode", "vae_decode")
    small = Profile("small", rows=2, slots=160, text=16, patches=16, latents=16)
    large = Profile("large", rows=3, slots=512, text=16, patches=16, latents=64)
    folder = cached_export(CHECKPOINT, [large, small], name="two", format="export", programs=programs)
    with few_programs(*programs):
        yield folder


@pytest.fixture
def small_bundle():
    """The folder of a bundle for tests that ask what becomes of its files, and run none; it loads in this test."""
    programs = ("choose", "step")
    folder = cached_export(CHECKPOINT, ONE, name="small", format="export", programs=programs)
    with few_programs(*programs):
        yield folder
