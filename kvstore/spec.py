"""What makes KV interchangeable (`ModelSpec`), which rectangle of a model a rank holds (`Shard`), and their digests.

The canonical form is JSON with sorted keys, UTF-8, no spaces and fields at their default left out, so that a new
field with a default changes no old digest. Another spec is another keyspace, never an error. docs/FORMAT.md.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from hashlib import sha256
from typing import Any

from kvstore.errors import BadRequest
from kvstore.types import KEY_BYTES

KINDS = ("full", "sliding", "latent", "state", "opaque")

DTYPES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
"""Known element types and their bytes."""

CANONICAL = "canonical"
OPAQUE_PREFIX = "opaque:"

MAX_GROUPS = 64
MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_DIM = 1 << 16
MAX_BLOCK_TOKENS = 1 << 15
MAX_GROUP_BLOCKS = 1 << 16
MAX_WINDOW = 1 << 30
MAX_TEXT_BYTES = 1024
MAX_JSON_BYTES = 1 << 16
MAX_BLOCK_BYTES = 1 << 30


def canonical(value: Any) -> Any:
    """A dataclass as plain JSON values: fields at their default left out, required ones always there. Pure."""
    if isinstance(value, tuple):
        return [canonical(item) for item in value]
    if not hasattr(value, "__dataclass_fields__"):
        return value
    plain: dict[str, Any] = {}
    for f in fields(value):
        if not f.init:
            continue
        item = getattr(value, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if default is MISSING or item != default:
            plain[f.name] = canonical(item)
    return plain


def dump(value: Any) -> str:
    """Canonical JSON text of a dataclass."""
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(f"{name} is {value!r}: give an integer from {low} to {high}")


def _text(name: str, value: object, *, empty: bool = True) -> None:
    if not isinstance(value, str) or (not value and not empty):
        raise BadRequest(f"{name} is {value!r}: give a {'' if empty else 'non-empty '}string")
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        raise BadRequest(f"{name} is no valid Unicode text: give a string that encodes as UTF-8") from None
    if length > MAX_TEXT_BYTES:
        raise BadRequest(f"{name} has {length} bytes: at most {MAX_TEXT_BYTES} are allowed")


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a rule. BadRequest where the fields do not fit the kind."""

    kind: str = "full"  # full | sliding | latent | state | opaque
    layers: int = 1
    kv_heads: int = 1
    k_dim: int = 0  # elements of one head's K; latent: of the latent vector
    v_dim: int = 0
    window: int = 0  # tokens, sliding only
    page_tokens: int = 0  # opaque: tokens of one engine page; block_tokens is a multiple
    page_bytes: int = 0  # opaque: bytes of one engine page of one layer; state: bytes of one layer's state; all heads
    page_dtype: str = ""  # opaque, state: element type where known

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadRequest(f"group kind is {self.kind!r}: give one of {', '.join(KINDS)}")
        _whole("group layers", self.layers, 1, MAX_LAYERS)
        _whole("group kv_heads", self.kv_heads, 1, MAX_HEADS)
        by_head = self.kind in ("full", "sliding")
        paged = self.kind in ("state", "opaque")
        self._only("k_dim", not paged, MAX_DIM)
        self._only("v_dim", by_head, MAX_DIM)
        self._only("window", self.kind == "sliding", MAX_WINDOW)
        self._only("page_tokens", self.kind == "opaque", MAX_BLOCK_TOKENS)
        self._only("page_bytes", paged, MAX_BLOCK_BYTES)
        if self.kind == "latent" and self.kv_heads != 1:
            raise BadRequest(
                f"a latent group has one shared vector per token, not {self.kv_heads} kv_heads: leave it at 1"
            )
        if paged and self.page_bytes % self.kv_heads:
            raise BadRequest(
                f"page_bytes {self.page_bytes} is no multiple of kv_heads {self.kv_heads}: give bytes of all heads"
            )
        _text("page_dtype", self.page_dtype)
        if self.page_dtype and (not paged or self.page_dtype not in DTYPES):
            raise BadRequest(f"page_dtype is {self.page_dtype!r}: leave it out, or give one of {', '.join(DTYPES)}")

    def _only(self, name: str, used: bool, high: int) -> None:
        """A field that this kind needs (1..high) or must not have (0)."""
        value = getattr(self, name)
        if used:
            _whole(f"{name} of a group of kind {self.kind}", value, 1, high)
        elif type(value) is not int or value != 0:
            raise BadRequest(f"{name} is {value!r} in a group of kind {self.kind}, which has none: leave it out")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What makes KV interchangeable. Two equal specs share one keyspace. BadRequest where a field is out of bounds."""

    model: str
    groups: tuple[Group, ...]
    revision: str = ""
    dtype: str = "bfloat16"
    rope: str = ""
    numerics: str = ""  # attention backend, instruction set where it matters
    layout: str = CANONICAL  # canonical | opaque:<engine page format>
    block_tokens: int = 64
    group_blocks: int = 32  # blocks of one placement group
    engine_hash: str = ""  # the engine's hash algorithm, in keyspaces without visible tokens
    _root: bytes = field(init=False, repr=False, compare=False, default=b"")
    _json: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        _text("model", self.model, empty=False)
        for name in ("revision", "rope", "numerics", "engine_hash"):
            _text(name, getattr(self, name))
        _text("layout", self.layout, empty=False)
        _text("dtype", self.dtype, empty=False)
        if self.dtype not in DTYPES:
            raise BadRequest(f"dtype is {self.dtype!r}: give one of {', '.join(DTYPES)}")
        _whole("block_tokens", self.block_tokens, 1, MAX_BLOCK_TOKENS)
        _whole("group_blocks", self.group_blocks, 1, MAX_GROUP_BLOCKS)
        if not isinstance(self.groups, tuple) or not all(isinstance(g, Group) for g in self.groups):
            raise BadRequest("groups is no tuple of Group: give groups=(Group(...), ...)")
        _whole("number of groups", len(self.groups), 1, MAX_GROUPS)
        self._check_layout()
        for group in self.groups:
            _whole("bytes of one block of a group", self.group_bytes(group), 1, MAX_BLOCK_BYTES)
        object.__setattr__(self, "_json", dump(self))
        object.__setattr__(self, "_root", sha256(b"kvstore/1\0" + self._json.encode()).digest()[:KEY_BYTES])

    def _check_layout(self) -> None:
        opaque = self.layout.startswith(OPAQUE_PREFIX) and len(self.layout) > len(OPAQUE_PREFIX)
        if self.layout != CANONICAL and not opaque:
            raise BadRequest(f"layout is {self.layout!r}: give {CANONICAL!r} or '{OPAQUE_PREFIX}<engine page format>'")
        for group in self.groups:
            if group.kind != "state" and (group.kind == "opaque") != opaque:
                raise BadRequest(
                    f"a group of kind {group.kind} does not fit layout {self.layout!r}: opaque pages need an opaque one"
                )
            if group.kind == "opaque" and self.block_tokens % group.page_tokens:
                raise BadRequest(
                    f"block_tokens {self.block_tokens} is no multiple of the engine's page_tokens {group.page_tokens}"
                )

    def group_bytes(self, group: Group) -> int:
        """Raw bytes of one block over all layers and heads of a group."""
        if group.kind == "state":
            return group.layers * group.page_bytes
        if group.kind == "opaque":
            return group.layers * group.page_bytes * (self.block_tokens // group.page_tokens)
        return group.layers * self.block_tokens * group.kv_heads * (group.k_dim + group.v_dim) * DTYPES[self.dtype]

    def canonical_json(self) -> str:
        """The text whose digest is the root."""
        return self._json

    @property
    def root(self) -> bytes:
        """16 bytes: SHA-256(b"kvstore/1\\0" + canonical JSON), the parent of every first block."""
        return self._root

    @classmethod
    def from_json(cls, text: str | bytes) -> ModelSpec:
        """Parse canonical or merely equal JSON. BadRequest on an unknown or repeated key or a bad value."""
        if len(text) > MAX_JSON_BYTES:
            raise BadRequest(f"the spec has {len(text)} bytes: at most {MAX_JSON_BYTES} are allowed")
        return _parsed(text)

    @classmethod
    def _from_json(cls, text: str | bytes) -> ModelSpec:
        try:
            plain = json.loads(text, object_pairs_hook=_no_repeats)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the spec is no JSON: {error}") from None
        values = _fields_of(cls, plain, "spec")
        groups = values.get("groups")
        if not isinstance(groups, list) or "model" not in values:
            raise BadRequest("the spec needs a 'model' and a list of 'groups'")
        values["groups"] = tuple(Group(**_fields_of(Group, group, "group")) for group in groups[: MAX_GROUPS + 1])
        return cls(**values)


@lru_cache(maxsize=64)
def _parsed(text: str | bytes) -> ModelSpec:
    """Every put names its spec, mostly the same one."""
    return ModelSpec._from_json(text)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return plain


def _fields_of(kind: type, plain: object, name: str) -> dict[str, Any]:
    """The keyword arguments in a JSON object. BadRequest for anything else, or an unknown key."""
    if not isinstance(plain, dict):
        raise BadRequest(f"the {name} is no JSON object: give one object with its fields")
    known = [f.name for f in fields(kind) if f.init]
    for key in plain:
        if key not in known:
            raise BadRequest(f"unknown key {key[:64]!r} in the {name}: known are {', '.join(known)}")
    return dict(plain)


@dataclass(frozen=True, slots=True)
class Shard:
    """The rectangle of a model that one rank holds: layers (counted within the group) x kv heads of one group."""

    group: int = 0
    layer_first: int = 0
    layer_count: int = 0
    head_first: int = 0
    head_count: int = 0

    def __post_init__(self) -> None:
        _whole("shard group", self.group, 0, MAX_GROUPS - 1)
        for name, high in (("layer", MAX_LAYERS), ("head", MAX_HEADS)):
            _whole(f"shard {name}_first", getattr(self, f"{name}_first"), 0, high - 1)
            _whole(f"shard {name}_count", getattr(self, f"{name}_count"), 0, high)

    @property
    def digest(self) -> bytes:
        """16 bytes: SHA-256 of the shard's canonical JSON."""
        return _shard_digest(self)

    @classmethod
    def whole(cls, spec: ModelSpec, group: int = 0) -> Shard:
        """All layers and heads of one group."""
        _whole("shard group", group, 0, len(spec.groups) - 1)
        return cls(group, 0, spec.groups[group].layers, 0, spec.groups[group].kv_heads)

    def contains(self, other: Shard) -> bool:
        """Whether every layer and head of `other` is in this rectangle. Pure."""
        return (
            self.group == other.group
            and self.layer_first <= other.layer_first
            and other.layer_first + other.layer_count <= self.layer_first + self.layer_count
            and self.head_first <= other.head_first
            and other.head_first + other.head_count <= self.head_first + self.head_count
        )

    def overlap(self, other: Shard) -> Shard | None:
        """The rectangle in both, None where there is none. Pure."""
        layer = max(self.layer_first, other.layer_first)
        layers = min(self.layer_first + self.layer_count, other.layer_first + other.layer_count) - layer
        head = max(self.head_first, other.head_first)
        heads = min(self.head_first + self.head_count, other.head_first + other.head_count) - head
        if self.group != other.group or layers <= 0 or heads <= 0:
            return None
        return Shard(self.group, layer, layers, head, heads)

    def fits(self, spec: ModelSpec) -> bool:
        """Whether this is a non-empty rectangle of the spec. Pure."""
        try:
            self.check(spec)
        except BadRequest:
            return False
        return True

    def check(self, spec: ModelSpec) -> None:
        """BadRequest unless it `fits`."""
        if self.group >= len(spec.groups):
            raise BadRequest(f"shard group {self.group} is not one of the {len(spec.groups)} groups of the spec")
        group = spec.groups[self.group]
        for name, first, count, bound in (
            ("layers", self.layer_first, self.layer_count, group.layers),
            ("heads", self.head_first, self.head_count, group.kv_heads),
        ):
            if count < 1 or first + count > bound:
                raise BadRequest(
                    f"shard {name} {first}..{first + count - 1} are not within the group's {bound}: name at least one"
                )


@lru_cache(maxsize=4096)
def _shard_digest(shard: Shard) -> bytes:
    return sha256(dump(shard).encode()).digest()[:KEY_BYTES]


@lru_cache(maxsize=4096)
def namespace_digest(name: str) -> bytes:
    """16 bytes: SHA-256(b"namespace\\0" + name). Names no wider than `MAX_TEXT_BYTES`, else BadRequest."""
    _text("namespace", name, empty=False)
    return sha256(b"namespace\0" + name.encode()).digest()[:KEY_BYTES]
