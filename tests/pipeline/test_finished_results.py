"""Finished results that a stage takes over from DVC's cache instead of computing them again."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline import finished_results
from pipeline.dvc_yaml import Stage
from stages.formats import artifact

STAGE = Stage("codes", "codes", "", (), (), ("artifacts/codes",), ("metrics/codes.json",), ("plots/codes",))
WORK = Path("runs/codes/0123")
CACHE = Path("cache")


def compute(contents: str, work: Path = WORK) -> str:
    """Make a result as the stage does, put it into the cache as DVC does, and return its digest."""
    out = Path(STAGE.outs[0])
    with artifact.commit_folder(out, "codes", {}) as folder:
        (folder / "train.parquet").write_text(contents)
        (folder / "nested").mkdir()
        (folder / "nested" / "file").write_text("nested")
    for name in ("metrics/codes.json", "plots/codes/usage.csv"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"{name} of {contents}")
    finished_results.record(STAGE, work)
    listing = [
        {"relpath": path.relative_to(out).as_posix(), "md5": store(path)} for path in out.rglob("*") if path.is_file()
    ]
    md5 = store_bytes(json.dumps(listing).encode(), ".dir")
    lock = {"schema": "2.0", "stages": {"codes": {"outs": [{"path": STAGE.outs[0], "md5": md5}]}}}
    YAML(typ="safe", pure=True).dump(lock, Path("dvc.lock"))
    return artifact.sha256(out / artifact.MANIFEST)


def store(path: Path) -> str:
    return store_bytes(path.read_bytes())


def store_bytes(data: bytes, suffix: str = "") -> str:
    md5 = hashlib.md5(data).hexdigest() + suffix
    target = CACHE / "files" / "md5" / md5[:2] / md5[2:]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return md5


def lose() -> None:
    """Delete what DVC deletes before it runs a stage."""
    for name in ("artifacts/codes", "metrics", "plots"):
        shutil.rmtree(name, ignore_errors=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[None]:
    """An empty current folder."""
    with chdir(tmp_path):
        yield


def test_result_comes_back_from_the_cache():
    """The artifact, the metrics and the plots are what they were."""
    digest = compute("first")
    lose()
    assert finished_results.restore(STAGE, WORK, CACHE)
    assert artifact.sha256(Path("artifacts/codes/manifest.json")) == digest
    artifact.read(Path("artifacts/codes"), "codes").verify()
    assert Path("metrics/codes.json").read_text() == "metrics/codes.json of first"
    assert Path("plots/codes/usage.csv").read_text() == "plots/codes/usage.csv of first"


def test_earlier_result_comes_back_after_another_one():
    """dvc.lock names only the newest result. A stage that is about to compute records where the cache has it."""
    first = compute("first")
    assert not finished_results.restore(STAGE, Path("runs/codes/4567"), CACHE)
    compute("second", Path("runs/codes/4567"))
    lose()
    assert finished_results.restore(STAGE, WORK, CACHE)
    assert artifact.sha256(Path("artifacts/codes/manifest.json")) == first


def test_result_in_place_needs_no_cache():
    """As where a stage is started by hand."""
    compute("first")
    shutil.rmtree(CACHE)
    Path("metrics/codes.json").write_text("edited")
    assert finished_results.restore(STAGE, WORK, CACHE)
    assert Path("metrics/codes.json").read_text() == "metrics/codes.json of first"


@pytest.mark.parametrize("damage", ["data", "listing", "missing", "record", "escape"])
def test_result_that_is_not_intact_is_computed_again(damage: str):
    """A damaged or cleaned cache, or a damaged record, never passes for a result; nothing is left half restored."""
    compute("first")
    lose()
    (listing,) = CACHE.rglob("*.dir")
    entries = json.loads(listing.read_text())
    data = next(
        CACHE / "files/md5" / entry["md5"][:2] / entry["md5"][2:] for entry in entries if "train" in entry["relpath"]
    )
    match damage:
        case "data":
            data.write_text("damaged")
        case "listing":
            listing.write_text("{")
        case "missing":
            data.unlink()
        case "record":
            next((WORK / "result").rglob("codes.json")).write_text("damaged")
        case "escape":
            listing.write_text(json.dumps([*entries, {"relpath": "../outside", "md5": entries[0]["md5"]}]))
    assert not finished_results.restore(STAGE, WORK, CACHE)
    assert not Path("artifacts/codes").exists() and not Path("artifacts/outside").exists()
    assert not list(Path("artifacts").glob("*"))


def test_damaged_artifact_in_place_is_replaced_from_the_cache():
    """The manifest alone does not show that a file has changed."""
    digest = compute("first")
    Path("artifacts/codes/train.parquet").write_text("fixst")
    assert finished_results.restore(STAGE, WORK, CACHE)
    assert artifact.read(Path("artifacts/codes"), "codes").digest == digest
    artifact.read(Path("artifacts/codes"), "codes").verify()


def test_damaged_record_of_another_result_is_ignored():
    """It concerns only the run that it belongs to."""
    compute("first", Path("runs/codes/4567"))
    Path("runs/codes/4567/result/manifest.json").write_text("{")
    compute("second")
    lose()
    assert finished_results.restore(STAGE, WORK, CACHE)


def test_recorded_result_comes_back_whatever_it_was_computed_from():
    """For a stage that must not compute: DVC has deleted the result that dvc.lock records."""
    compute("first", Path("runs/codes/4567"))
    digest = compute("second")
    lose()
    assert finished_results.restore_locked(STAGE, Path("runs/codes"), CACHE)
    assert artifact.sha256(Path("artifacts/codes/manifest.json")) == digest
    shutil.rmtree("runs")
    assert not finished_results.restore_locked(STAGE, Path("runs/codes"), CACHE)


def test_without_a_record_nothing_is_restored():
    """A stage that has not finished under this fingerprint computes."""
    compute("first")
    lose()
    assert not finished_results.restore(STAGE, Path("runs/codes/89ab"), CACHE)
