"""Programs as ONNX graphs of opset 24 whose weights lie outside, in the bundle's one safetensors file."""

import dataclasses
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset24 as op
from torch import nn

from bagel_opt.bundle import WEIGHTS, Location, locate_weights
from bagel_opt.export.examples import example_inputs
from bagel_opt.model.bagel import Bagel
from bagel_opt.profile import Profile
from bagel_opt.runtime.programs import Signature, cache_names, programs

OPSET = 24


class Program(nn.Module):
    """A program as a module that owns the model, so that its weights keep their names."""

    def __init__(self, model: Bagel, call: Callable):
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *inputs: torch.Tensor) -> tuple:
        return self.call(*inputs)


def linear(x, weight, bias=None):  # noqa: ANN001, ANN201  onnxscript values
    """Linear layers as Gemm, whose weight can lie in either order. The exporter's own translation transposes it, and
    the transposed copy would be a second one on disk."""
    *rows, channels = x.shape
    product = op.Gemm(x if len(rows) == 1 else op.Reshape(x, [-1, channels]), weight, bias, transB=1)
    return product if len(rows) == 1 else op.Reshape(product, [*rows, weight.shape[0]])


def export_program(
    model: Bagel, name: str, call: Callable, signature: Signature, profile: Profile, dtype: torch.dtype
) -> ir.Model:
    """Traces one program with torch.export and translates it. Weights are still in memory."""
    inputs, caches, free = example_inputs(model.config, signature, profile, dtype, torch.device("cpu"))
    input_names, output_names = list(signature.inputs), list(signature.outputs)
    if caches:
        names = cache_names(model.config)
        input_names += names
        output_names += [f"{name}.out" for name in names]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of each missing torchvision operator
        program = torch.onnx.export(
            Program(model, call).eval(),
            (*inputs, *caches),
            dynamo=True,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes={"inputs": (*free, *(None for _ in caches))} if any(free) else None,
            custom_translation_table={torch.ops.aten.linear.default: linear},
            verbose=False,
        )
    program.model.graph.name = name
    return program.model


def stored_weights(model: Bagel) -> dict[str, torch.Tensor]:
    """The weights as the bundle has them: those of linear layers as [in, out], which ONNX Runtime's kernel for a single
    token reads as it lies. As [out, in] it would be transposed anew for each token."""
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: p.t().contiguous() if name in linear else p for name, p in model.named_parameters()}


def point_outside(graph: ir.Graph, weights: dict[str, Location]) -> list[str]:
    """Replaces each weight in the graph by its place in the safetensors file; the names of those in use."""
    used = []
    for node in graph:
        if node.op_type == "Gemm":
            node.attributes["transB"] = ir.AttrInt64("transB", 0)
    for value in list(graph.initializers.values()):
        name = value.name.removeprefix("call.").removeprefix("model.")
        if (place := weights.get(name)) is not None:
            tensor = value.const_value
            where = WEIGHTS, place.offset, place.length
            value.shape = ir.Shape(place.shape)
            value.const_value = ir.ExternalTensor(*where, dtype=tensor.dtype, shape=value.shape, name=name)
            value.name = name
            used.append(name)
    return used


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


def export_onnx(
    model: Bagel,
    signatures: dict[str, Signature],
    suffix: str,
    profile: Profile,
    folder: Path,
    dtype: torch.dtype,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict]:
    """Writes programs to folder/NAME.onnx, NAME with a suffix; the manifest's entries. progress(program, done, total)."""
    calls, weights, entries = programs(model), locate_weights(folder / WEIGHTS), {}
    for done, (name, signature) in enumerate(signatures.items()):
        progress(f"exporting {name}", done, len(signatures))
        exported = export_program(model, name, calls[name], signature, profile, dtype)
        used = point_outside(exported.graph, weights)
        strip(exported)
        file = f"{name}{suffix}.onnx"
        ir.save(exported, folder / file)
        entries[name] = {"file": file, "weights": used, **dataclasses.asdict(signature)}
    progress("exported", len(signatures), len(signatures))
    return entries
