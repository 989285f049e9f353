"""dvc.lock records the committed results, so that a fresh clone has nothing to commit after `make demo`."""

import hashlib
from pathlib import Path

import pytest

from pipeline import dvc_yaml, params, result_versions

ROOT = Path(__file__).parents[2]
ENTRIES = params.read(ROOT / dvc_yaml.LOCK)["stages"]
RECORDED = {out["path"]: out["md5"] for entry in ENTRIES.values() for out in entry["outs"]}
IN_GIT = {path: md5 for path, md5 in RECORDED.items() if not path.startswith(("artifacts/", "plots/"))}


@pytest.mark.parametrize("path", IN_GIT)
def test_committed_result_is_the_one_that_dvc_lock_records(path: str):
    """Results outside of DVC's cache are committed to Git: the result versions and the metrics."""
    assert hashlib.md5((ROOT / path).read_bytes(), usedforsecurity=False).hexdigest() == IN_GIT[path]


def test_each_result_is_of_the_committed_result_version():
    """No stage runs in a clone that has the cache."""
    committed = params.read(ROOT / result_versions.FILE)
    recorded = {}
    for entry in ENTRIES.values():
        recorded |= entry.get("params", {}).get(result_versions.FILE.as_posix(), {})
    assert recorded == committed
