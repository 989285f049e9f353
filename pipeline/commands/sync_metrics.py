"""`vqvae2 sync-metrics`: upload of metrics that MLflow has missed."""

from stages.errors import UserError
from stages.images.count import format_count
from stages.tracking.sync_runs import SyncResult, sync_runs


def run() -> int:
    """Upload missing metrics and print a summary; return the exit status, 1 if some are still missing."""
    return report(sync_runs())


def report(result: SyncResult) -> int:
    """Print a summary of an upload; return the exit status. Raises UserError if a part of the upload failed."""
    print(
        f"{format_count(result.sent_points, 'point', 'points')} uploaded, {result.missing_points} missing; "
        f"{format_count(result.completed_runs, 'run', 'runs')} complete, {result.active_runs} still running"
    )
    if result.error:
        raise UserError(
            f"Upload to MLflow failed: {result.error}.",
            where="runs/",
            fix="Fix what the message names, then run: vqvae2 sync-metrics. It uploads what is still missing.",
        )
    return 1 if result.missing_points else 0
