from kvstore.wire import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Ack(_message.Message):
    __slots__ = ["applied", "waiting"]
    class AppliedEntry(_message.Message):
        __slots__ = ["key", "value"]
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    applied: _containers.ScalarMap[str, int]
    waiting: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, applied: _Optional[_Mapping[str, int]] = ..., waiting: _Optional[_Iterable[str]] = ...) -> None: ...

class AnnounceReply(_message.Message):
    __slots__ = ["ack", "coordinators", "fenced", "hints", "snapshot_request", "view", "welcome"]
    ACK_FIELD_NUMBER: _ClassVar[int]
    COORDINATORS_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    HINTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ack: Ack
    coordinators: _containers.RepeatedCompositeFieldContainer[_common_pb2.CoordinatorInfo]
    fenced: Fenced
    hints: Hints
    snapshot_request: SnapshotRequest
    view: View
    welcome: Welcome
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., snapshot_request: _Optional[_Union[SnapshotRequest, _Mapping]] = ..., fenced: _Optional[_Union[Fenced, _Mapping]] = ..., view: _Optional[_Union[View, _Mapping]] = ..., hints: _Optional[_Union[Hints, _Mapping]] = ..., coordinators: _Optional[_Iterable[_Union[_common_pb2.CoordinatorInfo, _Mapping]]] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ["delta", "heartbeat", "register", "snapshot"]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    heartbeat: Heartbeat
    register: Register
    snapshot: SnapshotChunk
    def __init__(self, register: _Optional[_Union[Register, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., snapshot: _Optional[_Union[SnapshotChunk, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ["added", "removed"]
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    added: _common_pb2.Run
    removed: _common_pb2.RemovedRun
    def __init__(self, added: _Optional[_Union[_common_pb2.Run, _Mapping]] = ..., removed: _Optional[_Union[_common_pb2.RemovedRun, _Mapping]] = ...) -> None: ...

class CoordinatorStatus(_message.Message):
    __slots__ = ["complete", "counters", "directory_blocks", "lag", "latencies", "namespaces", "pid", "self", "workers"]
    class CountersEntry(_message.Message):
        __slots__ = ["key", "value"]
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    LATENCIES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SELF_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    complete: bool
    counters: _containers.ScalarMap[str, int]
    directory_blocks: int
    lag: int
    latencies: _containers.RepeatedCompositeFieldContainer[_common_pb2.Latency]
    namespaces: _containers.RepeatedCompositeFieldContainer[_common_pb2.NamespaceStatus]
    pid: int
    self: _common_pb2.CoordinatorInfo
    workers: _containers.RepeatedCompositeFieldContainer[_common_pb2.WorkerStatus]
    def __init__(self, self_: _Optional[_Union[_common_pb2.CoordinatorInfo, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[_common_pb2.WorkerStatus, _Mapping]]] = ..., directory_blocks: _Optional[int] = ..., complete: bool = ..., counters: _Optional[_Mapping[str, int]] = ..., pid: _Optional[int] = ..., namespaces: _Optional[_Iterable[_Union[_common_pb2.NamespaceStatus, _Mapping]]] = ..., latencies: _Optional[_Iterable[_Union[_common_pb2.Latency, _Mapping]]] = ..., lag: _Optional[int] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ["changes", "dictionary", "first_seq", "last_seq", "namespace"]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[Change]
    dictionary: _containers.RepeatedCompositeFieldContainer[_common_pb2.DictionaryEntry]
    first_seq: int
    last_seq: int
    namespace: str
    def __init__(self, namespace: _Optional[str] = ..., first_seq: _Optional[int] = ..., last_seq: _Optional[int] = ..., dictionary: _Optional[_Iterable[_Union[_common_pb2.DictionaryEntry, _Mapping]]] = ..., changes: _Optional[_Iterable[_Union[Change, _Mapping]]] = ...) -> None: ...

class Fenced(_message.Message):
    __slots__ = ["epoch"]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ["heads", "leaving", "status", "wants"]
    class HeadsEntry(_message.Message):
        __slots__ = ["key", "value"]
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    HEADS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    WANTS_FIELD_NUMBER: _ClassVar[int]
    heads: _containers.ScalarMap[str, int]
    leaving: bool
    status: _common_pb2.WorkerStatus
    wants: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, heads: _Optional[_Mapping[str, int]] = ..., status: _Optional[_Union[_common_pb2.WorkerStatus, _Mapping]] = ..., leaving: bool = ..., wants: _Optional[_Iterable[str]] = ...) -> None: ...

class Hints(_message.Message):
    __slots__ = ["dictionary", "holders", "marks", "pulls", "view"]
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    MARKS_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    dictionary: _containers.RepeatedCompositeFieldContainer[_common_pb2.DictionaryEntry]
    holders: _containers.RepeatedCompositeFieldContainer[_common_pb2.Member]
    marks: _containers.RepeatedCompositeFieldContainer[MarkHint]
    pulls: _containers.RepeatedCompositeFieldContainer[PullHint]
    view: bytes
    def __init__(self, view: _Optional[bytes] = ..., dictionary: _Optional[_Iterable[_Union[_common_pb2.DictionaryEntry, _Mapping]]] = ..., holders: _Optional[_Iterable[_Union[_common_pb2.Member, _Mapping]]] = ..., pulls: _Optional[_Iterable[_Union[PullHint, _Mapping]]] = ..., marks: _Optional[_Iterable[_Union[MarkHint, _Mapping]]] = ...) -> None: ...

class MarkHint(_message.Message):
    __slots__ = ["keys", "namespace", "secondary", "shard"]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SECONDARY_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    namespace: str
    secondary: bool
    shard: bytes
    def __init__(self, namespace: _Optional[str] = ..., shard: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., secondary: bool = ...) -> None: ...

class MembersReply(_message.Message):
    __slots__ = ["boot_id", "coordinators", "members"]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    COORDINATORS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    coordinators: _containers.RepeatedCompositeFieldContainer[_common_pb2.CoordinatorInfo]
    members: _containers.RepeatedCompositeFieldContainer[_common_pb2.Member]
    def __init__(self, members: _Optional[_Iterable[_Union[_common_pb2.Member, _Mapping]]] = ..., coordinators: _Optional[_Iterable[_Union[_common_pb2.CoordinatorInfo, _Mapping]]] = ..., boot_id: _Optional[str] = ...) -> None: ...

class MembersRequest(_message.Message):
    __slots__ = []
    def __init__(self) -> None: ...

class PullHint(_message.Message):
    __slots__ = ["group", "keys", "namespace", "root", "shard", "sources"]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    group: bytes
    keys: bytes
    namespace: str
    root: bytes
    shard: bytes
    sources: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, namespace: _Optional[str] = ..., root: _Optional[bytes] = ..., shard: _Optional[bytes] = ..., group: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., sources: _Optional[_Iterable[int]] = ...) -> None: ...

class Register(_message.Message):
    __slots__ = ["heads", "hello", "member"]
    class HeadsEntry(_message.Message):
        __slots__ = ["key", "value"]
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    HEADS_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    heads: _containers.ScalarMap[str, int]
    hello: _common_pb2.HelloRequest
    member: _common_pb2.Member
    def __init__(self, member: _Optional[_Union[_common_pb2.Member, _Mapping]] = ..., heads: _Optional[_Mapping[str, int]] = ..., hello: _Optional[_Union[_common_pb2.HelloRequest, _Mapping]] = ...) -> None: ...

class ReplicaScore(_message.Message):
    __slots__ = ["blocks", "candidate", "engine_blocks", "known", "tiers"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    candidate: str
    engine_blocks: int
    known: bool
    tiers: _containers.RepeatedCompositeFieldContainer[TierBlocks]
    def __init__(self, candidate: _Optional[str] = ..., known: bool = ..., engine_blocks: _Optional[int] = ..., blocks: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierBlocks, _Mapping]]] = ...) -> None: ...

class ScoreReply(_message.Message):
    __slots__ = ["block_tokens", "blocks", "boot_id", "complete", "coordinators", "scores"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    COORDINATORS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    block_tokens: int
    blocks: int
    boot_id: str
    complete: bool
    coordinators: _containers.RepeatedCompositeFieldContainer[_common_pb2.CoordinatorInfo]
    scores: _containers.RepeatedCompositeFieldContainer[ReplicaScore]
    def __init__(self, scores: _Optional[_Iterable[_Union[ReplicaScore, _Mapping]]] = ..., blocks: _Optional[int] = ..., block_tokens: _Optional[int] = ..., complete: bool = ..., boot_id: _Optional[str] = ..., coordinators: _Optional[_Iterable[_Union[_common_pb2.CoordinatorInfo, _Mapping]]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ["candidates", "keys", "least", "root", "shards"]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedScalarFieldContainer[str]
    keys: bytes
    least: _common_pb2.Fidelity
    root: bytes
    shards: _containers.RepeatedCompositeFieldContainer[_common_pb2.Shard]
    def __init__(self, root: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., shards: _Optional[_Iterable[_Union[_common_pb2.Shard, _Mapping]]] = ..., least: _Optional[_Union[_common_pb2.Fidelity, str]] = ..., candidates: _Optional[_Iterable[str]] = ...) -> None: ...

class SnapshotChunk(_message.Message):
    __slots__ = ["dictionary", "first", "index", "last", "namespace", "resume_seq", "runs", "snapshot"]
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    RESUME_SEQ_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    dictionary: _containers.RepeatedCompositeFieldContainer[_common_pb2.DictionaryEntry]
    first: bool
    index: int
    last: bool
    namespace: str
    resume_seq: int
    runs: _containers.RepeatedCompositeFieldContainer[_common_pb2.Run]
    snapshot: int
    def __init__(self, namespace: _Optional[str] = ..., resume_seq: _Optional[int] = ..., first: bool = ..., last: bool = ..., dictionary: _Optional[_Iterable[_Union[_common_pb2.DictionaryEntry, _Mapping]]] = ..., runs: _Optional[_Iterable[_Union[_common_pb2.Run, _Mapping]]] = ..., snapshot: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ["namespace"]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    def __init__(self, namespace: _Optional[str] = ...) -> None: ...

class TierBlocks(_message.Message):
    __slots__ = ["blocks", "tier"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    tier: _common_pb2.Tier
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., blocks: _Optional[int] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ["digest", "members"]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    members: _containers.RepeatedCompositeFieldContainer[_common_pb2.Member]
    def __init__(self, digest: _Optional[bytes] = ..., members: _Optional[_Iterable[_Union[_common_pb2.Member, _Mapping]]] = ...) -> None: ...

class WatchMember(_message.Message):
    __slots__ = ["gone", "hidden", "member"]
    GONE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    gone: bool
    hidden: bool
    member: _common_pb2.Member
    def __init__(self, member: _Optional[_Union[_common_pb2.Member, _Mapping]] = ..., hidden: bool = ..., gone: bool = ...) -> None: ...

class WatchReply(_message.Message):
    __slots__ = ["delta", "dictionary", "epoch", "member", "snapshot", "state", "worker"]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    DICTIONARY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    dictionary: _containers.RepeatedCompositeFieldContainer[_common_pb2.DictionaryEntry]
    epoch: int
    member: WatchMember
    snapshot: SnapshotChunk
    state: WatchState
    worker: str
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[int] = ..., member: _Optional[_Union[WatchMember, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., snapshot: _Optional[_Union[SnapshotChunk, _Mapping]] = ..., state: _Optional[_Union[WatchState, _Mapping]] = ..., dictionary: _Optional[_Iterable[_Union[_common_pb2.DictionaryEntry, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ["entries_max"]
    ENTRIES_MAX_FIELD_NUMBER: _ClassVar[int]
    entries_max: int
    def __init__(self, entries_max: _Optional[int] = ...) -> None: ...

class WatchState(_message.Message):
    __slots__ = ["boot_id", "complete", "coordinators"]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    COORDINATORS_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    complete: bool
    coordinators: _containers.RepeatedCompositeFieldContainer[_common_pb2.CoordinatorInfo]
    def __init__(self, complete: bool = ..., boot_id: _Optional[str] = ..., coordinators: _Optional[_Iterable[_Union[_common_pb2.CoordinatorInfo, _Mapping]]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ["applied", "heartbeat_ms", "lease_ms", "self", "snapshot_turns"]
    class AppliedEntry(_message.Message):
        __slots__ = ["key", "value"]
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    SELF_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_TURNS_FIELD_NUMBER: _ClassVar[int]
    applied: _containers.ScalarMap[str, int]
    heartbeat_ms: int
    lease_ms: int
    self: _common_pb2.CoordinatorInfo
    snapshot_turns: bool
    def __init__(self, self_: _Optional[_Union[_common_pb2.CoordinatorInfo, _Mapping]] = ..., heartbeat_ms: _Optional[int] = ..., lease_ms: _Optional[int] = ..., applied: _Optional[_Mapping[str, int]] = ..., snapshot_turns: bool = ...) -> None: ...
