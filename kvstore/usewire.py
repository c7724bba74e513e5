"""`Use` and `Hint` to and from their messages."""

from __future__ import annotations

import math

from kvstore.errors import BadRequest
from kvstore.policies.usage import PRIORITY_MAX, SESSION_BYTES_MAX, Finish, Hint, Use
from kvstore.wire import worker_pb2


def _finish(value: int) -> Finish:
    """One that this build does not know is no knowledge."""
    return Finish(value) if value in set(Finish) else Finish.UNKNOWN


def use_to_wire(use: Use) -> worker_pb2.Use:
    return worker_pb2.Use(
        session=use.session,
        output_tokens=use.output_tokens,
        finish=int(use.finish),  # type: ignore[arg-type]
        time_s=use.time_s,
        blocks=use.blocks,
    )


def use_from_wire(message: worker_pb2.Use) -> Use:
    """BadRequest for what no caller can mean."""
    if len(message.session) > SESSION_BYTES_MAX:
        raise BadRequest(f"a session's name of {len(message.session)} bytes: at most {SESSION_BYTES_MAX}")
    time_s = message.time_s if message.HasField("time_s") else None
    if time_s is not None and not (math.isfinite(time_s) and time_s >= 0):
        raise BadRequest(f"time_s is {time_s}: give seconds of at least 0")
    return Use(
        message.session,
        message.output_tokens if message.HasField("output_tokens") else None,
        _finish(message.finish),
        time_s,
        message.blocks,
    )


def hint_to_wire(hint: Hint) -> worker_pb2.HintRequest:
    """Without root, blocks and use."""
    return worker_pb2.HintRequest(
        ended=hint.ended,
        output_tokens=hint.output_tokens,
        finish=int(hint.finish),  # type: ignore[arg-type]
        reuse_ms=None if hint.reuse_s is None else max(0, int(hint.reuse_s * 1000)),
        ttl_ms=None if hint.ttl_s is None else max(0, int(hint.ttl_s * 1000)),
        priority=hint.priority,
    )


def hint_from_wire(message: worker_pb2.HintRequest) -> Hint:
    """BadRequest for a priority out of range."""
    if abs(message.priority) > PRIORITY_MAX:
        raise BadRequest(f"priority {message.priority}: give -{PRIORITY_MAX} to {PRIORITY_MAX}")
    return Hint(
        message.ended,
        message.output_tokens if message.HasField("output_tokens") else None,
        _finish(message.finish),
        message.reuse_ms / 1000 if message.HasField("reuse_ms") else None,
        message.ttl_ms / 1000 if message.HasField("ttl_ms") else None,
        message.priority,
    )
