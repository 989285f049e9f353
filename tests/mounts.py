"""Disks that are small or read-only, in a namespace of mounts that ends with the command."""

import shutil
import subprocess

import pytest


def within(mounting: str) -> list[str]:
    """Give what to put before a command, so that it runs where a shell has mounted something; skip where it cannot."""
    before = ["unshare", "--mount", "sh", "-c", f'{mounting} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs Linux and root")
    return before
