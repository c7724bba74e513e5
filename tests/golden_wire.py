"""The messages behind tests/golden/wire_*.bin. The files are kept for ever; run as a module to write a missing one."""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import Message

from kvstore.transport import local_frames
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2

GOLDEN = Path(__file__).parent / "golden"
KEY, ROOT, SHARD = bytes(range(16)), bytes(range(16, 32)), bytes(range(32, 48))

MEMBER = common_pb2.Member(
    id="w1", epoch=3, address="10.0.0.1:7000", socket="/run/kvstore/w1.sock", host="boot", node="a", state="alive"
)

MESSAGES: dict[str, Message] = {
    "match_request": common_pb2.MatchRequest(
        root=ROOT,
        keys=KEY + ROOT,
        shards=[common_pb2.Shard(layer_count=32, head_count=8)],
        least=common_pb2.FIDELITY_EXACT,
        after=[common_pb2.CommitToken(worker="w1", epoch=3, seq=99)],
        wait_ms=100,
    ),
    "match_reply": common_pb2.MatchReply(
        blocks=2,
        runs=[
            common_pb2.HolderRun(
                tier=common_pb2.TIER_SSD, fidelity=common_pb2.FIDELITY_EXACT, count=2, stored_bytes=4096
            )
        ],
        holders=[MEMBER],
        shards=[common_pb2.Shard(layer_count=32, head_count=8)],
        complete=True,
        boot_id="b",
        coordinators=[common_pb2.CoordinatorInfo(id="c1", boot_id="b", address="10.0.0.9:7100")],
    ),
    "watch_reply": coordinator_pb2.WatchReply(
        worker="w1",
        epoch=3,
        snapshot=coordinator_pb2.SnapshotChunk(namespace="default", resume_seq=7, first=True, last=True, snapshot=1),
        dictionary=[common_pb2.DictionaryEntry(spec_json='{"model":"m"}')],
    ),
    "watch_member": coordinator_pb2.WatchReply(member=coordinator_pb2.WatchMember(member=MEMBER, hidden=True)),
    "announce_register": coordinator_pb2.AnnounceRequest(
        register=coordinator_pb2.Register(
            member=MEMBER, heads={"default": 99}, hello=common_pb2.HelloRequest(protocol=1, capabilities=["get.v1"])
        )
    ),
    "announce_delta": coordinator_pb2.AnnounceRequest(
        delta=coordinator_pb2.Delta(
            namespace="default",
            first_seq=98,
            last_seq=99,
            dictionary=[common_pb2.DictionaryEntry(spec_json='{"model":"m"}')],
            changes=[
                coordinator_pb2.Change(
                    added=common_pb2.Run(
                        root=ROOT,
                        shard=SHARD,
                        tier=common_pb2.TIER_HOT,
                        fidelity=common_pb2.FIDELITY_EXACT,
                        parent=ROOT,
                        keys=KEY,
                        group=KEY,
                        stored_bytes=4096,
                    )
                ),
                coordinator_pb2.Change(removed=common_pb2.RemovedRun(shard=SHARD, keys=ROOT)),
            ],
        )
    ),
    "announce_snapshot": coordinator_pb2.AnnounceRequest(
        snapshot=coordinator_pb2.SnapshotChunk(namespace="default", resume_seq=99, first=True, last=True, snapshot=1)
    ),
    "announce_heartbeat": coordinator_pb2.AnnounceRequest(
        heartbeat=coordinator_pb2.Heartbeat(heads={"default": 99}, leaving=True)
    ),
    "announce_view": coordinator_pb2.AnnounceReply(view=coordinator_pb2.View(digest=KEY, members=[MEMBER])),
    "announce_hints": coordinator_pb2.AnnounceReply(
        hints=coordinator_pb2.Hints(
            view=KEY,
            dictionary=[common_pb2.DictionaryEntry(spec_json='{"model":"m"}')],
            holders=[MEMBER],
            pulls=[
                coordinator_pb2.PullHint(namespace="default", root=ROOT, shard=SHARD, group=KEY, keys=KEY, sources=[0])
            ],
            marks=[coordinator_pb2.MarkHint(namespace="default", shard=SHARD, keys=KEY, secondary=True)],
        )
    ),
    "pull_request": worker_pb2.PullRequest(
        spec_json='{"model":"m"}',
        shard=common_pb2.Shard(layer_count=32, head_count=8),
        group=KEY,
        keys=KEY + ROOT,
        source=MEMBER,
    ),
    "pull_reply": worker_pb2.PullReply(committed=1, held=2, dropped=1, missing=1, left=KEY + ROOT),
    "drain_reply": worker_pb2.DrainReply(
        done=True, groups=9, groups_done=9, blocks_moved=8, blocks_held=1, blocks_left=1
    ),
    "put_header": worker_pb2.PutHeader(
        spec_json='{"model":"m"}',
        blocks=[
            worker_pb2.PutBlock(
                shard=common_pb2.Shard(layer_count=32, head_count=8),
                key=KEY,
                parent=ROOT,
                group=KEY,
                depth=1,
                computed_on=3,
                raw_bytes=4096,
                copy_id=0x0123456789ABCDEF,
                offset=8192,
            )
        ],
    ),
    "score_request": coordinator_pb2.ScoreRequest(
        root=bytes(range(16)),
        keys=bytes(range(32)),
        shards=[common_pb2.Shard(layer_count=2, head_count=4)],
        least=common_pb2.FIDELITY_NEAR,
        candidates=["replica-1", "w1"],
    ),
    "score_reply": coordinator_pb2.ScoreReply(
        scores=[
            coordinator_pb2.ReplicaScore(
                candidate="replica-1",
                known=True,
                engine_blocks=2,
                blocks=1,
                tiers=[coordinator_pb2.TierBlocks(tier=common_pb2.TIER_SSD, blocks=1)],
            ),
            coordinator_pb2.ReplicaScore(candidate="w1"),
        ],
        blocks=2,
        block_tokens=64,
        complete=True,
        boot_id="b",
        coordinators=[common_pb2.CoordinatorInfo(id="c1", boot_id="b", address="h:1")],
    ),
    "put_reply": worker_pb2.PutReply(
        token=common_pb2.CommitToken(worker="w1", epoch=3, seq=99),
        states=[worker_pb2.BLOCK_COMMITTED, worker_pb2.BLOCK_DROPPED],
    ),
    "open_reply": worker_pb2.OpenReply(
        hold=5,
        blocks=[
            worker_pb2.OpenBlock(
                state=worker_pb2.BLOCK_FOUND,
                tier=common_pb2.TIER_HOT,
                segment=2,
                offset=65536,
                length=4096,
                generation=7,
                raw=True,
                header=bytes(160),
            )
        ],
        segments=[worker_pb2.SegmentInfo(segment=2, bytes=1 << 26, data_offset=8192)],
    ),
}

LOCAL_HELLO = worker_pb2.LocalHelloRequest(
    hello=common_pb2.HelloRequest(protocol=1, capabilities=["local.v1"]), namespace="default"
)


def files() -> dict[str, bytes]:
    """Name of each file -> its content as this build writes it."""
    made = {name: message.SerializeToString(deterministic=True) for name, message in MESSAGES.items()}
    hello = LOCAL_HELLO.SerializeToString(deterministic=True)
    made["local_hello"] = local_frames.encode(local_frames.REQUEST, 1, 1, hello)
    made["local_open_reply"] = local_frames.encode(local_frames.REPLY, 3, 2, made["open_reply"], flags=b"\x00")
    made["local_error"] = local_frames.encode(local_frames.ERROR, 6, 3, b"RESOURCE_EXHAUSTED\nover quota: later")
    return made


if __name__ == "__main__":
    for name, content in files().items():
        path = GOLDEN / f"wire_{name}.bin"
        if not path.exists():
            path.write_bytes(content)
