"""Small and read-only disks for tests, in a mount namespace that ends with the command."""

import shutil
import subprocess

import pytest


def mount_prefix(mount_commands: str) -> list[str]:
    """Return the prefix that runs a command in a mount namespace, after the shell commands that mount.

    Skips the test where mounting is not possible.
    """
    prefix = ["unshare", "--mount", "sh", "-c", f'{mount_commands} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs Linux and root")
    return prefix
