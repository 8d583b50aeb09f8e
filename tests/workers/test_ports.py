"""A port that is chosen long before its server binds it."""

import asyncio
import errno
import socket

import pytest
from torch.distributed import TCPStore

from distill_workers.serving.ports import reserve_port


async def test_a_reserved_port_is_for_the_server_that_comes_later_and_for_nobody_else() -> None:
    port = reserve_port()
    with socket.socket() as somebody, pytest.raises(OSError) as refused:
        somebody.bind(("127.0.0.1", port))
    assert refused.value.errno == errno.EADDRINUSE
    for _ in range(2):  # SGLang's HTTP server, and again after a restart
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "0.0.0.0", port)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        server.close()
        await server.wait_closed()
    assert TCPStore("127.0.0.1", port, 1, True).port == port
