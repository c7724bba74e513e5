"""`kvstore doctor --vllm-config`: settings that silently cost all hits, or fail requests, are named with the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli.doctor import examine
from kvstore.cli.main import main
from kvstore.config import load_config
from kvstore.errors import ConfigError
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.integrations.vllm.examine import examine_transfer, read_transfer
from kvstore.operations.doctor import Engine
from tests.fleet_helpers import check_names

GOOD: dict[str, Any] = {
    "kv_connector": "KVStoreConnector",
    "kv_connector_module_path": "kvstore.integrations.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"coordinators": "127.0.0.1:7700"},
}
TRIES = 200


def faults(transfer: dict[str, Any], version: str = "0.32.0") -> dict[str, str]:
    """Name of each fault and its detail; every one has a fix."""
    checks, _ = examine_transfer(transfer, lambda: version)
    assert all(check.fix for check in checks if not check.ok)
    return {check.name: check.detail for check in checks if not check.ok}


def test_a_good_configuration_has_no_fault_and_says_where_the_service_is() -> None:
    assert faults(GOOD) == {}
    assert faults(GOOD, version="") == {}, "doctor may run where no vLLM is"
    _, client = examine_transfer(GOOD)
    assert client is not None and client.coordinators == ("127.0.0.1:7700",)


@pytest.mark.parametrize(
    ("changed", "name", "says"),
    [
        ({"kv_load_failure_policy": None}, "vllm load failure policy", "vLLM's default"),
        ({"kv_load_failure_policy": "fail"}, "vllm load failure policy", "would fail its request"),
        ({"kv_connector": "LMCacheConnectorV1"}, "vllm connector", "LMCacheConnectorV1"),
        ({"kv_connector_module_path": None}, "vllm connector", "kv_connector_module_path is None"),
        ({"kv_connector_module_path": "kvstore.vllm"}, "vllm connector", "kvstore.vllm"),
        ({"kv_role": None}, "vllm role", "None"),
        ({"kv_role": "both"}, "vllm role", "both"),
        ({"kv_load_failure_polcy": "recompute"}, "vllm kv-transfer-config", "kv_load_failure_polcy"),
        ({"kv_connector_extra_config": {}}, "vllm connector settings", "no coordinators"),
        ({"kv_connector_extra_config": {"coordinator": "a:1"}}, "vllm connector settings", "unknown key 'coordinator'"),
        ({"kv_connector_extra_config": {"coordinators": "a:1", "load": "x"}}, "vllm connector settings", "async"),
        ({"kv_connector_extra_config": "a:1"}, "vllm connector settings", "not an object"),
    ],
)
def test_one_wrong_setting_is_one_named_fault(changed: dict[str, Any], name: str, says: str) -> None:
    transfer = {field: value for field, value in (GOOD | changed).items() if value is not None}
    found = faults(transfer)
    assert list(found) == [name] and says in found[name]


def test_an_unsupported_engine_is_refused_by_name() -> None:
    assert "0.33" in faults(GOOD, version="0.34.1")["vllm version"]


def test_within_multi_connector_both_policies_count() -> None:
    outer = {**GOOD, "kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [GOOD]}}
    del outer["kv_connector_module_path"]
    assert faults(outer) == {}
    inner = {name: value for name, value in GOOD.items() if name != "kv_load_failure_policy"}
    outer["kv_connector_extra_config"] = {"connectors": [inner]}
    assert list(faults(outer)) == ["vllm load failure policy within MultiConnector"]
    outer["kv_connector_extra_config"] = {"connectors": []}
    assert "vllm connector" in faults(outer)


def test_json_a_file_and_a_file_of_engine_settings(tmp_path: Path) -> None:
    assert read_transfer(json.dumps(GOOD)) == GOOD
    file = tmp_path / "engine.json"
    for content in (GOOD, {"model": "m", "kv_transfer_config": GOOD}, {"kv-transfer-config": json.dumps(GOOD)}):
        file.write_text(json.dumps(content))
        assert read_transfer(str(file)) == GOOD
    for given in (str(tmp_path / "missing.json"), "{", "[1]", str(tmp_path)):
        with pytest.raises(ConfigError):
            read_transfer(given)


def test_the_command_line_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--vllm-config", "/nonexistent/kv.json"]) == 2
    assert "--kv-transfer-config" in capsys.readouterr().err
    wrong = {**GOOD, "kv_load_failure_policy": "fail", "kv_connector_extra_config": {"coordinators": "127.0.0.1:1"}}
    assert main(["doctor", "--vllm-config", json.dumps(wrong), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    found = check_names(report, ok=False)
    assert {"vllm load failure policy", "vllm coordinator 127.0.0.1:1", "vllm end to end"} <= set(found)


async def test_the_engines_addresses_are_tried_with_its_own_settings(tmp_path: Path) -> None:
    async with LocalCluster(load_config(env={}, overrides={"store": {"host_bytes": "16MiB"}}), redis=False) as cluster:
        assert cluster.coordinator is not None
        extra = {"coordinators": cluster.coordinator.address, "workers": str(cluster.workers[0].ready["socket"])}
        good = Engine(*examine_transfer({**GOOD, "kv_connector_extra_config": extra}, lambda: ""))
        for _ in range(TRIES):
            report = await examine(load_config(env={}), 1, good)
            if report["ok"]:
                break
        else:
            pytest.fail(json.dumps(report, indent=1))
        names = check_names(report, ok=True)
        socket = extra["workers"]
        assert {f"vllm coordinator {extra['coordinators']}", f"vllm worker {socket}", "vllm end to end"} <= set(names)

        extra = {"coordinators": f"{cluster.coordinator.address},127.0.0.1:1", "workers": str(tmp_path / "none.sock")}
        half = Engine(*examine_transfer({**GOOD, "kv_connector_extra_config": extra}, lambda: ""))
        named = check_names(await examine(load_config(env={}), 1, half), ok=False)
        assert {"vllm coordinator 127.0.0.1:1", f"vllm worker {tmp_path / 'none.sock'}"} <= set(named)
        assert "vllm end to end" not in named, "one coordinator is enough"
