"""TLS on all ports: files named by the configuration become credentials. Unix sockets stay as they are.

A server shows one certificate, and may insist that callers show one of its own authority; a client believes one
authority. Certificates say which host one talks to, tokens (`kvstore.auth`) who talks: one does not replace the other.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.config import ClientConfig, Config, ServerConfig
from kvstore.errors import SetupError


@dataclass(frozen=True, slots=True)
class Files:
    """PEM files. `authority`: whose certificates the other side must show. `own`: (certificate chain, key), if any."""

    authority: str = ""
    own: tuple[str, str] | None = None
    name: str = ""  # that the server's certificate must have, where it is not the address

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """(authority, key, certificate chain). SetupError names the file that can't be read."""
        chain, key = (None, None) if self.own is None else (_pem(self.own[0]), _pem(self.own[1]))
        return (_pem(self.authority) if self.authority else None), key, chain


@dataclass(frozen=True, slots=True)
class Tls:
    """Of one process. `serving` None: its port is plain; `calling` None: it calls in plain text."""

    serving: Files | None = None
    calling: Files | None = None


PLAIN = Tls()


def client_tls(config: ClientConfig) -> Tls:
    """SetupError where the settings do not fit together. Reads nothing yet."""
    own = _own(config.tls_cert_file, config.tls_key_file, "client")
    if not config.tls_ca_file:
        if own is not None or config.tls_server_name:
            raise SetupError("client.tls_cert_file or client.tls_server_name without TLS: set client.tls_ca_file")
        return PLAIN
    return Tls(calling=Files(config.tls_ca_file, own, config.tls_server_name))


def server_tls(config: Config) -> Tls:
    """Of a server, which calls other servers too: those calls follow the `client` section. SetupError."""
    mine: ServerConfig = config.server
    own = _own(mine.tls_cert_file, mine.tls_key_file, "server")
    calling = client_tls(config.client).calling
    if own is None:
        if mine.tls_client_ca_file:
            raise SetupError("server.tls_client_ca_file without TLS: set server.tls_cert_file and server.tls_key_file")
        return Tls(None, calling)
    return Tls(Files(mine.tls_client_ca_file, own), calling)


def _own(certificate: str, key: str, section: str) -> tuple[str, str] | None:
    if bool(certificate) != bool(key):
        raise SetupError(f"set both {section}.tls_cert_file and {section}.tls_key_file, or neither")
    return (certificate, key) if certificate else None


def _pem(path: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SetupError(f"cannot read {path}: {error.strerror}: name a PEM file this user can read") from None
    if b"-----BEGIN" not in content:
        raise SetupError(f"{path} is not a PEM file")
    return content


def channel_credentials(files: Files) -> tuple[Any, list[tuple[str, str]]]:
    """gRPC's credentials for a caller, and the channel options they need. SetupError."""
    import grpc  # noqa: TID251 - the real transport

    authority, key, chain = files.read()
    options = [("grpc.ssl_target_name_override", files.name)] if files.name else []
    return grpc.ssl_channel_credentials(authority, key, chain), options


def http_context(files: Files) -> ssl.SSLContext:
    """For the port of figures. With an authority a certificate is asked for, and who shows none gets health only."""
    files.read()  # a SetupError that names what is wrong
    assert files.own is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(*files.own)
        if files.authority:
            context.load_verify_locations(files.authority)
            context.verify_mode = ssl.CERT_OPTIONAL
    except ssl.SSLError as error:
        raise SetupError(f"{files.own[0]}: not a certificate with its key: {error.reason}") from None
    return context


def server_credentials(files: Files) -> Any:
    """gRPC's credentials for a port. With an authority, callers must show a certificate of it. SetupError."""
    import grpc  # noqa: TID251

    authority, key, chain = files.read()
    return grpc.ssl_server_credentials([(key, chain)], authority, require_client_auth=authority is not None)


def channel_context(files: Files) -> tuple[ssl.SSLContext, str]:
    """The same for the data channel: a caller's context, and the name it expects (empty: the address). SetupError."""
    files.read()  # says what is wrong with a file
    try:
        context = ssl.create_default_context(cafile=files.authority or None)
        if files.own is not None:
            context.load_cert_chain(*files.own)
    except (ssl.SSLError, OSError) as error:
        raise SetupError(f"the TLS files of the client do not fit: {error}") from None
    return context, files.name


def server_context(files: Files) -> ssl.SSLContext:
    """Of the data channel's port. SetupError."""
    files.read()
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.authority or None)
        if files.own is not None:
            context.load_cert_chain(*files.own)
    except (ssl.SSLError, OSError) as error:
        raise SetupError(f"the TLS files of the server do not fit: {error}") from None
    if files.authority:
        context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # what a client finds unread on an idle connection is its end
    return context
