"""Commands, run in this process."""

from pathlib import Path

import pytest

from bagel_opt.cli.commands import main


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        status = main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def fails(run):
    """Runs a command that must fail in one line on standard error."""

    def call(*argv):
        status, out, err = run(*argv)
        assert (status, out) == (1, "")
        assert err.startswith("bagel-opt: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert not list(Path.cwd().glob("*.png"))
        return err

    return call
