"""Models in MLflow: saving one without pickle, its registration under an alias, and its download.

A pipeline run has its model as the artifact `model`: the code that MLflow runs on loading, and the exported folder. A
model version of the registry is that artifact of a run; an alias such as `champion` names one version.
"""

import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from stages.errors import UserError
from stages.tracking import tags as run_tags
from stages.tracking.journal import MODEL
from stages.tracking.mlflow_store import MIN_PREFIX, configure_mlflow, connect, store_uri
from stages.tracking.mlflow_sync import PIPELINE_STAGE

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

SAVED_MODEL = "mlflow_model"  # folder in the work folder of the last stage
REGISTERED_MODEL = "vqvae2"  # default name in the registry
URI_SCHEMES = ("models:/", "runs:/")


def save_model(exported: Path, target: Path, *, code: Path, classes: tuple[str, ...]) -> None:
    """Save an exported model as a model of MLflow in the folder `target`, which must not exist.

    `code` is the file that MLflow runs on loading; it uses this package, which must be installed there. `classes` are
    those of the model.
    """
    configure_mlflow()
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    def columns(**types: DataType) -> Schema:
        return Schema([ColSpec(kind, name, required=False) for name, kind in types.items()])

    text, number = DataType.string, DataType.double
    defaults: dict[str, tuple[DataType, Any]] = {
        "method": (text, "sample"),
        "seed": (DataType.long, 0),
        # MLflow passes every parameter. A default of None keeps the model's rule; a number would be an option of all
        # levels, which overrides the rules of single levels.
        "temperature": (number, None),
        "top_k": (DataType.long, None),
        "top_p": (number, None),
        "guidance": (number, None),
    }
    mlflow.pyfunc.save_model(
        path=str(target),
        python_model=str(code),
        artifacts={exported.name: str(exported)},
        signature=ModelSignature(
            columns(**{"class": text}, image=text, codes=text),
            columns(image=text, codes=text, nats=number, **{"class": text}),
            ParamSchema([ParamSpec(name, kind, default) for name, (kind, default) in defaults.items()]),
        ),
        input_example=(pd.DataFrame({"class": [classes[0] if classes else ""]}), {"method": "sample", "seed": 0}),
        pip_requirements=[f"vqvae2=={importlib.metadata.version('vqvae2')}"],
    )


@dataclass(frozen=True)
class Promotion:
    """Version of a registered model that has received an alias."""

    run_name: str
    name: str
    version: str
    alias: str

    @property
    def uri(self) -> str:
        """Address by which MLflow and `vqvae2.load` find the model."""
        return f"models:/{self.name}@{self.alias}"


def promote(run: str, *, name: str, alias: str) -> Promotion:
    """Register the model of a pipeline run, if it is not registered, and move an alias to its version.

    `run` is the id of the run in MLflow, the first digits of it, or one of its names. Raises UserError if there is
    no such run or it has no model, and any exception of MLflow if the store does not answer.
    """
    configure_mlflow()
    from mlflow import MlflowException

    client, experiment = connect()
    pipeline_run = _find_run(client, experiment, run)
    run_id, run_name = pipeline_run.info.run_id, str(pipeline_run.info.run_name)
    if run_tags.MODEL not in pipeline_run.data.tags:  # files without the tag are those of an interrupted upload
        raise UserError(
            f"The run {run_name} has no complete model.",
            where=f"run {run_id} in MLflow",
            fix="Choose a run that has finished with all stages, or finish its upload: vqvae2 sync-metrics",
            code=2,
        )
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    versions = [v for v in client.search_model_versions(f"name = '{name}'") if v.run_id == run_id]
    source = f"{pipeline_run.info.artifact_uri}/{MODEL}"
    version = versions[0] if versions else client.create_model_version(name, source, run_id, description=run_name)
    client.set_registered_model_alias(name, alias, str(version.version))
    return Promotion(run_name, name, str(version.version), alias)


def _names(run: "MlflowRun") -> set[str]:
    """Return the names of a pipeline run: in MLflow, of its folder in runs/pipeline, and of its DVC experiment."""
    return {str(run.info.run_name)} | {
        run.data.tags[tag] for tag in (run_tags.KEY, run_tags.DVC_EXPERIMENT) if tag in run.data.tags
    }


def _find_run(client: "MlflowClient", experiment: str, run: str) -> "MlflowRun":
    """Return the pipeline run of an id, of its first digits, or of one of its names.

    Raises UserError unless there is one.
    """
    runs = client.search_runs([experiment], run_tags.stage_condition(PIPELINE_STAGE), order_by=["start_time DESC"])
    is_prefix = re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},32}}", run)
    matches = [
        candidate
        for candidate in runs
        if run in _names(candidate) or (is_prefix and candidate.info.run_id.startswith(run))
    ]
    if len(matches) == 1:
        return matches[0]
    listed = "; ".join(f"{match.info.run_id[:8]} {match.info.run_name}" for match in (matches or runs)[:3])
    raise UserError(
        f"{len(matches)} pipeline runs in MLflow are named {run}."
        if matches
        else f"No pipeline run in MLflow is {run}.",
        where=f"experiment {experiment} of the MLflow store",
        fix=f"Use the id of a run: {listed}" if listed else "Run: vqvae2 run",
        code=2,
    )


@contextmanager
def downloaded_model(uri: str) -> Iterator[Path]:
    """Yield a folder with a model of MLflow, of a URI such as models:/vqvae2@champion or runs:/ID/model.

    Raises UserError if there is no such model, or the store does not answer.
    """
    configure_mlflow()
    import mlflow.artifacts
    from mlflow import MlflowClient

    with TemporaryDirectory(prefix="vqvae2-model-") as folder:
        try:
            source = _source(MlflowClient(store_uri()), uri)
            path = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=store_uri())
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"The model cannot be loaded from MLflow: {str(error).splitlines()[0]}",
                where=uri,
                fix="Correct the name, the version or the alias, or set MLFLOW_TRACKING_URI to its store.",
                code=3,
            ) from error
        yield Path(path)


def _source(client: "MlflowClient", uri: str) -> str:
    """Return the address of the files of a model."""
    if uri.startswith("runs:/"):
        run_id, _, path = uri.removeprefix("runs:/").partition("/")
        return f"{client.get_run(run_id).info.artifact_uri}/{path or MODEL}"
    name = uri.removeprefix("models:/")
    if match := re.fullmatch(r"([^/@]+)@([^/@]+)", name):
        return str(client.get_model_version_by_alias(match[1], match[2]).source)
    if match := re.fullmatch(r"([^/@]+)/(\d+)", name):
        return str(client.get_model_version(match[1], match[2]).source)
    raise UserError(
        f"The URI of a model must be models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/model, got {uri}.",
        where=uri,
        fix="Use for example models:/vqvae2@champion.",
        code=2,
    )
