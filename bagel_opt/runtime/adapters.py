"""LoRA adapters kept apart from the weights: the layers' products get the factors of all of them, and each row of a batch
says how much of each counts, so that requests with different adapters share a batch and nothing is compiled for another."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bagel_opt.config import BagelConfig
from bagel_opt.errors import CheckpointError
from bagel_opt.files.checkpoint import part_rows, published_names, published_shapes
from bagel_opt.files.lora import Lora
from bagel_opt.files.parameters import parameter_shapes
from bagel_opt.files.torch_weights import Reader
from bagel_opt.model.linear import Linear, LowRank
from bagel_opt.model.mixture import Mixture

LAYERS = r"llm\.layers\.\d+\."
ROUND = 64  # ranks of a product, so that kernels find them aligned, and adapters of nearly the same rank fit the same shapes
WIDENED = ("qkv", "gate_up")  # products that a fused kernel takes with their adapters in one


def read_adapters(places: Sequence[Path | str], config: BagelConfig) -> list[Lora]:
    """Adapters over the transformer's layers. Nothing is read but headers and JSON. Raises FileNotFoundError, and
    CheckpointError for one that changes other weights, too."""
    shapes = published_shapes(config, parameter_shapes(config))
    adapters = [Lora(place, 1.0, shapes) for place in places]
    inside = set(published_shapes(config, {k: v for k, v in parameter_shapes(config).items() if re.match(LAYERS, k)}))
    for adapter in adapters:
        if others := sorted(adapter.pairs.keys() - inside):
            raise CheckpointError(
                f"{adapter.path} changes {others[0].removesuffix('.weight')}, and what is kept apart may change the "
                "transformer's layers alone; merge it: load(lora=), --lora"
            )
    return adapters


def attach(model: Mixture, adapters: Sequence[Lora], widen: bool) -> bool:
    """Gives the model's layers these adapters in place of those before. widen: as `Linear.widen` does, where that counts.
    -> whether tensors of the layers moved; adapters that need no more ranks than those before take the same memory."""
    products = {name: m for name, m in model.named_modules() if re.match(LAYERS, name) and isinstance(m, Linear)}
    shares = {name: _shares(model, name, product, adapters) for name, product in products.items()}
    model.adapters = len(adapters)
    ranks: dict[str, int] = defaultdict(int)  # the same in all layers, which then run the same compiled code
    for name, mine in shares.items():
        kind = re.sub(LAYERS, "", name)
        ranks[kind] = max(ranks[kind], sum(adapter.pairs[weight].rank for adapter, _, weight, _ in mine))
    moved = False
    reader = Reader(CheckpointError)
    for name, product in products.items():
        kind = re.sub(LAYERS, "", name)
        have = 0 if product.low_rank is None else len(product.low_rank.of_R)
        need = -(-ranks[kind] // ROUND) * ROUND if adapters else 0
        if need > have or (have and not adapters):
            plain = product.quantized is None and product.weight.dtype == model.dtype
            _make(model, product, need, widen and plain and kind.endswith(WIDENED))
            moved = True
        if product.low_rank is not None:
            _fill(product.low_rank, shares[name], reader)
    return moved


# An adapter's part of a product: it, its number, the weight that it changes, and that one's first row.
Share = tuple[Lora, int, str, int]


def _shares(model: Mixture, name: str, product: Linear, adapters: Sequence[Lora]) -> list[Share]:
    weights, found, row = published_names(f"{name}.weight"), [], 0
    rows = part_rows(model.config, f"{name}.weight", len(weights), product.out_features)
    for weight, count in zip(weights, rows, strict=True):
        found += [(a, number, weight, row) for number, a in enumerate(adapters) if weight in a.pairs]
        row += count
    return found


def _make(model: Mixture, product: Linear, ranks: int, widen: bool) -> None:
    if product.low_rank is not None and product.low_rank.wide is not None:
        product.weight.data = product.weight.data.contiguous()
    channels = product.in_features, product.out_features
    product.low_rank = LowRank(ranks, channels, model.dtype, model.device) if ranks else None
    if ranks and widen:
        product.widen()


def _fill(low_rank: LowRank, shares: Sequence[Share], reader: Reader) -> None:
    for tensor in (low_rank.down_RC, low_rank.up_NR, low_rank.of_R):
        tensor.zero_()
    start = 0
    for adapter, number, weight, row in shares:
        down, up = adapter.factors(weight, reader)
        end = start + len(down)
        down, up = (factor.to(low_rank.of_R.device).float() for factor in (down, up))
        low_rank.down_RC[start:end] = down
        low_rank.up_NR[row : row + len(up), start:end] = up * adapter.pairs[weight].scale
        low_rank.of_R[start:end] = number
        start = end
