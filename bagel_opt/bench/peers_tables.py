"""What peers.py found, as tables."""

from collections.abc import Iterator

from rich.table import Table

from bagel_opt.bench.peers_rows import ROWS, first_differences

# What M*'s chart (m-star.org) gives for one H100, in the figure that a row is compared by: of 1024x1024 pictures, and of
# answers to a question about a picture.
PUBLISHED = {
    "vllm-omni 0.30": {
        "pictures x 1": {"p50, s": 20.7},
        "edits x 1": {"p50, s": 25.2},
        "questions x 1": {"tokens/s": 117.0},
        "questions x 16": {"tokens/s": 435.0},
    }
}
ANSWERS = ("texts", "questions")


def tables(results: dict, published: bool) -> Iterator[Table]:
    servers, work = results["servers"], results["work"]
    others = [name for name in servers if name != "ours"]
    rows = [f"{row} x {clients}" for row, many in ROWS.items() for clients in many]
    title = f"{results['device']}; pictures {work['large']} and {work['small']}, {work['timesteps']} timesteps, {work['tokens']} tokens"
    columns = (
        "requests x clients",
        "server",
        "n",
        "lost",
        "p50 s",
        "p95 s",
        "a minute",
        "tokens/s",
        "first s",
        "GPU GB",
        "ours",
    )
    table = Table(*columns, title=title)
    for name in rows:
        own = servers.get("ours", {}).get("rows", {}).get(name, {})
        found = [(server, servers[server]["rows"].get(name)) for server in ("ours", *others) if server in servers]
        found += [(f"{peer}, published, H100", said.get(name)) for peer, said in PUBLISHED.items() if published]
        for server, row in found:
            if row is not None:
                table.add_row(name, server, *cells(row), "" if server == "ours" else ratio(name, own, row))
    yield table
    yield _starts(results)
    if "answers" in servers.get("ours", {}):
        yield _answers(servers)


def cells(row: dict) -> list[str]:
    if "left out" in row:
        return ["", "", row["left out"], "", "", "", "", ""]
    memory = row.get("memory, bytes")
    shown = [row.get(name) for name in ("p50, s", "p95, s", "per minute", "tokens/s", "first token p50, s")]
    return [
        *("" if row.get(name) is None else str(row[name]) for name in ("requests", "lost")),
        *("" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in shown),
        "" if memory is None else f"{memory / 1e9:.1f}",
    ]


def ratio(name: str, own: dict, other: dict) -> str:
    """How many times as much ours does: tokens a second of answers, else requests a minute, or where those are not known
    the time of one alone."""
    kind = name.partition(" x ")[0]
    for figure in ("tokens/s",) if kind in ANSWERS else ("per minute",):
        if own.get(figure) and other.get(figure):
            return f"{own[figure] / other[figure]:.2f}"
    if own.get("p50, s") and other.get("p50, s"):
        return f"{other['p50, s'] / own['p50, s']:.2f}"
    return ""


def _starts(results: dict) -> Table:
    table = Table("server", "ready, s", "first answer, s", "GPU GB once ready", title="From the start of the process")
    for name, server in results["servers"].items():
        start = server.get("start", {})
        values = [start.get("ready, s"), start.get("first answer, s")]
        memory = start.get("memory, bytes")
        shown = ["" if value is None else f"{value:.1f}" for value in values]
        table.add_row(name, *shown, server.get("error", "") if memory is None else f"{memory / 1e9:.1f}")
    return table


def _answers(servers: dict) -> Table:
    """Against ours one at a time."""
    own = servers["ours"]["answers"]
    table = Table(
        "greedy answers of", "the same", "equal tokens before the first other", title=f"{len(own)} texts, against ours"
    )
    for name, server in servers.items():
        for key, how in (("answers", ""), ("answers at once", ", at once")):
            if key in server and (name, key) != ("ours", "answers"):
                found = first_differences(own, server[key])
                differ = [str(at) for at in found if at is not None]
                table.add_row(f"{name}{how}", f"{len(found) - len(differ)} of {len(found)}", ", ".join(differ))
    return table
