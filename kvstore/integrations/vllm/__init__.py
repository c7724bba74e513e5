"""vLLM loads and saves KV through the service: a `KVConnectorBase_V1`, no patch of the engine. docs/ENGINES.md.

    --kv-transfer-config '{"kv_connector": "KVStoreConnector", "kv_connector_module_path": "kvstore.integrations.vllm",
      "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"coordinators": "10.0.0.1:7070"}}'

How to read it: `connector` is the class the engine knows and only passes calls on; `scheduler` decides what to load
and to save, `worker` moves bytes; `metadata` is what the one sends the other; `identity` makes the `ModelSpec` of a
running engine; `pages` copies between the engine's pages and raw blocks; `jobs` are the work in the client's loop.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KVStoreConnector"]


def __getattr__(name: str) -> Any:
    """The connector needs vllm; importing the package does not."""
    if name != "KVStoreConnector":
        raise AttributeError(f"module 'kvstore.integrations.vllm' has no attribute {name!r}")
    from kvstore.integrations.vllm.connector import KVStoreConnector

    return KVStoreConnector
