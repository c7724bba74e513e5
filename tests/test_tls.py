"""TLS on every gRPC port: who has no business there learns nothing, and no token is seen anywhere."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvstore.auth import Authenticator, client_credentials, load_policy
from kvstore.cli.main import main
from kvstore.client.kv_client import KVClient
from kvstore.config import ClientConfig, Config, load_config
from kvstore.errors import KVStoreError, SetupError, Unauthenticated, Unavailable
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.machine.system import real_system
from kvstore.operations.observe import Observer
from kvstore.transport.http import MetricsServer
from kvstore.transport.methods import WORKER
from kvstore.transport.rpc import GrpcTransport
from kvstore.transport.tls import PLAIN, Files, client_tls, http_context, server_tls
from kvstore.wire import worker_pb2
from tests.service_cluster import blocks_of, check, found
from tests.service_helpers import FULL, prompt

TOKEN = "a-cluster-token-that-nobody-may-see"


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._signed(self.name, self.key, [], authority=True)
        self.file = str(folder / f"{name}.pem")
        Path(self.file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, hosts: list[x509.GeneralName]) -> tuple[str, str]:
        """Paths of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self.folder / f"{name}.pem"
        certificate.write_bytes(self._signed(subject, key, hosts).public_bytes(serialization.Encoding.PEM))
        secret = self.folder / f"{name}.key"
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return str(certificate), str(secret)

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        hosts: list[x509.GeneralName],
        authority: bool = False,
    ) -> x509.Certificate:
        begin = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin.replace(year=2120))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if hosts:
            made = made.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        return made.sign(self.key, hashes.SHA256())


def fetch(address: str, path: str, context: ssl.SSLContext | None, *headers: str) -> int:
    """The status that a scraper gets; 0 where the port says nothing it understands."""
    host, _, port = address.rpartition(":")
    lines = [f"GET {path} HTTP/1.1", f"Host: {address}", *headers, "", ""]
    try:
        plain = socket.create_connection((host, int(port)), timeout=10)
        with plain, context.wrap_socket(plain) if context is not None else plain as connection:
            connection.sendall("\r\n".join(lines).encode())
            answer = connection.recv(4096).decode("latin-1")
    except (ssl.SSLError, ConnectionError):
        return 0
    return int(answer.split(" ")[1]) if answer.startswith("HTTP/1.1 ") else 0


def scraper(ca: str, own: tuple[str, str] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.check_hostname = False
    if own is not None:
        context.load_cert_chain(*own)
    return context


async def test_figures_are_behind_tls_the_certificate_and_the_token_too(authority: Authority, tmp_path: Path) -> None:
    config, _ = settings(authority, tmp_path)
    stranger = Authority(tmp_path, "stranger")
    mine, foreign = authority.issue("scraper", []), stranger.issue("foreign", [])
    auth = Authenticator(load_policy(token_file=config.server.token_file, bind="0.0.0.0:0"))
    server = await MetricsServer(lambda: "figures\n", lambda: True, auth).start("0.0.0.0:0", server_tls(config).serving)
    address, right = f"127.0.0.1:{server.address.rpartition(':')[2]}", f"Authorization: Bearer {TOKEN}"
    good = scraper(authority.file, mine)

    async def status(path: str, context: ssl.SSLContext | None, *headers: str) -> int:
        return await asyncio.to_thread(fetch, address, path, context, *headers)

    try:
        assert await status("/metrics", good, right) == 200
        assert await status("/metrics", good) == 401
        assert await status("/metrics", good, "Authorization: Bearer another-token-altogether") == 401
        assert await status("/metrics", scraper(authority.file), right) == 401, "no certificate"
        assert await status("/metrics", scraper(authority.file, foreign), right) == 0, "of another authority"
        assert await status("/metrics", scraper(stranger.file, mine), right) == 0, "the server is not believed"
        assert await status("/metrics", None, right) == 0 and await status("/healthz", None) == 0, "plain text"
        assert await status("/healthz", scraper(authority.file)) == 200
    finally:
        await server.close(1.0)


def test_a_wrong_certificate_file_is_one_line(authority: Authority, tmp_path: Path) -> None:
    own = authority.issue("one", [])
    other = authority.issue("two", [])
    with pytest.raises(SetupError, match="not a certificate with its key"):
        http_context(Files(own=(own[0], other[1])))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


def settings(authority: Authority, tmp_path: Path) -> tuple[Config, ClientConfig]:
    """Servers that insist on certificates and a token, and a client that has both."""
    server = authority.issue("server", [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    mine = authority.issue("caller", [])
    token = tmp_path / "token"
    token.write_text(TOKEN)
    called = {"tls_ca_file": authority.file, "tls_cert_file": mine[0], "tls_key_file": mine[1]}
    sections = {
        "store": {"host_bytes": "16MiB"},
        "server": {
            "token_file": str(token),
            "tls_cert_file": server[0],
            "tls_key_file": server[1],
            "tls_client_ca_file": authority.file,
        },
        "client": called,
    }
    return load_config(env={}, overrides=sections), ClientConfig(token_file=str(token), **called)


async def refusal(address: str, client: ClientConfig, *, worker: bool) -> KVStoreError:
    """What a caller with these settings gets to hear."""
    system = real_system(1)
    try:
        transport = GrpcTransport(system.clock, connect_timeout_s=5.0, tls=client_tls(client))
        observer = Observer(transport, client_credentials(client), 5.0)
        with pytest.raises(KVStoreError) as caught:
            await (observer.worker_hello(address) if worker else observer.coordinator_hello(address))
        return caught.value
    finally:
        system.pool.close()


async def test_every_port_wants_certificates_and_the_token(authority: Authority, tmp_path: Path) -> None:
    config, good = settings(authority, tmp_path)
    async with LocalCluster(config, workers=1, redis=False) as cluster:
        assert cluster.coordinator is not None
        good = replace(good, coordinators=(cluster.coordinator.address,))
        await serves(good)
        said = []
        for address, worker in ((cluster.coordinator.address, False), (cluster.workers[0].address, True)):
            for name, wrong in strangers(good, tmp_path).items():
                error = await refusal(address, wrong, worker=worker)
                assert type(error) is (Unauthenticated if "token" in name else Unavailable), (name, error)
                said.append(str(error))
        assert TOKEN not in " ".join(said)
        await data_port_refuses(cluster, good, strangers(good, tmp_path))
        for server in (cluster.coordinator, *cluster.workers):
            process = Path(f"/proc/{server.process.pid}")
            shown = process.joinpath("cmdline").read_bytes() + process.joinpath("environ").read_bytes()
            log = (Path(cluster.folder) / f"{server.name}.log").read_bytes()
            assert TOKEN.encode() not in shown + log
            assert server.name.encode() in shown, "this is not the process list"


async def data_port_refuses(cluster: LocalCluster, good: ClientConfig, wrong: dict[str, ClientConfig]) -> None:
    """A caller with a good ticket and one thing wrong in its TLS does not get in by the data port either."""
    system = real_system(1)
    address = cluster.workers[0].address
    try:
        transport = GrpcTransport(system.clock, connect_timeout_s=5.0, tls=client_tls(good))
        channel = await transport.connect(address, client_credentials(good))
        for name, settings in {"nothing wrong": good, **wrong}.items():
            told = await channel.unary(WORKER["Data"], worker_pb2.DataRequest(), timeout_s=5.0)
            theirs = GrpcTransport(system.clock, tls=client_tls(settings))
            opening = theirs.connect_data(f"127.0.0.1:{told.port}", told.ticket, system.pool, timeout_s=5.0)
            if name == "nothing wrong" or "token" in name:  # which is shown for the ticket
                await (await opening).close()
                continue
            with pytest.raises(Unavailable):
                await opening
        await channel.close()
    finally:
        system.pool.close()


async def serves(client: ClientConfig) -> None:
    """A client on another host puts, looks up and gets: coordinator and worker talked to each other, too."""
    system = replace(real_system(2), host="elsewhere")
    try:
        transport = GrpcTransport(system.clock, tls=client_tls(client))
        async with await KVClient.connect(client, system, transport) as connected:
            prefix = prompt(1, 6)
            while "committed" not in (await connected.put(FULL, prefix, blocks_of(prefix))).states:
                await connected.members.refresh(timeout_s=5.0)
            plan = await found(connected, prefix, 6)
            check(plan, await connected.get(plan), 6)
            assert np.all([run.holder for run in plan.runs])
            assert connected.counters["raw_gets"] == 1 and connected.counters["raw_puts"] >= 1, connected.counters
    finally:
        system.pool.close()


def strangers(good: ClientConfig, tmp_path: Path) -> dict[str, ClientConfig]:
    """Callers with one thing wrong."""
    other = Authority(tmp_path, "somebody")
    forged = other.issue("forged", [])
    token = tmp_path / "wrong-token"
    token.write_text("not-the-token-of-this-cluster")
    return {
        "plain text": replace(good, tls_ca_file="", tls_cert_file="", tls_key_file=""),
        "another authority": replace(good, tls_ca_file=other.file),
        "no certificate": replace(good, tls_cert_file="", tls_key_file=""),
        "somebody else's certificate": replace(good, tls_cert_file=forged[0], tls_key_file=forged[1]),
        "another host's name": replace(good, tls_server_name="cache.example"),
        "wrong token": replace(good, token_file=str(token)),
        "no token": replace(good, token_file=""),
    }


async def test_one_certificate_may_serve_many_addresses_under_one_name(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("fleet", [x509.DNSName("cache.example")])
    sections = {
        "store": {"host_bytes": "16MiB"},
        "server": {"tls_cert_file": certificate, "tls_key_file": key},
        "client": {"tls_ca_file": authority.file, "tls_server_name": "cache.example"},
    }
    async with LocalCluster(load_config(env={}, overrides=sections), workers=1, redis=False) as cluster:
        assert cluster.coordinator is not None
        client = ClientConfig(coordinators=(cluster.coordinator.address,), tls_ca_file=authority.file)
        await serves(replace(client, tls_server_name="cache.example"))
        error = await refusal(cluster.coordinator.address, client, worker=False)
        assert isinstance(error, Unavailable), "the certificate does not name the address"


def test_settings_that_do_not_fit_together_are_one_line(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = authority.issue("server", [])
    for section, wrong, says in (
        ("server", {"tls_cert_file": certificate}, "both server.tls_cert_file"),
        ("server", {"tls_client_ca_file": authority.file}, "without TLS"),
        ("client", {"tls_cert_file": certificate, "tls_key_file": key}, "client.tls_ca_file"),
        ("client", {"tls_server_name": "name"}, "client.tls_ca_file"),
    ):
        with pytest.raises(SetupError, match=says):
            server_tls(load_config(env={}, overrides={section: wrong}))
    assert client_tls(ClientConfig()) is PLAIN
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    for path, says in (("/nonexistent.pem", "cannot read /nonexistent.pem"), (str(empty), "is not a PEM file")):
        argv = ["coordinator", "--bind", "127.0.0.1:0"]
        argv += ["--set", f"server.tls_cert_file={path}", "--set", f"server.tls_key_file={key}"]
        assert main(argv) == 2
        assert says in capsys.readouterr().err
