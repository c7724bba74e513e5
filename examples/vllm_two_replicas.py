"""Two vLLM engines on this machine: what the first computed, the second loads instead of computing it again.

    make test-engines-quick                                   # once: makes .venv-engines
    .venv-engines/bin/python examples/vllm_two_replicas.py

It starts a coordinator and a worker, makes a small model with random weights, and asks both engines the same question.
For an engine of your own only `transfer` matters: the same object is `vllm serve --kv-transfer-config`'s argument.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUIET = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
QUIET |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def replica(model: str, transfer: dict[str, object]) -> None:
    """One engine: the only lines that an application needs are those with `transfer`."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from kvstore.bench.engine_models import prompt

    llm = LLM(
        model=model,
        kv_transfer_config=KVTransferConfig(**transfer),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=96,
        max_model_len=2048,
        enable_prefix_caching=False,
        disable_log_stats=False,
        gpu_memory_utilization=0.1,
    )
    sampling = SamplingParams(max_tokens=8, temperature=0)
    began = time.monotonic()
    [answer] = llm.generate([{"prompt_token_ids": prompt(1600, 1)}], sampling, use_tqdm=False)
    seconds = time.monotonic() - began
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    loaded = connector.scheduler.totals.data.get("tokens_loaded", 0)
    print(
        f"{seconds:5.2f} s, {loaded} of 1600 prompt tokens from the store, says {answer.outputs[0].token_ids}",
        flush=True,
    )
    llm.llm_engine.engine_core.shutdown()


def main() -> None:
    from kvstore.bench.engine_models import VISIBLE, make_model
    from kvstore.config import load_config
    from kvstore.fleet.local_cluster import LocalCluster

    cluster = LocalCluster(load_config(env={}), workers=1, redis=False)
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_model(Path(folder) / "model", size=VISIBLE))
        try:
            asyncio.run(cluster.start())
            assert cluster.coordinator is not None
            transfer = {
                "kv_connector": "KVStoreConnector",
                "kv_connector_module_path": "kvstore.integrations.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"coordinators": cluster.coordinator.address},
            }
            for name in ("first", "second"):
                print(f"{name} replica: ", end="", flush=True)
                argv = [sys.executable, __file__, "--replica", model, json.dumps(transfer)]
                subprocess.run(argv, check=True, stderr=subprocess.DEVNULL, env={**os.environ, **QUIET})
        finally:
            cluster.stop()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--replica"]:
        replica(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
