"""Tests of `vqvae2 sync-metrics`."""

import pytest

from pipeline.commands import sync_metrics
from stages.errors import UserError
from stages.tracking.sync_runs import SyncResult


@pytest.mark.parametrize(("missing", "status"), [(0, 0), (2, 1)])
def test_summary_has_uploaded_and_missing_points(capsys, missing, status):
    """Missing points give exit status 1."""
    assert sync_metrics.report(SyncResult(1, 0, 3, missing, "")) == status
    assert capsys.readouterr().out == f"3 points uploaded, {missing} missing; 1 run complete, 0 still running\n"


def test_rejection_by_mlflow_is_an_error(capsys):
    """The error has MLflow's reason, after the summary."""
    with pytest.raises(UserError) as caught:
        sync_metrics.report(SyncResult(1, 0, 3, 2, "it refused a name"))
    assert capsys.readouterr().out == "3 points uploaded, 2 missing; 1 run complete, 0 still running\n"
    assert caught.value.code == 1 and str(caught.value) == (
        "Upload to MLflow failed: it refused a name.\n  in: runs/\n"
        "  fix: Fix what the message names, then run: vqvae2 sync-metrics. It uploads what is still missing."
    )
