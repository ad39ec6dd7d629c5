"""Graphs for any number of rows and of slots, made from graphs of certain ones.

ONNX Runtime's CPU provider prepares weights anew for each program that it loads. One program for all rows of all profiles
means one such copy, and a flow step can compute just the rows that take part. All else stays static, and no size is
computed at run time.
"""

import itertools
from collections.abc import Iterable

import onnx_ir as ir

from bagel_opt.profile import Profile


def rows_to_trace(profiles: Iterable[Profile], weights: Iterable[tuple[int, ...]]) -> int:
    """How many rows to trace such programs with: of odd numbers from a prime on the first that divides no other dimension, so
    that it tells which are rows."""
    others = {side for weight in weights for side in weight}
    for p in profiles:
        others |= {p.slots, p.text, p.patches, p.patches + 2, p.latents, p.latents + 2}
    return next(rows for rows in itertools.count(1009, 2) if all(side % rows for side in others))


def free_sizes(graph: ir.Graph, rows: int | None, caches: list[str]) -> None:
    """Makes dimensions of that size free, as "rows", and the slots of caches, as "slots".

    Raises ValueError for a graph with a constant of each row, which would be wrong for another number of them.
    """
    kept = {*caches, *(f"{name}.out" for name in caches)}
    for node in list(graph):
        if node.op_type in ("Reshape", "Expand") and (sizes := node.inputs[1].const_value) is not None:
            wanted = sizes.numpy().tolist()
            if (free := _freed(graph, node, wanted, rows)) != wanted:
                node.replace_input_with(1, _constant(graph, node, free))
                node.attributes.pop("allowzero", None)  # with which 0 would be a size
    for value in (*graph.inputs, *graph.outputs):
        sides = ["rows" if rows and side == rows else side for side in value.shape]
        if value.name in kept:
            sides[1] = "slots"
        value.shape = ir.Shape(sides)
    constants = [*graph.initializers.values(), *(value for node in graph if not node.inputs for value in node.outputs)]
    for value in constants if rows else ():
        if value.const_value is not None and any(side and side % rows == 0 for side in value.const_value.shape):
            raise ValueError(
                f"program {graph.name!r} holds {value.name} for {rows} rows, so it cannot serve another number"
            )


def _freed(graph: ir.Graph, node: ir.Node, wanted: list[int], rows: int | None) -> list[int]:
    """The sizes that a Reshape or an Expand is to have. 0 and 1 leave what the input has; -1 is found by the others."""
    given = node.inputs[0]
    if node.op_type == "Reshape" and (made := given.producer()) is not None and made.op_type == "TensorScatter":
        return [0, 0, *wanted[2:]]
    if not rows or not wanted or wanted[0] < rows or wanted[0] % rows:
        return wanted
    if node.op_type == "Reshape":
        return [-1, *wanted[1:]]
    if len(given.shape) < len(wanted) or given.shape[0] != rows:
        node.replace_input_with(0, _for_each_row(graph, node, len(wanted)))
    return [1, *wanted[1:]]


def _for_each_row(graph: ir.Graph, node: ir.Node, rank: int) -> ir.Value:
    """What an Expand is given, plus a zero of each row."""
    given, lengths = node.inputs[0], next(value for value in graph.inputs if value.name == "kv_len")
    zero = ir.node("Mul", [lengths, _constant(graph, node, [0])])
    cast = ir.node("Cast", zero.outputs, {"to": given.dtype})
    column = ir.node("Reshape", [cast.outputs[0], _constant(graph, node, [-1, *[1] * (rank - 1)])])
    added = ir.node("Add", [given, column.outputs[0]])
    graph.insert_before(node, [zero, cast, column, added])
    return added.outputs[0]


def _constant(graph: ir.Graph, user: ir.Node, values: list[int]) -> ir.Value:
    node = ir.node("Constant", [], {"value_ints": values})
    graph.insert_before(user, node)
    return node.outputs[0]
