"""Models in the cache of the Hugging Face hub, whose files are links, and by repo id, from a hub on this machine."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest
from bundles import rewrite
from support import CHECKPOINT

import bagel_opt
from bagel_opt import BundleError
from bagel_opt.cli.commands import main
from bagel_opt.files.checkpoint import Checkpoint
from bagel_opt.files.manifest import MANIFEST

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(folder, cache, shared=False):
    """A folder's files as the hub's client lays them: blobs, which may be links to those of all repos, and links to them."""
    repo = cache / "models--owner--name"
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob, link = repo / "blobs" / f"{number:040}", repo / "snapshots" / COMMIT / path.relative_to(folder)
        kept = cache / "blobs" / "00" / f"{number:064}" if shared else blob
        for made in (blob, link, kept):
            made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)
        if shared:
            blob.symlink_to(os.path.relpath(kept, blob.parent))
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repo / "snapshots" / COMMIT


@pytest.mark.parametrize("shared", [False, True], ids=["of the repo", "of all repos"])
def test_a_bundle_in_the_hubs_cache(bundle, tmp_path, shared):
    folder = cached(bundle, tmp_path, shared)
    assert (folder / "text.onnx").is_symlink()
    want = bagel_opt.load(bundle, check=False).chat("hello", max_think_tokens=3)
    assert bagel_opt.load(folder).chat("hello", max_think_tokens=3) == want
    (tmp_path / "link").symlink_to(folder)
    assert bagel_opt.load(tmp_path / "link").chat("hello", max_think_tokens=3) == want


def test_a_checkpoint_in_the_hubs_cache(tmp_path):
    folder = cached(CHECKPOINT, tmp_path)
    assert set(Checkpoint(folder).tensors) == set(Checkpoint(CHECKPOINT).tensors)


def test_links_that_leave_the_cache_are_refused(bundle, tmp_path):
    folder = cached(bundle, tmp_path / "cache")
    repo, name = folder.parent.parent, "text.onnx"
    elsewhere = {
        "beside the cache": tmp_path / name,
        "beside the repo": repo.parent / name,
        "of another repo": repo.parent / "models--other--name" / "blobs" / name,
        "another snapshot": repo / "snapshots" / "other" / name,
    }
    link, blob = folder / name, (folder / name).resolve()
    for target in elsewhere.values():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(blob, target)
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(BundleError, match=rf"{name} leads outside the bundle"):
            bagel_opt.load(folder)
    link.unlink()
    link.symlink_to(blob)
    plain = shutil.copytree(bundle, tmp_path / "snapshots" / "plain")  # not as the hub's client names a repo
    (tmp_path / "blobs").mkdir()
    shutil.move(plain / name, tmp_path / "blobs" / name)
    (plain / name).symlink_to(tmp_path / "blobs" / name)
    with pytest.raises(BundleError, match=rf"{name} leads outside the bundle"):
        bagel_opt.load(plain)


def test_a_name_that_climbs_to_a_blob_is_refused(bundle, tmp_path):
    folder = cached(bundle, tmp_path)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    climbing = os.path.relpath((folder / "text.onnx").resolve(), folder)
    (folder / MANIFEST).unlink()  # a link, to which nobody writes
    shutil.copy(bundle / MANIFEST, folder)
    rewrite(folder, files={**files, climbing: files["text.onnx"]})
    with pytest.raises(BundleError, match="leads outside the bundle"):
        bagel_opt.load(folder)


def oid(name):
    return hashlib.sha1(name.encode()).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub's client asks of it, for one repo that a folder holds."""

    def __init__(self, folder, asked, *arguments):
        self.folder, self.asked = folder, asked
        super().__init__(*arguments)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        files = {f.relative_to(self.folder).as_posix(): f for f in self.folder.rglob("*") if f.is_file()}
        if path.startswith("/api/models/owner/name"):
            about = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": oid(n)} for n, f in files.items()]
            return self.answer(json.dumps(tree if "/tree/" in path else about).encode(), "application/json")
        name = path.removeprefix(f"/owner/name/resolve/{COMMIT}/")
        if name not in files:
            return self.send_error(404)
        if self.command == "GET":
            self.asked.append(name)
        return self.answer(files[name].read_bytes(), "application/octet-stream", ETag=f'"{oid(name)}"')

    def answer(self, data, kind, **headers):
        self.send_response(200)
        for field, value in {
            "Content-Type": kind,
            "Content-Length": len(data),
            "X-Repo-Commit": COMMIT,
            **headers,
        }.items():
            self.send_header(field, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(folder): what was fetched, from then on, of a repo with the folder's files; and a cache of its own."""
    servers = []

    def serve(folder):
        asked = []
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, folder, asked))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        here = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", here)
        template = here + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_bundle_by_repo_id(bundle, tmp_path, hub, capsys):
    repo = shutil.copytree(bundle, tmp_path / "repo")
    (repo / "README.md").write_text("A bundle.")
    (repo / "huge.safetensors").write_bytes(b"of something else")
    asked = hub(repo)
    assert main(["inspect", "owner/name"]) == 0
    assert "bundle " in capsys.readouterr().out
    model = bagel_opt.load("owner/name")
    assert Path(model.runtime.folder).parent.parent == tmp_path / "hub" / "models--owner--name"
    assert sorted(asked) == sorted(path.name for path in bundle.iterdir())  # each once, and nothing else
    assert model.chat("hello", max_think_tokens=3) == bagel_opt.load(bundle).chat("hello", max_think_tokens=3)


def test_a_bundle_by_repo_id_that_is_refused_is_not_downloaded(bundle, tmp_path, hub):
    repo = shutil.copytree(bundle, tmp_path / "repo")
    asked = hub(repo)
    with pytest.raises(BundleError, match="dtype='float16': of a bundle this was fixed"):
        bagel_opt.load("owner/name", dtype="float16")
    rewrite(repo, format=99)
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(BundleError, match=r"bundle format 99; .* upgrade it"):
        bagel_opt.load("owner/name")
    assert {name for name in asked if not name.endswith(".json")} == set()


def test_a_checkpoint_by_repo_id(tmp_path, hub):
    repo = shutil.copytree(CHECKPOINT, tmp_path / "repo")
    (repo / "pytorch_model.bin").write_bytes(b"pickled")
    asked = hub(repo)
    assert set(Checkpoint("owner/name").tensors) == set(Checkpoint(CHECKPOINT).tensors)
    assert "ema.safetensors" in asked
    assert not {"pytorch_model.bin", MANIFEST} & set(asked)
