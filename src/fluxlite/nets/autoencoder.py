"""The KL autoencoder of FLUX: pixels in [-1, 1] to latents, and back.

Names and shapes of the weights are those of diffusers' AutoencoderKL; `weights.layouts`
maps `ae.safetensors` onto them.

Shapes: B batch, C channels, H and W in pixels, h and w in latent cells, which are `downsampling`
pixels along a side.
"""

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def group_norm(channels, groups):
    """The norm of all levels; its eps is that of Stable Diffusion's autoencoders."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, channels_in, h, w) to (B, channels_out, h, w)."""

    def __init__(self, channels_in, channels_out, groups):
        super().__init__()
        self.norm1 = group_norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        if channels_in != channels_out:
            self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Single-head attention over all cells; no activation follows the group norm."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = group_norm(channels, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        out = F.scaled_dot_product_attention(
            self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        )
        return x + rearrange(self.to_out[0](out), "b 1 (h w) c -> b c h w", h=x.shape[2])


class MidBlock(nn.Module):
    """Attention between two residual blocks; shapes stay as they are."""

    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """(B, C, h, w) to (B, C, h/2, w/2), by a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(
            F.pad(x, (0, 1, 0, 1))
        )  # right and bottom only, as the weights were trained


class Upsample(nn.Module):
    """(B, C, h, w) to (B, C, 2h, 2w): each cell repeated, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Res blocks at one resolution, then a change of resolution, if any."""

    def __init__(self, channels_in, channels_out, *, num_resnets, groups, resample):
        super().__init__()
        widths = [channels_in] + [channels_out] * num_resnets
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:]))
        name = {Downsample: "downsamplers", Upsample: "upsamplers", None: None}[resample]
        if name:
            setattr(self, name, nn.ModuleList([resample(channels_out)]))
        self.resample_name = name

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return getattr(self, self.resample_name)[0](x) if self.resample_name else x


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) to mean, then log variance, of the posterior (B, 2C, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = list(config.block_out_channels), config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                a,
                b,
                num_resnets=config.layers_per_block,
                groups=groups,
                resample=Downsample if i < len(widths) - 1 else None,
            )
            for i, (a, b) in enumerate(zip(widths[:1] + widths, widths))
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Unscaled latents (B, C, h, w) to pixels (B, 3, H, W)."""

    def __init__(self, config):
        super().__init__()
        widths, groups = list(config.block_out_channels)[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(
                a,
                b,
                num_resnets=config.layers_per_block + 1,
                groups=groups,
                resample=Upsample if i < len(widths) - 1 else None,
            )
            for i, (a, b) in enumerate(zip(widths[:1] + widths, widths))
        )
        self.conv_norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """FLUX's autoencoder. Latents are scaled to about unit variance: `z = scaling_factor · (sample
    − shift_factor)`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def posterior(self, images):
        """Mean and log-variance of the unscaled posterior: images (B, 3, H, W) in [-1, 1] to two
        (B, C, h, w).
        """
        mean, logvar = (
            self.encoder(images.to(self.encoder.conv_in.weight.dtype)).float().chunk(2, dim=1)
        )
        return mean, logvar.clamp(-30, 20)

    def scale(self, sample):
        """Unscaled latents to those that the transformer sees."""
        return self.config.scaling_factor * (sample - self.config.shift_factor)

    def encode(self, images, noise=None):
        """Scaled latents (B, C, h, w) in float32: the posterior's mode, or with `noise` of that
        shape a sample of it.
        """
        return self.scale(sample_posterior(*self.posterior(images), noise))

    def decode(self, latents):
        """Scaled latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1]."""
        z = latents / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype))

    def decode_tiled(self, latents, tile):
        """`decode` in tiles of `tile` cells a side, which overlap by a quarter and are blended
        there in float32: less memory for large pictures.

        It is not exact: norms and attention see a tile alone. One tile that covers all is.
        """
        places = [tile_starts(size, tile) for size in latents.shape[2:]]
        if all(len(starts) == 1 for starts in places):
            return self.decode(latents)
        cell, width = self.config.downsampling, self.config.downsampling * (tile // 4)
        size = [cell * n for n in latents.shape[2:]]
        pixels = torch.zeros(len(latents), 3, *size, device=latents.device)
        total = pixels.new_zeros(size)
        for y, x in itertools.product(*places):
            part = self.decode(latents[:, :, y : y + tile, x : x + tile])
            rows, columns = (edge_ramp(n, width, latents.device) for n in part.shape[2:])
            weight, top, left = rows[:, None] * columns, cell * y, cell * x
            there = ..., slice(top, top + len(rows)), slice(left, left + len(columns))
            pixels[there] += part.float() * weight
            total[there] += weight
        return pixels / total


def tile_starts(size, tile):
    """Where tiles begin that cover `size` cells and overlap by a quarter or more."""
    if size <= tile:
        return [0]
    count = -(-(size - tile) // (tile - tile // 4)) + 1
    return [i * (size - tile) // (count - 1) for i in range(count)]


def edge_ramp(size, width, device):
    """Weights (size,) of a tile's pixels: 1, falling to nearly 0 over `width` pixels at an end."""
    place = torch.arange(size, device=device) + 0.5
    return (torch.minimum(place, size - place) / max(width, 0.5)).clamp(max=1)


def sample_posterior(mean, logvar, noise=None):
    """`mean + exp(logvar / 2) · noise`, or the mean without noise."""
    return mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
