"""What the client commands print: tables and JSON on standard output, errors on standard error."""

import json
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from quiver.channel import Tls
from quiver.client import Client
from quiver.errors import InvalidRequest, QuiverClientError
from quiver.exit_codes import FAILED, MISUSED
from quiver.results import Adapter, AdapterChanges, AdapterState, Score

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_STATE_STYLES = {
    AdapterState.RESIDENT: "green",
    AdapterState.LOADING: "yellow",
    AdapterState.HOST: "cyan",
    AdapterState.FAILED: "red",
}
_SHORT_REVISION_CHARACTERS = 12
_PIPE_WIDTH = 2000


@contextmanager
def connected(server: str) -> Generator[Client, None, None]:
    """A client of `server`; a failed call ends the command with its message and an exit code of `exit_codes`.

    Token and certificates come from the environment, where neither `ps` nor a shell's history shows them.
    """
    try:
        client = Client(server, token=os.environ.get("QUIVER_TOKEN", ""), tls=_tls())
    except (OSError, ValueError) as error:
        typer.echo(f"quiver: {error}", err=True)
        raise typer.Exit(MISUSED) from None
    with client:
        try:
            yield client
        except QuiverClientError as error:
            typer.echo(f"quiver: {error}", err=True)
            raise typer.Exit(MISUSED if isinstance(error, InvalidRequest) else FAILED) from None


def _tls() -> Tls | None:
    """The files that QUIVER_TLS_CA, QUIVER_TLS_CERT and QUIVER_TLS_KEY name; None when none does."""
    values = [os.environ.get(f"QUIVER_TLS_{name}") for name in ("CA", "CERT", "KEY")]
    return Tls(*(Path(value) if value else None for value in values)) if any(values) else None


def print_json(value: "DataclassInstance | Sequence[DataclassInstance]") -> None:
    """Prints one result, or a list of them, as JSON."""
    data: Any = [asdict(item) for item in value] if isinstance(value, Sequence) else asdict(value)
    print(json.dumps(data, indent=2, ensure_ascii=False))


def print_json_line(value: "DataclassInstance") -> None:
    """Prints one of a stream of results as a line of JSON, at once."""
    print(json.dumps(asdict(value), ensure_ascii=False), flush=True)


def print_changes(changes: AdapterChanges) -> None:
    """Prints a line for each adapter that has changed, at once."""
    for adapter in changes.adapters:
        pin = " (pinned)" if adapter.pinned else ""
        reason = f": {adapter.failure_reason}" if adapter.failure_reason else ""
        aliases = "".join(f", {alias.name} is {short_revision(alias.revision)}" for alias in adapter.aliases)
        revision = f", revision {short_revision(adapter.revision)}" if adapter.revision else ""
        print(f"{adapter.id} {adapter.state}{pin}{reason}{revision}{aliases}", flush=True)
    for adapter_id in changes.removed_ids:
        print(adapter_id, "gone", flush=True)


def print_adapters(adapters: Sequence[Adapter]) -> None:
    """Prints a table with one row per adapter, then why those that failed did."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("adapter", "state", "methods", "revision", "aliases"):
        table.add_column(heading, no_wrap=heading != "methods")
    for heading in ("device", "host", "disk", "running", "waiting"):
        table.add_column(heading, justify="right", no_wrap=True)
    for adapter in adapters:
        table.add_row(*_row(adapter))
    console = _console()
    console.print(table)
    for adapter in adapters:
        if adapter.failure_reason:
            console.print(f"{adapter.id} failed: {adapter.failure_reason}", soft_wrap=True)


def print_adapter(adapter: Adapter) -> None:
    """Prints one adapter with a field a line, its aliases and its revisions."""
    print_fields(replace(adapter, aliases=(), revisions=()))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("revision", "state", "aliases"):
        table.add_column(heading, no_wrap=True)
    for heading in ("device", "host", "disk", "running"):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in adapter.revisions:
        pin = " (pinned)" if item.pinned else ""
        names = ", ".join(alias.name for alias in adapter.aliases if alias.revision == item.revision)
        sizes = (decimal(size) for size in (item.device_bytes, item.host_bytes, item.disk_bytes))
        table.add_row(short_revision(item.revision), item.state + pin, names, *sizes, str(item.running))
    if adapter.revisions:
        _console().print(table)


def _row(adapter: Adapter) -> tuple[str | Text, ...]:
    pin = " (pinned)" if adapter.pinned else ""
    return (
        adapter.id,
        Text(adapter.state + pin, style=_STATE_STYLES.get(adapter.state, "")),
        ", ".join(adapter.methods),
        short_revision(adapter.revision),
        ", ".join(alias.name for alias in adapter.aliases),
        decimal(adapter.device_bytes),
        decimal(adapter.host_bytes),
        decimal(adapter.disk_bytes),
        str(adapter.running),
        str(adapter.waiting),
    )


def print_scores(continuations: Sequence[str], scores: Sequence[Score]) -> None:
    """Prints a table with one row per continuation, in the order they were asked for."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("continuation")
    for heading in ("log-probability", "tokens", "greedy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for text, score in zip(continuations, scores, strict=True):
        greedy = "yes" if score.is_greedy else ""
        table.add_row(Text(repr(text)), f"{score.total_logprob:.4f}", str(len(score.logprobs)), greedy)
    _console().print(table)


def print_fields(value: "DataclassInstance") -> None:
    """Prints one result with a field a line, leaving out empty ones."""
    table = Table.grid(padding=(0, 2))
    for name, field in asdict(value).items():
        if field not in ("", ()):
            table.add_row(name.removesuffix("_bytes").replace("_", " "), _field_text(name, field))
    _console().print(table)


def _field_text(name: str, field: Any) -> str:
    if isinstance(field, bool):
        return "yes" if field else "no"
    if name.endswith("_bytes"):
        return decimal(field)
    if isinstance(field, int):
        return f"{field:,}"
    return ", ".join(field) if isinstance(field, tuple) else str(field)


def short_revision(revision: str) -> str:
    """The first characters of a revision: enough for people, and for "id@revision" in a request."""
    return revision[:_SHORT_REVISION_CHARACTERS]


def _console() -> Console:
    # What a server sends is text, never markup. A pipe has no width: do not cut ids to fit one.
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return Console(markup=False, highlight=False, emoji=False, width=width)
