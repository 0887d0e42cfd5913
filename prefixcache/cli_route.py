"""`prefixcache route`: one address for several replicas."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from prefixcache import terminal
from prefixcache.errors import InvalidArgument
from prefixcache.extras import not_installed
from prefixcache.hints.schema import DEFAULT_PREFIX
from prefixcache.routing.policies import DEFAULT, POLICIES

REPLICAS, LISTEN, WAY, LOG = "Replicas", "Where it listens", "The way to the replicas", "Log"

Redis = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar="PREFIXCACHE_REDIS",
        help="The Redis in which the replicas are registered (serve --redis).",
        show_default=False,
        rich_help_panel=REPLICAS,
    ),
]
RedisPrefix = Annotated[
    str,
    typer.Option(
        envvar="PREFIXCACHE_REDIS_PREFIX", help="What all keys in Redis begin with.", rich_help_panel=REPLICAS
    ),
]
Deployment = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        envvar="PREFIXCACHE_DEPLOYMENT",
        help="Only replicas of this deployment.",
        show_default=False,
        rich_help_panel=REPLICAS,
    ),
]
Group = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Only this group of replicas, as `prefixcache replicas` names it.",
        show_default="the one with most replicas",
        rich_help_panel=REPLICAS,
    ),
]


def _file(option: str, variable: str, text: str) -> object:
    return typer.Option(
        option,
        metavar="FILE",
        envvar=variable,
        exists=True,
        dir_okay=False,
        readable=True,
        help=text,
        show_default=False,
        rich_help_panel=WAY,
    )


def route(
    redis: Redis = "",
    redis_prefix: RedisPrefix = DEFAULT_PREFIX,
    deployment: Deployment = "",
    group: Group = "",
    replica: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The address of a replica, with or without Redis; can be given again.",
            show_default=False,
            rich_help_panel=REPLICAS,
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help=f"How replicas are chosen: {', '.join(POLICIES)}.", rich_help_panel=REPLICAS)
    ] = DEFAULT,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=LISTEN)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.", rich_help_panel=LISTEN)] = 50051,
    tls_certificate: Annotated[
        str, typer.Option(metavar="FILE", help="Speak TLS with this certificate (PEM).", rich_help_panel=LISTEN)
    ] = "",
    tls_key: Annotated[str, typer.Option(metavar="FILE", help="Its private key (PEM).", rich_help_panel=LISTEN)] = "",
    tls: Annotated[
        bool | None,
        typer.Option("--tls/--no-tls", help="Speak TLS with the replicas, as --ca does.", rich_help_panel=WAY),
    ] = None,
    ca: Annotated[Path | None, _file("--ca", "PREFIXCACHE_CA", "Who signed the replicas' certificates (PEM).")] = None,
    certificate: Annotated[
        Path | None,
        _file(
            "--certificate",
            "PREFIXCACHE_CERTIFICATE",
            "The gateway's own certificate (PEM). If it is a tenant's, callers without a token are that tenant.",
        ),
    ] = None,
    key: Annotated[Path | None, _file("--key", "PREFIXCACHE_KEY", "Its private key (PEM).")] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, help="How long calls may go on after SIGTERM or SIGINT.", rich_help_panel=LISTEN),
    ] = 30.0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="The least severe message that is logged.", rich_help_panel=LOG),
    ] = "info",
    log_format: Annotated[
        Literal["auto", "text", "json"],
        typer.Option(help="How log lines look. 'auto': text on a terminal, json otherwise.", rich_help_panel=LOG),
    ] = "auto",
) -> None:
    """Put several replicas behind one address, for any client.

    A prompt goes to the replica that holds its longest prefix, unless that one is busier than the saving is worth.
    Redis says who is there and who holds what; without an answer from it, the gateway goes on with what it has seen
    itself. Tokens, quotas and everything else about callers are the replicas' business.

    Ctrl+C or SIGTERM ends it: calls in progress may finish, new ones are refused. A second one ends it at once.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # what it says of failed handshakes comes as an error as well
    import asyncio

    try:
        from prefixcache import logs
        from prefixcache.routing.gateway import Settings
        from prefixcache.routing.serving import serve
        from prefixcache.tls import server_credentials
    except ImportError as error:
        raise not_installed(error, "a gateway", "route") from None
    from prefixcache.channel import TLS

    if bool(tls_certificate) != bool(tls_key):
        raise typer.BadParameter("--tls-certificate and --tls-key belong together: give both")
    way: TLS | bool | None = tls
    if tls is not False and (ca or certificate or key):
        way = TLS(ca, certificate, key)
    settings = Settings(
        redis=redis,
        redis_prefix=redis_prefix,
        deployment=deployment,
        group=group,
        replicas=tuple(replica or ()),
        policy=policy,
        tls=way,
    )
    try:
        settings.check()
        credentials = server_credentials(tls_certificate, tls_key)
        logs.configure(log_level, log_format)
        raise typer.Exit(asyncio.run(serve(settings, host, port, credentials, drain_seconds)))
    except InvalidArgument as error:
        terminal.error(str(error))
        raise typer.Exit(2) from None
