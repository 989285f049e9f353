"""RAY_ADDRESS is checked within seconds; every error states what is wrong with the address."""

import pwd
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from stages.errors import UserError
from stages.runtime.ray_address import check_address, read_token

SETTINGS_FRAME = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # the first answer of every gRPC server


@contextmanager
def server(answer: bytes, host: str = "127.0.0.1") -> Iterator[int]:
    """Listen on a free port and send every client an answer; nothing if the answer is empty. Yield the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:

        def serve() -> None:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(64)
                if answer:
                    connection.sendall(answer)
                else:
                    connection.recv(1)  # until the client gives up

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def check(address: str, **options) -> str:
    """Check an address on a machine that is a node."""
    defaults = {
        "environment": {},
        "timeout_s": 0.5,
        "is_node": lambda: True,
        "find_latest": lambda: "",
        "ask_with_token": lambda host, port, token: "OK",
    }
    return check_address(address, **defaults | options)


@pytest.mark.parametrize(
    ("address", "suggestion"),
    [
        ("10.0.0.5", "10.0.0.5:6379"),
        ("head.example", "head.example:6379"),
        ("10.0.0.5:", "10.0.0.5:6379"),
        ("10.0.0.5:99999", "10.0.0.5:6379"),
        ("10.0.0.5:port", "10.0.0.5:6379"),
        ("10.0.0.5:0", "10.0.0.5:6379"),
        (" 10.0.0.5:6379", "10.0.0.5:6379"),
        ("redis://10.0.0.5:6379", "10.0.0.5:6379"),
        ("fd00::5:6379", "[fd00::5]:6379"),
        ("fd00::5", "[fd00::5]:6379"),
        ("[fd00::5]", "[fd00::5]:6379"),
        ("local", "Unset RAY_ADDRESS"),
    ],
)
def test_malformed_address_is_refused_with_a_corrected_one(address: str, suggestion: str):
    """Ray would take such an address for a name, or raise an error about its own code."""
    with pytest.raises(UserError, match=r"RAY_ADDRESS must be HOST:PORT of the head") as caught:
        check(address)
    assert suggestion in caught.value.fix and caught.value.code == 2


def test_address_of_the_dashboard_is_refused():
    """By its scheme without a connection, and by its answer whatever its port is."""
    with pytest.raises(UserError, match=r"not of a web page such as Ray's dashboard") as caught:
        check("http://10.0.0.5:8265/#/jobs")
    assert "RAY_ADDRESS=10.0.0.5:6379" in caught.value.fix and caught.value.code == 2
    with server(b"HTTP/1.0 400 Bad Request\r\n") as port, pytest.raises(UserError, match="dashboard") as caught:
        check(f"127.0.0.1:{port}")
    assert "RAY_ADDRESS=127.0.0.1:6379" in caught.value.fix


def test_program_that_is_no_cluster_is_refused():
    """Such as a database or SSH, which also answer."""
    with server(b"SSH-2.0-OpenSSH_9.6\r\n") as port, pytest.raises(UserError, match="not a Ray cluster"):
        check(f"127.0.0.1:{port}")


def test_silent_and_dead_addresses_are_refused_in_time():
    """A host that drops packets, and one that does not resolve, are errors too."""
    start = time.monotonic()
    with server(b"") as port, pytest.raises(UserError, match=r"does not answer: no answer within 0\.5 s"):
        check(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match="does not answer: Connection refused") as caught:
        check(f"127.0.0.1:{port}")
    assert caught.value.where == f"RAY_ADDRESS=127.0.0.1:{port}" and caught.value.code == 3
    with pytest.raises(UserError, match="does not answer"):
        check("no-such-host.invalid:6379")
    assert time.monotonic() - start < 10


def test_cluster_that_answers_is_accepted():
    """By name, by IPv4 and by IPv6 address, and through Ray Client."""
    for prefix, host in (("", "127.0.0.1"), ("", "localhost"), ("ray://", "127.0.0.1")):
        with server(SETTINGS_FRAME) as port:
            assert check(f"{prefix}{host}:{port}") == f"{prefix}{host}:{port}"
    if socket.has_ipv6:
        try:
            with server(SETTINGS_FRAME, "::1") as port:
                assert check(f"[::1]:{port}") == f"[::1]:{port}"
        except OSError:
            pytest.skip("this machine has no IPv6")


def test_auto_stands_for_the_cluster_of_this_machine():
    """The address is replaced, so that Ray connects to the cluster that was checked. It may have ended since."""
    with server(SETTINGS_FRAME) as port:
        assert check("auto", find_latest=lambda: f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    with pytest.raises(UserError, match="does not answer") as caught:
        check("auto", find_latest=lambda: f"127.0.0.1:{port}")
    assert caught.value.where == f"RAY_ADDRESS=auto, which stands for 127.0.0.1:{port}"
    with pytest.raises(UserError, match="No Ray cluster runs on this machine") as caught:
        check("auto")
    assert "ray start --head" in caught.value.fix and "unset RAY_ADDRESS" in caught.value.fix


def test_machine_outside_of_the_cluster_is_refused():
    """Ray would wait a minute for a node on this machine. Ray Client needs none."""
    with server(SETTINGS_FRAME) as port, pytest.raises(UserError, match="not a node of the Ray cluster") as caught:
        check(f"127.0.0.1:{port}", is_node=lambda: False)
    assert f"ray start --address=127.0.0.1:{port}" in caught.value.fix
    with server(SETTINGS_FRAME) as port:
        check(f"ray://127.0.0.1:{port}", is_node=lambda: False)


def test_encrypted_cluster_is_not_asked():
    """With TLS, the connection alone shows that something listens."""
    with server(b"\x15\x03") as port:
        check(f"127.0.0.1:{port}", environment={"RAY_USE_TLS": "1"})


def test_rejected_token_is_reported(tmp_path):
    """Ray itself would repeat the call for half a minute. The token is the one that Ray would send."""
    asked = []

    def reject(host, port, token):
        asked.append(token)
        return "UNAUTHENTICATED"

    (tmp_path / "token").write_text("from a file\n")
    for environment in (
        {},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "from a variable"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
    ):
        with server(SETTINGS_FRAME) as port, pytest.raises(UserError, match="rejects the token") as caught:
            check(f"127.0.0.1:{port}", environment=environment, ask_with_token=reject)
        assert "RAY_AUTH_MODE=token" in caught.value.fix
    assert asked == ["", "from a variable", "from a file"]
    with pytest.raises(UserError, match="cannot be read: No such file") as caught:
        read_token({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})
    assert caught.value.where == str(tmp_path / "none")


def test_token_of_a_user_without_a_home_folder_is_a_user_error(monkeypatch):
    """There is no folder to look for it in."""

    def no_entry(user: int):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.delenv("HOME")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_token({"RAY_AUTH_MODE": "token"})


def test_cluster_is_asked_with_the_token():
    """A server of gRPC sees it as Ray sends it, and its refusal is the status of the call."""
    import grpc

    def answer(request, context):
        if ("authorization", "Bearer secret") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    handlers = {"GetClusterId": grpc.unary_unary_rpc_method_handler(answer)}
    grpc_server = grpc.server(ThreadPoolExecutor(1))
    grpc_server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", handlers),)
    )
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    try:
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}
        address = f"127.0.0.1:{port}"
        assert check(address, environment=environment, ask_with_token=None, timeout_s=5) == address
        with pytest.raises(UserError, match="rejects the token"):
            check(address, environment={}, ask_with_token=None, timeout_s=5)
    finally:
        grpc_server.stop(None)
