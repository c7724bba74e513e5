"""The files in deploy/ are accepted as they stand, offline, and a typo in any of them is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kvstore.auth import load_policy
from kvstore.config import load_config
from tests.deploy_files import (
    commented_commands,
    compose_problems,
    dockerfile_problems,
    kubernetes_problems,
    pod_problems,
    ray_problems,
    setting_problems,
)

DEPLOY = Path(__file__).parent.parent / "deploy"


def read(name: str) -> str:
    return (DEPLOY / name).read_text()


def test_every_configuration_loads() -> None:
    files = {path.name: path for path in sorted(DEPLOY.glob("*.toml"))}
    policy = load_policy(str(files.pop("namespaces.toml")))
    assert list(policy.namespaces) == ["chat", "batch"]
    assert set(files) == {"node.toml", "coordinator.toml", "fleet.toml"}
    for path in files.values():
        config = load_config(str(path), env={})
        assert config.server.token_file, f"{path.name} listens beyond this machine"
        assert len(config.server.coordinators) == 2 or config.fleet.coordinators == 2


CHECKS: list[tuple[str, Callable[[str], list[str]]]] = [
    ("compose.yaml", compose_problems),
    ("kuberay.yaml", kubernetes_problems),
    ("kuberay.yaml", pod_problems),
    ("ray-cluster.yaml", ray_problems),
    ("Dockerfile", dockerfile_problems),
]


@pytest.mark.parametrize(("name", "problems"), CHECKS, ids=[f"{name}-{check.__name__}" for name, check in CHECKS])
def test_every_file_is_valid(name: str, problems: Callable[[str], list[str]]) -> None:
    assert problems(read(name)) == []


TYPOS = [
    ("compose.yaml", compose_problems, "stop_grace_period", "stop_grace_perod"),
    ("compose.yaml", compose_problems, "--ssd-bytes", "--sdd-bytes"),
    ("compose.yaml", compose_problems, "server.advertise", "server.advertize"),
    ("compose.yaml", compose_problems, "KVSTORE_SERVER_TOKEN_FILE:", "KVSTORE_SERVER_TOKENFILE:"),
    ("compose.yaml", compose_problems, "secrets: [kvstore_token,", "secrets: [kvstore_tokn,"),
    ("compose.yaml", compose_problems, "service_healthy", "healthy"),
    ("kuberay.yaml", kubernetes_problems, "readinessProbe", "readynessProbe"),
    ("kuberay.yaml", kubernetes_problems, "workerGroupSpecs", "workerGroups"),
    ("kuberay.yaml", kubernetes_problems, "memory: 80Gi", "memory: 80GB"),
    ("kuberay.yaml", pod_problems, "{name: ssd, hostPath", "{name: sdd, hostPath"),
    ("kuberay.yaml", pod_problems, "host_bytes =", "host_byte ="),
    ("kuberay.yaml", pod_problems, "configMap: {name: kvstore-fleet}", "configMap: {name: fleet}"),
    ("ray-cluster.yaml", ray_problems, "head_start_ray_commands", "head_start_commands"),
    ("ray-cluster.yaml", ray_problems, "max_workers: 2", "max_workers: two"),
    ("Dockerfile", dockerfile_problems, "COPY coordinator", "COPY coordinators"),
    ("Dockerfile", dockerfile_problems, "USER 10001:10001", "USER root"),
    ("Dockerfile", dockerfile_problems, "3.11.14-slim", "slim"),
]


@pytest.mark.parametrize(("name", "problems", "right", "wrong"), TYPOS, ids=[typo[3] for typo in TYPOS])
def test_a_typo_is_caught(name: str, problems: Callable[[str], list[str]], right: str, wrong: str) -> None:
    """The negative control."""
    text = read(name)
    assert right in text and problems(text.replace(right, wrong)) != []


def test_commands_in_comments_are_ours() -> None:
    commands = [command for path in sorted(DEPLOY.glob("*.yaml")) for command in commented_commands(path.read_text())]
    assert len(commands) == 2
    for command in commands:
        at = command.index("--config")
        assert setting_problems({}, [*command[:at], *command[at + 2 :]]) == []
    assert setting_problems({}, ["kvstore", "up", "--adress", "h:1"]) != []


def test_nothing_secret_lies_in_the_files_and_nothing_runs_as_root() -> None:
    for path in sorted(DEPLOY.iterdir()):
        assert "BEGIN" not in path.read_text()
    kinds = [document["kind"] for document in yaml.safe_load_all(read("kuberay.yaml"))]
    assert "Secret" not in kinds, "made by whoever deploys, not kept in a file"
    services = yaml.safe_load(read("compose.yaml"))["services"]
    assert all("ports" not in service for service in services.values()), "nothing is published by default"
