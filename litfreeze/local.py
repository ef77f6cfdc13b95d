"""Whether a request to a server on this machine comes from its own user, and not from another site's page. Such a page
can have the browser ask 127.0.0.1, by its address or by a name that leads there (DNS rebinding); the browser says then
where it comes from (Origin), or what it was asked for (Host)."""

from typing import Optional
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost", "::1")


def is_local(host: str) -> bool:
    """Whether a Host header, `localhost:8000`, names this machine and no other."""
    try:
        return urlsplit(f"//{host}").hostname in LOCAL
    except ValueError:
        return False


def place_of(origin: Optional[str]) -> Optional[str]:
    """The `localhost:8000` of an Origin header; empty if it has none, None where there is no header."""
    if origin is None:
        return None
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
