"""ONNX bundles where torch is not installed."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT

import bagel_opt


@pytest.mark.second  # it installs packages
def test_an_environment_without_torch_runs_the_shipped_models_bundle(load, tmp_path):
    """As the README says: a new environment, the package with its onnx extra, a bundle."""
    folder = load(bagel_opt.loading.shipped_model(), "onnx").runtime.folder
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-compile"]  # most of it is never imported
    install = [*pip, "-q", "-c", ROOT / "constraints.txt", f"{ROOT}[onnx]"]
    subprocess.run(install, check=True, cwd=tmp_path)
    script = f"""
import importlib.util, json, pathlib, sys
assert importlib.util.find_spec("torch") is None
import bagel_opt
model = bagel_opt.load({str(folder)!r})
prompt = "a large red circle at the top and a small blue star on the left"
picture = model.generate(prompt, num_timesteps=25, seed=0)
picture.save("circle.png")
(green,), (answer,) = model.run_many([
    bagel_opt.Request([picture, "make the circle green"], num_timesteps=25, seed=0),
    bagel_opt.Request([picture, "where is the star?"], output="text"),
])
site = pathlib.Path(bagel_opt.__file__).parent.parent
size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file() and "pip" not in path.parts)
print(json.dumps({{"answer": answer, "size": size}}))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert found["answer"] == "on the left"
    print(f"installed: {found['size'] / 1e6:.0f} MB")
    assert found["size"] < 400e6
    command = [tmp_path / "venv" / "bin" / "bagel-opt", "understand", "circle.png", "what color is the circle?"]
    done = subprocess.run(
        [*command, "--checkpoint", folder], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "red"
    done = subprocess.run(
        [command[0], "inspect", folder], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "memory in float32" in done.stdout
