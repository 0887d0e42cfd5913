"""What is in Redis, and the scripts that touch it.

Replicas whose blocks have the same names form a group: the same deployment, model,
precision, tokenizer and block size. All keys of a group carry its name as their hash
tag, so that in a Cluster they are in one slot and one script may use them together.

    prefixcache:groups                              sorted set: groups by the time until which they are of interest
    prefixcache:{main:9f8e7d6c5b4a3210:16}:replicas     hash: replica id -> lease
    prefixcache:{main:9f8e7d6c5b4a3210:16}:blocks:ID:NONCE  string: 16 bytes of state, then the `Table`

A lease is 13 digits (milliseconds of Redis' own clock at which it ends), 16 characters of
nonce, then a JSON object. The nonce is drawn anew by every process and after every lease
that was lost; a table belongs to a nonce. So what a process says that has lost its lease
is void, whatever it writes and whenever.

The state of a table is drawn anew at every change. A writer names the state it goes on
from, and if Redis has another one (it was restarted, flushed, or a failover lost the last
writes) nothing is written, and everything is published anew.

A tenant's namespace is part of its blocks' names and not of the keys: a table per
namespace would have to be as large as the pool, each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from prefixcache.errors import InvalidArgument
from prefixcache.hints.table import BUCKET_BYTES

DEFAULT_PREFIX = "prefixcache:"
DEFAULT_DEPLOYMENT = "main"
NONCE_CHARACTERS = 16
DEADLINE_DIGITS = 13
STATE_BYTES = 16
NO_STATE = bytes(STATE_BYTES)

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Group:
    """Names replicas that can use each other's hints. `fingerprint` is in hex, as GetModel reports it."""

    deployment: str
    fingerprint: str
    block_size: int

    def __str__(self) -> str:
        return f"{self.deployment}:{self.fingerprint[:16]}:{self.block_size}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the group of a name. Raises InvalidArgument if it is none."""
        deployment, _, rest = name.partition(":")
        fingerprint, _, size = rest.partition(":")
        if not _NAME.fullmatch(deployment) or not fingerprint or not size.isdigit():
            raise InvalidArgument(f"{name!r} is no group of replicas; one looks like main:9f8e7d6c5b4a3210:16")
        return cls(deployment, fingerprint, int(size))


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of keys. `prefix` is what an ACL user can be limited to."""

    prefix: str = DEFAULT_PREFIX

    @property
    def groups(self) -> str:
        return f"{self.prefix}groups"

    def replicas(self, group: Group) -> str:
        return f"{self.prefix}{{{group}}}:replicas"

    def table(self, group: Group, replica_id: str, nonce: str) -> str:
        return f"{self.prefix}{{{group}}}:blocks:{replica_id}:{nonce}"


def checked_name(name: str, what: str) -> str:
    """Return a name that can be part of a key. Raises InvalidArgument if it cannot."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{what} is {name!r}; it must be 1 to 64 letters, digits, dots, dashes and underscores")
    return name


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a replica is. Blocks: `free` hold nothing, `cached` can be evicted."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    """Prompt tokens that accepted requests still have to compute."""
    free: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    """Of all requests admitted so far; of these, `cached_tokens` were not computed."""
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """What a replica says of itself while it lives.

    `blocks` is the size of its pool, `published` how many of them are in its table, and
    `age` how many seconds ago the lease was renewed, by Redis' clock.
    """

    replica_id: str
    nonce: str
    address: str
    model: str
    block_size: int
    blocks: int
    load: Load
    published: int = 0
    draining: bool = False
    """Serves what it has accepted and takes nothing new."""
    lease_seconds: float = 12.0
    process: str = ""
    """Drawn by each process: what it has cached is there as long as it is, whatever becomes of its leases."""
    age: float = 0.0

    def payload(self) -> str:
        """Return the JSON object of a lease."""
        values = asdict(self)
        for name in ("replica_id", "nonce", "age"):
            del values[name]
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def parse(cls, replica_id: str, record: bytes, now: int) -> Self | None:
        """Return the lease in a record if it has not ended at `now` (milliseconds); None also if it cannot be read."""
        head = DEADLINE_DIGITS + NONCE_CHARACTERS
        try:
            deadline = int(record[:DEADLINE_DIGITS])
            nonce = record[DEADLINE_DIGITS:head].decode()
            values = json.loads(record[head:])
            load = Load(**_known(Load, values.pop("load")))
            if deadline <= now:
                return None
            lease = cls(replica_id=replica_id, nonce=nonce, load=load, **_known(cls, values))
            return replace(lease, age=max(0.0, lease.lease_seconds - (deadline - now) / 1000))
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a newer version may have added."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


# Scripts. Redis 6.2 and later: all of their commands are older, and the clock may be read
# before something is written, since effects are replicated and not scripts.
#
# A Redis that is full refuses what could need memory, unless the script has written
# before. What is there already can be written over in place, so RENEW and PUBLISH write a
# time to live first; REGISTER and BEGIN need memory and ask for it first.

_ALIVE = f"""
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function ends(record)
  return tonumber(string.sub(record, 1, {DEADLINE_DIGITS})) or 0
end
local function nonce(record)
  return string.sub(record, {DEADLINE_DIGITS + 1}, {DEADLINE_DIGITS + NONCE_CHARACTERS})
end
local function holder(record)
  if not record or ends(record) <= now() then return nil end
  return nonce(record)
end
local function lease()
  return string.format('%0{DEADLINE_DIGITS}d', now() + ARGV[3]) .. ARGV[2] .. ARGV[4]
end
"""

REGISTER = (
    _ALIVE
    + """
-- Take a replica's name. KEYS: replicas. ARGV: id, nonce, lease ms, payload, whether to take it
-- from whom has it now. Returns the nonce that held it (live or not) or '', whether it was taken,
-- and for how many ms more the lease of the one that holds it lasts.
local record = redis.call('HGET', KEYS[1], ARGV[1])
local before = holder(record)
if before and before ~= ARGV[2] and ARGV[5] ~= '1' then return {before, 0, ends(record) - now()} end
redis.call('HSET', KEYS[1], ARGV[1], lease())
redis.call('PEXPIRE', KEYS[1], ARGV[3] * 10)
-- Whoever has been gone for ten leases is not worth listing any more.
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  if ends(all[i + 1]) + ARGV[3] * 10 < now() then redis.call('HDEL', KEYS[1], all[i]) end
end
return {record and nonce(record) or '', 1, 0}
"""
)

RENEW = (
    _ALIVE
    + """
-- KEYS: replicas, table. ARGV: id, nonce, lease ms, payload, the state the table has ('' for any).
-- Returns 1, 0 if the lease was lost, -1 if it is renewed but the table is not in that state.
if holder(redis.call('HGET', KEYS[1], ARGV[1])) ~= ARGV[2] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[3] * 10)
redis.call('PEXPIRE', KEYS[2], ARGV[3] * 10)
redis.call('HSET', KEYS[1], ARGV[1], lease())
if ARGV[5] ~= '' and redis.call('GETRANGE', KEYS[2], 0, 15) ~= ARGV[5] then return -1 end
return 1
"""
)

LEAVE = (
    _ALIVE
    + """
-- KEYS: replicas, table. ARGV: id, nonce. Whoever has that nonce has ended, and its statements go.
local record = redis.call('HGET', KEYS[1], ARGV[1])
if record and nonce(record) == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
redis.call('UNLINK', KEYS[2])
return 1
"""
)

BEGIN = (
    _ALIVE
    + """
-- Begin an empty table. KEYS: replicas, table. ARGV: id, nonce, lease ms, state, bytes of the table.
-- Returns 1, or 0 if the lease was lost.
if holder(redis.call('HGET', KEYS[1], ARGV[1])) ~= ARGV[2] then return 0 end
redis.call('SETRANGE', KEYS[2], 0, ARGV[4])
redis.call('UNLINK', KEYS[2])  -- a string that is made at its full length has no room to spare
redis.call('SETRANGE', KEYS[2], 15 + ARGV[5], '\\0')
redis.call('SETRANGE', KEYS[2], 0, ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[3] * 10)
return 1
"""
)

PUBLISH = (
    _ALIVE
    + f"""
-- Change a table. KEYS: replicas, table. ARGV: id, nonce, lease ms, the state it has, the state it
-- gets, `Table.patches`. Returns 1, 0 if the lease was lost, -1 if the table is not in that state.
if holder(redis.call('HGET', KEYS[1], ARGV[1])) ~= ARGV[2] then return 0 end
if redis.call('GETRANGE', KEYS[2], 0, {STATE_BYTES - 1}) ~= ARGV[4] then return -1 end
redis.call('PEXPIRE', KEYS[2], ARGV[3] * 10)
local patches = ARGV[6]
local at = 1
while at <= #patches do
  local bucket, count = struct.unpack('<I4I4', patches, at)
  local stop = at + 8 + count * {BUCKET_BYTES}
  redis.call('SETRANGE', KEYS[2], {STATE_BYTES} + bucket * {BUCKET_BYTES}, string.sub(patches, at + 8, stop - 1))
  at = stop
end
redis.call('SETRANGE', KEYS[2], 0, ARGV[5])
return 1
"""
)

ROSTER = """
-- Who is there. KEYS: replicas. Returns the time in ms, then ids and leases in turn.
local time = redis.call('TIME')
local all = redis.call('HGETALL', KEYS[1])
table.insert(all, 1, string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)))
return all
"""

FIND = f"""
-- How many of a prompt's blocks, from the first, are in each of several tables. KEYS: tables. ARGV:
-- the blocks, 8 bytes each (see `query`). What a replica holds of a chain is a beginning of it, so
-- its end is found by halving; replicas often hold the same, so the last one's end is tried first.
-- -1 for a table that is not there.
local names = ARGV[1]
local blocks = #names / 8
local found, guess = {{}}, 0
for owner = 1, #KEYS do
  local key = KEYS[owner]
  local buckets = math.floor((redis.call('STRLEN', key) - {STATE_BYTES}) / {BUCKET_BYTES})
  local function has(block)
    local at = block * 8 - 7
    local place, mark = struct.unpack('<I4I4', names, at)
    local wanted = string.sub(names, at + 4, at + 7)
    local bucket = place % buckets
    for turn = 1, 2 do
      local from = {STATE_BYTES} + bucket * {BUCKET_BYTES}
      local range = redis.call('GETRANGE', key, from, from + {BUCKET_BYTES - 1})
      local slot = string.find(range, wanted, 1, true)
      while slot do
        if slot % 4 == 1 then return true end
        slot = string.find(range, wanted, slot + 1, true)
      end
      bucket = (mark - bucket) % buckets
    end
    return false
  end
  local low, high = 0, buckets > 0 and blocks or 0
  if guess > 0 and high > 0 then
    if not has(guess) then high = guess - 1
    elseif guess == blocks or not has(guess + 1) then low, high = guess, guess
    else low = guess + 1 end
  end
  if low == 0 and high > 0 then
    if has(1) then low = 1 else high = 0 end
  end
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if has(middle) then low = middle else high = middle - 1 end
  end
  found[owner] = buckets > 0 and low or -1
  if low > 0 then guess = low end
end
return found
"""
