"""What is done with a program's graph once it is traced: weights laid outside, and what it does not need dropped."""

from collections.abc import Set
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common

from bagel_opt.files.manifest import WEIGHTS
from bagel_opt.files.weights import locate_weights

# ONNX Runtime's CPU provider copies weights, in the order that its kernels read, for each program that it loads. Of models
# with more bytes of weights than this it may copy only what one program of a profile alone needs, and the file's own copy
# is then in no use; and the time's layers, with which the last bits of a row would otherwise depend on how many rows there
# are.
ALL_PACKED_BELOW = 2**30
PACKED = {
    "generate": (".gen.", "time."),
    "vit": ("vit_", "connector."),
    "vae_encode": ("vae.",),
    "vae_decode": ("vae.",),
}
# Codes of such models are packed where they are read for one token after another, and where no other program reads them. For
# other programs they stay in the file: those of 8 bits are packed anew for each product, those of 4 become floats first.
PACKED_CODES = ("decode", "vit")
# Of onnxscript's rules those that find something in these graphs. One of the others compares every node with all, which
# takes most of the time for a model of many layers.
RULES = rewriter.RewriteRuleSet(
    [
        common.mul_by_1_rule,
        common.div_by_1_rule,
        common.add_0_rule,
        common.sub_0_rule,
        common.no_op_cast_rule,
        common.no_op_expand_rule,
        common.no_op_transpose_rule,
        common.cast_cast_rule,
        common.materialize_reshape_shape_rule,
        common.max_min_rule,
        common.reshape_reshape_rule,
        common.squeeze_reshape_1d_rule,
        common.transpose_transpose_rule,
        common.unsqueeze_unsqueeze_rule,
        common.normalize_pad_format_conv_rule,
        common.fuse_pad_into_conv_rule,
    ]
)


def weights_to_inputs(graph: ir.Graph, stored: dict[str, tuple[int, ...]], transposed: bool) -> None:
    """Makes inputs of the weights, under their names and with their shapes in the bundle. transposed: stored as [in, out]."""
    for node in graph:
        if node.op_type == "Gemm" and transposed and node.inputs[1].producer() is None:
            node.attributes["transB"] = ir.AttrInt64("transB", 0)
    for value in list(graph.initializers.values()):
        name = value.name.removeprefix("call.").removeprefix("model.")
        if name in stored:
            del graph.initializers[value.name]
            value.name, value.shape, value.const_value = name, ir.Shape(stored[name]), None
            graph.inputs.append(value)


def optimize(program: ir.Model) -> None:
    """onnxscript.optimizer.optimize with RULES for its own."""
    optimizer.inline(program)
    for _ in range(2):
        optimizer.fold_constants(program, onnx_shape_inference=True)
        rewriter.rewrite(program, RULES)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(program)


def used_weights(graph: ir.Graph, stored: dict[str, tuple[int, ...]]) -> list[str]:
    """Removes inputs for weights that are in no use; the names of the others."""
    weights = [value for value in graph.inputs if value.name in stored]
    for value in weights:
        if not value.uses():
            graph.inputs.remove(value)
    return [value.name for value in weights if value.uses()]


def point_outside(graph: ir.Graph, folder: Path, used: list[str], unpacked: Set[str]) -> None:
    """Makes initializers of weights that are inputs. Those that are not to be packed stay inputs as well, ones that may
    be left out: ONNX Runtime then cannot take them for constant. unpacked: some of those."""
    places, inputs = locate_weights(folder / WEIGHTS), {value.name: value for value in graph.inputs}
    small = sum(place.length for place in places.values()) <= ALL_PACKED_BELOW
    for name in used:
        value, place = inputs[name], places[name]
        coded = ".quantized." in name and graph.name in PACKED_CODES
        packed = small or coded or any(part in name for part in PACKED.get(graph.name, ()))
        if packed and name not in unpacked:
            graph.inputs.remove(value)
        where = WEIGHTS, place.offset, place.length
        value.const_value = ir.ExternalTensor(*where, dtype=value.dtype, shape=value.shape, name=name)
        graph.register_initializer(value)


def strip(program: ir.Model) -> None:
    """Drops the exporter's notes on where nodes came from, which outweigh a small graph several times."""
    graph = program.graph
    for noted in (program, graph, *graph.inputs, *graph.outputs, *graph.initializers.values()):
        noted.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.type = value.shape = None
