"""Program that asks the head of a Ray cluster for the cluster's id, and prints the status of the call.

It is a process of its own, because a process that has used gRPC must not fork. The token is its standard input.
"""

import sys

TIMEOUT_S = 5.0


def main() -> None:
    """Print the name of the gRPC status, such as OK or UNAUTHENTICATED."""
    import grpc

    token = sys.stdin.read().strip()
    with grpc.insecure_channel(sys.argv[1], [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            call(b"", timeout=TIMEOUT_S, metadata=[("authorization", f"Bearer {token}")] if token else None)
            print("OK")
        except grpc.RpcError as error:
            print(error.code().name)


if __name__ == "__main__":
    main()
