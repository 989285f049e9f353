"""`vqvae2 config`: conf/ and overrides composed into params.yaml."""

from collections.abc import Sequence

from pipeline import locks, params, presets, stage_runner
from pipeline.compose import compose_settings, to_yaml
from pipeline.params_drift import warn_reverted_overrides


def run(overrides: Sequence[str], *, write: bool) -> int:
    """Print the composed settings, or write them to params.yaml; return the exit status."""
    data, settings = compose_settings(overrides)
    presets.warn_kept(data, settings)
    if not write:
        print(to_yaml(data), end="")
        return 0
    with locks.exclusive_project(stage_runner.RUNS):
        warn_reverted_overrides(overrides, data)
        params.write(to_yaml(data).encode())
    return 0
