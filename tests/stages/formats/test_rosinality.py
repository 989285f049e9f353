"""Checkpoints of rosinality/vq-vae-2-pytorch: the same codes and reconstructions as their network computes."""

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stages.errors import UserError
from stages.formats import rosinality
from tests.rosinality import SIZES, make_weights, their_forward


def save(path: Path, weights: object, legacy: bool = False) -> Path:
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_codes_and_reconstructions_are_theirs(tmp_path: Path, blocks: int, legacy: bool):
    """Codes are equal, pixels differ by rounding only; also of files written by distributed training."""
    weights = make_weights(**{**SIZES, "blocks": blocks})
    saved = {f"module.{name}": tensor for name, tensor in weights.items()} if legacy else weights
    network = rosinality.read(save(tmp_path / "vqvae_560.pt", saved, legacy))
    images = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected, expected_codes = their_forward(weights, images, blocks)
    output, codes = network(images), network.encode(images)
    assert all(len(grid.unique()) > 3 and torch.equal(codes[level], grid) for level, grid in expected_codes.items())
    torch.testing.assert_close(output.reconstruction, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(network.decode(codes), expected, atol=1e-6, rtol=0)


def test_training_state_of_codebooks_is_imported(tmp_path: Path):
    """An update of the codebook moves the chosen entries as theirs: by equation 3 with Laplace smoothing."""
    weights = make_weights(**SIZES)
    quantizer = rosinality.read(save(tmp_path / "a.pt", weights)).levels["level_top"].quantizer
    latents = torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(2))
    output = quantizer(latents)
    one_hot = F.one_hot(output.codes.flatten(), 24).float()
    sizes = 0.99 * weights["quantize_t.cluster_size"] + 0.01 * one_hot.sum(0)
    sums = 0.99 * weights["quantize_t.embed_avg"] + 0.01 * latents.permute(1, 0, 2, 3).flatten(1) @ one_hot
    smoothed = (sizes + 1e-5) / (sizes.sum() + 24 * 1e-5) * sizes.sum()
    quantizer.absorb(output.sums)
    chosen = one_hot.sum(0) > 0
    torch.testing.assert_close(quantizer.codebook[chosen], (sums / smoothed).T[chosen])


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"x": torch.zeros(1)}, "args": argparse.Namespace(hier="top")},
        {"model": {"horizontal.conv.weight": torch.zeros(1)}},
        {"horizontal.causal.weight": torch.zeros(1)},
    ],
    ids=["with arguments", "model only", "state dict"],
)
def test_pixelsnail_checkpoint_is_refused(tmp_path: Path, content: object):
    """The error says in a sentence what does not map, and what to do instead."""
    with pytest.raises(UserError, match=r"PixelSNAIL checkpoint, which does not map[\s\S]*train priors on its codes"):
        rosinality.read(save(tmp_path / "pixelsnail_top_420.pt", content))


def test_file_that_would_run_code_is_refused(tmp_path: Path):
    """It does not run."""

    class Payload:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Payload()))
    save(tmp_path / "b.pt", {"x": Payload()})
    for name, reason in (("a.pt", "it is damaged, or is no file"), ("b.pt", "it holds other objects")):
        with pytest.raises(UserError, match=rf"{name} cannot be read as weights: {reason}") as caught:
            rosinality.read(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # PyTorch advises to load the file with its code
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dec.blocks.0.weight": None}, 'Missing key.s. in state_dict: "decoder.0.weight"'),
        ({"quantize_t.embed": None}, r"quantize_t\.embed is missing"),
        ({"extra.weight": torch.zeros(1)}, r"it holds extra\.weight"),
        ({"enc_b.blocks.0.weight": torch.zeros(8, 1, 4, 4)}, "size mismatch for levels.level_bottom.encoder.0.weight"),
        ({"dec.blocks.0.bias": torch.full((16,), torch.nan)}, r"decoder\.0\.bias holds values that are not finite"),
        ({"quantize_b.cluster_size": torch.zeros(24)}, "cluster_size is 0"),
        ({"quantize_b.cluster_size": 3}, "other values than tensors"),
    ],
)
def test_other_checkpoint_is_refused(tmp_path: Path, change: dict, message: str):
    """The error has the tensor that does not fit."""
    weights = {name: tensor for name, tensor in (make_weights(**SIZES) | change).items() if tensor is not None}
    with pytest.raises(UserError, match=f"a.pt is not a checkpoint of the VQVAE class[\\s\\S]*{message}"):
        rosinality.read(save(tmp_path / "a.pt", weights))


def test_tensors_without_names_are_refused(tmp_path: Path):
    """The error has the first key that is not text."""
    with pytest.raises(UserError, match=r"a\.pt cannot be read as weights: names of tensors must be text, got 3"):
        rosinality.read(save(tmp_path / "a.pt", {3: torch.zeros(1)}))


def test_absent_and_damaged_files_are_refused(tmp_path: Path):
    """With the path."""
    with pytest.raises(UserError, match=r"absent\.pt does not exist"):
        rosinality.read(tmp_path / "absent.pt")
    path = save(tmp_path / "a.pt", make_weights(**SIZES))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"a\.pt cannot be read as weights: it is damaged, or"):
        rosinality.read(path)
    for contents in (b"", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        path.write_bytes(contents)
        with pytest.raises(UserError, match=r"a\.pt cannot be read as weights: it is damaged, or") as caught:
            rosinality.read(path)
        assert "weights_only" not in str(caught.value)


def test_folder_in_place_of_a_file_is_called_a_folder(tmp_path: Path):
    """It exists."""
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UserError, match="checkpoint is a folder, not a file of weights"):
        rosinality.read(tmp_path / "checkpoint")
