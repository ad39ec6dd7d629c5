"""The FLUX autoencoder (Black Forest Labs), module names as in ae.safetensors. Any height and width.

It cannot be padded like the other programs: its GroupNorm and its attention span the whole picture.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.config import VAEConfig


def _norm_silu(x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight_C, bias_C, eps))


class NormSilu(nn.GroupNorm):
    """The norm, and SiLU. compute: what does both; a runtime may bring a faster one."""

    compute = staticmethod(_norm_silu)

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias, self.eps)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1 = NormSilu(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = NormSilu(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))  # before the shortcut: at full resolution its memory is a fifth of the peak
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head attention over all pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.proj_out(out.reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the change to the next one where there is one."""

    def __init__(self, c_in: int, c_out: int, blocks: int, **change: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        for name, module in change.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.block, *(m for name, m in self.named_children() if name != "block")):
            x = module(x)
        return x


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths = [c.ch, *(c.ch * m for m in c.ch_mult)]
        self.conv_in = nn.Conv2d(3, c.ch, 3, padding=1)
        last = len(c.ch_mult) - 1
        self.down = nn.ModuleList(
            Level(
                widths[i],
                widths[i + 1],
                c.num_res_blocks,
                **({} if i == last else {"downsample": Downsample(widths[i + 1])}),
            )
            for i in range(len(c.ch_mult))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = NormSilu(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        widths = [*(c.ch * m for m in c.ch_mult), c.ch * c.ch_mult[-1]]
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(
                widths[i + 1],
                widths[i],
                c.num_res_blocks + 1,
                **({} if i == 0 else {"upsample": Upsample(widths[i])}),
            )
            for i in range(len(c.ch_mult))
        )
        self.norm_out = NormSilu(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x))


class VAE(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        self.config = c
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)

    def encode(self, pixels_13HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] to mean and log-variance of the posterior [1, 2 * z, H / 8, W / 8] in float32."""
        return self.encoder(pixels_13HW.to(self.encoder.conv_in.weight.dtype)).float()

    def decode(self, latent_1ZHW: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled latent to a picture [8 H, 8 W, 3] of bytes, truncated as in the official code, and [1], which is 1 where
        all of its values were finite and 0 otherwise: bytes do not tell."""
        z = latent_1ZHW / self.config.scale_factor + self.config.shift_factor
        x = self.decoder(z.to(self.decoder.conv_in.weight.dtype)).float()
        picture = ((x * 0.5 + 0.5).clamp(0, 1)[0].permute(1, 2, 0) * 255).to(torch.uint8)
        return picture, (x.sum((1, 2, 3)).abs() < torch.inf).long()
