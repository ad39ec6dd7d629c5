"""Programs as ONNX graphs of opset 24 whose weights lie outside, in the bundle's one safetensors file.

Graphs are made from shapes alone: no weight is read for them.
"""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from math import prod
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from bagel_opt.export import onnx_graph
from bagel_opt.export.examples import example_inputs
from bagel_opt.export.given import Given
from bagel_opt.export.onnx_free_sizes import free_sizes
from bagel_opt.export.onnx_fused import SplitQKV, check_order, fuse, store_split, widen
from bagel_opt.export.onnx_graph import optimize, point_outside, strip, used_weights, weights_to_inputs
from bagel_opt.export.onnx_ops import OnnxOps
from bagel_opt.export.onnx_quantized import Product, as_read, as_stored, product_for, table_for
from bagel_opt.export.onnx_translations import OPSET, TRANSLATIONS, translations_made_once
from bagel_opt.export.processes import in_processes
from bagel_opt.files.parameters import kind_of, part_of, stored_dtypes, stored_shapes
from bagel_opt.files.torch_weights import write_weights
from bagel_opt.lance.config import Config
from bagel_opt.model.families import build
from bagel_opt.model.linear import Linear
from bagel_opt.model.mixture import Mixture
from bagel_opt.model.transformer import Expert, GateUp
from bagel_opt.profile import Profile
from bagel_opt.programs.callables import programs
from bagel_opt.programs.signatures import ONE_ROW, Signature, cache_names
from bagel_opt.quantization import KINDS

logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of each missing torchvision operator


class Program(nn.Module):
    """A program as a module that owns the model, so that its weights keep their names."""

    def __init__(self, model: Mixture, call: Callable):
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, *inputs: Tensor) -> tuple:
        return self.call(*inputs)


class Apart(nn.Module):
    """The gate and up products as two, so that no node has to cut their outputs apart."""

    def __init__(self, joint: GateUp):
        super().__init__()
        sides = joint.in_features, joint.out_features // 2
        self.gate, self.up = (Linear(*sides, bias=False, device="meta") for _ in range(2))

    def forward(self, x: Tensor, _: None = None) -> tuple[Tensor, Tensor]:
        return self.gate(x), self.up(x)


class Shapes:
    """A model without weights, to trace programs with, and how its weights are stored.

    For the CPU provider those of linear layers are stored as [in, out], which its kernel for a single token reads as
    it lies; as [out, in] it would be transposed anew for each token. CUDA reads either. fused: with the operators of
    onnx_fused.py; None is for CUDA in 16 bits, since they have no fast kernels for float32. kinds: of the parts that are
    quantised, for the CPU provider in float32 and for CUDA in 16 bits. coded: parameters come quantised so already.
    """

    def __init__(
        self,
        config: Config,
        dtype: torch.dtype,
        device: str,
        fused: bool | None = None,
        kinds: Mapping[str, str] = MappingProxyType({}),
        coded: bool = False,
    ):
        self.config, self.dtype, self.device, self.kinds = config, dtype, device, dict(kinds)
        self.fused = device == "cuda" and dtype != torch.float32 if fused is None else fused
        with torch.device("meta"):
            self.plain = build(config)
            self.model = build(config)
        if coded:
            self.plain.quantize(self.kinds)
            check_order(config.llm, self.kinds, self.fused)
        for expert in [module for module in self.model.modules() if isinstance(module, Expert)]:
            expert.gate_up = Apart(expert.gate_up)
            if device == "cuda":
                expert.qkv = SplitQKV(expert.qkv)
        linear = [name for name, module in self.model.named_modules() if isinstance(module, Linear)]
        self.transposed = {f"{name}.weight" for name in linear} if device == "cpu" else set()
        shapes = stored_shapes(config, "onnx", device, self.kinds)
        names = [
            name for pair in self.plain.named_parameters() for part in self._split(*pair) for name in self._names(*part)
        ]
        self.stored = {name: shapes[name] for name in names}
        for name in linear:
            pair = [self.stored.get(coded) for coded in _coded(f"{name}.weight")]
            if all(pair):
                module = self.model.get_submodule(name)
                module.quantized = product_for(device, self.kinds[part_of(f"{name}.")], pair, module)
                module.weight = None
        if "embeddings" in self.kinds:
            embed = self.model.llm.embed
            embed.quantized, embed.weight = table_for(device, self.kinds["embeddings"], embed), None
        self.fixed = stored_dtypes(self.stored, self.kinds, device)
        layout = [(prod(shape), self._dtype(name)) for name, shape in self.stored.items()]
        self.small = sum(count * stored.itemsize for count, stored in layout) <= onnx_graph.ALL_PACKED_BELOW
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            for name, p in list(self.model.named_parameters()):
                path, _, last = name.rpartition(".")
                empty = nn.Parameter(torch.empty(p.shape, dtype=self._dtype(name)), requires_grad=False)
                setattr(self.model.get_submodule(path), last, empty)
        self.model.eval().ops = OnnxOps("onnx" if device == "cpu" else "onnx-cudnn" if self.fused else "onnx-cuda")

    def as_stored(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A parameter of `Bagel` under the names and in the order of channels in which graphs want it."""
        table = part_of(name) == "embeddings"
        for part, tensor in self._split(name, weight):
            if ".quantized." in part:
                yield (
                    part,
                    tensor if table else as_read(tensor, self.kinds[part_of(part)], self.device, self.stored[part]),
                )
            elif kind := kind_of(part, tensor.shape, self.kinds):
                yield from zip(_coded(part), as_stored(tensor, kind, None if table else self.device), strict=True)
            else:
                yield part, tensor.t() if part in self.transposed else tensor

    def _names(self, part: str, weight: Tensor) -> tuple[str, ...]:
        quantizes = ".quantized." not in part and kind_of(part, weight.shape, self.kinds)
        return _coded(part) if quantizes else (part,)

    def _split(self, name: str, weight: Tensor) -> list[tuple[str, Tensor]]:
        parts = [(name, weight)]
        if ".gate_up." in name:
            stem, _, last = name.partition("gate_up.")
            parts = [
                (f"{stem}gate_up.{half}.{last}", rows)
                for half, rows in zip(("gate", "up"), weight.chunk(2), strict=True)
            ]
        elif self.device == "cuda" and name.startswith("llm.layers."):
            parts = store_split(self.config.llm, name, weight, self.fused)
        return parts

    def write(self, path: Path, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Writes the parameters of `Bagel`, in its order, to a bundle's file of weights."""
        tensors = (stored for parameter in parameters for stored in self.as_stored(*parameter))
        write_weights(path, [(name, shape, self._dtype(name)) for name, shape in self.stored.items()], tensors)

    def unpacked(self, program: str) -> set[str]:
        """Codes of 4 bits, and their scales, that this program makes floats of."""
        if self.small or self.device == "cuda" or program in onnx_graph.PACKED_CODES:
            return set()
        return {n for n in self.stored if ".quantized." in n and KINDS[self.kinds[part_of(n)]].group}

    def _dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self.fixed[name]) if name in self.fixed else self.dtype


def _coded(weight: str) -> tuple[str, str]:
    """What takes its place where it is quantised."""
    stem = weight.removesuffix("weight") + "quantized."
    return f"{stem}codes", f"{stem}scale"


@contextmanager
def only_used_parameters(
    model: nn.Module, fake: FakeTensorMode, call: Callable, inputs: tuple[Tensor, ...]
) -> Iterator[None]:
    """Leaves the parameters that a call has no use for as mere attributes of a model for a while: the exporter makes each
    parameter an input, and its time grows with their square."""
    with fake, Given() as given:
        call(*inputs)
    unused = [
        (module, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None and id(p) not in given.ids
    ]
    for module, name, p in unused:
        module._parameters[name], module.__dict__[name] = None, p.data
    try:
        yield
    finally:
        for module, name, p in unused:
            del module.__dict__[name]
            module._parameters[name] = p


def trace(shapes: Shapes, name: str, call: Callable, signature: Signature, profile: Profile) -> ir.Model:
    """Traces one program with torch.export and translates it, node by node."""
    unpacked = shapes.unpacked(name)
    for path, module in shapes.model.named_modules():
        if isinstance(module, Product):
            module.unpacked = f"{path}.codes" in unpacked
    with shapes.fake:
        inputs, caches, free = example_inputs(shapes.config, signature, profile, shapes.dtype, torch.device("cpu"))
    input_names, output_names = list(signature.inputs), list(signature.outputs)
    if caches:
        names = cache_names(shapes.config)
        input_names += names
        output_names += [f"{name}.out" for name in names]
    tensors = (*inputs, *caches)
    with warnings.catch_warnings(), torch.no_grad(), only_used_parameters(shapes.model, shapes.fake, call, tensors):
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            Program(shapes.model, call).eval(),
            tensors,
            dynamo=True,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes={"inputs": (*free, *(None for _ in caches))} if any(free) else None,
            custom_translation_table=TRANSLATIONS,
            optimize=False,  # it would read weights, and there are none
            verbose=False,
        ).model
    exported.graph.name = name
    return exported


def export_program(shapes: Shapes, name: str, call: Callable, signature: Signature, profile: Profile) -> ir.Model:
    """A program's graph as a bundle has it. Weights are inputs, under their names."""
    exported = trace(shapes, name, call, signature, profile)
    weights_to_inputs(exported.graph, shapes.stored, transposed=shapes.device == "cpu")
    optimize(exported)
    if shapes.device == "cpu":
        rows = next(iter(signature.inputs.values()))[0][0] if name in ONE_ROW else None
        free_sizes(exported.graph, rows, cache_names(shapes.config) if signature.cache_rows else [])
    if shapes.device == "cuda":
        widen(exported)
    if shapes.fused:
        fuse(exported)
    return exported


def export_onnx(
    shapes: Shapes,
    signatures: dict[str, Signature],
    suffix: str,
    profile: Profile,
    folder: Path,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict]:
    """Writes programs to folder/NAME.onnx, NAME with a suffix; the manifest's entries. progress(program, done, total).

    For the CPU provider the weights must have been written before. Tracing is Python's work, so each core has a process
    of its own for it.
    """
    entries: dict[str, dict] = {}
    tasks = [(name, signature, folder / f"{name}{suffix}.onnx") for name, signature in signatures.items()]
    tasks.sort(key=lambda task: -task[1].cache_rows)  # those with all layers first
    model = shapes.config, str(shapes.dtype).removeprefix("torch."), shapes.device, shapes.fused, shapes.kinds, profile
    # Closed, so that the processes end with this, however it ends.
    with closing(in_processes(f"{__name__}:write_programs", model, tasks)) as written:
        for name, used in written:
            file = f"{name}{suffix}.onnx"
            entries[name] = {"file": file, "weights": used, **dataclasses.asdict(signatures[name])}
            progress(f"exported {name}", len(entries), len(signatures))
    return {name: entries[name] for name in signatures}


def write_programs(
    model: tuple[Config, str, str, bool, dict[str, str], Profile], tasks: list[tuple[str, Signature, Path]]
) -> Iterator[tuple[str, list[str]]]:
    """Traces and writes programs (name, signature, file). -> each one's name and the weights that it uses"""
    config, dtype, device, fused, kinds, profile = model
    shapes = Shapes(config, getattr(torch, dtype), device, fused, kinds)
    calls = programs(shapes.model)
    with translations_made_once():
        for name, signature, path in tasks:
            exported = export_program(shapes, name, calls[name], signature, profile)
            used = used_weights(exported.graph, shapes.stored)
            if device == "cpu":
                point_outside(exported.graph, path.parent, used, shapes.unpacked(name))
            strip(exported)
            ir.save(exported, path)
            yield name, used
