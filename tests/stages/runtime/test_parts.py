"""Parts done side by side by Ray Data: in order, by workers built once, and again when a worker is lost."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from stages.config import ClusterConfig
from stages.errors import UserError
from stages.runtime.cluster import connected
from stages.runtime.parts import map_parts, packed, unpacked
from stages.runtime.run import Run


def test_results_cross_processes_without_code():
    """Arrays and plain values return as they were; an object that would need pickle is refused."""
    result = {"array": np.arange(6, dtype=np.uint16).reshape(2, 3), "name": "a", "count": 3, "list": [1, None]}
    found = unpacked(packed(result))
    np.testing.assert_array_equal(found.pop("array"), result.pop("array"))
    assert found == result
    with pytest.raises(ValueError, match="pickle"):
        packed({"array": np.array([object()])})


class Square:
    """Square numbers; fail as each part says."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / f"built-{os.getpid()}").touch()

    def __call__(self, part: dict) -> dict:
        mark = self.folder / f"died-{part['number']}"
        if part.get("dies") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if part.get("wrong"):
            raise UserError("Shard 3 is damaged.", where=self.folder, fix="Mend it.", code=4)
        return {"square": part["number"] ** 2, "array": np.full(2, part["number"])}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = ClusterConfig(workers=2, cpus_per_worker=1)
    with connected(config):
        yield Run("codes", "f", tmp_path_factory.mktemp("work"), config)


@pytest.mark.ray
def test_results_come_in_the_order_of_the_parts_although_a_worker_is_killed(run: Run, tmp_path: Path):
    """What the killed worker had not finished is done again; nothing is lost or doubled."""
    parts = [{"number": number, "dies": number == 3} for number in range(8)]
    results = map_parts(Square, (tmp_path,), parts, run=run, unit="part")
    assert [result["square"] for result in results] == [number**2 for number in range(8)]
    assert (tmp_path / "died-3").exists()


@pytest.mark.ray
def test_a_users_error_in_a_worker_is_shown_as_it_is(run: Run, tmp_path: Path):
    """One clear message, at once, without retries."""
    with pytest.raises(UserError, match=r"Shard 3 is damaged") as caught:
        map_parts(Square, (tmp_path,), [{"number": 0, "wrong": True}], run=run, unit="part")
    assert caught.value.code == 4 and caught.value.fix == "Mend it."
