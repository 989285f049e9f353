"""Tests of `vqvae2 status`."""

import json
import os
from pathlib import Path

import pytest

from pipeline import dvc, ownership
from pipeline.commands import status
from stages.errors import UserError

STAGES = ["shard", "vqvae", "codes", "prior_top", "prior_bottom", "sample", "evaluate"]


def test_json_has_state_and_reasons_of_each_stage(project):
    """--json is for programs."""
    rows = json.loads(project.command("status", "--json").stdout)
    assert [row["stage"] for row in rows] == STAGES
    assert all(row["state"] == "out of date" and row["reasons"] == ["it has not run yet"] for row in rows)


def test_running_stage_is_shown_while_dvc_is_busy(current_project, monkeypatch, capsys):
    """DVC computes no status then; the lock of the running stage names its process."""

    def fail(stages):
        raise UserError(f"{dvc.BUSY}: PID 7.", where=".", fix="Wait.", code=3)

    monkeypatch.setattr(dvc, "out_of_date_reasons", fail)
    with pytest.raises(UserError, match="PID 7"):
        status.show(as_json=False)
    with ownership.exclusive_lock(Path("runs/vqvae")):
        assert status.show(as_json=True) == 0
    rows = {row["stage"]: (row["state"], row["reasons"]) for row in json.loads(capsys.readouterr().out)}
    assert rows["shard"] == ("unknown", ["DVC is busy"])
    assert rows["vqvae"][0] == "running" and f"PID {os.getpid()}" in rows["vqvae"][1][0]
