"""Tests of the upload of a pipeline run: its process uploads the journals of all stages."""

import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

from stages.tracking.journal import Journal
from stages.tracking.pipeline_upload import PipelineUploadThread, register_stage
from stages.tracking.upload_thread import UploadTiming

ROOT = Path(__file__).parents[3]


class FakeUploader:
    """Uploader that notes the order of uploads, and fails for the folders in `failing`."""

    def __init__(self, folder, uploaded, failing=()):
        self.folder, self.uploaded, self.failing = folder, uploaded, failing

    def flush(self):
        if self.folder.name in self.failing:
            raise OSError("no room left")
        self.uploaded.append(self.folder.resolve())

    def missing_points(self):
        return 3 if self.folder.name in self.failing else 0


@pytest.fixture
def pipeline_run(tmp_path):
    """Folder of a pipeline run with one stage that ran, and one that did not."""
    with chdir(tmp_path):
        run = tmp_path / "runs" / "pipeline" / "key"
        for folder in (run, run / "cached" / "shard", tmp_path / "runs" / "vqvae" / "f" / "tracked" / "attempt"):
            Journal(folder).close()
        register_stage(run, "vqvae", Path("runs/vqvae/f/tracked/attempt"))
        yield run


def finish(run, failing=()):
    """Upload a run that ends at once; return the folders uploaded, and the messages."""
    uploaded, messages = [], []
    thread = PipelineUploadThread(
        run, lambda folder: FakeUploader(folder, uploaded, failing), UploadTiming(interval_s=60), messages.append
    )
    thread.start()
    thread.finish(failed=False)
    return uploaded, messages


def test_journals_of_stages_are_uploaded_after_that_of_the_run(pipeline_run, tmp_path):
    """A stage's run is a child of the run, and a cached stage links to the run that computed its result."""
    stage = tmp_path / "runs" / "vqvae" / "f" / "tracked" / "attempt"
    assert finish(pipeline_run) == ([pipeline_run, stage, pipeline_run / "cached" / "shard"], [])


def test_moved_project_uploads_its_own_stages(pipeline_run, tmp_path):
    """The place of a journal is relative: a copy of the project does not lead to the original."""
    shutil.copytree(tmp_path / "runs", tmp_path / "copy" / "runs")
    uploaded, _ = finish(tmp_path / "copy" / "runs" / "pipeline" / "key")
    assert tmp_path / "copy" / "runs" / "vqvae" / "f" / "tracked" / "attempt" in uploaded and len(uploaded) == 3


def test_deleted_work_folder_of_a_stage_is_no_error(pipeline_run, tmp_path):
    """A resumed run may have stages whose work folders the user has deleted since."""
    shutil.rmtree(tmp_path / "runs" / "vqvae")
    assert finish(pipeline_run) == ([pipeline_run, pipeline_run / "cached" / "shard"], [])


def test_failed_upload_of_a_stage_stops_no_other_and_is_counted(pipeline_run):
    """The message has the number of points, the reason, and the command that sends them."""
    uploaded, (message,) = finish(pipeline_run, failing=("attempt",))
    assert uploaded == [pipeline_run, pipeline_run / "cached" / "shard"]
    assert message.startswith("3 points are not in MLflow yet (no room left), but saved in runs/.")
    assert message.endswith("vqvae2 sync-metrics")


def test_file_that_is_being_written_is_no_stage(pipeline_run):
    """A stage that starts renames its file from a temporary one, which may vanish at any time."""
    (pipeline_run / "stages" / ".codes-attempt.123").symlink_to("vanished")
    uploaded, messages = finish(pipeline_run)
    assert len(uploaded) == 3 and messages == []


def test_any_failure_is_told_and_stops_no_run(pipeline_run):
    """Also one of the file system, or of the start of an upload, which are no failures of MLflow."""
    (pipeline_run / "stages" / "codes-attempt").mkdir()
    messages = []
    thread = PipelineUploadThread(
        pipeline_run, lambda folder: FakeUploader(folder, []), UploadTiming(interval_s=60), messages.append
    )
    thread.start()
    thread.finish(failed=False)
    assert "MLflow has not received all of this run" in messages[0]


def test_stage_of_a_pipeline_run_does_not_import_mlflow(tmp_path):
    """The import alone takes longer than a short stage."""
    script = """
import sys
from pathlib import Path
from stages.tracking.tracker import track_stage
Path("run").mkdir()
with track_stage("vqvae", "f", Path("work"), params={}, inputs={}, parent="run") as reporter:
    reporter.metrics({"mse": 1.0}, 1)
sys.exit("mlflow" in sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/bin"}, check=True
    )
    assert len(list((tmp_path / "run" / "stages").iterdir())) == 1
