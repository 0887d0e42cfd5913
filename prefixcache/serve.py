"""`prefixcache serve`: its options are the fields of the engine's configuration.

Loaded when the command is used, since the configuration comes with the engine's
dependencies. A value goes to the configuration as it was typed or, if it was not
given, not at all, so that environment variables and defaults are in one place.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from typing import Annotated, Any

import typer
from typer.main import get_command

from prefixcache import terminal
from prefixcache.errors import FailedPrecondition, InvalidArgument

EPILOG = "Every option can also be set in the environment, as PREFIXCACHE_ and its name, such as PREFIXCACHE_PORT."


def command(description: str) -> Any:
    """Return the command for `prefixcache serve`. Raises FailedPrecondition without the engine's dependencies."""
    try:
        from engine.config import EngineConfig
    except ImportError as error:
        raise _not_installed(error) from None

    def serve(**options: Any) -> None:
        run(options)

    parameters = []
    for name, field in EngineConfig.model_fields.items():
        default = str(field.default) if field.default_factory is None else ""
        switch = (f"--{name.replace('_', '-')}",) if field.default is False else ()  # nobody switches off what is off
        option = typer.Option(
            *switch, help=field.description, show_default=default if default and not switch else False
        )
        annotation: Any = Annotated[field.annotation | None, option]  # type: ignore[operator]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False)
    app.command("serve", help=description, epilog=EPILOG)(serve)
    return get_command(app)


def run(options: dict[str, Any]) -> None:
    """Serve until SIGTERM or SIGINT; ends with typer.Exit, of code 2 if the options cannot be used."""
    from engine import config

    try:
        configuration = config.load(**options)
    except InvalidArgument as error:
        terminal.error(str(error))
        raise typer.Exit(2) from None
    if sys.stderr.isatty():
        terminal.note(f"Loading {configuration.model} ... (Ctrl+C ends the server; requests in progress may finish)")
    try:
        from engine import server
    except ImportError as error:
        raise _not_installed(error) from None
    raise typer.Exit(asyncio.run(server.serve(configuration)))


def _not_installed(error: ImportError) -> FailedPrecondition:
    """Return what to tell a user about a missing dependency; a missing module of ours is our own bug."""
    missing = (error.name or "").partition(".")[0]
    if missing in ("", "engine", "prefixcache"):
        raise error
    return FailedPrecondition(
        f"a server needs {missing}, which is not installed: pip install 'prefixcache[engine]' "
        "(generate, chat, lookup and stats work without it)"
    )
