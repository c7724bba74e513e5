"""The files in deploy/ are accepted as they stand."""

from __future__ import annotations

from pathlib import Path

from kvstore.auth import load_policy
from kvstore.config import load_config

DEPLOY = Path(__file__).parent.parent / "deploy"


def test_every_configuration_loads() -> None:
    files = {path.name: path for path in sorted(DEPLOY.glob("*.toml"))}
    policy = load_policy(str(files.pop("namespaces.toml")))
    assert list(policy.namespaces) == ["chat", "batch"]
    assert set(files) == {"node.toml", "coordinator.toml"}
    for path in files.values():
        config = load_config(str(path), env={})
        assert config.server.token_file, f"{path.name} listens beyond this machine"
        assert len(config.server.coordinators) == 2
