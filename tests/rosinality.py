"""Network of rosinality/vq-vae-2-pytorch, for tests of its import: random weights, and what they compute.

`their_forward` is that network, written from its architecture and the names of its tensors, with functions of
torch only. N images; channels second, except in quantizers.
"""

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]
SIZES = {"channels": 16, "residual": 6, "blocks": 2, "dim": 5, "entries": 24}


def make_weights(*, channels: int, residual: int, blocks: int, dim: int, entries: int) -> Weights:
    """Return random weights of the names and shapes of that class."""
    generator = torch.Generator().manual_seed(0)
    weights: Weights = {}

    def layer(name: str, *shape: int, transposed: bool = False) -> None:
        scale = (shape[0 if transposed else 1] * shape[2] * shape[3]) ** -0.5
        weights[f"{name}.weight"] = 2 * scale * torch.randn(shape, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(shape[1 if transposed else 0], generator=generator)

    def stack(name: str, first: int) -> int:
        for index in range(first, first + blocks):
            layer(f"{name}.{index}.conv.1", residual, channels, 3, 3)
            layer(f"{name}.{index}.conv.3", channels, residual, 1, 1)
        return first + blocks + 1  # after a ReLU

    half = channels // 2
    layer("enc_b.blocks.0", half, 3, 4, 4)
    layer("enc_b.blocks.2", channels, half, 4, 4)
    layer("enc_b.blocks.4", channels, channels, 3, 3)
    stack("enc_b.blocks", 5)
    layer("enc_t.blocks.0", half, channels, 4, 4)
    layer("enc_t.blocks.2", channels, half, 3, 3)
    stack("enc_t.blocks", 3)
    layer("quantize_conv_t", dim, channels, 1, 1)
    layer("dec_t.blocks.0", channels, dim, 3, 3)
    layer(f"dec_t.blocks.{stack('dec_t.blocks', 1)}", channels, dim, 4, 4, transposed=True)
    layer("quantize_conv_b", dim, dim + channels, 1, 1)
    layer("upsample_t", dim, dim, 4, 4, transposed=True)
    layer("dec.blocks.0", channels, 2 * dim, 3, 3)
    last = stack("dec.blocks", 1)
    layer(f"dec.blocks.{last}", channels, half, 4, 4, transposed=True)
    layer(f"dec.blocks.{last + 2}", half, 3, 4, 4, transposed=True)
    for name in ("quantize_t", "quantize_b"):
        weights[f"{name}.embed"] = torch.randn(dim, entries, generator=generator)
        weights[f"{name}.cluster_size"] = 10 * torch.rand(entries, generator=generator)
        weights[f"{name}.embed_avg"] = weights[f"{name}.embed"] * weights[f"{name}.cluster_size"]
    return weights


def their_forward(weights: Weights, images: torch.Tensor, blocks: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return reconstructions and codes."""

    def conv(name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    def up(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1)

    def residuals(name: str, first: int, x: torch.Tensor) -> torch.Tensor:
        for index in range(first, first + blocks):
            hidden = conv(f"{name}.{index}.conv.1", x.relu(), padding=1)
            x = x + conv(f"{name}.{index}.conv.3", hidden.relu())
        return x.relu()

    def quantize(name: str, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        entries = weights[f"{name}.embed"].T  # (K, D)
        codes = (latents.permute(0, 2, 3, 1)[..., None, :] - entries).square().sum(-1).argmin(-1)
        return entries[codes].permute(0, 3, 1, 2), codes

    x = conv("enc_b.blocks.0", images, stride=2, padding=1).relu()
    x = conv("enc_b.blocks.4", conv("enc_b.blocks.2", x, stride=2, padding=1).relu(), padding=1)
    bottom = residuals("enc_b.blocks", 5, x)
    x = conv("enc_t.blocks.2", conv("enc_t.blocks.0", bottom, stride=2, padding=1).relu(), padding=1)
    top_latents, top_codes = quantize("quantize_t", conv("quantize_conv_t", residuals("enc_t.blocks", 3, x)))
    x = residuals("dec_t.blocks", 1, conv("dec_t.blocks.0", top_latents, padding=1))
    context = up(f"dec_t.blocks.{blocks + 2}", x)
    bottom_latents, bottom_codes = quantize("quantize_b", conv("quantize_conv_b", torch.cat([context, bottom], 1)))
    latents = torch.cat([up("upsample_t", top_latents), bottom_latents], 1)
    x = residuals("dec.blocks", 1, conv("dec.blocks.0", latents, padding=1))
    x = up(f"dec.blocks.{blocks + 4}", up(f"dec.blocks.{blocks + 2}", x).relu())
    return x, {"top": top_codes, "bottom": bottom_codes}
