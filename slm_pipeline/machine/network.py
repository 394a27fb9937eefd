"""Whether there is a network at all: without one huggingface_hub tries again and again, for half a minute a file."""

from __future__ import annotations

import functools
import os
import socket
import urllib.request
from urllib.parse import urlsplit

_SECONDS = 5.0  # for a name to be looked up and a connection to be made


def hub() -> str:
    """The hub's address, which ``HF_ENDPOINT`` may name."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


@functools.cache
def hub_answers() -> bool:
    """Whether somebody listens where the hub is; asked once. With a proxy that is for the proxy to say: true."""
    if {"http", "https", "all"} & set(urllib.request.getproxies()):
        return True
    place = urlsplit(hub())
    try:
        with socket.create_connection((place.hostname or "", place.port or 443), timeout=_SECONDS):
            return True
    except OSError:
        return False
