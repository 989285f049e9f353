"""Model of a pipeline run, which MLflow receives with the results of the last stage."""

import shutil
from pathlib import Path

from pipeline import model_folder
from pipeline.image_commands import MODEL
from stages.errors import UserError
from stages.inference.folder import MODEL_IN_MLFLOW
from stages.runtime.context import Reporter
from stages.tracking import registry

CODE = Path(__file__).with_name("mlflow_model.py")
MAX_BYTES = 1 << 30  # of the weights; a larger model would delay the end of each run for minutes


def write(work: Path, reporter: Reporter, *, model: Path = MODEL, title: str = "") -> None:
    """Write the model of a finished pipeline in the form of MLflow. A failure is reported, and is no error of the run.

    A model of more than MAX_BYTES is left out.
    """
    target, exported = work / registry.SAVED_MODEL, work / MODEL_IN_MLFLOW
    for folder in (target, exported):
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(file.stat().st_size for part in ("vqvae", "priors") for file in (model / part).rglob("*.safetensors"))
    if size > MAX_BYTES:
        reporter.message(f"The model has {size / 2**30:.1f} GiB, above 1 GiB: it is not uploaded to MLflow.")
        return
    try:
        models = model_folder.write(model, exported, title=title or "vqvae2", license_id="unknown")
        registry.save_model(exported, target, code=CODE, classes=models.classes)
    except Exception as error:  # of any kind: MLflow and the packages that it imports have many
        problem = error.what if isinstance(error, UserError) else str(error) or type(error).__name__
        reporter.message(f"The model is not uploaded to MLflow: {problem}")
        shutil.rmtree(target, ignore_errors=True)
    finally:
        shutil.rmtree(exported, ignore_errors=True)
