"""The `ModelSpec` and the shards of a running engine, from its configuration. What is not supported is refused by name.

The engine's pages are opaque to us: whatever decides their bytes (platform, instruction set, page layout, engine
version) is part of the spec, so that an engine with other pages has another keyspace.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from math import lcm
from pathlib import Path
from typing import Any

from kvstore.errors import SetupError
from kvstore.integrations.vllm.options import Options
from kvstore.spec import Group, ModelSpec, Shard

SUPPORTED = ((0, 32), (0, 33))
"""vLLM versions from, and below."""

KINDS = ("FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec")
"""KV cache specs whose pages hold every token of their page."""

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
SAMPLE_BYTES = 1 << 16
SAMPLE_STEP = 1 << 24
"""Of a weight file, 64 KiB in every 16 MiB go into its digest."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One group of the engine's KV cache: layers that share a page table."""

    layers: tuple[str, ...]  # the engine's names, in our order
    page_tokens: int
    page_bytes: int  # of one layer on one rank
    sliding: bool  # the engine frees pages that left the window


@dataclass(frozen=True, slots=True)
class Identity:
    """What a connector stores under. `shards[rank][group]`."""

    spec: ModelSpec
    layouts: tuple[Layout, ...]
    shards: tuple[tuple[Shard, ...], ...]

    @property
    def needed(self) -> tuple[Shard, ...]:
        """Every rank's shards, each once: a hit is what all ranks hold."""
        return tuple(dict.fromkeys(shard for rank in self.shards for shard in rank))


def check_version(version: str) -> None:
    """SetupError unless the connector was made for this engine."""
    found = re.match(r"(\d+)\.(\d+)", version)
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
    if found is None or not SUPPORTED[0] <= (int(found[1]), int(found[2])) < SUPPORTED[1]:
        raise SetupError(f"vLLM {version} is not supported: use {low} <= version < {high}")


def identify(vllm_config: Any, kv_cache_config: Any, options: Options, version: str, platform: str) -> Identity:
    """From the engine's two configurations. `platform`: what decides pages and numerics on this machine.

    SetupError names what is not supported. Reads the model's folder; does not mutate.
    """
    check_version(version)
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "speculative decoding with a model that has its own KV": _drafts(vllm_config),
    }
    for what, used in refused.items():
        if used:
            raise SetupError(f"the kvstore connector does not support {what}: switch one of them off")
    total_heads = vllm_config.model_config.get_total_num_kv_heads()
    layouts: list[Layout] = []
    groups: list[Group] = []
    shards: list[list[Shard]] = []
    for engine_group in kv_cache_config.kv_cache_groups:
        layout, heads = _layout(engine_group)
        index = len(layouts)
        whole = heads * ranks if total_heads >= ranks and not _latent(engine_group) else max(1, total_heads)
        whole = heads if _latent(engine_group) else whole
        firsts = [rank * whole // ranks if whole > heads else 0 for rank in range(ranks)]
        groups.append(
            Group(
                kind="opaque",
                layers=len(layout.layers),
                kv_heads=whole,
                page_tokens=layout.page_tokens,
                page_bytes=layout.page_bytes // heads * whole,
            )
        )
        layouts.append(layout)
        shards.append([Shard(index, 0, len(layout.layers), first, heads) for first in firsts])
    page = lcm(*(layout.page_tokens for layout in layouts))
    model, revision = model_identity(vllm_config, options)
    cache = vllm_config.cache_config
    layout_name = getattr(kv_cache_config, "kv_cache_layout", None) or "default"
    spec = ModelSpec(
        model=model,
        revision=revision,
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        numerics=f"{platform}:kv={cache.cache_dtype}:q={vllm_config.model_config.quantization or 'none'}",
        layout=f"opaque:vllm-{version}:{layout_name}",
        block_tokens=-(-options.block_tokens // page) * page,
        groups=tuple(groups),
    )
    return Identity(spec, tuple(layouts), tuple(zip(*shards, strict=True)))


def _drafts(vllm_config: Any) -> bool:
    speculative = getattr(vllm_config, "speculative_config", None)
    return speculative is not None and getattr(speculative, "method", "") != "ngram"


def _latent(engine_group: Any) -> bool:
    return "MLA" in type(engine_group.kv_cache_spec).__name__


def _layout(engine_group: Any) -> tuple[Layout, int]:
    """The group's layout and its kv heads on one rank."""
    found = engine_group.kv_cache_spec
    kind = type(found).__name__
    if kind not in KINDS:
        raise SetupError(f"KV cache groups of kind {kind} are not supported: known are {', '.join(KINDS)}")
    layers = tuple(sorted(engine_group.layer_names, key=natural))
    heads = 1 if _latent(engine_group) else found.num_kv_heads
    if found.page_size_bytes % heads:
        raise SetupError(f"a page of {found.page_size_bytes} bytes is not a multiple of its {heads} heads")
    return Layout(layers, found.block_size, found.page_size_bytes, kind == "SlidingWindowSpec"), heads


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts "layers.10" after "layers.9"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def model_identity(vllm_config: Any, options: Options) -> tuple[str, str]:
    """(model, revision). Equal only where weights and configuration are: the path says nothing about them."""
    model = vllm_config.model_config
    config = model.hf_text_config.to_dict() if hasattr(model.hf_text_config, "to_dict") else {}
    ignored = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")
    plain = {name: value for name, value in config.items() if name not in ignored}
    text = json.dumps(plain, sort_keys=True, default=str)
    folder = Path(str(model.model))
    if vllm_config.load_config.load_format == "dummy":
        weights = f"dummy:{model.seed}"
    elif folder.is_dir():
        weights = folder_digest(folder)
    else:
        weights = str(getattr(model.hf_config, "_commit_hash", None) or model.revision or "unnamed")
    name = options.model_id or (folder.name if folder.is_dir() else str(model.model))
    return name, f"{weights}:{sha256(text.encode()).hexdigest()[:16]}"


def folder_digest(folder: Path) -> str:
    """Of the names, sizes and samples of all weight files (or of a LoRA adapter's). 32 hex digits."""
    digest = sha256()
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset in [*range(0, size, SAMPLE_STEP), max(0, size - SAMPLE_BYTES)]:
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]
