"""What a running engine stores under, without an engine: the connector's pure parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.errors import ConfigError, SetupError
from kvstore.integrations.vllm.identity import Identity, check_version, folder_digest, identify, natural
from kvstore.integrations.vllm.options import Options, read_options
from kvstore.integrations.vllm.requests import track
from kvstore.spec import Shard


class FullAttentionSpec(SimpleNamespace):
    pass


class SlidingWindowSpec(SimpleNamespace):
    pass


class MambaSpec(SimpleNamespace):
    pass


def engine(model: Path, *, ranks: int = 1, heads: int = 4, **changed: Any) -> Any:
    parallel = {"tensor_parallel_size": ranks, "pipeline_parallel_size": 1}
    config = SimpleNamespace(to_dict=lambda: {"hidden_size": 8, "rope_theta": changed.get("rope", 1.0)})
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel | changed.get("parallel", {})),
        model_config=SimpleNamespace(
            model=str(model),
            dtype="torch.bfloat16",
            quantization=None,
            hf_text_config=config,
            hf_config=SimpleNamespace(),
            revision=None,
            seed=0,
            get_total_num_kv_heads=lambda: heads,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
    )


def pages(*kinds: type, heads: int = 4) -> Any:
    groups = []
    for index, kind in enumerate(kinds):
        found = kind(block_size=32, page_size_bytes=heads * 1024, num_kv_heads=heads)
        names = [f"layers.{2 * layer + index}.attn" for layer in (0, 10, 2)]
        groups.append(SimpleNamespace(kv_cache_spec=found, layer_names=names))
    return SimpleNamespace(kv_cache_groups=groups, kv_cache_layout="LBHNC")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(200_000))
    return folder


def made(model: Path, *, kinds: tuple[type, ...] = (FullAttentionSpec,), **how: Any) -> Identity:
    local = how.pop("local_heads", 4)
    platform = how.pop("platform", "cpu:AVX2")
    return identify(engine(model, **how), pages(*kinds, heads=local), Options(), how.pop("version", "0.32.0"), platform)


def test_equal_engines_share_and_whatever_changes_the_bytes_does_not(model: Path, tmp_path: Path) -> None:
    one = made(model).spec
    moved = tmp_path / "elsewhere" / "tiny"
    moved.mkdir(parents=True)
    (moved / "model.safetensors").write_bytes(bytes(200_000))
    assert made(moved).spec == one, "a model is known by what it is, not by where it lies"
    (moved / "model.safetensors").write_bytes(b"\1" + bytes(199_999))
    others = [made(moved), made(model, rope=2.0), made(model, platform="cpu:AVX512")]
    assert len({one.root, *(other.spec.root for other in others)}) == 4


def test_ranks_hold_their_heads_and_a_hit_is_what_all_hold(model: Path) -> None:
    two = made(model, ranks=2, local_heads=2)
    assert two.needed == (Shard(0, 0, 3, 0, 2), Shard(0, 0, 3, 2, 2))
    assert two.spec.groups[0].kv_heads == 4 and two.spec.groups[0].page_bytes == 4096
    replicated = made(model, ranks=4, heads=2, local_heads=1)
    assert replicated.needed == (Shard(0, 0, 3, 0, 1), Shard(0, 0, 3, 1, 1))
    assert [rank[0].head_first for rank in replicated.shards] == [0, 0, 1, 1]


def test_groups_keep_their_own_pages_and_layers_their_order(model: Path) -> None:
    found = made(model, kinds=(FullAttentionSpec, SlidingWindowSpec))
    assert [layout.sliding for layout in found.layouts] == [False, True]
    assert found.layouts[0].layers == ("layers.0.attn", "layers.4.attn", "layers.20.attn")
    assert natural("layers.9.x") < natural("layers.10.x")
    assert {shard.group for shard in found.needed} == {0, 1}


def test_what_is_not_supported_is_refused_by_name(model: Path) -> None:
    with pytest.raises(SetupError, match="MambaSpec"):
        made(model, kinds=(MambaSpec,))
    with pytest.raises(SetupError, match="pipeline parallelism"):
        made(model, parallel={"pipeline_parallel_size": 2})
    for version in ("0.31.9", "0.33.0", "1.0", "dev"):
        with pytest.raises(SetupError, match=rf"vLLM {version} is not supported: use 0.32"):
            check_version(version)
    check_version("0.32.1+cpu")


def test_settings_are_checked_and_the_clients_stand_beside_them() -> None:
    options, client = read_options({"coordinators": "a:1,b:2", "block_tokens": 128, "save_bytes_max": "64MiB"})
    assert client.coordinators == ("a:1", "b:2") and options.block_tokens == 128
    assert options.save_bytes_max == 64 << 20
    with pytest.raises(ConfigError, match="unknown key 'coordinator'"):
        read_options({"coordinator": "a:1"})
    with pytest.raises(ConfigError, match="use async or sync"):
        read_options({"coordinators": "a:1", "load": "maybe"})


def request(**changed: Any) -> Any:
    plain = {
        "request_id": "r",
        "prompt_token_ids": [1] * 200,
        "all_token_ids": [1] * 200,
        "num_prompt_tokens": 200,
        "prompt_embeds": None,
        "lora_request": None,
        "cache_salt": None,
        "mm_features": [],
    }
    return SimpleNamespace(**plain | changed)


def keys(model: Path, **changed: Any) -> list[bytes] | None:
    tracked = track(request(**changed), made(model).spec, {})
    return None if tracked is None else list(tracked.extend(200))


def test_inputs_that_are_no_tokens_are_in_the_keys(model: Path, tmp_path: Path) -> None:
    plain = keys(model)
    assert plain is not None and len(plain) == 3
    salted = keys(model, cache_salt="tenant")
    image = SimpleNamespace(identifier="abc", mm_position=SimpleNamespace(offset=70))
    pictured = keys(model, mm_features=[image])
    assert salted is not None and pictured is not None
    assert salted[0] != plain[0]
    assert pictured[0] == plain[0] and pictured[1] != plain[1], "only from the block on where it begins"
    adapters = []
    for content in (b"one", b"two", b"one"):
        folder = tmp_path / f"adapter-{len(adapters)}"
        folder.mkdir()
        (folder / "adapter.safetensors").write_bytes(content)
        lora = SimpleNamespace(lora_name="mine", lora_path=str(folder), lora_int_id=1, load_inplace=False)
        adapters.append(keys(model, lora_request=lora))
    assert adapters[0] != adapters[1] and adapters[0] == adapters[2] != plain
    assert keys(model, prompt_embeds=object()) is None, "embeddings are not visible: nothing is shared"


def test_weights_are_sampled_by_name_and_size(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(1000))
    before = folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("no weights")
    assert folder_digest(tmp_path) == before
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert folder_digest(tmp_path) != before
