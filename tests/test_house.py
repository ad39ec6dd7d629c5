"""The house in one direction: no file or folder imports in a circle, and none imports what stands above it."""

import ast
import graphlib
from pathlib import Path

import bagel_opt

HOME = Path(bagel_opt.__file__).parent
# From the ground up. Parts on one floor do not know each other.
FLOORS = (
    ("dtypes", "errors", "json_files", "limits", "option_kinds", "toml_files", "versions"),
    (
        "config",
        "profile",
        "tokenizer",
        "images",
        "installed",
        "options",
        "quantization",
        "request",
        "examples",
        "lance",
        "videos",
        "devices",
    ),
    ("model",),
    ("programs", "files"),
    ("sampling", "runtime"),
    ("api",),
    ("loading",),
    ("__init__",),
    ("export", "serve"),
    ("bench",),
    ("cli",),
    ("demo", "__main__"),
)
WORDS = FLOORS[1]  # their order among themselves is that of their imports
ENTRIES = {("export/__main__.py", "cli"), ("serve/ray.py", "cli")}  # commands, which are below what they start


def modules():
    """Every file of the package, by its dotted name."""
    found = {}
    for path in HOME.rglob("*.py"):
        parts = path.relative_to(HOME).with_suffix("").parts
        found[".".join(("bagel_opt", *parts)).removesuffix(".__init__")] = path
    return found


def imports(path, known):
    """The modules of the package that a file names, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found |= {name for name in (inside if inside in known else node.module,) if name in known}
    return found


def graph():
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def part(name):
    """The folder of bagel_opt, or the file in it, that a module belongs to."""
    return [*name.split("."), "__init__"][1]


def floor(name):
    return next(number for number, parts in enumerate(FLOORS) if name in parts)


def wrong_arrows(arrows):
    """(from, to) of imports that lead up or across a floor."""
    found = []
    for name, targets in arrows.items():
        here = part(name)
        for target in sorted(targets):
            there = part(target)
            place = "/".join(name.split(".")[1:]) + ".py"
            down = here == there or floor(there) < floor(here) or (here in WORDS and there in WORDS)
            if not down and (place, there) not in ENTRIES:
                found.append((name, target))
    return found


def folders(arrows):
    found = {}
    for name, targets in arrows.items():
        place = "/".join(name.split(".")[1:]) + ".py"
        reached = {part(target) for target in targets} - {part(name)}
        found.setdefault(part(name), set()).update(t for t in reached if (place, t) not in ENTRIES)
    return found


def circle(arrows):
    """The first circle, or None."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_every_part_has_a_floor():
    assert {part(name) for name in modules()} == {name for parts in FLOORS for name in parts}


def test_no_circle_of_files():
    assert circle(graph()) is None


def test_no_circle_of_folders():
    assert circle(folders(graph())) is None


def test_no_arrow_leads_up():
    assert wrong_arrows(graph()) == []


def test_each_entry_is_needed():
    arrows = graph()
    used = {("/".join(name.split(".")[1:]) + ".py", part(t)) for name, targets in arrows.items() for t in targets}
    assert used >= ENTRIES


def test_what_is_wrong_is_found():
    """Circles and arrows up that are put in by hand."""
    arrows = graph()
    assert circle(arrows | {"bagel_opt.errors": {"bagel_opt.config"}, "bagel_opt.config": {"bagel_opt.errors"}})
    up = arrows | {"bagel_opt.model.vae": {"bagel_opt.runtime.torch"}}
    assert wrong_arrows(up) == [("bagel_opt.model.vae", "bagel_opt.runtime.torch")]
    assert circle(folders(up))
    across = arrows | {"bagel_opt.sampling.flow": {"bagel_opt.runtime.onnx"}}
    assert wrong_arrows(across) == [("bagel_opt.sampling.flow", "bagel_opt.runtime.onnx")]
