"""Who may do what: identities, namespaces and tokens, read once at the start of a process.

A `Policy` is what `namespaces.toml` and the cluster token say together; the `Authenticator` is the one gate that
both servers (gRPC and the Unix socket) put in front of every call. Without a file there is one namespace and one
identity. Tokens are kept as SHA-256 only and compared in constant time; no token is ever in a repr, log or error.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from kvstore import codec_rules
from kvstore.codec_rules import CodecRules
from kvstore.config import ClientConfig, ServerConfig
from kvstore.directory.replicas import Copies
from kvstore.errors import ConfigError, NotGranted, SetupError, Unauthenticated
from kvstore.quotas import Quotas
from kvstore.transport.base import CallContext, Credentials, Method
from kvstore.transport.methods import SERVICES
from kvstore.values import convert

DEFAULT_NAMESPACE = "default"
TOKEN_CHARS_MIN = 16
COPIES_MAX = 16
N = TypeVar("N")
NODE_METHODS = frozenset({("Coordinator", "Announce"), ("Worker", "Probe"), ("Worker", "Pull"), ("Worker", "Drain")})
"""Calls that only workers and coordinators make."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVELOPMENT_KEY = b"kvstore on loopback without a token"


@dataclass(frozen=True, slots=True)
class NamespaceRules:
    """`[namespaces.NAME]`. Only what is enforced is a key here; any other is an error."""

    redis_secret_file: str = ""  # empty: derived from the cluster token
    quotas: Quotas = field(default_factory=Quotas)  # table `quotas`
    copies: Copies = field(default_factory=Copies)  # keys `copies`, `hot_copies`, `hot_bytes`
    codecs: CodecRules = field(default_factory=CodecRules)  # keys of `kvstore.codec_rules`


@dataclass(frozen=True, slots=True)
class Identity:
    """`[identities.NAME]`. Role `node` (workers, coordinators) has every namespace and every call."""

    name: str
    role: str
    namespaces: tuple[str, ...]
    token_sha256: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Policy:
    """Immutable. `identities` empty: nobody needs a token, whoever reaches the server is `default` with role node."""

    namespaces: Mapping[str, NamespaceRules]
    identities: tuple[Identity, ...] = ()
    digest: str = ""  # of namespaces.toml, for the handshake; empty without one
    redis_secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def granted(self, identity: Identity) -> tuple[str, ...]:
        """The namespaces an identity has, in the order of the file."""
        return tuple(self.namespaces) if identity.role == "node" else identity.namespaces

    def redis_secret(self, namespace: str) -> bytes:
        """The key of the MAC on this namespace's values in Redis. NotGranted for an unknown namespace."""
        if namespace not in self.redis_secrets:
            raise NotGranted(f"namespace {namespace} does not exist")
        return self.redis_secrets[namespace]


class Authenticator:
    """`kvstore.transport.base.Authenticator` over a policy. Pure.

    `host_uid`: the user of this process; without identities a Unix peer must be the same user.
    """

    def __init__(self, policy: Policy, host_uid: int | None = None) -> None:
        self.policy = policy
        self._host_uid = host_uid

    def authenticate(self, credentials: Credentials, *, peer: str, method: Method) -> CallContext:
        """The context of a call, or Unauthenticated (token, user, role) or NotGranted (namespace)."""
        identity = self._identify(credentials.token, peer)
        namespace = credentials.namespace
        if method.service not in SERVICES:  # reflection: about the server, in no namespace
            namespace = ""
        elif namespace not in self.policy.granted(identity):
            raise NotGranted(f"namespace {namespace} does not exist")
        if (method.service, method.name) in NODE_METHODS and identity.role != "node":
            raise Unauthenticated(f"{method.service}.{method.name} needs an identity of role node")
        return CallContext(identity=identity.name, role=identity.role, namespace=namespace, peer=peer)

    def _identify(self, token: str, peer: str) -> Identity:
        if not self.policy.identities:
            uid = _peer_uid(peer)
            if uid is not None and self._host_uid is not None and uid != self._host_uid:
                raise Unauthenticated(f"the socket belongs to user {self._host_uid}, and no token is configured")
            return Identity("default", "node", (), b"")
        presented = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found: Identity | None = None
        for identity in self.policy.identities:  # all of them, so that time tells nothing
            if hmac.compare_digest(identity.token_sha256, presented):
                found = identity
        if found is None:
            raise Unauthenticated("token missing or wrong: pass --token-file" if not token else "token not known here")
        return found


def load_policy(namespaces_file: str = "", token_file: str = "", bind: str = "127.0.0.1:0") -> Policy:
    """Read the files of one process. ConfigError: a wrong key or value, or a bind that needs a token.

    SetupError: a file that can't be read.
    """
    if not is_loopback(bind) and not token_file:
        raise ConfigError(f"binding to {bind} needs a cluster token: pass --token-file")
    token = read_token(token_file) if token_file else ""
    namespaces: dict[str, NamespaceRules] = {DEFAULT_NAMESPACE: NamespaceRules()}
    identities: tuple[Identity, ...] = ()
    digest = ""
    if namespaces_file:
        tree = _read_toml(namespaces_file)
        namespaces, identities = _parse(tree, namespaces_file)
        canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"), default=str)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:32]
    if token:
        cluster = Identity("cluster", "node", (), _sha256(token))
        if all(identity.token_sha256 != cluster.token_sha256 for identity in identities):
            identities = (*identities, cluster)
    secrets = {name: _redis_secret(name, rules, token) for name, rules in namespaces.items()}
    return Policy(namespaces, identities, digest, secrets)


def client_credentials(config: ClientConfig) -> Credentials:
    """What a client of this configuration shows. SetupError when the token file can't be read."""
    return Credentials(config.namespace, read_token(config.token_file) if config.token_file else "")


def node_credentials(config: ServerConfig, namespace: str = DEFAULT_NAMESPACE) -> Credentials:
    """What a worker or coordinator shows to another one."""
    return Credentials(namespace, read_token(config.token_file) if config.token_file else "")


def read_token(path: str) -> str:
    """The token of a file, without the white space around it. SetupError, or ConfigError for one too short."""
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"cannot read the token file {path}: {_reason(error)}") from None
    if len(token) < TOKEN_CHARS_MIN or any(c.isspace() for c in token):
        raise ConfigError(f"the token in {path} must be one word of at least {TOKEN_CHARS_MIN} characters")
    return token


def is_loopback(bind: str) -> bool:
    """Whether only this machine reaches `bind` ("host:port", "[v6]:port" or "unix:path")."""
    if bind.startswith("unix:"):
        return True
    host = bind.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _peer_uid(peer: str) -> int | None:
    """The user of a Unix peer ("unix:uid=UID,pid=PID"), None for any other."""
    match = re.match(r"unix:uid=(\d+)", peer)
    return int(match.group(1)) if match else None


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not ASCII text"


def _read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"cannot read {path}: {_reason(error)}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse(tree: dict[str, Any], path: str) -> tuple[dict[str, NamespaceRules], tuple[Identity, ...]]:
    _known(tree, ("identities", "namespaces"), path)
    namespaces = {name: _rules(name, table, path) for name, table in _tables(tree, "namespaces", path).items()}
    if not namespaces:
        raise ConfigError(f"{path}: no [namespaces.NAME] table: add at least one")
    identities = tuple(
        _identity(name, table, namespaces, path) for name, table in _tables(tree, "identities", path).items()
    )
    if len({identity.token_sha256 for identity in identities}) != len(identities):
        raise ConfigError(f"{path}: two identities have the same token_sha256")
    return namespaces, identities


def _tables(tree: dict[str, Any], key: str, path: str) -> dict[str, dict[str, Any]]:
    tables = tree.get(key, {})
    if not isinstance(tables, dict):
        raise ConfigError(f"{path}: {key} must be tables, [{key}.NAME]")
    for name, table in tables.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: {key}.{name}: a name is 1 to 64 of A-Z a-z 0-9 . _ - and begins with no sign")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {key}.{name} must be a table, [{key}.{name}]")
    return tables


def _known(table: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise ConfigError(f"{where}: unknown key {key}: one of {', '.join(keys)}")


def _rules(name: str, table: dict[str, Any], path: str) -> NamespaceRules:
    where = f"{path}: namespaces.{name}"
    _known(table, ("redis_secret_file", "quotas", *(f.name for f in fields(Copies)), *codec_rules.KEYS), where)
    secret = table.get("redis_secret_file", "")
    if not isinstance(secret, str):
        raise ConfigError(f"{where}.redis_secret_file must be the path of a file")
    quotas = table.get("quotas", {})
    if not isinstance(quotas, dict):
        raise ConfigError(f"{where}.quotas must be a table, [namespaces.{name}.quotas]")
    _known(quotas, tuple(f.name for f in fields(Quotas)), f"{where}.quotas")
    bounds = _numbers(Quotas, quotas, f"{where}.quotas")
    return NamespaceRules(secret, bounds, _copies(table, where), codec_rules.parse(table, where))


def _numbers(kind: type[N], table: dict[str, Any], where: str) -> N:
    """A dataclass of whole numbers, none negative, from a table that may have other keys too. ConfigError."""
    numbers: dict[str, int] = {}
    for f in fields(kind):  # type: ignore[arg-type]
        try:
            numbers[f.name] = int(str(convert(f.name, int, table.get(f.name, f.default))))
        except ValueError as error:
            raise ConfigError(f"{where}.{f.name}: {error}") from None
        if numbers[f.name] < 0:
            raise ConfigError(f"{where}.{f.name} = {numbers[f.name]}: must be at least 0")
    return kind(**numbers)


def _copies(table: dict[str, Any], where: str) -> Copies:
    copies = _numbers(Copies, table, where)
    if not 1 <= copies.copies <= COPIES_MAX or copies.hot_copies > COPIES_MAX:
        raise ConfigError(f"{where}: copies is 1 to {COPIES_MAX}, hot_copies 0 to {COPIES_MAX}")
    return copies


def _identity(name: str, table: dict[str, Any], namespaces: Mapping[str, NamespaceRules], path: str) -> Identity:
    where = f"{path}: identities.{name}"
    _known(table, ("token_sha256", "role", "namespaces"), where)
    role = table.get("role", "client")
    if role not in ("client", "node"):
        raise ConfigError(f"{where}.role must be client or node")
    digest = table.get("token_sha256")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise ConfigError(f"{where}.token_sha256 must be 64 hexadecimal digits")
    granted = table.get("namespaces", [])
    if not isinstance(granted, list) or not all(isinstance(item, str) for item in granted):
        raise ConfigError(f"{where}.namespaces must be a list of names")
    for item in granted:
        if item not in namespaces:
            raise ConfigError(f"{where}.namespaces: there is no [namespaces.{item}]")
    if role == "client" and not granted:
        raise ConfigError(f"{where}.namespaces: a client needs at least one")
    return Identity(name, role, tuple(granted), bytes.fromhex(digest))


def _redis_secret(namespace: str, rules: NamespaceRules, token: str) -> bytes:
    if rules.redis_secret_file:
        return read_token(rules.redis_secret_file).encode()
    key = token.encode() if token else _DEVELOPMENT_KEY
    return hmac.new(key, b"kvstore/redis\0" + namespace.encode(), hashlib.sha256).digest()
