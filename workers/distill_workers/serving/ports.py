"""Ports of this machine for servers that bind them later."""

import socket

_reserved: list[socket.socket] = []


def reserve_port() -> int:
    """Return a TCP port of this machine that the kernel gives to nobody else while this process lives.

    A server that takes a minute to start may find a port that was merely free in use: the kernel gives it to the next
    search for a free port, or to a connection of anyone. Here a socket stays bound to the port without listening.
    Beside it a server that sets SO_REUSEADDR may bind the port and listen (socket(7)), which asyncio, http.server,
    PyTorch's TCPStore and Go's net package do.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _reserved.append(held)
    return int(held.getsockname()[1])
