"""Code of a model in MLflow. MLflow copies this file into the model, and runs it when the model is loaded: no pickle.

It imports the public API only, which a checkout and an installed wheel have under the same name.

`predict` reads one image per row. The parameter `method` chooses what it does:

    method   columns that it reads          columns that it returns
    sample   class ("" for any)             image, codes
    encode   image                          codes
    decode   codes                          image
    score    image, class ("" for any)      nats, class

`image` is a PNG in base64, `codes` is JSON: {"top": [[...]], "bottom": [[...]]}. The other parameters are the seed and
the sampling rule, of which None keeps that of the model.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel
from PIL import Image

import vqvae2
from vqvae2 import Model

Rows = list[dict[str, Any]]


class PipelineModel(PythonModel):
    """Trained VQ-VAE and priors as a model of MLflow."""

    model: Model

    def load_context(self, context: Any) -> None:
        """Load the exported model, on a GPU if there is one."""
        self.model = vqvae2.load(context.artifacts["model"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Rows:
        """Return one row per row of the input. Raises ValueError for inputs that do not fit the method."""
        options = dict(params or {})
        method = options.pop("method", "sample")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if not len(model_input):
            raise ValueError("the input must have 1 or more rows, got none")
        return METHODS[method](self.model, model_input, options)


def _sample(model: Model, rows: pd.DataFrame, options: Mapping[str, Any]) -> Rows:
    names = _classes(rows)
    codes = model.sample_codes(len(rows), classes=names or (), **options)
    return [
        {"image": image, "codes": text}
        for image, text in zip(_encode_images(model, codes), _to_json(codes), strict=True)
    ]


def _encode(model: Model, rows: pd.DataFrame, options: Mapping[str, Any]) -> Rows:
    return [{"codes": text} for text in _to_json(model.encode(_images(rows)))]


def _decode(model: Model, rows: pd.DataFrame, options: Mapping[str, Any]) -> Rows:
    grids = [json.loads(text) for text in _column(rows, "codes")]
    codes = {level: np.array([grid[level] for grid in grids]) for level in grids[0]}
    return [{"image": image} for image in _encode_images(model, codes)]


def _score(model: Model, rows: pd.DataFrame, options: Mapping[str, Any]) -> Rows:
    scores = model.score(_images(rows), labels=_classes(rows))
    names = [model.classes[label] if label >= 0 else "" for label in scores.labels]
    return [{"nats": float(nats), "class": name} for nats, name in zip(scores.per_image, names, strict=True)]


METHODS: dict[str, Callable[[Model, pd.DataFrame, Mapping[str, Any]], Rows]] = {
    "sample": _sample,
    "encode": _encode,
    "decode": _decode,
    "score": _score,
}


def _column(rows: pd.DataFrame, name: str) -> list[str]:
    """Return the texts of a column. Raises ValueError if one is missing."""
    values = rows[name].tolist() if name in rows else []
    texts = [value for value in values if isinstance(value, str) and value]
    if len(texts) < len(rows):
        raise ValueError(f"column {name} must have a text in each of {len(rows)} rows, got {len(texts)}")
    return texts


def _classes(rows: pd.DataFrame) -> list[str] | None:
    """Return the class of each row; None if no row has one. Raises ValueError if some have."""
    values = rows["class"].tolist() if "class" in rows else []
    names = [value for value in values if isinstance(value, str) and value]
    if names and len(names) < len(rows):
        raise ValueError(f"column class must have a name in all rows or in none, got {len(names)} of {len(rows)}")
    return names or None


def _images(rows: pd.DataFrame) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(text, validate=True))) for text in _column(rows, "image")]


def _encode_images(model: Model, codes: Mapping[str, np.ndarray]) -> list[str]:
    return [_encode_png(image) for image in model.decode(codes)]


def _encode_png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _to_json(codes: Mapping[str, np.ndarray]) -> Sequence[str]:
    count = len(next(iter(codes.values())))
    return [json.dumps({level: grid[index].tolist() for level, grid in codes.items()}) for index in range(count)]


mlflow.models.set_model(PipelineModel())
