"""What makes ONNX graphs fast on an NVIDIA GPU: in 16 bits ONNX Runtime's own operators (domain com.microsoft), chosen by
what they took on an H200 (profiles/results/README.md, "ONNX Runtime on a GPU").

C channels, I the MLP's channels, H query heads on G key-value heads of D channels.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from bagel_opt.config import LLMConfig
from bagel_opt.model.linear import Linear
from bagel_opt.model.quantized import GROUP
from bagel_opt.model.transformer import QKV

DOMAIN = "com.microsoft"
NOT_IN_BFLOAT16 = {"Clip", "Pad", "ReduceL2"}  # of CUDA's provider in onnxruntime-gpu 1.31.1
# The gated norm's own norm, switched off: with a large e, x / sqrt(mean(x^2) + e) * sqrt(e) is x. Both are powers of 2,
# so in float32, in which the operator computes, nothing is rounded; sqrt(e) is stored in the model's own type.
ROOT = {ir.DataType.FLOAT: 2.0**40, ir.DataType.BFLOAT16: 2.0**40, ir.DataType.FLOAT16: 2.0**14}


class SplitQKV(nn.Module):
    """Queries by themselves, whose product is large, so that no node has to copy them; keys and values together, which
    are of one size: for an uneven Split, CUDA's kernel reads host memory that a replayed graph may find changed."""

    def __init__(self, joint: QKV):
        super().__init__()
        self.heads, size = joint.heads, joint.in_features
        head = joint.out_features // sum(joint.heads)
        self.q = Linear(size, joint.heads[0] * head, device="meta")
        self.kv = Linear(size, 2 * joint.heads[1] * head, device="meta")

    def forward(self, x: Tensor, _: None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, kv = self.q(x), self.kv(x)
        groups = self.heads[1]
        return q.unflatten(-1, (self.heads[0], -1)), *kv.unflatten(-1, (2 * groups, -1)).split(groups, dim=2)


def store_split(c: LLMConfig, name: str, weight: Tensor, grouped: bool) -> list[tuple[str, Tensor]]:
    """A parameter of an expert as `SplitQKV` has it. grouped: with its query heads in the order that onnx_ops.py wants: first
    one of each group. Then [B, Q, H * D] is also [B, Q * H / G, G * D], and grouped queries are more queries of as many
    heads as there are keys. The weight may be codes or scales.
    """
    groups, heads = c.num_key_value_heads, c.num_attention_heads
    queries = heads * c.head_dim

    def ordered(rows: Tensor) -> Tensor:
        if not grouped:
            return rows
        return rows.unflatten(0, (groups, heads // groups, -1)).transpose(0, 1).flatten(0, 2)

    stem, dot, kind = name.rpartition(".quantized.") if ".quantized." in name else name.rpartition(".")
    if stem.endswith(".qkv"):
        return [
            (f"{stem}.q{dot}{kind}", ordered(weight[:queries])),
            (f"{stem}.kv{dot}{kind}", weight[queries:]),
        ]
    if stem.endswith(".o") and weight.ndim == 2:
        return [(name, ordered(weight.t()).t().contiguous())]
    return [(name, weight)]


def check_order(c: LLMConfig, kinds: Mapping[str, str], grouped: bool) -> None:
    """Raises ValueError where weights that are coded already cannot be put in the order of `store_split`."""
    if grouped and c.head_dim % GROUP and "int4" in (kinds.get("und"), kinds.get("gen")):
        raise ValueError(
            f"this model is quantised, to 'int4' in groups of {GROUP} channels, of which its heads of {c.head_dim} are no "
            "multiple: ONNX for CUDA needs them in another order; export it from the checkpoint that was quantised"
        )


def fuse(program: ir.Model) -> None:
    """Joins residuals with the norms after them, and SiLU with the product by `up`."""
    graph, unit = program.graph, {}
    for node in list(graph):
        if node.op_type == "RMSNormalization":
            _fuse_residual(graph, node)
        elif node.op_type == "Mul":
            _fuse_swiglu(graph, node, unit)
    program.opset_imports[DOMAIN] = 1


def widen(program: ir.Model) -> None:
    """Lets what CUDA's provider has no kernel for in bfloat16 compute in float32."""
    for node in list(program.graph):
        if node.op_type not in NOT_IN_BFLOAT16 or node.inputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        narrow = [(i, x) for i, x in enumerate(node.inputs) if x is not None and x.dtype == ir.DataType.BFLOAT16]
        for i, x in narrow:
            wide = ir.node("Cast", [x], {"to": ir.DataType.FLOAT})
            wide.outputs[0].shape, wide.outputs[0].dtype = x.shape, ir.DataType.FLOAT
            program.graph.insert_before(node, wide)
            node.replace_input_with(i, wide.outputs[0])
        (found,) = node.outputs
        back = ir.node("Cast", [found], {"to": ir.DataType.BFLOAT16})
        back.outputs[0].shape, back.outputs[0].dtype = found.shape, ir.DataType.BFLOAT16
        ir.convenience.replace_all_uses_with(found, back.outputs[0])
        back.replace_input_with(0, found)
        program.graph.insert_after(node, back)
        found.dtype = ir.DataType.FLOAT


def _fuse_residual(graph: ir.Graph, norm: ir.Node) -> None:
    add = norm.inputs[0].producer()
    if add is None or add.op_type != "Add" or add.inputs[0].shape != add.inputs[1].shape:
        return
    fused = ir.node(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        {"epsilon": norm.attributes["epsilon"].value},
        domain=DOMAIN,
        num_outputs=4,
    )
    for unused in fused.outputs[1:3]:
        unused.name = ""
    _replace(graph, {add.outputs[0]: fused.outputs[3], norm.outputs[0]: fused.outputs[0]}, fused, add)


def _fuse_swiglu(graph: ir.Graph, product: ir.Node, unit: dict[int, ir.Value]) -> None:
    """(gate * sigmoid(gate)) * up"""
    for silu, up in (product.inputs, product.inputs[::-1]):
        inner = silu.producer()
        if inner is None or inner.op_type != "Mul":
            continue
        for gate, share in (inner.inputs, inner.inputs[::-1]):
            sigmoid = share.producer()
            if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is gate:
                channels, root = gate.shape[-1], ROOT[gate.dtype]
                if channels not in unit:
                    values = torch.full((channels,), root).to(getattr(torch, gate.dtype.name.lower(), torch.float32))
                    unit[channels] = _initializer(graph, f"unit.{channels}", values)
                fused = ir.node(
                    "GatedRMSNorm",
                    [up, unit[channels], gate],
                    {"activation": "silu", "epsilon": root**2},
                    domain=DOMAIN,
                )
                _replace(graph, {product.outputs[0]: fused.outputs[0]}, fused, product)
                graph.remove([inner, sigmoid], safe=True)
                return


def _initializer(graph: ir.Graph, name: str, values: Tensor) -> ir.Value:
    tensor = TorchTensor(values, name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, values: dict[ir.Value, ir.Value], fused: ir.Node, after: ir.Node) -> None:
    old = list(values)
    for value, new in values.items():
        new.shape, new.type, new.name = value.shape, value.type, f"{value.name}.fused"
    outputs = {value: value.name for value in old if value.is_graph_output()}
    graph.insert_after(after, fused)
    ir.convenience.replace_all_uses_with(old, [values[value] for value in old], replace_graph_outputs=True)
    graph.remove(list(dict.fromkeys(value.producer() for value in old)), safe=True)
    for value, name in outputs.items():
        values[value].name = name
