"""Process of the service: its token, its address, its start, and an end that loses no request."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from protopush.api import Run
from protopush.app.address import address_of, check_public, is_local, known_as, listening
from protopush.app.entrance import Entrance
from protopush.app.service import Service, ServiceLimits, build_service
from protopush.data.manifest import DataConfig
from protopush.errors import InputError, check_fields
from protopush.predict.prediction import SHARE
from protopush.predict.threshold import calibrate

logger = logging.getLogger("protopush.training")

TOKEN = "PROTOPUSH_TOKEN"
SHORTEST = 16  # characters of a token
HEAD_SECONDS = 10.0  # until the whole head of a request must be there
ARRIVED = 0.2  # seconds in which requests that are on the wire when the end comes are still taken


def run_service(
    run: Run, limits: ServiceLimits, host: str = "127.0.0.1", port: int = 7861, token_file: str = "",
    root_path: str = "", allowed_host: Sequence[str] = (),
) -> None:  # fmt: skip
    """Answer until somebody presses Ctrl-C, then those who have asked already; the run is what it is now.

    Args:
        host: the address to listen on; one that other computers reach needs a token.
        port: 0 for any that is free.
        token_file: what callers have to know; without, the variable ``PROTOPUSH_TOKEN``, or nothing.
        root_path: where a reverse proxy shows the service: a path, or the whole address.
        allowed_host: names by which the service may be called, besides those of this computer.

    Raises:
        InputError: an option is wrong, or the address isn't free.
    """
    check_fields(limits, "--")
    root_path, names = check_public(root_path, allowed_host)
    token = read_token(token_file)
    if token is None and not is_local(host):
        raise InputError(
            f"other computers reach --host {host}; expected a token that callers have to know: --token_file FILE, or "
            f"the variable {TOKEN}"
        )
    if token is None and names:
        logger.warning("Everybody whom the proxy lets through may ask; there is no token")
    with listening(host, port) as door:
        limit = calibrate(run, DataConfig(**run.data), SHARE, run.device, run.num_workers)
        if limit.value is None:
            logger.warning("no threshold for nothing_similar, which stays empty: %s", limit.problem)
        service = Service(run, limits, limit.value)
        # The first pass takes longer, and says early what is wrong.
        service.batcher.submit(torch.zeros(3, *run.transform.preprocessing.size)).result()
        app = Entrance(
            build_service(service, token is not None, root_path), service, token, known_as(host, names), names
        )
        try:
            print(f"Service: {address_of(host, door)} (Ctrl-C ends it; /docs says how to call it)", flush=True)
            Server(app, service).run(sockets=[door])
        except KeyboardInterrupt:
            pass
        finally:
            ended = service.close()
    cut = f"; {service.cut} were cut off after {limits.grace:g} s" if service.cut else ""
    print(f"Service ended; {service.answered} requests were answered{cut}.", flush=True)
    if service.cut or not ended:  # a thread is still at work for somebody who has gone
        os._exit(0)


def read_token(file: str) -> str | None:
    """The token in a file, or in the variable; None where there is neither.

    Raises:
        InputError: it can't be read, or is too short to be one.
    """
    try:
        token = Path(file).read_text(encoding="ascii").strip() if file else os.environ.get(TOKEN, "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token_file {file} can't be read ({error}); expected a file with a token") from error
    where = f"--token_file {file}" if file else TOKEN
    if not token and not file:
        return None
    if len(token) < SHORTEST or not token.isascii() or len(token.split()) > 1:
        advice = "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        raise InputError(f"{where} holds no token; expected one word of {SHORTEST} characters or more; {advice}")
    return token


class Server(uvicorn.Server):
    """One that takes the requests which are on the wire when its end comes, and answers them."""

    def __init__(self, app: Entrance, service: Service) -> None:
        config = uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False,
            timeout_graceful_shutdown=service.limits.grace,  # type: ignore[arg-type]
        )  # fmt: skip
        super().__init__(config)
        self.service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the service and nothing else; uvicorn would send them again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no more; answer; end."""
        self.service.stopping = True
        for _ in range(2):  # connections that wait are accepted
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        await asyncio.sleep(ARRIVED)
        await super().shutdown(sockets)


class Protocol(H11Protocol):
    """One that waits for the head of a request for so long and no longer, and refuses it in JSON."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._before: object = None
        self.loop.call_later(HEAD_SECONDS, self._watch)

    def _watch(self) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._before:  # no whole head has come since the last check
            if self.cycle is None:
                self._refuse(b"408 Request Timeout", f"the request was not there after {HEAD_SECONDS:g} s")
            self.transport.close()
            return
        self._before = self.cycle
        self.loop.call_later(HEAD_SECONDS, self._watch)

    def send_400_response(self, msg: str) -> None:
        self._refuse(b"400 Bad Request", "this is no HTTP request; expected one that /docs lists")
        self.transport.close()

    def _refuse(self, status: bytes, error: str) -> None:
        body = json.dumps({"error": error}).encode()
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
