from kvstore.wire import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

BLOCK_COMMITTED: BlockState
BLOCK_DROPPED: BlockState
BLOCK_FOUND: BlockState
BLOCK_HELD_ALREADY: BlockState
BLOCK_LATER: BlockState
BLOCK_MISSING: BlockState
BLOCK_REFUSED: BlockState
BLOCK_STATE_UNSPECIFIED: BlockState
DESCRIPTOR: _descriptor.FileDescriptor
FINISH_END_TURN: Finish
FINISH_OTHER: Finish
FINISH_TOOL_USE: Finish
FINISH_UNKNOWN: Finish

class BlockInfo(_message.Message):
    __slots__ = ["header", "state", "tier"]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    header: bytes
    state: BlockState
    tier: _common_pb2.Tier
    def __init__(self, state: _Optional[_Union[BlockState, str]] = ..., header: _Optional[bytes] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ...) -> None: ...

class ChunkPart(_message.Message):
    __slots__ = ["block", "first_chunk", "table"]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    block: int
    first_chunk: int
    table: bytes
    def __init__(self, block: _Optional[int] = ..., first_chunk: _Optional[int] = ..., table: _Optional[bytes] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ["blocks", "segment", "spec_json"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[PutBlock]
    segment: int
    spec_json: str
    def __init__(self, spec_json: _Optional[str] = ..., segment: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[PutBlock, _Mapping]]] = ...) -> None: ...

class DataGet(_message.Message):
    __slots__ = ["get", "timeout_ms"]
    GET_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    get: GetRequest
    timeout_ms: int
    def __init__(self, get: _Optional[_Union[GetRequest, _Mapping]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class DataPut(_message.Message):
    __slots__ = ["put", "timeout_ms"]
    PUT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    put: PutHeader
    timeout_ms: int
    def __init__(self, put: _Optional[_Union[PutHeader, _Mapping]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class DataReply(_message.Message):
    __slots__ = ["port", "ticket", "ttl_ms"]
    PORT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    port: int
    ticket: bytes
    ttl_ms: int
    def __init__(self, port: _Optional[int] = ..., ticket: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class DataRequest(_message.Message):
    __slots__ = []
    def __init__(self) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ["blocks_held", "blocks_left", "blocks_moved", "done", "groups", "groups_done"]
    BLOCKS_HELD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_LEFT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_MOVED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_DONE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    blocks_held: int
    blocks_left: int
    blocks_moved: int
    done: bool
    groups: int
    groups_done: int
    def __init__(self, done: bool = ..., groups: _Optional[int] = ..., groups_done: _Optional[int] = ..., blocks_moved: _Optional[int] = ..., blocks_held: _Optional[int] = ..., blocks_left: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ["timeout_ms"]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class GetFrame(_message.Message):
    __slots__ = ["data", "h"]
    DATA_FIELD_NUMBER: _ClassVar[int]
    H_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    h: GetHeader
    def __init__(self, h: _Optional[_Union[GetHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class GetHeader(_message.Message):
    __slots__ = ["blocks", "parts", "purges"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    PURGES_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockInfo]
    parts: _containers.RepeatedCompositeFieldContainer[ChunkPart]
    purges: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockInfo, _Mapping]]] = ..., parts: _Optional[_Iterable[_Union[ChunkPart, _Mapping]]] = ..., purges: _Optional[_Iterable[bytes]] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ["blocks", "by_block", "layer_count", "layer_first", "least", "planes", "purges", "redis", "resume", "root"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BY_BLOCK_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIRST_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    PLANES_FIELD_NUMBER: _ClassVar[int]
    PURGES_FIELD_NUMBER: _ClassVar[int]
    REDIS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[ShardKeys]
    by_block: bool
    layer_count: int
    layer_first: int
    least: _common_pb2.Fidelity
    planes: int
    purges: bool
    redis: bool
    resume: _containers.RepeatedCompositeFieldContainer[Resume]
    root: bytes
    def __init__(self, root: _Optional[bytes] = ..., blocks: _Optional[_Iterable[_Union[ShardKeys, _Mapping]]] = ..., layer_first: _Optional[int] = ..., layer_count: _Optional[int] = ..., least: _Optional[_Union[_common_pb2.Fidelity, str]] = ..., redis: bool = ..., resume: _Optional[_Iterable[_Union[Resume, _Mapping]]] = ..., planes: _Optional[int] = ..., by_block: bool = ..., purges: bool = ...) -> None: ...

class HintReply(_message.Message):
    __slots__ = ["blocks"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class HintRequest(_message.Message):
    __slots__ = ["blocks", "ended", "finish", "output_tokens", "priority", "reuse_ms", "root", "ttl_ms", "use"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    REUSE_MS_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    USE_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[ShardKeys]
    ended: bool
    finish: Finish
    output_tokens: int
    priority: int
    reuse_ms: int
    root: bytes
    ttl_ms: int
    use: Use
    def __init__(self, root: _Optional[bytes] = ..., blocks: _Optional[_Iterable[_Union[ShardKeys, _Mapping]]] = ..., use: _Optional[_Union[Use, _Mapping]] = ..., ended: bool = ..., output_tokens: _Optional[int] = ..., finish: _Optional[_Union[Finish, str]] = ..., reuse_ms: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ["blocks"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[InspectedBlock]
    def __init__(self, blocks: _Optional[_Iterable[_Union[InspectedBlock, _Mapping]]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ["key", "redis"]
    KEY_FIELD_NUMBER: _ClassVar[int]
    REDIS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    redis: bool
    def __init__(self, key: _Optional[bytes] = ..., redis: bool = ...) -> None: ...

class InspectedBlock(_message.Message):
    __slots__ = ["copies", "moving", "pins", "secondary", "shard"]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    MOVING_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    SECONDARY_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    copies: _containers.RepeatedCompositeFieldContainer[InspectedCopy]
    moving: bool
    pins: int
    secondary: bool
    shard: _common_pb2.Shard
    def __init__(self, shard: _Optional[_Union[_common_pb2.Shard, _Mapping]] = ..., copies: _Optional[_Iterable[_Union[InspectedCopy, _Mapping]]] = ..., pins: _Optional[int] = ..., secondary: bool = ..., moving: bool = ...) -> None: ...

class InspectedCopy(_message.Message):
    __slots__ = ["error", "header", "length", "offset", "raw", "segment", "table", "tier"]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    error: str
    header: bytes
    length: int
    offset: int
    raw: bool
    segment: int
    table: bytes
    tier: _common_pb2.Tier
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., raw: bool = ..., segment: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., header: _Optional[bytes] = ..., table: _Optional[bytes] = ..., error: _Optional[str] = ...) -> None: ...

class LocalHelloRequest(_message.Message):
    __slots__ = ["hello", "namespace", "token"]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    hello: _common_pb2.HelloRequest
    namespace: str
    token: str
    def __init__(self, hello: _Optional[_Union[_common_pb2.HelloRequest, _Mapping]] = ..., namespace: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class OpenBlock(_message.Message):
    __slots__ = ["generation", "header", "length", "offset", "raw", "segment", "state", "tier"]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    generation: int
    header: bytes
    length: int
    offset: int
    raw: bool
    segment: int
    state: BlockState
    tier: _common_pb2.Tier
    def __init__(self, state: _Optional[_Union[BlockState, str]] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., segment: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., generation: _Optional[int] = ..., raw: bool = ..., header: _Optional[bytes] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ["blocks", "hold", "rows", "segments"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[OpenBlock]
    hold: int
    rows: bytes
    segments: _containers.RepeatedCompositeFieldContainer[SegmentInfo]
    def __init__(self, hold: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[OpenBlock, _Mapping]]] = ..., segments: _Optional[_Iterable[_Union[SegmentInfo, _Mapping]]] = ..., rows: _Optional[bytes] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ["blocks", "deadline_ms", "least", "redis", "release", "root", "rows"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    REDIS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[ShardKeys]
    deadline_ms: int
    least: _common_pb2.Fidelity
    redis: bool
    release: _containers.RepeatedScalarFieldContainer[int]
    root: bytes
    rows: bool
    def __init__(self, root: _Optional[bytes] = ..., blocks: _Optional[_Iterable[_Union[ShardKeys, _Mapping]]] = ..., least: _Optional[_Union[_common_pb2.Fidelity, str]] = ..., redis: bool = ..., deadline_ms: _Optional[int] = ..., release: _Optional[_Iterable[int]] = ..., rows: bool = ...) -> None: ...

class PinReply(_message.Message):
    __slots__ = ["epoch", "states", "ttl_ms"]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    states: _containers.RepeatedScalarFieldContainer[BlockState]
    ttl_ms: int
    def __init__(self, states: _Optional[_Iterable[_Union[BlockState, str]]] = ..., epoch: _Optional[int] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ["blocks", "deadline_ms", "least", "pin", "redis", "root", "ttl_ms"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    REDIS_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[ShardKeys]
    deadline_ms: int
    least: _common_pb2.Fidelity
    pin: bytes
    redis: bool
    root: bytes
    ttl_ms: int
    def __init__(self, pin: _Optional[bytes] = ..., root: _Optional[bytes] = ..., blocks: _Optional[_Iterable[_Union[ShardKeys, _Mapping]]] = ..., least: _Optional[_Union[_common_pb2.Fidelity, str]] = ..., ttl_ms: _Optional[int] = ..., redis: bool = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class PrefetchPart(_message.Message):
    __slots__ = ["group", "holders", "keys", "shard"]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    group: bytes
    holders: _containers.RepeatedScalarFieldContainer[str]
    keys: bytes
    shard: _common_pb2.Shard
    def __init__(self, shard: _Optional[_Union[_common_pb2.Shard, _Mapping]] = ..., group: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., holders: _Optional[_Iterable[str]] = ...) -> None: ...

class PrefetchReply(_message.Message):
    __slots__ = ["missing", "pulled", "ready"]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    PULLED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    missing: int
    pulled: int
    ready: int
    def __init__(self, ready: _Optional[int] = ..., pulled: _Optional[int] = ..., missing: _Optional[int] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ["deadline_ms", "least", "parts", "redis", "spec_json"]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    REDIS_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    least: _common_pb2.Fidelity
    parts: _containers.RepeatedCompositeFieldContainer[PrefetchPart]
    redis: bool
    spec_json: str
    def __init__(self, spec_json: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[PrefetchPart, _Mapping]]] = ..., least: _Optional[_Union[_common_pb2.Fidelity, str]] = ..., redis: bool = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ["results"]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ProbeResult]
    def __init__(self, results: _Optional[_Iterable[_Union[ProbeResult, _Mapping]]] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = []
    def __init__(self) -> None: ...

class ProbeResult(_message.Message):
    __slots__ = ["detail", "fix", "ok", "tier"]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FIX_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    detail: str
    fix: str
    ok: bool
    tier: _common_pb2.Tier
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., ok: bool = ..., detail: _Optional[str] = ..., fix: _Optional[str] = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ["committed", "dropped", "held", "left", "missing"]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    committed: int
    dropped: int
    held: int
    left: bytes
    missing: int
    def __init__(self, committed: _Optional[int] = ..., held: _Optional[int] = ..., dropped: _Optional[int] = ..., missing: _Optional[int] = ..., left: _Optional[bytes] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ["group", "keys", "shard", "source", "spec_json"]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    group: bytes
    keys: bytes
    shard: _common_pb2.Shard
    source: _common_pb2.Member
    spec_json: str
    def __init__(self, spec_json: _Optional[str] = ..., shard: _Optional[_Union[_common_pb2.Shard, _Mapping]] = ..., group: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., source: _Optional[_Union[_common_pb2.Member, _Mapping]] = ...) -> None: ...

class PurgeReply(_message.Message):
    __slots__ = ["blocks"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class PurgeRequest(_message.Message):
    __slots__ = ["model", "purge", "revision", "root"]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PURGE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    model: str
    purge: bytes
    revision: str
    root: bytes
    def __init__(self, root: _Optional[bytes] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., purge: _Optional[bytes] = ...) -> None: ...

class PutBlock(_message.Message):
    __slots__ = ["computed_on", "copy_id", "depth", "group", "key", "offset", "parent", "raw_bytes", "shard"]
    COMPUTED_ON_FIELD_NUMBER: _ClassVar[int]
    COPY_ID_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    computed_on: int
    copy_id: int
    depth: int
    group: bytes
    key: bytes
    offset: int
    parent: bytes
    raw_bytes: int
    shard: _common_pb2.Shard
    def __init__(self, shard: _Optional[_Union[_common_pb2.Shard, _Mapping]] = ..., key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., group: _Optional[bytes] = ..., depth: _Optional[int] = ..., computed_on: _Optional[int] = ..., raw_bytes: _Optional[int] = ..., copy_id: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class PutFrame(_message.Message):
    __slots__ = ["data", "h"]
    DATA_FIELD_NUMBER: _ClassVar[int]
    H_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    h: PutHeader
    def __init__(self, h: _Optional[_Union[PutHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PutHeader(_message.Message):
    __slots__ = ["blocks", "spec_json"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[PutBlock]
    spec_json: str
    def __init__(self, spec_json: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[PutBlock, _Mapping]]] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ["states", "token"]
    STATES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedScalarFieldContainer[BlockState]
    token: _common_pb2.CommitToken
    def __init__(self, token: _Optional[_Union[_common_pb2.CommitToken, _Mapping]] = ..., states: _Optional[_Iterable[_Union[BlockState, str]]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = []
    def __init__(self) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ["holds"]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    holds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, holds: _Optional[_Iterable[int]] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ["known"]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, known: _Optional[_Iterable[bool]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ["pins", "ttl_ms"]
    PINS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedScalarFieldContainer[bytes]
    ttl_ms: int
    def __init__(self, pins: _Optional[_Iterable[bytes]] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ["block", "copy_id", "first_chunk"]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    COPY_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    block: int
    copy_id: int
    first_chunk: int
    def __init__(self, block: _Optional[int] = ..., copy_id: _Optional[int] = ..., first_chunk: _Optional[int] = ...) -> None: ...

class SegmentInfo(_message.Message):
    __slots__ = ["bytes", "data_offset", "segment", "writable"]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    WRITABLE_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    data_offset: int
    segment: int
    writable: bool
    def __init__(self, segment: _Optional[int] = ..., bytes: _Optional[int] = ..., data_offset: _Optional[int] = ..., writable: bool = ...) -> None: ...

class ShardKeys(_message.Message):
    __slots__ = ["keys", "shard"]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    shard: _common_pb2.Shard
    def __init__(self, shard: _Optional[_Union[_common_pb2.Shard, _Mapping]] = ..., keys: _Optional[bytes] = ...) -> None: ...

class StageReply(_message.Message):
    __slots__ = ["segment"]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    segment: SegmentInfo
    def __init__(self, segment: _Optional[_Union[SegmentInfo, _Mapping]] = ...) -> None: ...

class StageRequest(_message.Message):
    __slots__ = ["bytes"]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class UnpinReply(_message.Message):
    __slots__ = []
    def __init__(self) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ["pins"]
    PINS_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, pins: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Use(_message.Message):
    __slots__ = ["blocks", "finish", "output_tokens", "session", "time_s"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    finish: Finish
    output_tokens: int
    session: bytes
    time_s: float
    def __init__(self, session: _Optional[bytes] = ..., output_tokens: _Optional[int] = ..., finish: _Optional[_Union[Finish, str]] = ..., time_s: _Optional[float] = ..., blocks: _Optional[int] = ...) -> None: ...

class BlockState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = []

class Finish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = []
