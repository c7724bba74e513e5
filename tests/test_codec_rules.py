"""What namespaces.toml says of codecs, planes and fidelity."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.auth import load_policy
from kvstore.codec_rules import CodecRules
from kvstore.errors import ConfigError
from kvstore.types import Fidelity, Tier


def rules_of(tmp_path: Path, text: str) -> CodecRules:
    (tmp_path / "namespaces.toml").write_text("[namespaces.a]\n" + text)
    return load_policy(str(tmp_path / "namespaces.toml")).namespaces["a"].codecs


def test_the_default_is_exact(tmp_path: Path) -> None:
    assert rules_of(tmp_path, "") == CodecRules() and CodecRules().least == Fidelity.EXACT


def test_everything_is_read(tmp_path: Path) -> None:
    text = 'least_fidelity = "compact"\ncodec = "nested"\ncodec_layers = { "0" = "dense", "2-5" = "near" }\n'
    rules = rules_of(tmp_path, text + "planes = { ssd = 2, redis = 1 }")
    assert rules == CodecRules(
        Fidelity.COMPACT, "nested", ((0, 0, "dense"), (2, 5, "near")), {Tier.SSD: 2, Tier.REDIS: 1}
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('least_fidelity = "good"', "least_fidelity"),
        ('codec = "gzip"', "codec"),
        ('codec = "near"', "near keeps near in host, but least_fidelity is exact"),
        ('codec = "compact"\nleast_fidelity = "near"', "compact keeps compact"),
        ('codec_layers = { "0" = "near" }', "least_fidelity is exact"),
        ('codec_layers = { "one" = "dense" }', "layers as"),
        ('codec_layers = "dense"', "table of layers"),
        ("planes = { hot = 1 }", "host, ssd or redis"),
        ("planes = { ssd = 4 }", "1 to 3"),
        ("planes = 2", "table of tiers"),
        ('codec = "nested"\nleast_fidelity = "near"\nplanes = { redis = 1 }', "nested keeps compact in redis"),
    ],
)
def test_what_does_not_fit_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rules_of(tmp_path, text)
