"""`zoo serve`: load the models, listen, and serve until it is stopped."""

import socket
from collections.abc import Sequence

import typer
import uvicorn

from zoo.serve.app import LOOPBACK, create_app
from zoo.serve.gate import is_loopback
from zoo.serve.limits import Limits
from zoo.serve.models import load_models

CONNECTIONS = 1000  # open at once; uvicorn answers further ones with 503


def serve(
    names: Sequence[str], chat: str | None, device: str | None, host: str, port: int, token: str, limits: Limits
) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        names: of classifiers.
        chat: folder or hub id of a multimodal model; None for the packaged one, if there is one.
        device: where to compute; None for the first GPU, else the CPU.
        host: name or address to listen on.
        port: to listen on; 0 for a free one.
        token: what requests must bring; empty for nothing.
        limits: how much to take on.

    Raises:
        ValueError: others could reach the server and no token keeps them out, or there is no such model.
        OSError: the port is in use.
    """
    if not is_loopback(host) and not token:
        raise ValueError(f"Others may reach {host}: set a token that they must know, with ZOO_SERVE_TOKEN or --token.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        models = load_models(names, chat, device)
        app = create_app(models, limits, token, LOOPBACK if is_loopback(host) else None)
        for task, reason in models.missing.items():
            typer.echo(f"Without {task}: {reason}", err=True)
        address = f"[{host}]" if ":" in host else host
        typer.echo(f"Serving on http://{address}:{listening.getsockname()[1]}", err=True)
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=20,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(config).run([listening])
