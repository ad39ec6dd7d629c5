"""What compiled code on a GPU waits for before its first program, made ready while weights are read.

FlashAttention 4 and quack-kernels compile a kernel in Python where it is first wanted, some seconds each; processes of their
own do that, into the packages' caches. torch's compiler takes some seconds to start.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from bagel_opt.config import LLMConfig
from bagel_opt.installed import KERNELS, kernel_folder
from bagel_opt.lance.config import Config
from bagel_opt.model import attention
from bagel_opt.model.linear import Linear
from bagel_opt.model.transformer import Layer
from bagel_opt.runtime import fused_products

# What attention is compiled for: whose heads, and (rows, queries, causal) of flow steps and their markers; of text; of tokens,
# whose keys are split among multiprocessors; and of pictures that are read.
ATTENTION = (
    ("layers", ((2, 4096, False), (2, 2, False))),
    ("layers", ((1, 64, True), (1, 512, True))),
    ("layers", ((1, 1, True), (8, 1, True))),
    ("vit", ((1, 4096, False),)),
)
Heads = Mapping[str, tuple[int, int, int]]  # of queries, of keys and values; channels of each
PRODUCTS = 2  # parts of the products
PARTS = len(ATTENTION) + PRODUCTS  # each can be compiled by a process of its own
PATIENCE = 120  # seconds; what is not compiled by then is compiled when it is wanted


@contextlib.contextmanager
def warming_up(
    config: Config, device: torch.device, dtype: torch.dtype, kinds: Mapping[str, str] = MappingProxyType({})
) -> Iterator[None]:
    """Starts all that, and waits for it at the end. kinds: of the parts that are quantised. Whether it succeeds shows in
    nothing but the time."""
    compiler = threading.Thread(target=_compile_pieces, args=(config.llm, device, dtype, kinds), daemon=True)
    compiler.start()
    processes: list[subprocess.Popen] = []
    try:
        with contextlib.suppress(OSError):
            for command, settings in _commands(config, device, dtype):
                processes.append(subprocess.Popen(command, **settings))
        yield
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        compiler.join(PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _compile_pieces(config: LLMConfig, device: torch.device, dtype: torch.dtype, kinds: Mapping[str, str]) -> None:
    # what fails shows again where it matters; a thread's own device is the first
    with contextlib.suppress(Exception), torch.no_grad(), torch.cuda.device(device):
        _run_all_pieces(config, device, dtype, kinds)


def _run_all_pieces(config: LLMConfig, device: torch.device, dtype: torch.dtype, kinds: Mapping[str, str]) -> None:
    """With a layer of their own, whose memory is free again at the end."""
    from bagel_opt.runtime.two_streams import run_pieces  # which imports torch's compiler

    # (rows, tokens): of text, and tokens of one row and of several
    for rows, length in ((1, 64), (1, 1), (2, 1)):
        for kind in {kinds.get("und"), kinds.get("gen")} if length > 1 else {kinds.get("und")}:
            run_pieces(_layer(config, device, dtype, kind), rows, length)


def _layer(config: LLMConfig, device: torch.device, dtype: torch.dtype, kind: str | None) -> Layer:
    from bagel_opt.runtime import one_token  # Triton comes with torch for GPUs alone

    with torch.device("meta"):
        layer = Layer(config).to(dtype)
    del layer.und
    for product in [module for module in layer.modules() if isinstance(module, Linear)]:
        if kind:
            product.quantize(kind)
        product.multiply = one_token.linear
    return layer.to_empty(device=device).eval().requires_grad_(False)


def heads_of(config: Config) -> Heads:
    """Those of the ViT only where it takes FlashAttention, too."""
    c, heads = config.llm, config.vit.num_attention_heads
    found, channels = {}, config.vit.hidden_size // heads
    if attention.of_vit("flash", channels) == "flash":
        found["vit"] = heads, heads, channels
    return found | {"layers": (c.num_attention_heads, c.num_key_value_heads, c.head_dim)}


def _commands(config: Config, device: torch.device, dtype: torch.dtype) -> list[tuple[list[str], dict[str, Any]]]:
    """Of the processes, with what Popen takes beside: as many as leave a core free, but for one. None where there is nothing to
    compile."""
    if torch.cuda.get_device_capability(device)[0] < 9 or attention.flash_package() != "flash_attn.cute":
        return []
    if all(any(kernel_folder(name).rglob("*.o")) for name in KERNELS) or not sys.executable:
        return []
    about = [str(device), str(dtype).removeprefix("torch."), json.dumps(heads_of(config))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    count = max(1, min(PARTS, len(os.sched_getaffinity(0)) - 1 if hasattr(os, "sched_getaffinity") else 1))
    shares = [map(str, range(PARTS)[first::count]) for first in range(count)]
    return [([sys.executable, "-m", __name__, *about, *share], {"env": environment, **quiet}) for share in shares]


def compile_part(device: torch.device, dtype: torch.dtype, heads: Heads, part: int) -> None:
    """Runs a part's kernels once, on small tensors: those of an item of ATTENTION, if these heads are known, or a share of the
    products'."""
    if part >= len(ATTENTION):
        if fused_products.possible(device, dtype):
            for call in fused_products.kernels(device, dtype)[part - len(ATTENTION) :: PRODUCTS]:
                call()
        return
    whose, sizes = ATTENTION[part]
    if whose not in heads:
        return
    query_heads, kv_heads, channels = heads[whose]
    for rows, queries, causal in sizes:
        q = torch.zeros(rows, queries, query_heads, channels, dtype=dtype, device=device)
        k = torch.zeros(rows, 4352, kv_heads, channels, dtype=dtype, device=device)
        kv_len = torch.full((rows,), max(queries, 200), dtype=torch.int64, device=device)
        attention.attention(q, k, k, kv_len, causal, "flash")
    torch.cuda.synchronize(device)


if __name__ == "__main__":
    device, dtype, heads, *parts = sys.argv[1:]
    for part in parts:
        compile_part(torch.device(device), getattr(torch, dtype), json.loads(heads), int(part))
