"""What the server can be told: one frozen model, every field described.

Values come from keyword arguments (the command line) and then from the environment
(`PREFIXCACHE_` and the field's name in capitals). A name that is not known here, in
either place, is an error, so that a misspelt option never passes for a default.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prefixcache.errors import InvalidArgument
from prefixcache.eviction import POLICIES
from prefixcache.hints.schema import DEFAULT_DEPLOYMENT, DEFAULT_PREFIX, checked_name
from prefixcache.hosts import is_loopback

ENV_PREFIX = "PREFIXCACHE_"
# Read by the client's side of this project, which may well run in the same environment.
CLIENT_VARIABLES = frozenset(ENV_PREFIX + name for name in ("ADDRESS", "TOKEN", "CA", "CERTIFICATE", "KEY"))

EMBEDDED = "embedded"
EMBEDDED_CACHE_LIMIT = 2 * 2**30
DEFAULT_SHARE = 0.25

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?:(?P<unit>[kmgt]?i?)b?)", re.IGNORECASE)
_SHARE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*%")
_HOST_PORT = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")
_PREFIX = re.compile(r"[!-z|~]{1,64}")  # what can be seen, without braces


def _cores() -> int:
    """Physical cores this process may use: hyperthreads of one core only slow each other down."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as siblings:
                cores.add(siblings.read())
        except OSError:
            return len(allowed)
    return len(cores)


class EngineConfig(BaseModel):
    """Options of one server process. Build it with `load`, which explains what is wrong."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        default=EMBEDDED,
        min_length=1,
        description="Directory or hub id of a transformers causal language model, or 'embedded' for the "
        "small one that needs no download.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Precision of weights and cache. 'auto': float32 on a CPU, the checkpoint's own on a GPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs. 'auto': the GPU if there is one."
    )
    kernels: Literal["auto", "torch"] = Field(
        default="auto",
        description="What computes on a CPU, besides oneDNN. 'auto': kernels that g++ compiles for this processor at "
        "the first start, or PyTorch's where there is no g++. 'torch': PyTorch's.",
    )
    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to listen on. The default accepts connections from this machine only; "
        "0.0.0.0 accepts them from everywhere.",
    )
    port: int = Field(default=50051, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    cache_memory: str = Field(
        default="auto",
        description="Memory for cached keys and values: bytes ('512MiB', '2GB') or a share of what is free "
        "once the model is loaded ('40%'). 'auto' is 25%, for the embedded model at most 2GiB.",
    )
    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens per cache block.")
    max_batch_tokens: int = Field(
        default=2048,
        ge=1,
        description="The most tokens computed in one step. Larger prefills faster and needs more memory.",
    )
    max_pause_ms: int = Field(
        default=250,  # hardly noticed in text that streams, and costs a few percent of the prefill rate on a quiet CPU
        ge=0,
        description="How long running streams may pause, in milliseconds, for a step that prefills others' prompts "
        "as well: while anyone is streaming, prompts are computed in chunks that keep to it. It is exceeded where "
        "prompts would get less than a third of the time. 0: no limit, which prefills fastest.",
    )
    warm_pause_ms: int = Field(
        default=10,  # a few percent of what most requests take, and half as fast as if nobody were to be spared
        ge=1,
        description="How long a request may have to wait, in milliseconds, for a step that computes prompts ahead of "
        "time (Warm). Longer warms faster. Running streams are slowed down by a quarter at most, whatever it is.",
    )
    warm: str = Field(
        default="",
        description="File of prompts (a JSON value per line, see `prefixcache warm --help`) to compute at the start.",
    )
    warm_before_serving: bool = Field(
        default=False, description="Say SERVING only when the prompts of --warm are computed."
    )
    remember: str = Field(
        default="",
        description="File in which the prefixes that save most are remembered, as token ids, readable for the owner "
        "only. What it holds at the start is computed before the server says SERVING.",
    )
    remember_seconds: float = Field(
        default=30.0, gt=0, allow_inf_nan=False, description="How often the file of --remember is written."
    )
    remember_wait_seconds: float = Field(
        default=60.0,
        ge=0,
        allow_inf_nan=False,
        description="How long the start may wait for what is remembered to be computed; the rest is computed while "
        "the server serves.",
    )
    max_running: int = Field(default=64, ge=1, description="The most requests computed at the same time.")
    max_queue: int = Field(
        default=1024,
        ge=1,
        description="The most requests waiting to be admitted; more are refused with RESOURCE_EXHAUSTED.",
    )
    stream_interval_ms: int = Field(
        default=50,  # smooth to a reader, and a fraction of the messages when many tokens come fast
        ge=0,
        description="How often a stream gets a message at most, in milliseconds: tokens that come faster share one. "
        "The first token and the end never wait, and a request with stop strings is not held back. 0: a message "
        "per token.",
    )
    max_message_bytes: int = Field(
        default=4 * 2**20, ge=1024, description="The largest request message accepted, in bytes."
    )
    threads: int = Field(
        default_factory=_cores,
        ge=1,
        description="Threads for the model's arithmetic on a CPU. Default: the cores this process may use.",
    )
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        allow_inf_nan=False,
        description="How long accepted requests may go on after SIGTERM or SIGINT.",
    )
    eviction: str = Field(
        default="lru",
        description="Which cached blocks are given up first when room is needed: " + ", ".join(POLICIES) + ".",
    )
    tenants: str = Field(
        default="",
        description="File (TOML) of the tenants who may call, with hashes of their tokens and their quotas; read again "
        "when it changes. Without it everybody may, and all share one cache. See `prefixcache token`.",
    )
    tls_certificate: str = Field(
        default="",
        description="File (PEM) of the server's certificate, to encrypt all connections; read again when it changes.",
    )
    tls_key: str = Field(default="", description="File (PEM) of the certificate's private key.")
    tls_client_ca: str = Field(
        default="",
        description="File (PEM) of whoever signs the clients' certificates: only clients with such a certificate can "
        "connect, and its names may stand for a tenant.",
    )
    allow_plaintext: bool = Field(
        default=False,
        description="Take tokens from other machines without TLS. Only where something else encrypts the way to here, "
        "such as a proxy or a service mesh.",
    )
    default_ttl_seconds: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="How long cached prompts are kept, in seconds, unless a request says otherwise. 0: until they are "
        "evicted.",
    )
    ttl_mode: Literal["sliding", "fixed"] = Field(
        default="sliding",
        description="What starts a time to live anew: every use ('sliding') or nothing ('fixed'), unless a request "
        "says otherwise.",
    )
    session_idle_seconds: float = Field(
        default=600.0,
        gt=0,
        allow_inf_nan=False,
        description="A session that nobody has used for so long ends: what only it has used is evicted first.",
    )
    max_pinned_percent: int = Field(
        default=25,
        ge=0,
        le=90,
        description="Share of the cache that pins may hold. The rest is always there for requests, so it also bounds "
        "the longest prompt.",
    )
    redis: str = Field(
        default="",
        description="URL of a Redis server (redis://, rediss://, redis+cluster://, redis+sentinel://, unix://) through "
        "which replicas and `prefixcache route` learn what this one has cached. It may hold a user and a password; "
        "better then to set it as PREFIXCACHE_REDIS, which other users of this machine do not see.",
    )
    advertise: str = Field(
        default="",
        description="host:port under which other machines reach this server, for --redis. Not needed if it accepts "
        "connections from this machine only.",
    )
    replica_id: str = Field(
        default="",
        description="Name of this server among its replicas; every answer carries it. With --redis, it is made from "
        "the machine's name and the port if it is not given.",
    )
    deployment: str = Field(
        default=DEFAULT_DEPLOYMENT,
        description="Replicas find each other's prompts if they have the same deployment, model and block size.",
    )
    redis_prefix: str = Field(default=DEFAULT_PREFIX, description="What all keys in Redis begin with.")
    secret_file: str = Field(
        default="",
        description="File with the secret of the deployment, at least 16 bytes, the same on all replicas. It enters "
        "the hashes by which blocks are named, so that they tell nobody else which prompts they stand for.",
    )
    lease_seconds: float = Field(
        default=12.0,
        ge=2,
        le=300,
        description="How long other replicas believe in this one, in seconds, after they last heard of it in Redis.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least severe message that is logged. 'debug' has a line per request."
    )
    log_format: Literal["auto", "text", "json"] = Field(
        default="auto", description="How log lines look. 'auto': text on a terminal, json otherwise."
    )

    @field_validator("eviction")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        if value not in POLICIES:
            raise ValueError(f"there are the policies {', '.join(POLICIES)}")
        return value

    @field_validator("cache_memory")
    @classmethod
    def _readable_size(cls, value: str) -> str:
        text = value.strip()
        if text == "auto":
            return text
        if share := _SHARE.fullmatch(text):
            if not 0 < float(share["number"]) <= 100:
                raise ValueError("a share of free memory must be above 0% and at most 100%")
            return text
        if size := _SIZE.fullmatch(text):
            if _bytes(size) < 1:
                raise ValueError("the size must be above 0")
            return text
        raise ValueError("give bytes, such as '512MiB' or '2GB', a share, such as '40%', or 'auto'")

    @field_validator("advertise")
    @classmethod
    def _reachable(cls, value: str) -> str:
        match = _HOST_PORT.fullmatch(value)
        if value and (match is None or not 0 < int(match["port"]) < 65536):
            raise ValueError("give host:port, such as 10.0.0.7:50051")
        return value

    @field_validator("redis_prefix")
    @classmethod
    def _usable_prefix(cls, value: str) -> str:
        if not _PREFIX.fullmatch(value):
            raise ValueError("it must be 1 to 64 ASCII characters without spaces and braces")
        return value

    @model_validator(mode="after")
    def _known_to_others(self) -> Self:
        checked_name(self.deployment, "deployment")
        if self.replica_id:
            checked_name(self.replica_id, "replica_id")
        if not self.redis:
            if self.advertise:
                raise ValueError("advertise is how replicas are found through Redis: give redis as well, or neither")
            return self
        if not self.advertise and not is_loopback(self.host):
            raise ValueError(
                f"other replicas must know how to reach this server, and {self.host} does not say: give advertise, "
                "such as 10.0.0.7:50051"
            )
        if self.tenants and not self.secret_file:
            raise ValueError(
                "with tenants, redis needs secret_file: without a secret, whoever can read Redis could find out "
                "whether a tenant has sent a prompt, by trying"
            )
        return self

    @model_validator(mode="after")
    def _safe_way_for_tokens(self) -> Self:
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate and tls_key belong together: give both")
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("tls_client_ca needs TLS: give tls_certificate and tls_key as well")
        plaintext = not self.tls_certificate and not is_loopback(self.host)
        if self.tenants and plaintext and not self.allow_plaintext:
            raise ValueError(
                f"tokens would cross the network unencrypted to {self.host}: give tls_certificate and tls_key, or "
                "allow_plaintext if something else encrypts the way to here"
            )
        return self

    def cache_bytes(self, free: int) -> int:
        """Return how many bytes the cache may take when `free` bytes are free on the device."""
        if self.cache_memory == "auto":
            share = int(free * DEFAULT_SHARE)
            return min(share, EMBEDDED_CACHE_LIMIT) if self.model == EMBEDDED else share
        if share_match := _SHARE.fullmatch(self.cache_memory):
            return int(free * float(share_match["number"]) / 100)
        size = _SIZE.fullmatch(self.cache_memory)
        assert size is not None, "the validator lets nothing else through"
        return _bytes(size)


def _bytes(size: re.Match[str]) -> int:
    return int(float(size["number"]) * _UNITS[size["unit"].lower()])


def load(environment: Mapping[str, str] | None = None, **options: object) -> EngineConfig:
    """Return the configuration from `options`, then `environment`, then the defaults.

    Options that are None count as not given. Raises InvalidArgument that names every
    unknown or unusable option and says what is allowed. The default environment is the
    process's own.
    """
    fields = EngineConfig.model_fields
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in fields:
            raise InvalidArgument(f"there is no option {name!r}{closest(name, fields)}")
    source = os.environ if environment is None else environment
    for variable, value in source.items():
        if not variable.startswith(ENV_PREFIX) or variable in CLIENT_VARIABLES:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in fields:
            known = {ENV_PREFIX + field.upper(): None for field in fields}
            raise InvalidArgument(f"{variable} is set, but it is no option{closest(variable, known)}")
        given.setdefault(name, value)
    try:
        return EngineConfig.model_validate(given)
    except ValidationError as error:
        raise InvalidArgument("; ".join(_explain(detail) for detail in error.errors())) from None


def closest(name: str, known: Mapping[str, object]) -> str:
    """Return what to say behind an unknown name: the one that was probably meant, or all there are."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f". There are: {', '.join(sorted(known))}"


def _explain(detail: Mapping[str, object]) -> str:
    location = detail["loc"]
    assert isinstance(location, tuple)
    name = ".".join(str(part) for part in location)
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not name:  # of several options
        return message
    return f"option {name} cannot be {detail['input']!r}: {message[0].lower()}{message[1:]}"
