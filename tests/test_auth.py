"""Identities, namespaces and tokens: who gets in, who learns nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from kvstore.auth import (
    Authenticator,
    Policy,
    client_credentials,
    is_loopback,
    load_policy,
    node_credentials,
    read_token,
)
from kvstore.config import ClientConfig, ServerConfig
from kvstore.errors import ConfigError, KVStoreError, NotGranted, SetupError, Unauthenticated
from kvstore.transport.base import Credentials, Method
from kvstore.transport.methods import COORDINATOR, WORKER, WORKER_LOCAL

TOKEN = "cluster-token-0123456789"
ALICE = "alice-token-0123456789"
NODE = "node-token-0123456789"
REFLECTION = Method("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo", None, None, True, True)
PEER = "ipv4:127.0.0.1:5000"


def sha(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


FILE = f"""
[identities.alice]
token_sha256 = "{sha(ALICE)}"
namespaces = ["team-a"]

[identities.storage]
token_sha256 = "{sha(NODE)}"
role = "node"

[namespaces.team-a]

[namespaces.team-b]
"""


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return str(path)


def policy_of(tmp_path: Path, text: str = FILE, token_file: str = "") -> Policy:
    path = tmp_path / "namespaces.toml"
    path.write_text(text)
    return load_policy(str(path), token_file)


def ask(
    policy: Policy, token: str, namespace: str, method: Method = WORKER["Match"], peer: str = PEER
) -> tuple[str, str]:
    context = Authenticator(policy, host_uid=1000).authenticate(Credentials(namespace, token), peer=peer, method=method)
    assert context.peer == peer
    return context.identity, context.role


def test_without_a_file_there_is_one_namespace_and_one_identity() -> None:
    policy = load_policy()
    assert ask(policy, "", "default") == ("default", "node")
    assert ask(policy, "", "default", COORDINATOR["Announce"]) == ("default", "node")
    assert policy.digest == ""
    with pytest.raises(NotGranted):
        ask(policy, "", "another")


def test_without_a_token_a_socket_is_for_its_own_user_only() -> None:
    policy = load_policy()
    assert ask(policy, "", "default", WORKER_LOCAL["Hello"], "unix:uid=1000,pid=5") == ("default", "node")
    with pytest.raises(Unauthenticated):
        ask(policy, "", "default", WORKER_LOCAL["Hello"], "unix:uid=1001,pid=5")


def test_the_cluster_token_opens_everything_and_nothing_else_does(token_file: str) -> None:
    policy = load_policy("", token_file, "0.0.0.0:7070")
    assert ask(policy, TOKEN, "default", COORDINATOR["Announce"]) == ("cluster", "node")
    assert ask(policy, TOKEN, "default", WORKER_LOCAL["Hello"], "unix:uid=1001,pid=5") == ("cluster", "node")
    for wrong in ("", TOKEN[:-1], TOKEN + "x", sha(TOKEN), "ü\udcff"):
        for peer in (PEER, "unix:uid=1000,pid=5"):
            with pytest.raises(Unauthenticated):
                ask(policy, wrong, "default", peer=peer)


def test_a_client_has_the_namespaces_of_the_file_and_a_node_has_all(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    assert ask(policy, ALICE, "team-a") == ("alice", "client")
    assert ask(policy, NODE, "team-a") == ask(policy, NODE, "team-b") == ("storage", "node")
    with pytest.raises(Unauthenticated):
        ask(policy, "", "team-a")


def test_a_namespace_not_granted_looks_like_one_that_does_not_exist(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    messages = []
    for name in ("team-b", "team-x", "default", ""):
        with pytest.raises(NotGranted) as caught:
            ask(policy, ALICE, name)
        messages.append(str(caught.value).replace(name, "NAME") if name else "namespace NAME does not exist")
    assert set(messages) == {"namespace NAME does not exist"}


@pytest.mark.parametrize("method", [COORDINATOR["Announce"], WORKER["Probe"]])
def test_calls_of_nodes_are_refused_to_clients(tmp_path: Path, method: Method) -> None:
    policy = policy_of(tmp_path)
    assert ask(policy, NODE, "team-a", method) == ("storage", "node")
    with pytest.raises(Unauthenticated, match="role node"):
        ask(policy, ALICE, "team-a", method)


def test_reflection_needs_a_token_but_no_namespace(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    assert ask(policy, ALICE, "nowhere", REFLECTION) == ("alice", "client")
    with pytest.raises(Unauthenticated):
        ask(policy, "", "team-a", REFLECTION)


def test_the_file_and_the_cluster_token_add_up(tmp_path: Path, token_file: str) -> None:
    policy = policy_of(tmp_path, token_file=token_file)
    assert ask(policy, TOKEN, "team-b") == ("cluster", "node")
    assert ask(policy, ALICE, "team-a") == ("alice", "client")
    same = policy_of(tmp_path, FILE.replace(sha(NODE), sha(TOKEN)), token_file)
    assert ask(same, TOKEN, "team-b") == ("storage", "node"), "an identity of the file keeps its name"


def test_a_file_of_namespaces_only_needs_no_token_on_loopback(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, "[namespaces.one]\n[namespaces.two]\n")
    assert ask(policy, "", "two") == ("default", "node")
    with pytest.raises(NotGranted):
        ask(policy, "", "default")


def test_the_digest_is_of_what_the_file_says_not_of_how(tmp_path: Path) -> None:
    digest = policy_of(tmp_path).digest
    assert len(digest) == 32
    assert policy_of(tmp_path, "# a comment\n" + FILE).digest == digest
    assert policy_of(tmp_path, FILE.replace("team-b", "team-c")).digest != digest


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[namespaces.a]\nhost_byte = 1", "unknown key host_byte"),
        ("[namespace.a]", "unknown key namespace"),
        ("", r"no \[namespaces.NAME\]"),
        ("namespaces = 3", "must be tables"),
        ("[namespaces]\na = 3", "must be a table"),
        ('[namespaces."a b"]', "a name is"),
        ("[namespaces.a]\nredis_secret_file = 1", "path of a file"),
        ('[namespaces.a]\n[identities.i]\nnamespaces = ["a"]', "64 hexadecimal"),
        ('[namespaces.a]\n[identities.i]\ntoken_sha256 = "abc"\nnamespaces = ["a"]', "64 hexadecimal"),
        (f'[namespaces.a]\n[identities.i]\ntoken_sha256 = "{sha("x")}"', "at least one"),
        (f'[namespaces.a]\n[identities.i]\ntoken_sha256 = "{sha("x")}"\nnamespaces = ["b"]', "no .namespaces.b"),
        (f'[namespaces.a]\n[identities.i]\ntoken_sha256 = "{sha("x")}"\nnamespaces = "a"', "a list of names"),
        (f'[namespaces.a]\n[identities.i]\ntoken_sha256 = "{sha("x")}"\nrole = "root"', "client or node"),
        (f'[namespaces.a]\n[identities.i]\ntoken_sha256 = "{sha("x")}"\ntoken = "x"', "unknown key token"),
        (FILE.replace(sha(NODE), sha(ALICE)), "the same token_sha256"),
        ("[namespaces.a", "namespaces.toml"),
    ],
)
def test_a_wrong_file_is_refused_with_its_reason(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        policy_of(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bind", ["0.0.0.0:1", "192.168.1.5:1", "[::]:1", "example.org:1", "127.0.0.1.nip.io:1"])
def test_a_bind_beyond_this_machine_needs_a_token(bind: str, token_file: str) -> None:
    with pytest.raises(ConfigError, match="needs a cluster token: pass --token-file"):
        load_policy(bind=bind)
    assert load_policy("", token_file, bind).identities


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "localhost:1", "[::1]:1", "127.8.9.1:1", "unix:/tmp/x"])
def test_loopback_needs_none(bind: str) -> None:
    assert is_loopback(bind) and not load_policy(bind=bind).identities


def test_token_files(tmp_path: Path, token_file: str) -> None:
    assert read_token(token_file) == TOKEN
    assert client_credentials(ClientConfig(namespace="n", token_file=token_file)) == Credentials("n", TOKEN)
    assert client_credentials(ClientConfig()) == Credentials("default", "")
    assert node_credentials(ServerConfig(token_file=token_file), "n") == Credentials("n", TOKEN)
    with pytest.raises(SetupError, match="cannot read the token file"):
        read_token(str(tmp_path / "missing"))
    for content in (b"short", b"two words of a token", b"\xff" * 20, b""):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(KVStoreError) as caught:
            read_token(str(tmp_path / "bad"))
        assert caught.value.exit_code == 2
    with pytest.raises(SetupError, match="cannot read"):
        load_policy(str(tmp_path / "missing"))


def test_no_token_shows_anywhere(tmp_path: Path, token_file: str) -> None:
    policy = policy_of(tmp_path, token_file=token_file)
    shown = [repr(policy), repr(policy.identities), repr(Credentials("n", TOKEN)), str(Credentials("n", TOKEN))]
    with pytest.raises(Unauthenticated) as caught:
        ask(policy, "wrong-" + TOKEN, "team-a")
    shown.append(str(caught.value))
    for text in shown:
        for secret in (TOKEN, ALICE, NODE, sha(ALICE), repr(hashlib.sha256(ALICE.encode()).digest())):
            assert secret not in text


def test_redis_secrets_differ_by_namespace_and_token(tmp_path: Path, token_file: str) -> None:
    own = tmp_path / "secret"
    own.write_text("a-redis-secret-of-its-own\n")
    text = FILE + f'redis_secret_file = "{own}"\n'
    with_token, without = policy_of(tmp_path, text, token_file), policy_of(tmp_path, FILE)
    assert with_token.redis_secret("team-b") == b"a-redis-secret-of-its-own"
    secrets = [
        with_token.redis_secret("team-a"),
        without.redis_secret("team-a"),
        without.redis_secret("team-b"),
        load_policy().redis_secret("default"),
    ]
    assert len(set(secrets)) == 4 and all(len(secret) == 32 for secret in secrets)
    assert without.redis_secret("team-a") == policy_of(tmp_path).redis_secret("team-a")
    with pytest.raises(NotGranted):
        without.redis_secret("default")
