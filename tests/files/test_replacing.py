"""Files that take the place of others: whole, or not at all."""

import errno
import os
import resource
from pathlib import Path

import pytest
from PIL import Image
from support import CHECKPOINT, forked

from bagel_opt.cli.commands import main
from bagel_opt.files.replacing import replacing


def test_a_file_takes_the_place_of_another(tmp_path):
    path = tmp_path / "a.json"
    for text in ("old", "new"):
        with replacing(path) as partial:
            assert partial.suffix == ".json"
            partial.write_text(text)
        path.chmod(0o600)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("mine")])
def test_what_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")

    def write():
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error), match=r"No space left on device: '.*/a\.json'|^mine$"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "a.json", tmp_path / "elsewhere" / "b.json"
    link.symlink_to(target)
    for text in ("old", "new"):
        with replacing(link) as partial:
            partial.write_text(text)
        assert target.read_text() == text
    assert link.is_symlink()


def test_a_folder_that_is_not_there_is_told_by_the_file(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/none/a\.json'"),
        replacing(tmp_path / "none" / "a.json") as partial,
    ):
        partial.write_text("new")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_devices_are_written_to():
    with replacing(Path(os.devnull)) as partial:
        partial.write_text("new")
    assert Path(os.devnull).is_char_device()
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"), replacing(Path("/dev/full")) as partial:
        partial.write_text("new")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_drawn_picture_leaves_the_old_one_where_there_is_no_space(tmp_path, name):
    Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    size = ["--height", "64", "--width", "64", "--num-timesteps", "2"]

    def draw():
        os.chdir(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # bytes that a file may have
        return main(["generate", "a", "--checkpoint", str(CHECKPOINT), *size, "--out", name])

    done = forked(draw)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"bagel-opt: [Errno {errno.EFBIG}] File too large: '{name}'\n"
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]
