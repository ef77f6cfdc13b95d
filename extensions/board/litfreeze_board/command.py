"""`litfreeze board`: the command. No heavy import: the command line reads this file to print its help."""

from pathlib import Path
from typing import Optional

from litfreeze.local import LOCAL

MISSING = "The board needs nicegui: pip install 'litfreeze[board]'."


def setup(host: str = "127.0.0.1", port: int = 8765, root: Path = Path(), token: Optional[str] = None) -> None:
    """Open a local web page for choosing layers, fine-tuning them and watching it. Runs go on without it.

    Args:
        host: Address to listen on. Another than this machine's own asks for a token.
        port: And its port.
        root: The folder that checkpoints and data are chosen from and runs are written to; nothing outside of it is
            shown.
        token: What a browser has to bring, once. On a machine that others use, give one for 127.0.0.1 too, in the
            environment (LITFREEZE_TOKEN). Where one is needed and none is given, one is made and printed.
    """
    import re
    import secrets
    import socket
    from importlib.util import find_spec

    from litfreeze.errors import UsageError

    if find_spec("nicegui") is None:
        raise UsageError(MISSING)
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir():
        raise UsageError(f"--root {root} is no folder.")
    if not 0 < port < 65536:
        raise UsageError(f"--port {port} must be from 1 to 65535.")
    if token is not None and not re.fullmatch("[A-Za-z0-9_-]{8,}", token):
        raise UsageError("--token takes at least 8 letters, digits, - and _. Left out, one is made where it is needed.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port} cannot be listened on: {error.strerror}.") from None
    if token is None and host not in LOCAL:
        token = secrets.token_urlsafe(24)
    name = f"[{host}]" if ":" in host else host
    shown = f"http://{name}:{port}/" + (f"?token={token}" if token is not None else "")

    from litfreeze_board.server import serve

    serve(folder, host, port, token, f"Board     {shown}\nRoot      {folder}\nCtrl-C ends the page; runs go on.")
