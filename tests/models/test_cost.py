"""Cost counts: parameters and operations of the published models."""

import pytest
import torch

from models.config import LevelConfig, QuantizerConfig, VQVAEConfig
from models.cost import count_parameters, forward_flops
from models.vqvae import VQVAE


@pytest.mark.parametrize(
    ("strides", "image_size", "expected_parameters", "expected_flops"),
    [
        ({"top": 8, "bottom": 4}, 256, 1_782_339, 9_546_235_904),  # ImageNet: 1.78 M and 9.55 GFLOP
        ({"top": 32, "middle": 16, "bottom": 8}, 1024, 3_172_419, 75_984_011_264),  # FFHQ: 3.17 M and 76.0 GFLOP
    ],
)
def test_cost_of_the_papers_models(
    strides: dict[str, int], image_size: int, expected_parameters: int, expected_flops: int
):
    """At the paper's widths, the parameters, with codebooks, and the forward operations are exactly these."""
    with torch.device("meta"):
        vqvae = VQVAE(VQVAEConfig({name: LevelConfig(stride) for name, stride in strides.items()}))
        image = torch.empty(1, 3, image_size, image_size)
    assert count_parameters(vqvae) == expected_parameters
    assert forward_flops(lambda: vqvae(image)) == expected_flops


def test_codebook_counts_once_in_every_mode():
    """A codebook counts K x D numbers, as a buffer or as a parameter, and 0 without quantization."""
    counts = {}
    for mode in ("ema", "loss", "none"):
        with torch.device("meta"):
            counts[mode] = count_parameters(VQVAE(VQVAEConfig({"top": LevelConfig(4)}, QuantizerConfig(mode=mode))))
    assert counts["ema"] == counts["loss"] == counts["none"] + 512 * 64
