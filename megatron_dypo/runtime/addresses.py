"""Which addresses are this machine's own."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether nobody else can be there; False for a name other than ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def all_here(urls: list[str]) -> bool:
    return all(is_loopback(urlsplit(url).hostname or "") for url in urls)
