"""One vLLM engine in a process of its own: reads jobs as JSON lines, answers in JSON lines. No network, no download.

python -m tests.engines.engine '{"model": ..., "connector": {...} or null, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def transfer_config(extra: dict[str, Any], name: str = "KVStoreConnector", module: str = "") -> dict[str, Any]:
    return {
        "kv_connector": name,
        "kv_connector_module_path": module or "kvstore.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def build(job: dict[str, Any]) -> Any:
    """An `LLM` as the job says."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "num_gpu_blocks_override": 512,
        "max_model_len": 2048,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "gpu_memory_utilization": 0.1,
        "seed": 0,
    }
    settings.update(job.get("settings", {}))
    transfer = job.get("transfer")
    config = KVTransferConfig(**transfer) if transfer else None
    return LLM(model=job["model"], kv_transfer_config=config, **settings)


def run(llm: Any, prompts: list[list[int]], tokens: int, logprobs: int | None) -> dict[str, Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=logprobs)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    answer: dict[str, Any] = {"ids": [list(output.outputs[0].token_ids) for output in outputs]}
    answer["reasons"] = [output.outputs[0].finish_reason for output in outputs]
    if logprobs is not None:
        answer["logprobs"] = [
            [step[token].logprob for step, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)]
            for o in outputs
        ]
    return answer


def counters(llm: Any) -> dict[str, float]:
    """The connector's sums since the start; empty without one."""
    core = llm.llm_engine.engine_core.engine_core
    connector = core.scheduler.connector
    side = getattr(connector, "scheduler", None)
    return dict(side.totals.data) if side is not None else {}


def end(llm: Any) -> None:
    """Shut an engine down so that the next one in this process gets a connector of its own."""
    import gc

    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    llm.llm_engine.engine_core.shutdown()
    ensure_kv_transfer_shutdown()
    gc.collect()


def main() -> None:
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the engine prints is not an answer
    llm: Any = None
    for line in sys.stdin:
        job = json.loads(line)
        answer: dict[str, Any] = {}
        if job["do"] in ("build", "stop") and llm is not None:
            end(llm)
            llm = None
        if job["do"] == "stop":
            break
        if job["do"] == "build":
            llm = build(job)
        elif job["do"] == "run":
            answer = run(llm, job["prompts"], job["tokens"], job.get("logprobs"))
        answer["counters"] = counters(llm)
        print(json.dumps(answer), file=answers)
    answers.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
