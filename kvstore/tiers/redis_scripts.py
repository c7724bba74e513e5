"""What runs inside Redis: every change of a namespace's index is one script, so that it is whole or not at all.

docs/FORMAT-REDIS.md explains the keys. An index entry is a block's 160-byte header; `id` is shard digest + key. What a
block costs (`cost`) is its value and a flat sum for index, order and key.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha1

VALUE_EXTRA_BYTES = 40
"""Trailer of a value: magic, algorithm, MAC."""

INDEX_BYTES = 512
"""Charged per block for its index entry, its place in the order, its key and Redis's own bookkeeping."""

EVICT_MAX = 512
"""Blocks one put may evict; a put that needs more is refused."""

_COMMON = f"""
local meta, index, order, changes = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local function cost(entry)
  return struct.unpack('<I8', entry, 137) + {VALUE_EXTRA_BYTES + INDEX_BYTES}
end
local function raw(entry)
  return struct.unpack('<I8', entry, 129)
end
local function fidelity(entry)
  return math.min(string.byte(entry, 121), string.byte(entry, 122))
end
local function millis()
  local now = redis.call('TIME')
  return now[1] * 1000 + now[2] / 1000
end
local function total()
  return tonumber(redis.call('HGET', meta, 'bytes') or '0')
end
local function totals()
  local found = redis.call('HMGET', meta, 'bytes', 'raw')
  return total(), redis.call('HLEN', index), tonumber(found[2] or '0')
end
local function count(bytes, raw_bytes)
  redis.call('HINCRBY', meta, 'bytes', bytes)
  redis.call('HINCRBY', meta, 'raw', raw_bytes)
end
local function tell(stream_max, op, what)
  local number = redis.call('HINCRBY', meta, 'changes', 1)
  redis.call('XADD', changes, 'MAXLEN', '~', stream_max, '*', 'n', number, op, what)
end
local function forget(id, entry, prefix, stream_max)
  redis.call('HDEL', index, id)
  redis.call('ZREM', order, id)
  count(-cost(entry), -raw(entry))
  redis.call('UNLINK', prefix .. id)
  tell(stream_max, 'del', id)
end
local function keep(ttl)
  for i = 1, 5 do redis.call('PEXPIRE', KEYS[i], ttl) end
end
"""

# KEYS: meta index order changes words; ARGV: a new incarnation, name of the namespace
ENTER = (
    _COMMON
    + """
local found = redis.call('HGET', meta, 'incarnation')
if not found then
  found = ARGV[1]
  redis.call('UNLINK', index, order, changes, KEYS[5])
  redis.call('HDEL', meta, 'bytes', 'raw', 'changes')
  redis.call('HSET', meta, 'incarnation', found, 'format', 1)
end
redis.call('HSET', meta, 'name', ARGV[2])
return {found, totals()}
"""
)

# KEYS: meta index order changes words, the value as sent; ARGV: incarnation, id, entry, capacity, ttl in ms, length of
# the change stream, prefix of values, digests that have words. The value was set under a name of its own before: a
# script would copy it.
PUT = (
    _COMMON
    + f"""
local sent, id, entry = KEYS[6], ARGV[2], ARGV[3]
local capacity, ttl, stream_max, prefix = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6], ARGV[7]
local function answer(word)
  return {{word, totals()}}
end
if redis.call('HGET', meta, 'incarnation') ~= ARGV[1] then
  redis.call('UNLINK', sent)
  return answer('enter')
end
for i = 8, #ARGV do
  if redis.call('HEXISTS', KEYS[5], ARGV[i]) == 0 then -- Redis came up again with a dump of before they were said
    redis.call('UNLINK', sent)
    return answer('enter')
  end
end
if redis.call('EXISTS', sent) == 0 then return answer('lost') end
local old = redis.call('HGET', index, id)
if old and redis.call('EXISTS', prefix .. id) == 1 and fidelity(old) >= fidelity(entry) then
  redis.call('UNLINK', sent)
  redis.call('ZADD', order, 'XX', millis(), id)
  redis.call('PEXPIRE', prefix .. id, ttl)
  return answer('held')
end
local needed = cost(entry) - (old and cost(old) or 0)
local now = millis()
local victims, evicted = redis.call('ZRANGEBYSCORE', order, '-inf', now - ttl, 'LIMIT', 0, 16), 0
for _, victim in ipairs(victims) do
  local gone = victim ~= id and redis.call('HGET', index, victim)
  if gone then forget(victim, gone, prefix, stream_max) end
end
while total() + needed > capacity do
  local victim = redis.call('ZRANGE', order, 0, 0)[1]
  if victim == id then victim = redis.call('ZRANGE', order, 1, 1)[1] end
  if not victim or evicted >= {EVICT_MAX} then
    redis.call('UNLINK', sent)
    return answer('full')
  end
  local gone = redis.call('HGET', index, victim)
  if gone then forget(victim, gone, prefix, stream_max) else redis.call('ZREM', order, victim) end
  evicted = evicted + 1
end
redis.call('UNLINK', prefix .. id)
redis.call('RENAME', sent, prefix .. id)
redis.call('PEXPIRE', prefix .. id, ttl)
redis.call('HSET', index, id, entry)
redis.call('ZADD', order, now, id)
count(needed, raw(entry) - (old and raw(old) or 0))
tell(stream_max, 'add', entry)
keep(ttl * 2)
return answer('kept')
"""
)

# KEYS: meta index order changes words; ARGV: ttl in ms, prefix of values, ids...
TOUCH = (
    _COMMON
    + """
local ttl, prefix = tonumber(ARGV[1]), ARGV[2]
local now = millis()
for i = 3, #ARGV do
  redis.call('PEXPIRE', prefix .. ARGV[i], ttl) -- first: a script that has written may go on where memory is short
  redis.call('ZADD', order, 'XX', now, ARGV[i])
end
keep(ttl * 2)
return {#ARGV - 2, totals()}
"""
)

# KEYS: meta index order changes words; ARGV: length of the change stream, prefix of values, then pairs (id, copy_id as
# in the header; empty: whatever copy)
REMOVE = (
    _COMMON
    + """
local removed = 0
for i = 3, #ARGV, 2 do
  local entry = redis.call('HGET', index, ARGV[i])
  if entry and (ARGV[i + 1] == '' or string.sub(entry, 113, 120) == ARGV[i + 1]) then
    forget(ARGV[i], entry, ARGV[2], ARGV[1])
    removed = removed + 1
  end
end
return {removed, totals()}
"""
)

# KEYS: meta, lease; ARGV: worker, lease in ms, the least epoch that may be drawn. Replies the epoch, nil while another
# worker has the lease, '' when there is no index. Numbers beyond 2^53 stay strings.
ELECT = """
local meta, lease = KEYS[1], KEYS[2]
local found = redis.call('HGET', meta, 'incarnation')
if not found then return '' end
local held = redis.call('HMGET', lease, 'worker', 'incarnation', 'epoch')
if held[1] and held[1] ~= ARGV[1] then return false end
if held[1] and held[2] == found then
  redis.call('PEXPIRE', lease, ARGV[2])
  return held[3]
end
redis.call('HINCRBY', meta, 'epoch', 1)
local epoch = redis.call('HGET', meta, 'epoch')
if #epoch < #ARGV[3] or (#epoch == #ARGV[3] and epoch < ARGV[3]) then
  epoch = ARGV[3]
  redis.call('HSET', meta, 'epoch', epoch)
end
redis.call('DEL', lease)
redis.call('HSET', lease, 'worker', ARGV[1], 'incarnation', found, 'epoch', epoch)
redis.call('PEXPIRE', lease, ARGV[2])
return epoch
"""

# KEYS: lease; ARGV: worker
RESIGN = """
if redis.call('HGET', KEYS[1], 'worker') == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""

# KEYS: meta, changes: (incarnation, number of the last change, id of the last entry of the stream)
MARK = """
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
local found = redis.call('HMGET', KEYS[1], 'incarnation', 'changes')
return {found[1] or '', tonumber(found[2] or '0'), last[1] and last[1][1] or '0-0'}
"""


@dataclass(frozen=True, slots=True)
class Script:
    """Lua source and the digest it is called by."""

    source: str

    @property
    def digest(self) -> str:
        return _digest(self.source)


@lru_cache(maxsize=64)
def _digest(source: str) -> str:
    return sha1(source.encode(), usedforsecurity=False).hexdigest()
