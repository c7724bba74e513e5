"""`kvstore bench codec`: its models run, and its bars tell a good codec from a bad one."""

from __future__ import annotations

import torch

from kvstore.bench import codec_bytemodel as bytemodel
from kvstore.bench.codec_kv import attention_error, byte_layers, byte_sequences, llama_like
from kvstore.bench.codec_trip import Trip
from kvstore.codecs import FAST, INT4, INT8, NESTED


def test_codecs_cost_what_they_may_on_a_trained_model() -> None:
    weights, sequences = bytemodel.load(), byte_sequences(1, 192)
    layers = byte_layers(weights, sequences)
    errors = {name: attention_error(layers, Trip(codec)) for name, codec in (("int8", INT8), ("int4", INT4))}
    assert 0 < errors["int8"] < 0.015 < errors["int4"] < 0.2
    for codec in (FAST, NESTED):
        assert attention_error(layers, Trip(codec)) == 0
    ruined = attention_error(layers, lambda values, value: values.roll(1, 0))
    assert ruined > 0.5, "the measure does not see that keys belong to other tokens"


def test_the_byte_model_has_learned_and_kl_sees_damage() -> None:
    weights, [sequence] = bytemodel.load(), byte_sequences(1, 256)
    with torch.no_grad():
        logits, _ = bytemodel.forward(weights, sequence[None, :-1])
    loss = torch.nn.functional.cross_entropy(logits[0], sequence[1:])
    assert float(loss) < 2.0, "nats a byte on text it has not seen; an untrained model has 5.5"
    same = bytemodel.kl_of(weights, [sequence], 64, lambda values, value: values)
    ruined = bytemodel.kl_of(weights, [sequence], 64, lambda values, value: torch.zeros_like(values))
    assert same < 1e-6 and ruined > 0.1


def test_synthetic_kv_has_outlier_channels_and_compresses_as_real_kv_does() -> None:
    keys = llama_like(64, 8, 128, 0, value=False)
    sizes = keys.abs().mean(0).reshape(-1)
    assert float(sizes.max() / sizes.median()) > 8
    trip = Trip(FAST)
    trip(keys, False)
    assert 1.3 < trip.ratio < 1.34 and trip.used == {FAST: 1}
