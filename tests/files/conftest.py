"""A small checkpoint, and a copy of it."""

import shutil
from pathlib import Path

import pytest
from checkpoints import SMALL
from random_checkpoint import make


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return make(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture
def folder(small, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(small, tmp_path / "checkpoint"))
