"""The loader: layers, types, ranges, and messages that name the key."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from kvstore.config import GIB, MIB, Config, load_config, override, parse_toml, settings, to_toml
from kvstore.errors import ConfigError
from kvstore.values import parse_size


def write(folder: Path, text: str) -> Path:
    path = folder / "kvstore.toml"
    path.write_text(text)
    return path


def test_defaults_are_valid_and_frozen() -> None:
    config = load_config(env={})
    assert config == Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.store.host_bytes = 1  # type: ignore[misc]


def test_overrides_beat_environment_beats_file_beats_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, '[store]\nhost_bytes = "1GiB"\nthreads = 2\nssd_folder = "/file"\n')
    env = {"KVSTORE_STORE_THREADS": "3", "KVSTORE_STORE_SSD_FOLDER": "/env", "PATH": "/bin"}
    config = load_config(path, env, {"store": {"ssd_folder": "/flag"}})
    assert (config.store.host_bytes, config.store.threads, config.store.ssd_folder) == (GIB, 3, "/flag")
    assert config.store.ssd_bytes == Config().store.ssd_bytes


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path, "[fleet]\nnodes = 3\n")
    assert load_config(env={"KVSTORE_CONFIG": str(path)}).fleet.nodes == 3


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("64MiB", 64 * MIB),
        ("2 GiB", 2 * GIB),
        ("1.5KiB", 1536),
        ("4096", 4096),
        ("3GB", 3 * 10**9),
        ("0", 0),
        ("7B", 7),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes
    assert (
        load_config(env={"KVSTORE_STORE_HOT_BYTES": text, "KVSTORE_STORE_HOST_BYTES": "4GiB"}).store.hot_bytes == nbytes
    )


@pytest.mark.parametrize("text", ["", "MiB", "64mib", "-1", "1e9", "64 MiBs", "٣MiB"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("toml", "names"),
    [
        ("[store]\nhost_byte = 1\n", ["store.host_byte", "did you mean store.host_bytes"]),
        ("[stor]\nhost_bytes = 1\n", ["[stor]", "did you mean store"]),
        ("[store]\nzzz = 1\n", ["store.zzz", "known:", "host_bytes"]),
        ("store = 3\n", ["store is a section"]),
        ("[store]\nhost_bytes = -1\n", ["store.host_bytes = -1", "greater than 0"]),
        ("[store]\nhost_bytes = true\n", ["store.host_bytes", "True", "whole number"]),
        ("[store]\nhost_bytes = 1.5\n", ["store.host_bytes", "whole number"]),
        ('[store]\nhost_bytes = "lots"\n', ["store.host_bytes", "64MiB"]),
        ("[store]\nssd_folder = 3\n", ["store.ssd_folder", "not a text"]),
        ('[store]\nssd_direct = "maybe"\n', ["store.ssd_direct", "neither true nor false"]),
        ("[store]\ndevices = [1]\n", ["store.devices", "list of strings"]),
        ("[store]\nthreads = 0\n", ["store.threads = 0"]),
        ("[store]\nssd_sync_s = nan\n", ["store.ssd_sync_s = nan"]),
        ("[store]\nlow_watermark = 0.95\n", ["low_watermark", "high_watermark"]),
        ("[store]\nhigh_watermark = 1.5\n", ["high_watermark"]),
        ('[store]\ncodec = "gzip"\n', ["store.codec", "lossless"]),
        ('[store]\npolicy = "mru"\n', ["store.policy", "lru"]),
        ('[store]\nhot_bytes = "3GiB"\n', ["store.hot_bytes", "store.host_bytes"]),
        ("[coordinator]\nlease_s = 0.5\n", ["coordinator.lease_s", "heartbeat_s"]),
        ("[coordinator]\nmatch_wait_max_s = 0.5\n", ["match_wait_max_s"]),
        ('[server]\nbind = "nowhere"\n', ["server.bind", "HOST:PORT"]),
        ('[server]\nbind = "0.0.0.0:99999"\n', ["server.bind", "HOST:PORT"]),
        ('[fleet]\nname = "../x"\n', ["fleet.name"]),
        ("[store\n", ["not valid TOML"]),
    ],
)
def test_a_bad_file_names_the_key_in_one_line(tmp_path: Path, toml: str, names: list[str]) -> None:
    path = write(tmp_path, toml)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    message = str(caught.value)
    assert "\n" not in message
    for part in names:
        assert part in message


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent.toml: No such file"):
        load_config(tmp_path / "absent.toml", {})
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.toml", {})


def test_unknown_variables_are_errors_and_others_are_not_ours() -> None:
    with pytest.raises(ConfigError, match=r"KVSTORE_STORE_HOST_BYTE.*did you mean KVSTORE_STORE_HOST_BYTES"):
        load_config(env={"KVSTORE_STORE_HOST_BYTE": "1"})
    with pytest.raises(ConfigError, match=r"environment: coordinator\.lease_s"):
        load_config(env={"KVSTORE_COORDINATOR_LEASE_S": "soon"})
    assert load_config(env={"KVSTORED": "1", "HOME": "/"}) == Config()


def test_lists_and_truth_from_the_environment() -> None:
    env = {"KVSTORE_CLIENT_COORDINATORS": "127.0.0.1:1, 127.0.0.1:2", "KVSTORE_STORE_SSD_DIRECT": "no"}
    config = load_config(env=env)
    assert config.client.coordinators == ("127.0.0.1:1", "127.0.0.1:2")
    assert config.store.ssd_direct is False


def test_toml_round_trip_keeps_every_key() -> None:
    config = load_config(
        env={},
        overrides={
            "store": {"ssd_folder": 'a "quoted" \\ path\té', "devices": ["cuda:0", "cuda:1"], "ssd_sync_s": 0.25},
            "coordinator": {"lease_s": 9.0},
        },
    )
    text = to_toml(config)
    assert parse_toml(text) == config
    assert text.count("=") >= len(settings())


def test_override_checks_the_whole() -> None:
    assert override(Config(), {"store": {"threads": 1}}).store.threads == 1
    with pytest.raises(ConfigError, match="hot_bytes"):
        override(Config(), {"store": {"hot_bytes": "4GiB"}})


def test_the_reference_in_the_documentation_is_the_code() -> None:
    """docs/OPERATIONS.md lists every key, in order, with its default."""
    text = (Path(__file__).parent.parent / "docs" / "OPERATIONS.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| *(.*?) *\| *(.*?) *\| *(.*?) *\|$", text, re.MULTILINE)
    assert [key for key, *_ in rows] == list(settings())
    for key, shown, unit, _ in rows:
        _, default = settings()[key]
        if key.endswith(("_bytes", "_bytes_max")):
            assert unit == "bytes"
            assert parse_size(shown) == default, key
        else:
            value = tomllib.loads(f"x = {shown}")["x"]
            assert (tuple(value) if isinstance(value, list) else value) == default, key
        if key.endswith("_s"):
            assert unit == "seconds", key
