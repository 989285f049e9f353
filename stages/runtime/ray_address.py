"""Check of RAY_ADDRESS. It takes seconds; Ray itself retries an address that does not answer for minutes."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from stages.errors import UserError

CONNECT_TIMEOUT_S = 5.0
TOKEN_TIMEOUT_S = 15.0  # to start a process and ask once
REJECTED = "UNAUTHENTICATED"
DEFAULT_PORT = 6379
CLIENT_SCHEME = "ray://"  # Ray Client, which needs no node of the cluster on this machine
# Start of an HTTP/2 connection. A gRPC server, such as the head of a cluster, answers it with a frame of type SETTINGS.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
HTTP2_FRAME_TYPE, HTTP2_SETTINGS = 3, 4  # index of the type in a frame's header, and the value for SETTINGS
UNSET = "unset RAY_ADDRESS to run on this machine"


def check_address(
    address: str,
    *,
    environment: Mapping[str, str] = os.environ,
    timeout_s: float = CONNECT_TIMEOUT_S,
    is_node: Callable[[], bool] | None = None,
    find_latest: Callable[[], str] | None = None,
    ask_with_token: Callable[[str, int, str], str] | None = None,
) -> str:
    """Check that a Ray cluster answers at an address; return the address that Ray can use, with "auto" replaced.

    `is_node` returns whether this machine is a node of a cluster, `find_latest` the address that "auto" stands for, ""
    for none, `ask_with_token` the status with which the cluster answers a token. Raises UserError if the address is
    malformed, if no cluster answers there, or if it rejects the token.
    """
    where = f"RAY_ADDRESS={address}"
    if address == "auto":
        address = (find_latest or _find_latest)()
        if not address:
            raise UserError(
                "No Ray cluster runs on this machine.",
                where=where,
                fix=f"Start one: ray start --head, or {UNSET}.",
                code=3,
            )
        where = f"{where}, which stands for {address}"
    host, port = _parse(address, where)
    encrypted = environment.get("RAY_USE_TLS", "0") not in ("", "0")
    _probe(host, port, where, timeout_s, encrypted=encrypted)
    if not address.startswith(CLIENT_SCHEME) and not (is_node or _is_node)():
        raise UserError(
            "This machine is not a node of the Ray cluster.",
            where=where,
            fix=f"Run the command on a node of the cluster, join it: ray start --address={address}, or {UNSET}.",
            code=3,
        )
    if not encrypted and (ask_with_token or _ask_with_token)(host, port, read_token(environment)) == REJECTED:
        raise UserError(
            "The Ray cluster rejects the token.",
            where=where,
            fix="Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as the cluster was started with.",
            code=3,
        )
    return address


def read_token(environment: Mapping[str, str]) -> str:
    """Return the token that Ray would send; "" for none. Raises UserError if its file cannot be read."""
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        return ""
    if token := environment.get("RAY_AUTH_TOKEN"):
        return token
    file = environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    path = Path(os.path.expanduser(file))  # noqa: PTH111  # Path raises an error for a user without a home folder
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"The token of the Ray cluster cannot be read: {getattr(error, 'strerror', None) or error}.",
            where=path,
            fix="Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file with the cluster's token.",
            code=3,
        ) from None


def _parse(address: str, where: str) -> tuple[str, int]:
    """Split HOST:PORT. Raises UserError if the address has another form."""
    text = address.removeprefix(CLIENT_SCHEME)
    if re.match(r"https?://", text):
        raise _dashboard_error(where, re.sub(r"^https?://|[:/].*$", "", text))
    match = re.fullmatch(r"(\[[\da-fA-F:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})", text)
    if match and 0 < int(match[2]) < 65_536:
        return match[1].strip("[]"), int(match[2])
    raise UserError(
        "RAY_ADDRESS must be HOST:PORT of the head of a Ray cluster, or auto.",
        where=where,
        fix=f"{UNSET[0].upper()}{UNSET[1:]}." if text == "local" else f"Write it as {_example(text)}, or {UNSET}.",
        code=2,
    )


def _example(text: str) -> str:
    """Return the address that a malformed one probably means, or an example."""
    if re.fullmatch(r"[\da-fA-F:]*:[\da-fA-F:]*:[\da-fA-F:]*", text):  # IPv6 without brackets
        host, _, port = text.rpartition(":")
        is_port = port.isdecimal() and len(port) == len(str(DEFAULT_PORT))
        return f"[{host}]:{port}" if is_port else f"[{text}]:{DEFAULT_PORT}"
    if re.fullmatch(r"[\w.-]+|\[[\da-fA-F:]+\]", text):
        return f"{text}:{DEFAULT_PORT}"
    return f"10.0.0.5:{DEFAULT_PORT}"


def _probe(host: str, port: int, where: str, timeout_s: float, *, encrypted: bool) -> None:
    """Raise UserError unless a gRPC server listens at an address."""
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            if encrypted:
                return
            connection.settimeout(timeout_s)
            connection.sendall(HTTP2_PREFACE)
            answer = connection.recv(64)
    except OSError as error:
        reason = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else error.strerror or error
        raise UserError(
            f"The Ray cluster does not answer: {reason}.",
            where=where,
            fix=f"Start the cluster, correct the address, or {UNSET}.",
            code=3,
        ) from None
    if answer.startswith(b"HTTP/"):
        raise _dashboard_error(where, f"[{host}]" if ":" in host else host)
    if len(answer) <= HTTP2_FRAME_TYPE or answer[HTTP2_FRAME_TYPE] != HTTP2_SETTINGS:
        raise UserError(
            "The program at this address is not a Ray cluster.",
            where=where,
            fix=f"Set RAY_ADDRESS to the address that ray start has printed, or {UNSET}.",
            code=2,
        )


def _ask_with_token(host: str, port: int, token: str) -> str:
    """Return the status with which the head answers a call, as named by gRPC; "" if it is unknown."""
    program = [sys.executable, "-P", str(Path(__file__).with_name("ray_token.py"))]
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with suppress(subprocess.TimeoutExpired):
        return subprocess.run(
            [*program, target], input=token, capture_output=True, text=True, timeout=TOKEN_TIMEOUT_S, check=False
        ).stdout.strip()
    return ""


def _dashboard_error(where: str, host: str) -> UserError:
    return UserError(
        "RAY_ADDRESS must be the address of the head, not of a web page such as Ray's dashboard.",
        where=where,
        fix=f"Use the port of the head, such as RAY_ADDRESS={host}:{DEFAULT_PORT}, or {UNSET}.",
        code=2,
    )


def _find_latest() -> str:
    """Return the address of the cluster that Ray takes for "auto"; "" for none."""
    from ray._private import services  # the same rule as in `ray.init`

    running = sorted(services.find_gcs_addresses())
    recorded = services.find_bootstrap_address(None) or ""
    return recorded if recorded and len(running) != 1 else "".join(running[:1])


def _is_node() -> bool:
    """Return whether a Ray node runs on this machine, as Ray itself finds out: by the name of its process."""
    import psutil

    return any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"]))
