"""Ours beside other servers of BAGEL, over HTTP: python -m bagel_opt.bench.peers --mstar PYTHON --vllm-omni

One after another, each server is started on a checkpoint of the published layout and sizes with random weights, and is sent
the same requests. What was measured is saved row by row; what is in the file already stays.
"""

import argparse
import datetime
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from bagel_opt.bench import peers_checkpoint
from bagel_opt.bench.full_size import versions
from bagel_opt.bench.peers_requests import Dialect, MStar, Ours, Work, call_of, send
from bagel_opt.bench.peers_rows import ROWS, Row, measured, told, warmed
from bagel_opt.bench.peers_servers import free_port, gpu_memory, started
from bagel_opt.bench.peers_tables import tables
from bagel_opt.config import PUBLISHED, BagelConfig, LLMConfig, ResizeConfig, SpecialTokens, VAEConfig, ViTConfig
from bagel_opt.files.replacing import replacing
from bagel_opt.json_files import read_json

# For a processor. The side of the latent table is the published one, which M* does not read from the files.
TINY = BagelConfig(
    llm=LLMConfig(256, 640, 2, 4, 2, 512),
    vit=ViTConfig(32, 64, 2, 2, 14, 8**2),
    vae=VAEConfig(32, (1, 2, 1, 1), 1),
    vae_resize=ResizeConfig(128, 32, 16),
    vit_resize=ResizeConfig(112, 28, 14),
    special=SpecialTokens(491, 492, 499, 500),
    latent_side=64,
    vit_side=8,
)
# Sizes of the model, its dtype, the work, and the server's profile: rows of 16 pictures, slots of an edit.
SIZES = {
    "published": (
        PUBLISHED,
        torch.bfloat16,
        Work(),
        {"rows": 32, "slots": 14336, "text": 256, "patches": 4900, "latents": 4096},
    ),
    "tiny": (
        TINY,
        torch.float32,
        Work(128, 64, 3, 6),
        {"rows": 8, "slots": 512, "text": 64, "patches": 64, "latents": 64},
    ),
}
SERVE = "{python} -m bagel_opt serve {checkpoint} --backend {backend} --profile {profile} --port {port} --name bagel"
MSTAR = "env -u PYTHONPATH HF_HUB_OFFLINE=1 {mstar} -m mstar.cli.main serve bagel --host 127.0.0.1 --port {port} --cache-dir {hub}"


@dataclass(frozen=True)
class Server:
    """command: with {port} and the other names of `_filled`."""

    name: str
    dialect: Dialect
    command: str


def main(words: list[str] | None = None) -> int:
    a = _arguments().parse_args(words)
    config, dtype, work, profile = SIZES[a.sizes]
    work = replace(work, timesteps=a.num_timesteps or work.timesteps, tokens=a.tokens or work.tokens)
    a.folder.mkdir(parents=True, exist_ok=True)
    a.json = a.json or a.folder / "peers.json"
    results = _before(a.json) if a.json.exists() else {"servers": {}}
    if results.setdefault("work", asdict(work)) != asdict(work):
        raise SystemExit(f"peers: {a.json} has figures of other work, {results['work']}; give another file as --json")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results["versions"] = versions()
    if results.setdefault("device", device) != device:
        raise SystemExit(f"peers: {a.json} has figures of another device, {results['device']}; give another --json")

    def save() -> None:
        with replacing(a.json) as partial:
            partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    checkpoint = a.folder / "checkpoint"
    if wrote := _written(checkpoint, config, dtype):
        results["checkpoint"] = wrote
        save()
    peers_checkpoint.write_hub(a.folder / "hub", checkpoint, num_timesteps=work.timesteps)
    settings = {"name": "peers", **profile}
    (a.folder / "ours.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    if a.load:
        _say("load")
        run = [sys.executable, "-m", "bagel_opt.bench.peers_load", str(checkpoint)]
        found = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout
        results["load"] = json.loads(found.splitlines()[-1])
        save()
        _say(json.dumps(results["load"]))
    failed = False
    for server in _servers(a):
        results["servers"][server.name] = about = {"rows": {}, **results["servers"].get(server.name, {})}
        about.pop("error", None)
        try:
            _all_rows(a, server, about, work, save)
        except RuntimeError as error:
            about["error"], failed = str(error), True
            _say(f"{server.name}: {error}")
        save()
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables(results, a.vllm_omni and work == Work()):
        console.print(table)
    return int(failed)


def _before(place: Path) -> dict:
    """The figures of calls before."""
    try:
        found = read_json(place, ValueError)
        if isinstance(found, dict) and isinstance(found.get("servers"), dict):
            return found
        why = f"{place} has none of its figures"
    except (OSError, ValueError) as error:
        why = str(error)
    raise SystemExit(f"peers: {why}; give another file as --json")


def _written(folder: Path, config: BagelConfig, dtype: torch.dtype) -> dict | None:
    """Writes the checkpoint unless it is there whole."""
    mark = folder / "written.json"
    if mark.exists() and json.loads(mark.read_text()) == json.loads(json.dumps(config.to_dict())):
        return None
    begun, shown = time.perf_counter(), 0.0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done / total >= shown + 0.1:
            shown = done / total
            _say(
                f"writing the checkpoint: {shown:.0%} of {total / 1e9:.1f} GB after {time.perf_counter() - begun:.0f} s"
            )

    mark.unlink(missing_ok=True)
    peers_checkpoint.write_checkpoint(folder, config, dtype, progress=progress)
    seconds = time.perf_counter() - begun
    mark.write_text(json.dumps(config.to_dict()))
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"bytes": size, "written, s": seconds}


def _servers(a: argparse.Namespace) -> Iterator[Server]:
    if not a.no_ours:
        yield Server("ours", Ours(), SERVE)
    for name, command in a.server:
        yield Server(name, Ours(), command)
    if a.mstar:
        yield Server(
            "mstar", MStar(), a.mstar if "{port}" in a.mstar else MSTAR.replace("{mstar}", shlex.quote(a.mstar))
        )


def _filled(a: argparse.Namespace, server: Server, port: int) -> list[str]:
    places = {
        "python": sys.executable,
        "checkpoint": a.folder / "checkpoint",
        "hub": a.folder / "hub",
        "profile": a.folder / "ours.toml",
        "backend": "compile" if torch.cuda.is_available() else "eager",
        "port": port,
    }
    return [word.format(**{name: str(value) for name, value in places.items()}) for word in shlex.split(server.command)]


def _all_rows(a: argparse.Namespace, server: Server, about: dict, work: Work, save: Callable[[], None]) -> None:
    """Starts a server and measures the rows that were asked for. Raises RuntimeError where it does not start."""
    before, port, dialect = gpu_memory(), free_port(), server.dialect
    command = _filled(a, server, port)
    about |= {"date": datetime.date.today().isoformat(), "command": shlex.join(command)}
    _say(f"{server.name}: {about['command']}")
    begun = time.perf_counter()
    with started(command, port, dialect.ready, a.folder / f"{server.name}.log", a.patience) as (url, ready):
        first = send(url, call_of("texts", dialect, work, 0, light=True), a.timeout)
        about["start"] = {"ready, s": ready, "first answer, s": time.perf_counter() - begun}
        if before is not None:
            about["start"]["memory, bytes"] = (gpu_memory() or before) - before
        _say(f"{server.name}: {json.dumps(about['start'])}")
        if first.error:
            raise RuntimeError(f"its first answer failed: {first.error}")
        save()
        if a.compare:
            short = replace(work, tokens=min(32, work.tokens))
            about["answers"] = told(url, dialect, short, a.timeout, together=False)
            about["answers at once"] = told(url, dialect, short, a.timeout, together=True)
            save()
        known: set[str] = set()
        for row in a.rows:
            for clients in ROWS[row] if a.clients is None else [n for n in ROWS[row] if n in a.clients]:
                name = f"{row} x {clients}"
                about["rows"][name] = found = _row(a, url, dialect, row, clients, work, before, about["rows"], known)
                _say(f"{server.name}, {name}: {json.dumps(found)}")
                save()


def _row(
    a: argparse.Namespace,
    url: str,
    dialect: Dialect,
    row: str,
    clients: int,
    work: Work,
    before: int | None,
    others: dict[str, Row],
    known: set[str],
) -> Row:
    """A row, or that it is left out where its requests, one after another, would take too long."""
    alone = others.get(f"{row} x 1", {}).get("p50, s")
    if isinstance(alone, float) and clients > 1 and clients * alone > a.longest_row:
        return {"left out": f"{clients} x {alone:.1f} s > {a.longest_row:.0f} s"}
    warm = warmed(url, dialect, row, clients, work, a.timeout, known)
    return measured(url, dialect, row, clients, work, a.seconds_per_row, a.timeout, before) | {"warm-up, s": warm}


def _say(text: str) -> None:
    print(f"peers: {text}", flush=True)


def _arguments() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("bagel_opt.bench.peers", description=__doc__)
    top.add_argument(
        "--folder", type=Path, default=Path("peers"), help="for the checkpoint (29 GB) and logs (%(default)s)"
    )
    top.add_argument("--sizes", choices=SIZES, default="published", help="of the model and the work (%(default)s)")
    top.add_argument("--json", type=Path, help="figures; those in it stay and are shown too (FOLDER/peers.json)")
    top.add_argument("--load", action="store_true", help="also load the checkpoint by itself and compare its tensors")
    top.add_argument("--no-ours", action="store_true", help="leave our own server out")
    top.add_argument(
        "--server", action="append", default=[], type=_named, metavar="NAME=COMMAND", help="another with our API"
    )
    top.add_argument("--mstar", metavar="PYTHON", help="its environment's python, or a command with {port} and {hub}")
    top.add_argument("--vllm-omni", action="store_true", help="show its published figures, of another card")
    top.add_argument("--rows", type=_rows, default=list(ROWS), help=f"of {','.join(ROWS)} (all)")
    top.add_argument("--clients", type=_numbers, help="of each row's, as 1,16 (all)")
    top.add_argument("--no-compare", dest="compare", action="store_false", help="do not compare answers")
    top.add_argument("--seconds-per-row", type=float, default=15, help="after which nothing new is sent (%(default)s)")
    top.add_argument("--longest-row", type=float, default=100, help="leave out rows of more seconds (%(default)s)")
    top.add_argument("--num-timesteps", type=int, help="of each picture (50)")
    top.add_argument("--tokens", type=int, help="of each answer (128)")
    top.add_argument("--patience", type=float, default=1800, help="seconds for a server to start (%(default)s)")
    top.add_argument("--timeout", type=float, default=600, help="seconds for an answer (%(default)s)")
    return top


def _named(text: str) -> tuple[str, str]:
    name, sign, command = text.partition("=")
    if not sign or not name or "{port}" not in command:
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=COMMAND with {{port}} in it")
    return name, command


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; give numbers, as 1,16")
    return [int(part) for part in parts]


def _rows(text: str) -> list[str]:
    rows = text.split(",")
    if wrong := [row for row in rows if row not in ROWS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r}; rows are {', '.join(ROWS)}")
    return rows


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` leaves no server behind
    sys.exit(main())
