"""How a namespace's blocks are encoded: codecs by layer, planes by tier, and the least fidelity it allows. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.codecs import CODECS, LOSSLESS_NAMES, NAMES, PLANES_MAX, codec_for, fidelity_of
from kvstore.errors import ConfigError
from kvstore.layout import OPAQUE, STATE, Chunk, chunks
from kvstore.spec import ModelSpec, Shard
from kvstore.types import Fidelity, Tier

KEYS = ("least_fidelity", "codec", "codec_layers", "planes")
"""Of `[namespaces.NAME]`."""

PLANE_TIERS = {"host": Tier.HOST, "ssd": Tier.SSD, "redis": Tier.REDIS}
_LAYERS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_EXAMPLE = "bfloat16"  # what lossy codecs know: the worst that a name can mean


@dataclass(frozen=True, slots=True)
class CodecRules:
    """`codec` empty: the store's own (`store.codec`). `layers`: (first, last, name) of the model's, the first that fits
    counts. `planes`: of nested chunks, leading ones kept in a tier; all where it names none."""

    least: Fidelity = Fidelity.EXACT
    codec: str = ""
    layers: tuple[tuple[int, int, str], ...] = ()
    planes: Mapping[Tier, int] = field(default_factory=dict)

    def names(self, default: str) -> set[str]:
        """Every codec that may be used."""
        return {self.codec or default, *(name for _, _, name in self.layers)}

    def planes_in(self, tier: Tier) -> int:
        return self.planes.get(tier, PLANES_MAX)

    def codecs(self, spec: ModelSpec, shard: Shard, default: str) -> tuple[int, ...]:
        """Codec of every chunk of a shard. States and engine pages are always exact."""
        base = sum(group.layers for group in spec.groups[: shard.group])
        return tuple(self._codec(piece, base + piece.layer, default) for piece in chunks(spec, shard))

    def _codec(self, piece: Chunk, layer: int, default: str) -> int:
        named = (name for first, last, name in self.layers if first <= layer <= last)
        name = next(named, self.codec or default)
        if piece.component in (STATE, OPAQUE) and name not in LOSSLESS_NAMES:
            name = "lossless"
        return codec_for(name, piece.dtype)

    def fidelity_in(self, tier: Tier, codecs: tuple[int, ...]) -> Fidelity:
        """What a block of these codecs is worth in a tier."""
        planes = self.planes_in(tier)
        return min(fidelity_of(codec, min(planes, CODECS[codec].planes)) for codec in codecs)


def parse(table: Mapping[str, Any], where: str) -> CodecRules:
    """The rules in a namespace's table, which may have other keys. ConfigError."""
    least = _fidelity(table.get("least_fidelity", "exact"), f"{where}.least_fidelity")
    codec = table.get("codec", "")
    if codec != "" and codec not in NAMES:
        raise ConfigError(f"{where}.codec = {codec!r}: one of {', '.join(NAMES)}")
    rules = CodecRules(least, codec, _layers(table, where), _planes(table, where))
    names = rules.names("lossless")
    for tier in PLANE_TIERS.values():
        for name in sorted(names):
            worst = rules.fidelity_in(tier, (codec_for(name, _EXAMPLE),))
            if worst < least:
                raise ConfigError(
                    f"{where}: {name} keeps {worst.name.lower()} in {tier.name.lower()}, but least_fidelity is "
                    f"{least.name.lower()}: lower it, or choose another codec or more planes"
                )
    return rules


def _fidelity(value: Any, where: str) -> Fidelity:
    names = {fidelity.name.lower(): fidelity for fidelity in Fidelity}
    if value not in names:
        raise ConfigError(f"{where} = {value!r}: one of {', '.join(names)}")
    return names[value]


def _layers(table: Mapping[str, Any], where: str) -> tuple[tuple[int, int, str], ...]:
    layers = table.get("codec_layers", {})
    if not isinstance(layers, dict):
        raise ConfigError(f"{where}.codec_layers must be a table of layers, {{ '0-3' = 'dense' }}")
    found = []
    for name, codec in layers.items():
        match = _LAYERS.fullmatch(name)
        if match is None or codec not in NAMES:
            raise ConfigError(f"{where}.codec_layers: {name!r} = {codec!r}: layers as '0' or '0-3', and a codec")
        first = int(match.group(1))
        found.append((first, int(match.group(2) or first), str(codec)))
    return tuple(found)


def _planes(table: Mapping[str, Any], where: str) -> dict[Tier, int]:
    planes = table.get("planes", {})
    if not isinstance(planes, dict):
        raise ConfigError(f"{where}.planes must be a table of tiers, {{ redis = 1 }}")
    found = {}
    for name, count in planes.items():
        if name not in PLANE_TIERS or type(count) is not int or not 1 <= count <= PLANES_MAX:
            raise ConfigError(f"{where}.planes: {name} = {count!r}: host, ssd or redis, 1 to {PLANES_MAX}")
        found[PLANE_TIERS[name]] = count
    return found
