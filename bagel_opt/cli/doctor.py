"""What runs on this machine and what does not, as tables."""

import logging
from typing import Any

from rich.console import Console
from rich.table import Table

import bagel_opt
from bagel_opt.runtime.facts import facts


def examine() -> dict[str, Any]:
    """The facts. What a library warns of as it is tried is among them."""
    logging.getLogger("bagel_opt").addHandler(logging.NullHandler())
    found = facts()
    return found | {"versions": {"bagel_opt": bagel_opt.__version__} | found["versions"]}


def show(found: dict[str, Any], output: Console) -> None:
    """Tables of what there is and of what computes, then what does not. Commands stand in a line each, to be copied."""
    versions = _table("versions")
    for name, version in found["versions"].items():
        versions.add_row(name, version or "not installed")
    output.print(versions)
    for device in found["devices"]:
        about = [device["model"]]
        if "cores" in device:
            about += [f"{device['cores']} cores", *filter(None, [device.get("features")])]
        else:
            about += [f"compute capability {device['capability']}", f"{device['memory_bytes'] / 1e9:.1f} GB"]
        table = _table(device["device"])
        table.add_row("what it is", ", ".join(about))
        for row in device["uses"].items():
            table.add_row(*row)
        output.print(table)
    output.print("not used" if found["unused"] else "all is used that could be", style="bold")
    for one in found["unused"]:
        output.print(f"- {one['what']}: {one['why']}", soft_wrap=True)
        if one["do"]:
            output.print(f"      {one['do']}", soft_wrap=True)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
