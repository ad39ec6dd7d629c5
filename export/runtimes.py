"""Which runtimes run a bundle's graphs, and how far their numbers are from those of onnxruntime in Python:

    python export/runtimes.py BUNDLE [--node FOLDER]

A bundle of format "onnx" for the CPU in float32. Tried is what is installed: OpenVINO's package beside this Python's, and
onnxruntime-node and onnxruntime-web in FOLDER/node_modules. Each program runs once, in a process of its own, since some
runtimes end the process where they fail.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

import numpy as np
import onnxruntime as ort

from bagel_opt.errors import BundleError
from bagel_opt.export.verify import ROUNDED, TOLERANCE, relative
from bagel_opt.files.manifest import read_manifest
from bagel_opt.programs.exercise import run_programs
from bagel_opt.runtime.onnx import OnnxRuntime

HERE = Path(__file__).parent
SECONDS = 600


class Recording(OnnxRuntime):
    """Keeps what each program is given when it first runs, and what it answers."""

    def record(self, folder: Path) -> dict[str, Path]:
        """-> by program a folder with its inputs and outputs"""
        self.into, self.seen = folder, {}
        run_programs(self, self.manifest.config, self.manifest.profiles[0])
        return self.seen

    def run(self, program: str, inputs: list, caches: list[np.ndarray] = (), rows: int | slice | None = None) -> tuple:
        if program in self.seen:
            return super().run(program, inputs, caches, rows)
        entry, chosen = self.programs[program], slice(None) if rows is None else slice(rows, rows + 1)
        kinds = [self.dtype if kind == "model" else kind for _, kind in entry["inputs"].values()]
        given = {n: np.asarray(x, kind) for n, x, kind in zip(entry["inputs"], inputs, kinds, strict=True)}
        given |= {n: cache[chosen].copy() for n, cache in zip(self.cache_names, caches, strict=False)}
        outputs = super().run(program, inputs, caches, rows)
        found = dict(zip(entry["outputs"], outputs, strict=True))
        found |= {f"{n}.out": cache[chosen] for n, cache in zip(self.cache_names, caches, strict=False)}
        self.seen[program] = self.into / program
        for name, tensors in (("given", given), ("found", found)):
            save(self.seen[program] / name, tensors)
        return outputs


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """As plain bytes, with a file that tells of them."""
    folder.mkdir(parents=True)
    about = []
    for number, (name, tensor) in enumerate(tensors.items()):
        np.ascontiguousarray(tensor).tofile(folder / f"{number}.bin")
        about.append({"name": name, "dtype": tensor.dtype.name, "shape": tensor.shape, "file": f"{number}.bin"})
    (folder / "about.json").write_text(json.dumps(about))


def read(folder: Path) -> dict[str, np.ndarray]:
    about = json.loads((folder / "about.json").read_text())
    return {x["name"]: np.fromfile(folder / x["file"], x["dtype"]).reshape(x["shape"]) for x in about}


def openvino(graph: Path, given: Path, found: Path) -> None:
    """Runs a graph there: in a process of its own."""
    from openvino import Core

    model = Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = model(read(given))
    save(found, {name: outputs[out] for out in model.outputs for name in out.get_names()})


def runtimes(node: Path | None) -> Iterator[tuple[str, list[str]]]:
    """Name with version, and the command that runs a graph: with the graph, and the folders of inputs and outputs after it."""
    if util.find_spec("openvino"):
        yield f"OpenVINO {metadata.version('openvino')}", [sys.executable, str(HERE / "runtimes.py"), "--openvino"]
    for package in ("onnxruntime-node", "onnxruntime-web"):
        about = node and node / "node_modules" / package / "package.json"
        if about and about.is_file() and shutil.which("node"):
            name = f"{package} {json.loads(about.read_text())['version']}"
            yield name, ["node", str(HERE / "runtimes.mjs"), str(about.parent)]


def tried(command: list[str], graph: Path, record: Path, folder: Path, near: float) -> str:
    """How far a runtime is from Python's numbers, relatively, and whether that is too far; or what it says instead."""
    found = folder / "tried"
    shutil.rmtree(found, ignore_errors=True)
    try:
        done = subprocess.run(
            [*command, str(graph), str(record / "given"), str(found)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {SECONDS} s"
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return f"fails: {' '.join(map(str.strip, said[-2:])):.160}" if said else f"ends with status {done.returncode}"
    want, got = read(record / "found"), read(found)
    if lost := want.keys() - got.keys():
        return f"has no output {min(lost)}"
    error = max(relative(got[name], want[name]) for name in want)
    return f"{error:.1e}" + (" WRONG" if not error <= near else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--node", type=Path, metavar="FOLDER", help="where node_modules is")
    a = parser.parse_args()
    manifest = read_manifest(a.bundle)
    if (manifest.kind, manifest.dtype, manifest.device) != ("onnx", "float32", "cpu"):
        raise BundleError(
            f"{a.bundle} is of kind {manifest.kind!r} in {manifest.dtype} for {manifest.device}; export one for the CPU in float32"
        )
    others = dict(runtimes(a.node))
    if not others:
        print(
            "nothing else is installed here: pip install openvino, or npm install onnxruntime-node onnxruntime-web and --node"
        )
        return 1
    print(f"onnxruntime {ort.__version__} in Python, and the largest relative difference of others from it")
    near, wrong = ROUNDED if manifest.quantization else TOLERANCE["float32"], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for program, record in Recording(a.bundle, manifest).record(folder).items():
            graph = a.bundle / manifest.programs[manifest.profiles[0].name][program]["file"]
            for name, command in others.items():
                answer = tried(command, graph.resolve(), record, folder, near)
                wrong += "WRONG" in answer
                print(f"{program:16} {name:24} {answer}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--openvino"]:
        openvino(*map(Path, sys.argv[2:]))
    else:
        sys.exit(main())
