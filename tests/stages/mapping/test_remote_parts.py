"""Parts on nodes without a shared disk: inputs and outputs travel through the storage, and finished parts are kept."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.config import ClusterConfig
from stages.errors import UserError
from stages.formats import artifact
from stages.mapping.parts import Part, Result, map_parts
from stages.mapping.remote_parts import NodeWorkspace, TransferPlan
from stages.runtime.context import StageContext


class CopyWeights:
    """Mapper that writes the weights of two inputs to a file of the part; it is killed once, at part 2."""

    def __init__(self, model: Path, calls: str, work_dir: Path):
        self.model, self.calls, self.work_dir = model, calls, work_dir

    def __call__(self, part: Part) -> Result:
        Path(self.calls.removeprefix("of "), f"{part['number']}-{os.getpid()}").touch()
        if part["number"] == 2 and not (marker := self.model.parent / "killed").exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        text = (self.model / "weights").read_text() + Path(part["model"], "weights").read_text()
        (self.work_dir / f"{part['number']}.txt").write_text(text)
        return {"file": f"{part['number']}.txt", "model": str(self.model), "array": np.full(3, part["number"])}


class WhereAmI:
    """Mapper that returns the path of its argument."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, part: Part) -> Result:
        return {"folder": str(self.folder)}


@pytest.fixture
def remote(context: StageContext, tmp_path: Path) -> StageContext:
    """Context with a storage and a work folder of its own."""
    cluster = replace(context.cluster, storage=f"file://{tmp_path}/store")
    (tmp_path / "work" / "parts").mkdir(parents=True)
    return replace(context, work_dir=tmp_path / "work", cluster=cluster)


@pytest.fixture
def arguments(remote: StageContext, tmp_path: Path) -> tuple[Path, str, Path]:
    """Arguments of `CopyWeights`: an artifact, text that holds a path but is none, and the work folder."""
    (tmp_path / "calls").mkdir()
    with artifact.commit_folder(tmp_path / "model", "model", {}) as folder:
        (folder / "weights").write_text("w")
    return tmp_path / "model", f"of {tmp_path / 'calls'}", remote.work_dir / "parts"


def read_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_output_of_an_earlier_version_is_not_used(remote: StageContext, tmp_path: Path):
    """A result of another name is deleted, and its files stay out of the work folder: the part runs again."""
    assert remote.storage
    plan, digest = TransferPlan(remote.storage.child("parts"), {}, str(remote.work_dir)), "0" * 64
    with artifact.commit_folder(tmp_path / "output", "part", {}) as folder:
        (folder / "result.npz").write_bytes(b"result")
    plan.storage.upload(tmp_path / "output", digest)
    assert plan.finished_parts() == {digest}
    assert plan.fetch_result(digest, tmp_path) is None
    assert plan.finished_parts() == set() and list(read_files(remote.work_dir / "parts")) == []
    assert [path.name for path in remote.work_dir.iterdir()] == ["parts"]


@pytest.mark.ray
def test_outputs_are_downloaded_and_a_rerun_skips_finished_parts(
    remote: StageContext, arguments: tuple[Path, str, Path], tmp_path: Path
):
    """A killed worker's part runs again; a rerun downloads all outputs, even if this node has lost its files."""
    parts = [{"number": number, "model": str(tmp_path / "model")} for number in range(4)]
    results = map_parts(CopyWeights, arguments, parts, context=remote, unit="part")
    assert [result["file"] for result in results] == [f"{number}.txt" for number in range(4)]
    assert [result["array"].tolist() for result in results] == [[number] * 3 for number in range(4)]
    assert all(not Path(result["model"]).is_relative_to(tmp_path) for result in results)
    expected = {f"{number}.txt": "ww" for number in range(4)}
    work_dir = remote.work_dir / "parts"
    assert read_files(work_dir) == expected

    calls = len(list((tmp_path / "calls").iterdir()))
    for path in work_dir.iterdir():
        path.unlink()
    rerun = map_parts(CopyWeights, arguments, parts, context=remote, unit="part")
    assert len(list((tmp_path / "calls").iterdir())) == calls
    assert read_files(work_dir) == expected
    assert [result["model"] for result in rerun] == [result["model"] for result in results]


@pytest.mark.ray
def test_output_that_the_store_damages_is_reported(
    remote: StageContext, arguments: tuple[Path, str, Path], tmp_path: Path, monkeypatch
):
    """The error has the URL, and the damaged output is not used."""
    monkeypatch.setattr(TransferPlan, "fetch_result", lambda *_: None)
    with pytest.raises(UserError, match=r"The stored output of part 0 is damaged\.") as caught:
        map_parts(
            CopyWeights, arguments, [{"number": 0, "model": str(tmp_path / "model")}], context=remote, unit="part"
        )
    assert caught.value.where == f"file://{tmp_path}/store/runs/codes/f/parts" and caught.value.code == 5
    assert caught.value.fix == "Run the same command again; it regenerates the part."


@pytest.mark.ray
def test_input_that_is_no_artifact_is_read_on_its_own_node(remote: StageContext, tmp_path: Path):
    """Raw images are not uploaded: their parts run on this node, with a storage or without."""
    (result,) = map_parts(WhereAmI, (tmp_path,), [{"number": 3}], context=remote, unit="part")
    assert result["folder"] == str(tmp_path)


def test_part_with_a_damaged_stored_output_runs_again(tmp_path: Path, cache_dir: Path):
    """A damaged output counts as absent. An input may also be a folder of artifacts."""
    config = ClusterConfig(storage=f"file://{tmp_path}/store")
    context = StageContext("sample", "f", tmp_path / "work", config)
    (context.work_dir / "parts").mkdir(parents=True)
    for level in ("top", "bottom"):
        with artifact.commit_folder(tmp_path / "priors" / level, "prior", {}) as folder:
            (folder / "weights").write_text(level)
    arguments = (tmp_path / "priors", context.work_dir / "parts")
    plan = TransferPlan.create(context, arguments, [{"number": 0}])
    assert plan is not None
    workspace = NodeWorkspace(plan)
    priors, work_dir = workspace.localize_paths(arguments)
    assert [(priors / level / "weights").read_text() for level in ("top", "bottom")] == ["top", "bottom"]
    for _ in range(2):
        (work_dir / "a").write_text("a")
        workspace.upload_result("x", b"result")
        assert not list(work_dir.iterdir())
        assert plan.finished_parts() == {"x"} and plan.fetch_result("x", context.work_dir) == b"result"
        assert (context.work_dir / "parts" / "a").read_text() == "a"
        (tmp_path / "store/runs/sample/f/parts/x/a").write_text("b")
        assert plan.fetch_result("x", context.work_dir) is None
        assert plan.finished_parts() == set()
