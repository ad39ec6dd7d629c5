"""The Wan 2.2 autoencoder (arXiv 2503.20314), module names as in its published file. Any height and width, a part of a video at a time.

Its convolutions look back in time. What they need of the frames before is carried from part to part, so that the parts of
a video give what all of it at once would give. The first part is one frame, which is one latent frame; every further
latent frame is WanConfig.frames frames.

B videos (one), C channels, F frames, H and W rows and columns.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel_opt.lance.config import DEVIATIONS, MEANS, WanConfig

FOLD = 2  # pixels to a side that are channels of one


class Carried:
    """What convolutions keep of the frames before, in the order in which they run. state: None where there are none."""

    def __init__(self, state: Iterable[Tensor] | None):
        self.first = state is None
        self.old, self.new = iter(state or ()), []

    def before(self, x_BCFHW: Tensor, count: int) -> Tensor:
        """x with so many frames before it: zeros, or those that were kept."""
        old = x_BCFHW.new_zeros(x_BCFHW[:, :, :1].shape).expand(-1, -1, count, -1, -1) if self.first else next(self.old)
        x_BCFHW = torch.cat((old, x_BCFHW), dim=2)
        self.keep(x_BCFHW[:, :, -count:])
        return x_BCFHW

    def keep(self, x_BCFHW: Tensor) -> None:
        self.new.append(x_BCFHW.clone())  # without the memory of what it is a part of


class Norm(nn.Module):
    """Each pixel's channels brought to the length sqrt(channels), times gamma."""

    def __init__(self, channels: int, *ones: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *ones))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


class CausalConv(nn.Conv3d):
    """3 x 3 x 3, of which each output frame sees its own and the two before."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, carried: Carried) -> Tensor:
        return super().forward(carried.before(x, 2))


class Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        parts = {
            "0": Norm(c_in, 1, 1, 1),
            "2": CausalConv(c_in, c_out),
            "3": Norm(c_out, 1, 1, 1),
            "6": CausalConv(c_out, c_out),
        }
        self.residual = nn.ModuleDict(parts)
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, carried: Carried) -> Tensor:
        h = x
        for norm, conv in (("0", "2"), ("3", "6")):
            h = self.residual[conv](F.silu(self.residual[norm](h)), carried)
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Single-head attention over each frame's pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels, 1, 1)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCFHW: Tensor, carried: Carried) -> Tensor:
        def attend(x_FCHW: Tensor) -> Tensor:
            q, k, v = self.to_qkv(self.norm(x_FCHW)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
            out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
            return self.proj(out.reshape(x_FCHW.shape))

        return x_BCFHW + each_frame(x_BCFHW, attend)


def each_frame(x_BCFHW: Tensor, call: nn.Module) -> Tensor:
    """Of one video, every frame by itself."""
    return call(x_BCFHW[0].transpose(0, 1)).transpose(0, 1)[None]


class Down(nn.Module):
    """Half the sides, and with `time` half the frames: of the first part none, later over the last frame before."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, carried: Carried) -> Tensor:
        x = each_frame(x, lambda x_FCHW: self.resample["1"](F.pad(x_FCHW, (0, 1, 0, 1))))
        if self.time_conv is None:
            return x
        if carried.first:
            carried.keep(x)
            return x
        return self.time_conv(carried.before(x, 1))


class Up(nn.Module):
    """Twice the sides, and with `time` twice the frames: of the first part, which the convolution over time never sees, none."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, padding=1)})
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, carried: Carried) -> Tensor:
        if self.time_conv is not None:
            if carried.first:
                carried.keep(torch.zeros_like(x).expand(-1, -1, 2, -1, -1))
            else:
                x = self.time_conv(carried.before(x, 2)).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return each_frame(x, lambda x_FCHW: self.resample["1"](F.interpolate(x_FCHW, scale_factor=2.0, mode="nearest")))


def averaged(x_BCFHW: Tensor, c_out: int, time: int, space: int) -> Tensor:
    """The shortcut of a level of the encoder: pixels folded into channels, of which groups are averaged. Zero frames come first
    where frames do not divide."""
    x = F.pad(x_BCFHW, (0, 0, 0, 0, -x_BCFHW.shape[2] % time, 0))
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time)).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.flatten(1, 4).unflatten(1, (c_out, -1)).mean(2)


def repeated(x_BCFHW: Tensor, c_out: int, time: int, space: int, first: bool) -> Tensor:
    """The shortcut of a level of the decoder: repeated channels unfolded into pixels; of the first part without the early
    copies."""
    x = x_BCFHW.repeat_interleave(c_out * time * space**2 // x_BCFHW.shape[1], dim=1)
    x = (
        x.unflatten(1, (c_out, time, space, space))
        .permute(0, 1, 5, 2, 6, 3, 7, 4)
        .flatten(6, 7)
        .flatten(4, 5)
        .flatten(2, 3)
    )
    return x[:, :, time - 1 :] if first else x


class DownLevel(nn.Module):
    """change: what follows the blocks; None at the last level."""

    def __init__(self, c_in: int, c_out: int, blocks: int, change: Down | None):
        super().__init__()
        parts = [Residual(c_in if i == 0 else c_out, c_out) for i in range(blocks)]
        self.downsamples = nn.ModuleList([*parts, *([change] if change else [])])
        self.sizes = c_out, 1 + bool(change and change.time_conv is not None), 1 + bool(change)

    def forward(self, x: Tensor, carried: Carried) -> Tensor:
        h = x
        for part in self.downsamples:
            h = part(h, carried)
        return h + averaged(x, *self.sizes)


class UpLevel(nn.Module):
    """change: what follows the blocks; None at the last level, which has no shortcut either."""

    def __init__(self, c_in: int, c_out: int, blocks: int, change: Up | None):
        super().__init__()
        parts = [Residual(c_in if i == 0 else c_out, c_out) for i in range(blocks)]
        self.upsamples = nn.ModuleList([*parts, *([change] if change else [])])
        self.sizes = (c_out, 1 + (change.time_conv is not None), 2) if change else None

    def forward(self, x: Tensor, carried: Carried) -> Tensor:
        h = x
        for part in self.upsamples:
            h = part(h, carried)
        return h if self.sizes is None else h + repeated(x, *self.sizes, carried.first)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([Residual(channels, channels), Attention(channels), Residual(channels, channels)])


def _head(c_in: int, c_out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": Norm(c_in, 1, 1, 1), "2": CausalConv(c_in, c_out)})


class Encoder(nn.Module):
    def __init__(self, c: WanConfig):
        super().__init__()
        widths, last = c.encoder, len(c.encoder) - 2
        self.conv1 = CausalConv(3 * FOLD**2, widths[0])
        self.downsamples = nn.ModuleList(
            DownLevel(
                *widths[i : i + 2], c.num_res_blocks, Down(widths[i + 1], c.encoder_time[i]) if i < last else None
            )
            for i in range(last + 1)
        )
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * c.z_channels)

    def forward(self, x: Tensor, carried: Carried) -> Tensor:
        x = self.conv1(x, carried)
        for part in (*self.downsamples, *self.middle):
            x = part(x, carried)
        return self.head["2"](F.silu(self.head["0"](x)), carried)


class Decoder(nn.Module):
    def __init__(self, c: WanConfig):
        super().__init__()
        widths, last = c.decoder, len(c.decoder) - 2
        self.conv1 = CausalConv(c.z_channels, widths[0])
        self.middle = _middle(widths[0])
        self.upsamples = nn.ModuleList(
            UpLevel(
                *widths[i : i + 2], c.num_res_blocks + 1, Up(widths[i + 1], c.decoder_time[i]) if i < last else None
            )
            for i in range(last + 1)
        )
        self.head = _head(widths[-1], 3 * FOLD**2)

    def forward(self, x: Tensor, carried: Carried) -> Tensor:
        x = self.conv1(x, carried)
        for part in (*self.middle, *self.upsamples):
            x = part(x, carried)
        return self.head["2"](F.silu(self.head["0"](x)), carried)


class WanVAE(nn.Module):
    """state: what the call for the part before gave last; None for the first."""

    def __init__(self, c: WanConfig):
        super().__init__()
        self.config = c
        self.encoder = Encoder(c)
        self.conv1 = nn.Conv3d(2 * c.z_channels, 2 * c.z_channels, 1)
        self.conv2 = nn.Conv3d(c.z_channels, c.z_channels, 1)
        self.decoder = Decoder(c)

    def encode(self, pixels_13FHW: Tensor, state: Iterable[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Pixels in [-1, 1] to mean and log-variance of the posterior [1, F', H / 16, W / 16, 2 * Z] in float32, and the state."""
        carried = Carried(state)
        x = pixels_13FHW.to(self.conv1.weight.dtype).unflatten(4, (-1, FOLD)).unflatten(3, (-1, FOLD))
        x = x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)  # as (colour, column, row)
        moments = self.conv1(self.encoder(x, carried)).permute(0, 2, 3, 4, 1).float()
        return moments, *carried.new

    def decode(self, latent_1ZFHW: Tensor, state: Iterable[Tensor] | None = None) -> tuple[Tensor, ...]:
        """A latent frame to frames [F', 16 H, 16 W, 3] of bytes, [1], which is 1 where all of their values were finite and 0
        otherwise, and the state."""
        carried = Carried(state)
        mean, deviation = (latent_1ZFHW.new_tensor(numbers)[:, None, None, None] for numbers in (MEANS, DEVIATIONS))
        z = latent_1ZFHW * deviation + mean
        x = self.decoder(self.conv2(z.to(self.conv2.weight.dtype)), carried).float()
        x = x.unflatten(1, (3, FOLD, FOLD)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
        frames_FHW3 = ((x.clamp(-1, 1) / 2 + 0.5) * 255).round().to(torch.uint8)[0].permute(1, 2, 3, 0)
        return frames_FHW3, (x.sum((1, 2, 3, 4)).abs() < torch.inf).long(), *carried.new
