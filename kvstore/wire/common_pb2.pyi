from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor
FIDELITY_COMPACT: Fidelity
FIDELITY_EXACT: Fidelity
FIDELITY_NEAR: Fidelity
FIDELITY_UNSPECIFIED: Fidelity
TIER_HOST: Tier
TIER_HOT: Tier
TIER_REDIS: Tier
TIER_SSD: Tier
TIER_UNSPECIFIED: Tier

class CodecUse(_message.Message):
    __slots__ = ["chunks", "codec", "decode_s", "encode_s", "raw_bytes", "stored_bytes"]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    ENCODE_S_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    codec: str
    decode_s: float
    encode_s: float
    raw_bytes: int
    stored_bytes: int
    def __init__(self, codec: _Optional[str] = ..., chunks: _Optional[int] = ..., raw_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., encode_s: _Optional[float] = ..., decode_s: _Optional[float] = ...) -> None: ...

class CommitToken(_message.Message):
    __slots__ = ["epoch", "seq", "worker"]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    seq: int
    worker: str
    def __init__(self, worker: _Optional[str] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ...) -> None: ...

class CoordinatorInfo(_message.Message):
    __slots__ = ["address", "boot_id", "host", "id"]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    address: str
    boot_id: str
    host: str
    id: str
    def __init__(self, id: _Optional[str] = ..., boot_id: _Optional[str] = ..., address: _Optional[str] = ..., host: _Optional[str] = ...) -> None: ...

class DictionaryEntry(_message.Message):
    __slots__ = ["shard", "spec_json"]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    shard: Shard
    spec_json: str
    def __init__(self, spec_json: _Optional[str] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ["boot_id", "capabilities", "coordinators", "host", "id", "incomplete", "member", "namespaces_digest", "protocol", "software"]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    COORDINATORS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    coordinators: _containers.RepeatedCompositeFieldContainer[CoordinatorInfo]
    host: str
    id: str
    incomplete: bool
    member: Member
    namespaces_digest: str
    protocol: int
    software: str
    def __init__(self, protocol: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., software: _Optional[str] = ..., namespaces_digest: _Optional[str] = ..., id: _Optional[str] = ..., boot_id: _Optional[str] = ..., host: _Optional[str] = ..., member: _Optional[_Union[Member, _Mapping]] = ..., coordinators: _Optional[_Iterable[_Union[CoordinatorInfo, _Mapping]]] = ..., incomplete: bool = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ["capabilities", "coordinator", "namespaces_digest", "protocol", "software"]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    coordinator: CoordinatorInfo
    namespaces_digest: str
    protocol: int
    software: str
    def __init__(self, protocol: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., software: _Optional[str] = ..., namespaces_digest: _Optional[str] = ..., coordinator: _Optional[_Union[CoordinatorInfo, _Mapping]] = ...) -> None: ...

class HolderRun(_message.Message):
    __slots__ = ["count", "fidelity", "first_depth", "holder", "shard", "stored_bytes", "tier"]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    FIRST_DEPTH_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    count: int
    fidelity: Fidelity
    first_depth: int
    holder: int
    shard: int
    stored_bytes: int
    tier: Tier
    def __init__(self, holder: _Optional[int] = ..., shard: _Optional[int] = ..., tier: _Optional[_Union[Tier, str]] = ..., fidelity: _Optional[_Union[Fidelity, str]] = ..., first_depth: _Optional[int] = ..., count: _Optional[int] = ..., stored_bytes: _Optional[int] = ...) -> None: ...

class Latency(_message.Message):
    __slots__ = ["bounds_s", "counts", "sum_s", "tier", "what"]
    BOUNDS_S_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUM_S_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    bounds_s: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    sum_s: float
    tier: Tier
    what: str
    def __init__(self, what: _Optional[str] = ..., tier: _Optional[_Union[Tier, str]] = ..., bounds_s: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ..., sum_s: _Optional[float] = ...) -> None: ...

class MatchReply(_message.Message):
    __slots__ = ["blocks", "boot_id", "complete", "coordinators", "holders", "not_applied", "runs", "shards"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    COORDINATORS_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    NOT_APPLIED_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    boot_id: str
    complete: bool
    coordinators: _containers.RepeatedCompositeFieldContainer[CoordinatorInfo]
    holders: _containers.RepeatedCompositeFieldContainer[Member]
    not_applied: _containers.RepeatedCompositeFieldContainer[CommitToken]
    runs: _containers.RepeatedCompositeFieldContainer[HolderRun]
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    def __init__(self, blocks: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[HolderRun, _Mapping]]] = ..., holders: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., not_applied: _Optional[_Iterable[_Union[CommitToken, _Mapping]]] = ..., complete: bool = ..., boot_id: _Optional[str] = ..., coordinators: _Optional[_Iterable[_Union[CoordinatorInfo, _Mapping]]] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ["after", "keys", "least", "root", "shards", "wait_ms"]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    after: _containers.RepeatedCompositeFieldContainer[CommitToken]
    keys: bytes
    least: Fidelity
    root: bytes
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    wait_ms: int
    def __init__(self, root: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., least: _Optional[_Union[Fidelity, str]] = ..., after: _Optional[_Iterable[_Union[CommitToken, _Mapping]]] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ["address", "epoch", "host", "id", "node", "slow_start", "socket", "state"]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SLOW_START_FIELD_NUMBER: _ClassVar[int]
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    address: str
    epoch: int
    host: str
    id: str
    node: str
    slow_start: bool
    socket: str
    state: str
    def __init__(self, id: _Optional[str] = ..., epoch: _Optional[int] = ..., address: _Optional[str] = ..., socket: _Optional[str] = ..., host: _Optional[str] = ..., node: _Optional[str] = ..., state: _Optional[str] = ..., slow_start: bool = ...) -> None: ...

class NamespaceStatus(_message.Message):
    __slots__ = ["blocks", "blocks_over_quota", "namespace", "pinned_bytes", "puts_over_quota", "seq", "staging_bytes", "tiers"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_OVER_QUOTA_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PUTS_OVER_QUOTA_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    STAGING_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    blocks_over_quota: int
    namespace: str
    pinned_bytes: int
    puts_over_quota: int
    seq: int
    staging_bytes: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierUse]
    def __init__(self, namespace: _Optional[str] = ..., seq: _Optional[int] = ..., blocks: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierUse, _Mapping]]] = ..., pinned_bytes: _Optional[int] = ..., staging_bytes: _Optional[int] = ..., puts_over_quota: _Optional[int] = ..., blocks_over_quota: _Optional[int] = ...) -> None: ...

class RemovedRun(_message.Message):
    __slots__ = ["keys", "shard"]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    shard: bytes
    def __init__(self, shard: _Optional[bytes] = ..., keys: _Optional[bytes] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ["fidelity", "first_depth", "group", "keys", "parent", "root", "shard", "stored_bytes", "tier"]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    FIRST_DEPTH_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    fidelity: Fidelity
    first_depth: int
    group: bytes
    keys: bytes
    parent: bytes
    root: bytes
    shard: bytes
    stored_bytes: int
    tier: Tier
    def __init__(self, root: _Optional[bytes] = ..., shard: _Optional[bytes] = ..., tier: _Optional[_Union[Tier, str]] = ..., fidelity: _Optional[_Union[Fidelity, str]] = ..., parent: _Optional[bytes] = ..., first_depth: _Optional[int] = ..., keys: _Optional[bytes] = ..., group: _Optional[bytes] = ..., stored_bytes: _Optional[int] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ["group", "head_count", "head_first", "layer_count", "layer_first"]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    HEAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIRST_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIRST_FIELD_NUMBER: _ClassVar[int]
    group: int
    head_count: int
    head_first: int
    layer_count: int
    layer_first: int
    def __init__(self, group: _Optional[int] = ..., layer_first: _Optional[int] = ..., layer_count: _Optional[int] = ..., head_first: _Optional[int] = ..., head_count: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = []
    def __init__(self) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ["blocks", "capacity", "codecs", "detail", "errors", "hits", "raw_bytes", "state", "tier", "used", "writes"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    WRITES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    capacity: int
    codecs: _containers.RepeatedCompositeFieldContainer[CodecUse]
    detail: str
    errors: int
    hits: int
    raw_bytes: int
    state: str
    tier: Tier
    used: int
    writes: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ..., used: _Optional[int] = ..., capacity: _Optional[int] = ..., blocks: _Optional[int] = ..., raw_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., writes: _Optional[int] = ..., errors: _Optional[int] = ..., codecs: _Optional[_Iterable[_Union[CodecUse, _Mapping]]] = ...) -> None: ...

class TierUse(_message.Message):
    __slots__ = ["quota", "tier", "used"]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    quota: int
    tier: Tier
    used: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., used: _Optional[int] = ..., quota: _Optional[int] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ["coordinators", "counters", "lag", "latencies", "member", "namespaces", "pid", "saved_tokens", "tiers"]
    class CountersEntry(_message.Message):
        __slots__ = ["key", "value"]
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COORDINATORS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    LATENCIES_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SAVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    coordinators: int
    counters: _containers.ScalarMap[str, int]
    lag: int
    latencies: _containers.RepeatedCompositeFieldContainer[Latency]
    member: Member
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceStatus]
    pid: int
    saved_tokens: float
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ..., namespaces: _Optional[_Iterable[_Union[NamespaceStatus, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., pid: _Optional[int] = ..., latencies: _Optional[_Iterable[_Union[Latency, _Mapping]]] = ..., lag: _Optional[int] = ..., saved_tokens: _Optional[float] = ..., coordinators: _Optional[int] = ...) -> None: ...

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = []

class Fidelity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = []
