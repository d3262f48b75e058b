"""Ports of this machine that a test's job may open."""

import random
import socket


def two_free_ports() -> int:
    """The first of two neighbours outside of those that the kernel gives to connections."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        try:
            with socket.create_server(("", port)), socket.create_server(("", port + 1)):
                return port
        except OSError:
            continue
