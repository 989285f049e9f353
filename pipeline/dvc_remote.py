"""DVC's default remote: what it holds, asked through DVC within a limited time."""

import json
import re
import subprocess
from pathlib import Path

from pipeline import dvc, dvc_yaml
from stages.errors import UserError

TIMEOUT_S = 30.0  # of a command that reads the remote


def missing_everywhere() -> list[str]:
    """Return the outputs of dvc.lock, and files in them, that neither the cache nor the default remote holds.

    A folder whose listing is missing is named by its MD5 instead of its path. Raises UserError if the remote cannot be
    read.
    """
    result = _ask_remote("status", "--cloud", "--json")
    states = json.loads(result.stdout or "{}")
    listings = re.findall(r"md5: ([0-9a-f]+\.dir)", result.stderr)
    return [*listings, *(path for path, state in states.items() if state == "missing")]


def fetch_run_cache() -> None:
    """Download the entries of the remote's run cache, without the outputs.

    Raises UserError if the remote cannot be read.
    """
    _ask_remote("fetch", "--run-cache", dvc_yaml.VERSIONS_STAGE)  # a stage without outputs in the cache


def _ask_remote(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Return the result of a DVC command that reads the default remote.

    Raises UserError if it fails, for example because none is configured, or takes longer than TIMEOUT_S.
    """
    what, fix = f"The DVC remote did not answer within {TIMEOUT_S:.0f} s.", "Check it with: dvc status --cloud"
    try:
        result = subprocess.run(
            [*dvc.COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
        if not result.returncode:
            return result
        if "no remote specified" in result.stderr:
            what, fix = "No DVC remote is configured.", "Add one: dvc remote add -d store URL"
        else:
            what = f"DVC cannot read the remote: {dvc.error_message(result.stderr)}"
    except subprocess.TimeoutExpired:
        pass
    raise UserError(what, where=Path.cwd(), fix=fix, code=3)
