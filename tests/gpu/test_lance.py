"""The golden cases of Lance on a GPU. Run with -s to see the errors."""

import pytest
import torch
from lance_cases import CHECKPOINT, cases

import bagel_opt
from bagel_opt import Profile
from bagel_opt.export import export

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
WAYS = [
    ("eager", "float32", "sdpa"),
    ("compile", "float32", "sdpa"),
    ("eager", "bfloat16", "sdpa"),
    ("eager", "bfloat16", "flash"),
    ("compile", "bfloat16", "flash"),
]


def check(model, dtype):
    """Three times: launched, captured and replayed."""
    errors = {}
    for case in cases() * 3:
        events = []
        outputs = model.run(case.inputs, on_step=events.append, **case.options)
        if dtype == "float32":
            case.check_outputs(outputs, share=1e-2)
        if events:
            errors[case.name] = max(case.velocity_error(events), errors.get(case.name, 0))
    print(f"\n{model.runtime.active()}", " ".join(f"{name} {e:.1e}" for name, e in errors.items()))
    assert max(errors.values()) < (1e-4 if dtype == "float32" else 0.1)


@pytest.mark.parametrize(("backend", "dtype", "attention"), WAYS)
def test_golden_cases(backend, dtype, attention):
    check(bagel_opt.load(CHECKPOINT, device="cuda", backend=backend, dtype=dtype, attention=attention), dtype)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("parallel", ["sequence", "auto"])
@pytest.mark.parametrize(("backend", "dtype", "attention"), [WAYS[1], WAYS[-1]])
def test_golden_cases_on_two(parallel, backend, dtype, attention):
    model = bagel_opt.load(
        CHECKPOINT, device="cuda", backend=backend, dtype=dtype, attention=attention, gpus=2, parallel=parallel
    )
    try:
        check(model, dtype)
    finally:
        model.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_golden_cases_in_onnx_runtime(dtype, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    profile = Profile("lance", rows=3, slots=320, text=32, patches=64, latents=64)
    check(bagel_opt.load(export(CHECKPOINT, tmp_path / "bundle", profile, dtype=dtype, device="cuda")), dtype)
