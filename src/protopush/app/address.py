"""Addresses that a server listens on, and the names by which browsers may call it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from protopush.errors import InputError, listing

LOCAL = ("127.0.0.1", "localhost", "::1")


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound and heard already, so that what is wrong with the address is known first.

    Raises:
        InputError: it is taken, or none of this computer's.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}; expected 0 to 65535 (0: any that is free)")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # The protocol by its number: else asyncio leaves the delay of small packets on, and each answer waits 40 ms.
        door = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        with suppress(OSError):
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
        door.listen(128)
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"cannot listen on {host} port {port} ({why}); choose another --port or --host") from error
    with door:
        yield door


def address_of(host: str, door: socket.socket) -> str:
    """Where a server that listens on a host is found."""
    return f"http://{f'[{host}]' if ':' in host else host}:{door.getsockname()[1]}"


def is_local(host: str) -> bool:
    """Whether only programs of this computer reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def known_as(host: str, allowed_host: Sequence[str]) -> tuple[str, ...]:
    """The names by which a server on this host may be called; none: by any, as others reach it under all its names."""
    return (*LOCAL, *allowed_host) if is_local(host) or allowed_host else ()


def may_call(headers: Headers, hosts: Container[str], proxies: Container[str]) -> bool:
    """Whether a request calls a server by a name that it has, and comes from no page of another site.

    Args:
        hosts: the server's names; none: any.
        proxies: names of servers that hand requests on, whose pages may call it under whatever name they know it by.
    """
    host = headers.get("host", "")
    if hosts and host_of(f"//{host}") not in hosts:
        return False  # a page of another site that has its name point here
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == host or host_of(origin) in proxies


def host_of(url: str) -> str:
    """The name of the host in an address; empty where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def check_public(root_path: str, allowed_host: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A proxy's path or address without the last slash, and the names of hosts, checked.

    Raises:
        InputError: they are none.
    """
    if root_path and not root_path.startswith(("/", "http://", "https://")):
        raise InputError(
            f"--root_path {root_path}; expected a path (/review) or an address (https://example.org/review)"
        )
    names = tuple(host_of(f"//{given}") for given in allowed_host)
    if wrong := [given for given, name in zip(allowed_host, names, strict=True) if not name or {*given} & {*"/*"}]:
        raise InputError(f"--allowed_host {listing(wrong)}; expected names of hosts, such as hub.example.org")
    return root_path.rstrip("/"), names
