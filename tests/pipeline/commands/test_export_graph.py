"""Tests of `vqvae2 export encoder` and `decoder`: the graphs compute what the model does, for any number of images."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from models.config import LevelConfig, VQVAEConfig
from models.vqvae import VQVAE
from pipeline.commands import export_graph
from stages.errors import UserError
from stages.inference.graphs import FORMATS, write_graph
from tests.mini_pipeline import MiniPipeline


@pytest.fixture(scope="module")
def network() -> VQVAE:
    """Three levels with entries near the latents, so that codes vary."""
    torch.manual_seed(0)
    levels = {name: LevelConfig(stride, 8, 4, 1, 16, 4) for name, stride in (("a", 8), ("b", 4), ("c", 2))}
    network = VQVAE(VQVAEConfig(levels))
    for _ in range(2):
        network.absorb({name: level.sums for name, level in network(torch.rand(8, 3, 16, 16) * 2 - 1).levels.items()})
    return network.eval().requires_grad_(False)


def call(path: Path, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Run a graph without this project's code."""
    if path.suffix == ".pt2":
        outputs = torch.export.load(path).module()(*inputs)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    feed = {name: tensor.numpy() for name, tensor in zip(evaluator.input_names, inputs, strict=True)}
    return [torch.from_numpy(np.asarray(output)) for output in evaluator.run(None, feed)]


@pytest.mark.parametrize("ending", FORMATS)
def test_graphs_compute_what_the_model_does(network: VQVAE, tmp_path: Path, ending: str):
    """Equal codes, and pixels that differ by rounding only, for one image and for five."""
    paths = {part: tmp_path / f"{part}{ending}" for part in ("encoder", "decoder")}
    for part, path in paths.items():
        write_graph(network, part, path, image_size=16)
    for count in (1, 5):
        images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count)) * 2 - 1
        expected = network.encode(images)
        codes = call(paths["encoder"], (images,))
        assert len(expected["c"].unique()) > 3
        assert all(torch.equal(grid, expected[name]) for grid, name in zip(codes, expected, strict=True))
        (decoded,) = call(paths["decoder"], tuple(codes))
        torch.testing.assert_close(decoded, network.decode(expected), atol=1e-5, rtol=0)


def test_command_writes_the_model_of_a_project(artifacts: MiniPipeline, tmp_path: Path, capsys):
    """It prints the inputs and outputs, and replaces no file."""
    assert export_graph.run("decoder", tmp_path / "decoder.pt2", model=None) == 0
    output = capsys.readouterr().out
    assert "top int64 (N, 2, 2), bottom int64 (N, 4, 4) -> images float32 (N, 3, 16, 16) in [-1, 1]" in output
    with pytest.raises(UserError, match=r"decoder\.pt2 exists"):
        export_graph.run("decoder", tmp_path / "decoder.pt2", model=None)


def test_other_formats_are_refused(artifacts: MiniPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before the model is read; the error has the endings, or the package that is missing."""
    with pytest.raises(UserError, match=r"must end in \.pt2 or \.onnx, got decoder\.pth"):
        export_graph.run("decoder", tmp_path / "decoder.pth", model=None)
    with pytest.raises(UserError, match=r"The folder of decoder\.pt2 does not exist"):
        export_graph.run("decoder", tmp_path / "absent" / "decoder.pt2", model=None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package onnx\.[\s\S]*pip install onnx onnxscript"):
        export_graph.run("decoder", tmp_path / "decoder.onnx", model=None)
