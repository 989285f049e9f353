"""Headless Chromium for tests that look at pages."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium on the path")
BROWSER = "not an origin"  # initiator of the requests that no page makes, in Chromium's log
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


def run_chromium(folder: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a network, with a profile in `folder`; messages of the console are in stderr."""
    offline = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *QUIET, offline]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def document(folder: Path, page: Path, *flags: str) -> str:
    """Return the document of a page after its scripts have run."""
    return run_chromium(folder, page, "--virtual-time-budget=5000", "--dump-dom", *flags).stdout


def console_messages(folder: Path, page: Path) -> list[str]:
    """Return the messages that a page writes to the console, with errors of its scripts and of missing files."""
    return re.findall(r"CONSOLE.*", run_chromium(folder, page, "--virtual-time-budget=5000", "--dump-dom").stderr)


def requested_hosts(folder: Path, page: Path) -> set[str]:
    """Return the hosts that a page contacts, without those that Chromium contacts by itself."""
    log = folder / "net.json"
    run_chromium(folder, page, f"--log-net-log={log}", "--virtual-time-budget=5000", "--dump-dom")
    requests = [event.get("params", {}) for event in json.loads(log.read_text(encoding="utf-8"))["events"]]
    of_page = [request["url"] for request in requests if request.get("initiator", BROWSER) != BROWSER]
    return {host for url in of_page if (host := urlsplit(url).hostname)}
