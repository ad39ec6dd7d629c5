"""Every attention backend on a GPU, in float32 and bfloat16. Run with -s to see the errors as a table."""

import json

import numpy as np
import pytest
import torch
from support import CHECKPOINT, cases, random_inputs, relative

import bagel_opt
from bagel_opt import Profile
from bagel_opt.demo.loop import Settings
from bagel_opt.demo.train import train
from bagel_opt.export import export
from bagel_opt.files.manifest import read_manifest
from bagel_opt.model import attention
from bagel_opt.runtime import fused_products
from bagel_opt.runtime.cuda_graphs import Graphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def available(backend, dtype):
    try:
        attention.choose(backend, torch.device("cuda"), dtype)
    except (ValueError, ImportError) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("backend", attention.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(4, 2, 16), (14, 2, 64), (28, 4, 128)])
@pytest.mark.parametrize("queries", [1, 130, 1000])
def test_op_against_float64(backend, dtype, causal, heads, kv_heads, channels, queries):
    available(backend, dtype)
    q, k, v, kv_len = random_inputs(3, queries, 1500, heads, kv_heads, channels, dtype=dtype, device="cuda")
    for b, length in enumerate(kv_len):
        k[b, length:], v[b, length:] = 100, -100
    got = attention.attention(q, k, v, kv_len, causal, backend)
    want = attention.attention(q.double(), k.double(), v.double(), kv_len, causal, "sdpa")
    assert relative(got.double(), want) < (1e-5 if dtype == torch.float32 else 1e-2)


def run_twice(model, exact):
    """Velocity errors of all golden cases, whose outputs are looked at where they are to be exact. The second time they
    run by the graphs of the first, in which the same picture follows flow steps."""
    errors = {}
    for case in cases() * 2:
        events = []
        outputs = model.run(case.inputs, on_step=events.append, **case.options)
        if exact:
            case.check_outputs(outputs, share=1e-2)
        # where rounding changed a random model's thought, the picture is of another thought
        if events and (len(outputs) == 1 or outputs[0] == case.outputs[0]):
            errors[case.name] = max(case.velocity_error(events), errors.get(case.name, 0))
    return errors


@pytest.mark.parametrize("runtime", ["eager", "compile"])
@pytest.mark.parametrize("backend", attention.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_golden_cases(backend, dtype, runtime, record_property):
    available(backend, dtype)
    model = bagel_opt.load(CHECKPOINT, device="cuda", dtype=dtype, attention=backend, backend=runtime)
    errors = run_twice(model, exact=dtype == torch.float32)
    record_property("velocity errors", errors)
    print(f"\n{runtime:8} {backend:6} {dtype!s:15}", " ".join(f"{name} {e:.1e}" for name, e in errors.items()))
    # In bfloat16 errors of one step feed the next, and guidance amplifies them; a broken mask gives 0.3 and more.
    assert max(errors.values()) < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("kind", ["aoti", "export", "compile"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_golden_cases_from_torchs_bundles(kind, dtype, tmp_path, record_property):
    profile = Profile("tiny", rows=3, slots=768, text=64, patches=64, latents=64)
    folder = export(CHECKPOINT, tmp_path / kind, profile, format=kind, dtype=dtype, device="cuda")
    model = bagel_opt.load(folder)
    assert read_manifest(folder).attention == ("sdpa" if dtype == "float32" else "flash")
    errors = run_twice(model, exact=dtype == "float32")
    record_property("velocity errors", errors)
    print(f"\n{kind} {dtype:8}", " ".join(f"{name} {e:.1e}" for name, e in errors.items()))
    assert max(errors.values()) < (1e-4 if dtype == "float32" else 0.1)


@pytest.mark.parametrize(
    ("kind", "quantization"), [("aoti", {"und": "int4", "gen": "int8", "head": "int8"}), ("export", "fp8"), ("compile", "int4")]
)  # fmt: skip
def test_quantized_bundles(kind, quantization, tmp_path):
    """As near to float32 as the model itself in the same kinds. Other sums are rounded to other codes: what fp8 gives in 16 bits
    may differ by 19% from itself, as far as it is from float32."""
    profile = Profile("tiny", rows=3, slots=768, text=64, patches=64, latents=64)
    given = {"dtype": "bfloat16", "device": "cuda", "quantization": quantization}
    folder = export(CHECKPOINT, tmp_path / kind, profile, format=kind, **given)
    exact, itself, bundle = map(first_velocities, (
        bagel_opt.load(CHECKPOINT, device="cpu"), bagel_opt.load(CHECKPOINT, **given), bagel_opt.load(folder)
    ))  # fmt: skip
    for case, want in exact.items():
        errors = relative(bundle[case], want), relative(itself[case], want)
        print(f"\n{kind} {quantization} {case}: {errors[0]:.3f}, the model's {errors[1]:.3f}", end="")
        assert errors[0] < 1.5 * errors[1] + 0.02
    assert exact


def first_velocities(model):
    """Of the golden cases with pictures that follow no thought, by name."""
    found = {}
    for case in cases():
        events = []
        outputs = model.run(case.inputs, on_step=events.append, **case.options)
        if events and len(outputs) == 1:
            found[case.name] = events[0].v_t
    return found


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def onnx_bundle(request, tmp_path_factory):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    profile = Profile("tiny", rows=3, slots=768, text=64, patches=64, latents=64)
    return export(
        CHECKPOINT, tmp_path_factory.mktemp("onnx") / request.param, profile, dtype=request.param, device="cuda"
    )


def test_golden_cases_in_onnx_runtime(onnx_bundle, record_property):
    errors = run_twice(bagel_opt.load(onnx_bundle), exact=onnx_bundle.name == "float32")
    record_property("velocity errors", errors)
    print(f"\nonnx {onnx_bundle.name:8}", " ".join(f"{name} {e:.1e}" for name, e in errors.items()))
    assert max(errors.values()) < (1e-4 if onnx_bundle.name == "float32" else 0.1)


def test_replayed_graphs_do_not_disturb_each_other(onnx_bundle):
    """Those of several caches belong to one session, and between them run programs that share their memory."""
    runtime, rng = bagel_opt.load(onnx_bundle).runtime, np.random.default_rng(0)
    caches, seen = [runtime.caches(3, 768) for _ in range(3)], []
    counts = [np.full(3, n) for n in (0, 64, 0)]
    for turn in (0, 1, 2, 0, 2, 1, 0):
        x = np.random.default_rng(turn).standard_normal((3, 64, runtime.manifest.config.latent_dim), np.float32)
        inputs = [x, np.full(3, 0.5, np.float32), np.tile(np.arange(64), (3, 1)), *counts]
        seen.append((turn, runtime.host(runtime.run("generate", inputs, caches[turn])[0]).copy()))
        runtime.run("vae_decode", [rng.standard_normal((1, 16, 16, 16), np.float32)])
        runtime.run("decode_row", [np.array([turn + 7]), np.array([3]), np.array([3])], runtime.caches(3, 768), 1)
    assert all(np.array_equal(a, b) for i, a in seen for j, b in seen if i == j)
    assert not any(np.array_equal(a, b) for i, a in seen for j, b in seen if i != j)


def test_no_node_of_a_program_runs_on_the_host(onnx_bundle):
    """But for those of the VAE's sizes, which are shapes."""
    ort = pytest.importorskip("onnxruntime")
    for path in onnx_bundle.glob("*.onnx"):
        options = ort.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = ort.InferenceSession(path, options, providers=["CUDAExecutionProvider"])
        nodes = [
            (part.ep_name, node.op_type)
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
        elsewhere = [kind for provider, kind in nodes if provider != "CUDAExecutionProvider"]
        assert nodes
        assert not elsewhere or "vae" in path.name, (path.name, elsewhere)
        assert "MemcpyToHost" not in {kind for _, kind in nodes}, path.name


def test_training_in_cuda_graphs_is_training(tmp_path):
    logs = []
    for graphs in (True, False):
        few = {"vae_steps": 8, "vae_batch": 2, "steps": 6, "refine_steps": 2, "pairs": 2}
        settings = Settings(**few, workers=2, log_every=1, sheets=0, graphs=graphs)
        train(tmp_path / str(graphs), settings, "cuda")
        logs.append([json.loads(line) for line in (tmp_path / str(graphs) / "log.jsonl").open()])
    for got, want in zip(*logs, strict=True):
        for loss in ("error", "kl", "draw_flow", "edit_flow", "ask_text", "think_flow", "think_text"):
            assert got.get(loss) == pytest.approx(want.get(loss), rel=0.02)


@pytest.mark.parametrize(("m", "k", "n"), [(512, 64, 64), (777, 3584, 4608), (1030, 1152, 320), (8192, 256, 3584)])
def test_fused_products(m, k, n):
    if not fused_products.usable(torch.device("cuda"), torch.bfloat16):
        pytest.skip("needs Hopper and quack-kernels")
    torch.manual_seed(0)
    x, residual, weight, bias, gate_up = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (m, n), (n, k), (n,), (2 * n, k))
    )
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=-1)
    for got, want in (
        (fused_products.product(x, weight, bias), x.double() @ weight.double().T + bias),
        (fused_products.product(x, weight, residual_MN=residual), x.double() @ weight.double().T + residual),
        (fused_products.gated_product(x, gate_up), torch.nn.functional.silu(gate) * up),
    ):
        assert relative(got.double(), want) < 3e-3


def test_programs_can_be_forgotten_and_captured_again():
    def add(x, cache):
        return x + cache.sum(), cache

    graphs = Graphs(torch.device("cuda"))
    for value in (1.0, 2.0):
        cache, x = torch.full((4,), value, device="cuda"), torch.ones(3, device="cuda")
        for _ in range(2):
            assert graphs.run(add, [x], [cache])[0].tolist() == [1 + 4 * value] * 3
        graphs.forget(cache)
        assert not graphs.captured
