"""vLLM in a process of its own, driven through pipes: a JSON object a line, an answer a line. One engine at a time.

{"do": "build", "model": FOLDER, "transfer": {...} or null, "settings": {...}}   ends the engine before it
{"do": "run", "prompts": [[id, ...], ...], "tokens": N, "logprobs": null or 1}
{"do": "lookups", "prompts": [...]}   how long the scheduler stands still for each
{"do": "identity"}                    what the connector stores under
{"do": "stop"}
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from kvstore.machine.system import RealClock

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Environment of an engine on a small CPU machine; docs/ENGINES.md says why."""

CLOCK = RealClock()


def transfer_config(extra: dict[str, Any], name: str = "KVStoreConnector", module: str = "") -> dict[str, Any]:
    """`--kv-transfer-config` for a connector, ours unless named."""
    return {
        "kv_connector": name,
        "kv_connector_module_path": module or "kvstore.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def build(job: dict[str, Any]) -> Any:
    """An engine as the job says. The engine's own prefix cache is off unless the job switches it on."""
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
        "gpu_memory_utilization": 0.1,  # checked at the start against what the machine has free
        "kv_cache_memory_bytes": 1 << 30,  # else a share of the machine less the model, which may be nothing
        "seed": 0,
    }
    settings.update(job.get("settings", {}))
    transfer = job.get("transfer")
    made = LLM(model=job["model"], kv_transfer_config=KVTransferConfig(**transfer) if transfer else None, **settings)
    _kernels_are_registered()
    return made


def _kernels_are_registered() -> None:
    """Every engine registers vLLM's CPU kernels again, by a scan of all modules that fails on llvmlite's, which our
    client has loaded by then. Once a process is enough."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)


def run(llm: Any, prompts: list[list[int]], tokens: int, logprobs: int | None) -> dict[str, Any]:
    """Greedy ids (and the logprobs of what was chosen) of one batch, and how long it took."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=logprobs)
    began = CLOCK.monotonic()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    answer: dict[str, Any] = {"seconds": CLOCK.monotonic() - began}
    chosen = [output.outputs[0] for output in outputs]
    answer["ids"] = [list(one.token_ids) for one in chosen]
    answer["reasons"] = [one.finish_reason for one in chosen]
    if logprobs is not None:
        answer["logprobs"] = [
            [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)] for one in chosen
        ]
    answer["preemptions"] = sum(int(m.value) for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    return answer


def connector_of(llm: Any) -> Any:
    """The scheduler's connector, None without one."""
    return llm.llm_engine.engine_core.engine_core.scheduler.connector


def identity(llm: Any) -> dict[str, Any]:
    made = connector_of(llm).identity
    return {"spec": made.spec.canonical_json(), "shards": [asdict(shard) for shard in made.needed]}


def counters(llm: Any) -> dict[str, float]:
    """The connector's sums since the start; empty without one."""
    side = getattr(connector_of(llm), "scheduler", None)
    return dict(side.totals.data) if side is not None else {}


def lookups(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Seconds the scheduler stands still when it asks the connector about each prompt, as it would for a request."""
    side = connector_of(llm).scheduler
    seconds, found = [], 0
    for number, ids in enumerate(prompts):
        request = SimpleNamespace(
            request_id=f"lookup-{number}",
            all_token_ids=ids,
            prompt_token_ids=ids,
            num_tokens=len(ids),
            num_prompt_tokens=len(ids),
            prompt_embeds=None,
            lora_request=None,
            cache_salt=None,
            mm_features=[],
        )
        began = CLOCK.monotonic()
        tokens, _ = side.matched(request, 0)
        seconds.append(CLOCK.monotonic() - began)
        found += tokens or 0
        side.finished(request)
    return {"seconds": seconds, "tokens": found}


def end(llm: Any) -> None:
    """Shut an engine down so that the next one in this process gets a connector of its own."""
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    llm.llm_engine.engine_core.shutdown()
    ensure_kv_transfer_shutdown()
    gc.collect()


def answer_to(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    if job["do"] == "run":
        return run(llm, job["prompts"], job["tokens"], job.get("logprobs"))
    if job["do"] == "lookups":
        return lookups(llm, job["prompts"])
    return identity(llm) if job["do"] == "identity" else {}


def main() -> None:
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    llm: Any = None
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # what the engine prints is not an answer
        for line in sys.stdin:
            job = json.loads(line)
            if job["do"] in ("build", "stop") and llm is not None:
                end(llm)
                llm = None
            if job["do"] == "stop":
                break
            if job["do"] == "build":
                llm = build(job)
            answer = answer_to(llm, job) | {"counters": counters(llm)}
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
