"""Prefect's API on loopback, for as long as one command lasts: ``python -m flows.api_server``.

The first line of stdout names the port, before anything heavy is imported: so the client can get ready while
the server does.
"""

import os
import socket
import sys


def main() -> int:
    """Serves on a free port until it is told to stop."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        sys.stdout.write(f"port {listening.getsockname()[1]}\n")
        sys.stdout.flush()
        # Read by Prefect where it asks what kind of server it is in: no user interface, no schedulers.
        os.environ["PREFECT__SERVER_EPHEMERAL"] = os.environ["PREFECT__SERVER_FINAL"] = "1"

        import uvicorn
        from prefect.server.api.server import create_app

        config = uvicorn.Config(create_app(ephemeral=True, final=True), log_level="error", lifespan="on")
        server = uvicorn.Server(config)
        server.run(sockets=[listening])
    return 0 if server.started else 1


if __name__ == "__main__":
    raise SystemExit(main())
