"""Python API of trained models: sample, encode, decode, score, restore, and read codes.

    import vqvae2

    model = vqvae2.load("artifacts")
    images = model.sample(16, classes=["flags"], seed=0)
    codes = model.encode(images)                  # {"top": (16, 8, 8), "bottom": (16, 16, 16)}
    blurred = model.decode(codes, levels=["top"])
    scores = model.score(images)                  # nats per code, by level
    table = vqvae2.codes("artifacts/codes").to_pandas()

This file names all that is public; the code is in stages/inference/ and stages/formats/. Torch and the other libraries
are imported on first use, so `import vqvae2` is fast. It is one file beside the packages, and not a fourth package,
because it only forwards to them. In the wheel it is the __init__.py of the package that holds them (pipeline/wheel.py).
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __name__ as _PIPELINE
from stages import __name__ as _STAGES
from stages.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.hub_model import HubModel as HubModel
    from stages.formats.code_table import CodeTable
    from stages.inference.model import Model
    from stages.inference.sampling_options import SamplingOptions
    from stages.inference.scores import Scores

# The program of an installed wheel imports vqvae2.pipeline. In a copy of the repository, it runs the copy's code.
__path__ = [str(Path(__file__).parent)]
__all__ = ["CodeTable", "Model", "SamplingOptions", "Scores", "UserError", "codes", "load"]

_MODULES = {  # relative to packages that the wheel has below vqvae2/ (pipeline/wheel.py)
    "CodeTable": (".formats.code_table", _STAGES),
    "HubModel": (".hub_model", _PIPELINE),  # not in __all__, since it needs huggingface_hub
    "Model": (".inference.model", _STAGES),
    "SamplingOptions": (".inference.sampling_options", _STAGES),
    "Scores": (".inference.scores", _STAGES),
}


def load(folder: Path | str = "artifacts", *, device: "torch.device | str | None" = None) -> "Model":
    """Load a trained model. The device defaults to CUDA if there is a GPU, else the CPU.

    `folder` holds `vqvae/` and `priors/`, as the folder `artifacts` of a project or an exported model does, or is such
    a project. It may also be the URI of a model in MLflow, such as models:/vqvae2@champion. Without `priors/`, the
    model encodes and decodes only. Raises UserError if a part is missing, damaged or does not match the others.
    """
    from stages.inference.model import load_model

    return load_model(folder, device=device)


def codes(folder: Path | str = "artifacts/codes") -> "CodeTable":
    """Open a folder of codes as a table with one row per image. Raises UserError if it is missing or incomplete."""
    from stages.formats.code_table import open_code_table

    return open_code_table(Path(folder))


def __getattr__(name: str) -> Any:
    """Import a public class on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(*_MODULES[name]), name)
