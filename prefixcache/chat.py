"""`prefixcache chat`: a conversation, and what each turn of it cost.

Every turn sends the whole conversation, as chat programs do; the cache makes that
cheap. A turn that fails or is cancelled leaves the conversation as it was before. On a
terminal there is a prompt with line editing; otherwise each line of stdin is a turn.

A conversation is a session: when it ends, what only it has used is the first to go.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Iterator

from prefixcache import sample, terminal
from prefixcache.client import Client
from prefixcache.errors import FailedPrecondition, PrefixCacheError, Unavailable
from prefixcache.explain import cost
from prefixcache.requests import GenerateOptions

END_SECONDS = 2.0
EMBEDDED = "embedded"
"""The model that is given a sheet to answer from, if there is no other system prompt."""
HELP = """\
/system   show the system prompt
/reset    begin a new conversation (with the same system prompt)
/help     this list
Ctrl+C    cancel the answer
Ctrl+D    end the chat"""


class Conversation:
    """The turns so far and how to get the next one."""

    def __init__(self, client: Client, system: str | None, options: GenerateOptions) -> None:
        self._client = client
        self._options = options.copy()
        self._beginning = [{"role": "system", "content": system}] if system is not None else []
        self.reset()

    @property
    def system(self) -> str | None:
        return self._beginning[0]["content"] if self._beginning else None

    def reset(self) -> None:
        """Begin anew, as another session."""
        self._turns = list(self._beginning)
        self._options["session_id"] = f"chat-{secrets.token_hex(8)}"

    def end(self) -> None:
        """Tell the server that nobody will go on from here, if it still answers."""
        session, namespace = self._options["session_id"], self._options.get("namespace")
        assert session is not None
        with contextlib.suppress(PrefixCacheError):
            self._client.end_session(session, namespace=namespace or "", timeout=END_SECONDS)

    def say(self, text: str) -> None:
        """Send a turn, write the answer as it comes, and add both. Raises what the client raises."""
        turns = [*self._turns, {"role": "user", "content": text}]
        with self._client.stream(turns, **self._options) as stream:
            terminal.write(stream)
            completion = stream.result()
        terminal.note(cost(completion))
        self._turns = [*turns, {"role": "assistant", "content": completion.text}]


def chat(client: Client, system: str | None, options: GenerateOptions) -> None:
    """Talk until the input ends. Without a terminal the first error ends it and is raised."""
    model = client.model()
    if not model.has_chat_template:
        raise FailedPrecondition(
            f"{model.name} has no chat template, so it cannot hold a conversation; use `prefixcache generate`"
        )
    interactive = sys.stdin.isatty()
    if interactive:
        terminal.note(f"{model.name} ({model.architecture}) at {client.target}; /help lists what you can do")
    if system is None and model.name == EMBEDDED:
        system = sample.sheet()
        if interactive:
            terminal.note("It answers from a sheet, which /system shows. Ask, for example:")
            for question in sample.QUESTIONS:
                terminal.note(f"  {question}")
    conversation = Conversation(client, system, options)
    try:
        _talk(conversation, interactive)
    finally:
        conversation.end()


def _talk(conversation: Conversation, interactive: bool) -> None:
    for line in _lines(interactive):
        match line.strip():
            case "":
                continue
            case "/reset":
                conversation.end()
                conversation.reset()
                terminal.note("a new conversation")
            case "/system":
                terminal.note(conversation.system or "there is no system prompt")
            case "/help":
                terminal.note(HELP)
            case text if text.startswith("/") and " " not in text:
                terminal.note(f"there is no {text}; /help lists what there is")
            case text:
                _turn(conversation, text, interactive)


def _turn(conversation: Conversation, text: str, interactive: bool) -> None:
    try:
        conversation.say(text)
    except KeyboardInterrupt:
        if not interactive:
            raise
        terminal.note("cancelled: this turn is not part of the conversation")
    except PrefixCacheError as error:
        if not interactive or isinstance(error, Unavailable):
            raise
        terminal.error(str(error))


def _lines(interactive: bool) -> Iterator[str]:
    """Yield the lines that are typed or piped in, until there are no more."""
    if not interactive:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` line editing and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            terminal.note("Ctrl+D ends the chat")
