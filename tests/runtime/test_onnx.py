"""The runtime of ONNX bundles."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnxruntime import InferenceSession
from PIL import Image
from support import CHECKPOINT

import bagel_opt
from bagel_opt import BundleError
from bagel_opt.files.manifest import read_manifest
from bagel_opt.runtime import onnx
from bagel_opt.runtime.onnx import OnnxRuntime


def test_caches_are_updated_in_place(bundle):
    """Bound as input and output to one memory: what a program did not write stays what it was."""
    runtime = OnnxRuntime(bundle, read_manifest(bundle))
    caches = runtime.caches(3, 768)
    for cache in caches:
        cache[:] = 7
    ids, one = np.full((1, 64), 5), np.array([10])
    runtime.run("text", [ids, one, one], caches, rows=1)
    for cache in caches:
        assert (cache[[0, 2]] == 7).all()
        assert (cache[1, :10] == 7).all()
        assert (cache[1, 74:] == 7).all()
        assert (cache[1, 10:74] != 7).any()


@pytest.mark.parametrize("free", [0, None])
def test_where_memory_is_short_programs_make_room(bundle, monkeypatch, free):
    """For the next one that copies weights, and come again when they are needed. None: a system that does not say."""
    want, got = bagel_opt.load(bundle), bagel_opt.load(bundle)
    asked = {"num_timesteps": 3, "height": 64, "width": 64, "seed": 0}
    loaded, load_session = [], onnx.load_session
    monkeypatch.setattr(onnx, "free_memory", lambda: free)
    monkeypatch.setattr(onnx, "load_session", lambda path, *more: loaded.append(path.stem) or load_session(path, *more))
    answers, most = [], 0
    for _ in range(2):
        answers.append(got.chat("a", max_think_tokens=3))
        answers.append(np.asarray(got.generate("a", **asked)))
        most = max(most, len(got.runtime.held))
    again = {name for name in loaded if loaded.count(name) > 1}
    assert (most, again) == ((1, {"text", "decode", "generate", "vae_decode"}) if free == 0 else (4, set()))
    monkeypatch.undo()
    for number in (0, 2):
        assert answers[number] == want.chat("a", max_think_tokens=3)
        np.testing.assert_array_equal(answers[number + 1], np.asarray(want.generate("a", **asked)))


def test_a_program_that_memory_has_no_room_to_load(bundle, monkeypatch):
    """As ONNX Runtime 1.32 said it under a limit of `ulimit -v`, which is too fine a measure for a test."""

    def full(*given, **options):
        raise RuntimeError(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: std::bad_alloc"
        )

    model = bagel_opt.load(bundle)
    monkeypatch.setattr(onnx.ort, "InferenceSession", full)
    with pytest.raises(MemoryError, match=r"memory is full \(program 'text' cannot be loaded\); end other programs"):
        model.chat("a")


def test_a_program_that_memory_has_no_room_to_run(bundle):
    """ONNX Runtime's exception has no kind of its own. The engine lets one request end by it, and the command says one line."""
    runtime = OnnxRuntime(bundle, read_manifest(bundle))
    entry = runtime.programs["choose"]
    huge = helper.make_tensor("huge", TensorProto.INT64, [2], [2**44, 1])
    nodes = [helper.make_node("Expand", ["temperature", "huge"], ["e"]), helper.make_node("ReduceMax", ["e"], ["ids"])]
    given = [helper.make_tensor_value_info(name, 1, shape) for name, (shape, _) in entry["inputs"].items()]
    graph = helper.make_graph(nodes, "choose", given, [helper.make_tensor_value_info("ids", 1, None)], [huge])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    runtime.sessions[entry["file"]] = InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = [np.ones(shape, np.float32) for shape, _ in entry["inputs"].values()]
    with pytest.raises(MemoryError, match=r"memory is full \(program 'choose'\); use a smaller height"):
        runtime.run("choose", inputs)


def test_a_file_of_another_program_is_named(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    shutil.copyfile(bundle / "decode.onnx", copy / "text.onnx")
    runtime = OnnxRuntime(copy, read_manifest(copy))
    with pytest.raises(BundleError, match=r"text\.onnx is not the program that the manifest tells of"):
        runtime.session("text")
    runtime.session("decode")


def test_bundles_run_without_torch(bundle, tmp_path):
    """In a process where torch cannot be imported: the same picture for the same seed."""
    script = f"""
import sys
sys.modules["torch"] = None
import bagel_opt
from bagel_opt.export import export
model = bagel_opt.load({str(bundle)!r})
events = []
model.generate("a red circle", seed=3, num_timesteps=4, height=64, width=64, on_step=events.append).save("out.png")
assert type(events[0].x_t).__module__ == "numpy"
for call in (lambda: bagel_opt.load({str(CHECKPOINT)!r}), lambda: export({str(CHECKPOINT)!r}, "out", "tiny")):
    try:
        call()
    except ImportError as error:
        assert "pip install" in str(error)
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    expected = bagel_opt.load(bundle).generate("a red circle", seed=3, num_timesteps=4, height=64, width=64)
    difference = np.asarray(Image.open(tmp_path / "out.png")).astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 1


OTHER_SESSION = """
import json, os, sys
import numpy as np, onnx, onnxruntime

def other():
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "twice", [x], [y])
    opset = onnx.helper.make_opsetid("", 21)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones(4, np.float32)})[0].tolist() == [2] * 4

def ours():
    import bagel_opt
    bagel_opt.load(sys.argv[1]).chat("a", max_think_tokens=2)

for name in sys.argv[2:]:
    {"ours": ours, "other": other}[name]()
tasks = f"/proc/{os.getpid()}/task"
print(json.dumps([sorted(os.sched_getaffinity(int(task))) for task in os.listdir(tasks)]))
"""


@pytest.mark.parametrize("order", [["ours", "other"], ["other", "ours", "other"]], ids=" ".join)
def test_others_may_use_onnxruntime_in_the_same_process(bundle, order):
    """With sessions as they are by default."""
    command = [sys.executable, "-c", OTHER_SESSION, bundle, *order]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}, timeout=120)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no such limit")
def test_threads_stay_on_the_cores_of_the_process(bundle):
    """ONNX Runtime by itself counts all cores, and pins a thread to each."""
    allowed = min(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_SESSION, bundle, "ours"],
        env={**environment, "PYTHONPATH": ":".join(sys.path)},
        preexec_fn=lambda: os.sched_setaffinity(0, {allowed}),
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    assert all(cores == [allowed] for cores in json.loads(done.stdout))
