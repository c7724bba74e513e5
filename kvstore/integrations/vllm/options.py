"""What `kv_connector_extra_config` may say. An unknown key is an error, as everywhere."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvstore.config import MIB, ClientConfig, load_config
from kvstore.errors import ConfigError
from kvstore.values import convert


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of the connector. The client's (`coordinators`, `workers`, `namespace`, `token_file`) stand beside."""

    config_file: str = ""  # TOML file of kvstore; empty: KVSTORE_CONFIG, or defaults
    model_id: str = ""  # names the model where its path does not; replicas that share must agree
    block_tokens: int = 64  # rounded up to a multiple of the engine's page
    load: str = "async"  # async | sync: between the engine's steps, or inside one
    min_load_blocks: int = 1  # shorter hits are computed
    lookup_wait_ms: float = 4.0  # the scheduler stands still for a lookup at most so long, then asks again later
    lookup_timeout_ms: float = 250.0  # after which a lookup is a miss
    own_saves_wait_ms: float = 100.0  # a lookup waits so long for blocks this engine is just storing
    pin_max_s: float = 120.0  # blocks of a matched request are kept so long, while it waits and loads
    pins_max: int = 512  # requests whose blocks are kept at a time
    load_timeout_s: float = 5.0  # of one load while the prefill rate is unknown, and at most
    load_patience_ms: float = 0.0  # a load may take so long even where computing is measured to be faster
    save: bool = True
    save_decode: bool = False  # blocks of generated tokens too
    save_bytes_max: int = 256 * MIB  # copied out and not yet stored; beyond it saves are dropped
    load_bytes_max: int = 256 * MIB  # buffers of loads in flight; a longer load goes through them in parts
    requests_max: int = 4096  # followed at a time

    def __post_init__(self) -> None:
        if self.load not in ("async", "sync"):
            raise ConfigError(f"load = {self.load!r}: use async or sync")
        for name in ("block_tokens", "min_load_blocks", "save_bytes_max", "load_bytes_max", "requests_max", "pins_max"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("lookup_wait_ms", "lookup_timeout_ms", "load_timeout_s", "pin_max_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be greater than 0")
        for name in ("load_patience_ms", "own_saves_wait_ms"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least 0")


def read_options(extra: Mapping[str, Any]) -> tuple[Options, ClientConfig]:
    """The connector's settings and the client's, from the engine's configuration. ConfigError names a wrong key."""
    own_types = typing.get_type_hints(Options)
    client_names = [field.name for field in dataclasses.fields(ClientConfig)]
    own: dict[str, Any] = {}
    client: dict[str, object] = {"verify_memory": True}  # a pass over bytes is nothing beside computing them
    for name, value in extra.items():
        if name in own_types:
            try:
                own[name] = convert(name, own_types[name], value)
            except ValueError as error:
                raise ConfigError(f"kv_connector_extra_config: {name}: {error}") from error
        elif name in client_names:
            client[name] = value
        else:
            known = ", ".join([*own_types, *client_names])
            raise ConfigError(f"kv_connector_extra_config: unknown key {name!r}; known: {known}")
    options = Options(**own)
    return options, load_config(options.config_file or None, overrides={"client": client}).client
