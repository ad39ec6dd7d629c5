"""export/runtimes.py, with stand-ins for other runtimes."""

import importlib.util
import shutil
import sys

import numpy as np
import pytest
from support import ROOT

from bagel_opt.files.manifest import read_manifest
from bagel_opt.programs.signatures import ROW

spec = importlib.util.spec_from_file_location("runtimes", ROOT / "export" / "runtimes.py")
runtimes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runtimes)

SAME = "import shutil, sys; from pathlib import Path; shutil.copytree(Path(sys.argv[2]).parent / 'found', sys.argv[3])"
OTHER = f"{SAME}; import numpy as np; p = Path(sys.argv[3]) / '0.bin'; (np.fromfile(p, 'float32') * 1.01).tofile(p)"
FAILS = "import sys; sys.exit('no such\\noperator here')"
DIES = "import os; os._exit(7)"


@pytest.fixture(scope="module")
def records(bundle, tmp_path_factory):
    recording = runtimes.Recording(bundle, read_manifest(bundle))
    return recording.record(tmp_path_factory.mktemp("records"))


def test_every_program_is_recorded(bundle, records):
    manifest = read_manifest(bundle)
    programs = manifest.programs[manifest.profiles[0].name]
    assert records.keys() == programs.keys()
    for program, folder in records.items():
        caches = manifest.config.llm.num_hidden_layers * 2 if programs[program]["cache_rows"] else 0
        given, found = (runtimes.read(folder / name) for name in ("given", "found"))
        assert len(given) == len(programs[program]["inputs"]) + caches
        assert len(found) == len(programs[program]["outputs"]) + caches
        if program == "text":  # the first; the cache is from before, though what comes out lies in its place
            assert not given["key.0"].any()
            assert found["key.0.out"].any()
        if program.endswith(ROW):
            assert {len(value) for value in given.values()} == {1}


@pytest.mark.parametrize(
    ("code", "answer"),
    [(SAME, "0.0e+00"), (OTHER, "WRONG"), (FAILS, "fails: no such operator here"), (DIES, "ends with status 7")],
)
def test_what_is_said_of_a_runtime(records, tmp_path, code, answer):
    command = [sys.executable, "-c", code]
    said = runtimes.tried(command, tmp_path / "a.onnx", records["text"], tmp_path, 1e-4)
    assert answer in said, said


def test_an_output_that_is_not_there(records, tmp_path):
    shutil.copytree(records["choose"], tmp_path / "record")
    found = runtimes.read(tmp_path / "record" / "found")
    runtimes.save(tmp_path / "other", {"another": np.zeros(1)})
    code = f"import shutil, sys; shutil.copytree({str(tmp_path / 'other')!r}, sys.argv[3])"
    said = runtimes.tried([sys.executable, "-c", code], tmp_path / "a.onnx", tmp_path / "record", tmp_path, 1e-4)
    assert said == f"has no output {min(found)}"
