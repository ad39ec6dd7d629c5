"""A layer's operations as single ONNX nodes, for a model that is traced.

B rows, Q queries, T tokens, S slots, H query heads, G key-value heads, D channels per head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bagel_opt.export.onnx_fused import DOMAIN
from bagel_opt.model import attention
from bagel_opt.model.attention import Visible

Node = torch.onnx.ops.symbolic


@dataclass(frozen=True)
class OnnxOps:
    """backend: "onnx" for ONNX Runtime's CPU provider, "onnx-cuda" and "onnx-cudnn" for its CUDA provider in float32 and
    in 16 bits; in the last, query heads are ordered as by onnx_fused.store_split."""

    backend: str

    @property
    def vit(self) -> "OnnxOps":
        return OnnxOps("onnx" if self.backend == "onnx" else "onnx-cuda")

    def visible(self, kv_len_B: Tensor, queries: int, slots: int, causal: bool) -> Visible:
        """The node makes its own mask."""
        return Visible(kv_len_B, causal, None)

    def within(self, group_BQ: Tensor, kv_len_B: Tensor) -> Visible:
        """With a mask that the node is given."""
        return attention.within(group_BQ, kv_len_B)

    def attend(self, q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, seen: Visible) -> Tensor:
        if self.backend != "onnx-cudnn":
            return _attention(q_BQHD, k_BSGD, v_BSGD, seen, in_use=self.backend == "onnx")
        if not seen.causal:
            return _multi_head_attention(q_BQHD, k_BSGD, v_BSGD, seen.kv_len_B)
        # queries are ordered for MultiHeadAttention; Attention wants those of a group together
        grouped = q_BQHD.unflatten(2, (-1, k_BSGD.shape[2])).transpose(2, 3).flatten(2, 3)
        out = _attention(grouped, k_BSGD, v_BSGD, seen)
        return out.unflatten(2, (k_BSGD.shape[2], -1)).transpose(2, 3).flatten(2, 3)

    def write(self, cache_BSGD: Tensor, new_BTGD: Tensor, start_B: Tensor) -> Tensor:
        """TensorScatter, which returns the new cache; a runtime binds it to the memory of the old one."""
        return Node(
            "TensorScatter",
            (cache_BSGD, new_BTGD, start_B),
            {"axis": 1, "mode": "linear"},
            dtype=cache_BSGD.dtype,
            shape=cache_BSGD.shape,
            version=24,
        )

    def rotate(self, x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RotaryEmbedding of opset 23 in its 3-D form, which wants an angle for each token."""
        tokens, heads = x_BTHD.shape[1:3]
        tables = (table.expand(-1, tokens, -1, -1).squeeze(2).to(x_BTHD.dtype) for table in (cos, sin))
        x = x_BTHD.flatten(2)
        shape = {"dtype": x.dtype, "shape": x.shape, "version": 23}
        return Node("RotaryEmbedding", (x, *tables), {"num_heads": heads}, **shape).view(x_BTHD.shape)


def _attention(q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, seen: Visible, in_use: bool = False) -> Tensor:
    """Attention in its 3-D form, which takes this cache layout without a transpose. in_use: over the slots in use alone."""
    shape = q_BQHD.shape
    k, v = k_BSGD.flatten(2), v_BSGD.flatten(2)
    if seen.mask is not None:
        given = q_BQHD.flatten(2), k, v, seen.mask
    else:
        k, v = _in_use(seen.kv_len_B, k, v) if in_use else (k, v)
        given = q_BQHD.flatten(2), k, v, None, None, None, seen.kv_len_B
    return Node(
        "Attention",
        given,
        {"q_num_heads": shape[2], "kv_num_heads": k_BSGD.shape[2], "is_causal": int(seen.causal)},
        dtype=q_BQHD.dtype,
        shape=(shape[0], shape[1], shape[2] * shape[3]),
        version=24,
    ).unflatten(-1, shape[2:])


def _multi_head_attention(q_BQHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, kv_len_B: Tensor) -> Tensor:
    """ONNX Runtime's own operator, over the first kv_len keys, which runs on cuDNN."""
    rows, queries, heads, size = q_BQHD.shape
    groups = k_BSGD.shape[2]
    q = q_BQHD.reshape(rows, queries * heads // groups, groups * size)
    return Node(
        f"{DOMAIN}::MultiHeadAttention",
        (q, k_BSGD.flatten(2), v_BSGD.flatten(2), None, kv_len_B.int()),
        {"num_heads": groups},
        dtype=q.dtype,
        shape=q.shape,
        version=1,
    ).view(q_BQHD.shape)


def _in_use(kv_len_B: Tensor, *kv_BSC: Tensor) -> tuple[Tensor, ...]:
    """Keys and values up to the longest row's end, in steps of 64.

    ONNX Runtime's CPU provider computes over all slots that it is given, and would group a row's sums by the length of
    its neighbours. How many slots are left is unknown to the tracer, which is told that there are as many as before.
    """
    ints = {"dtype": torch.int64, "shape": (1,), "version": 24}
    longest = Node("ReduceMax", (kv_len_B,), {"keepdims": 1}, **ints)
    end = (longest + 63) // 64 * 64
    zero, one = (torch.tensor([value], device=end.device) for value in (0, 1))
    return tuple(Node("Slice", (x, zero, end, one), {}, dtype=x.dtype, shape=x.shape, version=24) for x in kv_BSC)
