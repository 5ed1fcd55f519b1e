"""The `quiver adapters` commands: what a server's adapters are, and what an administrator does to them."""

from typing import Annotated

import typer
from rich.filesize import decimal

from quiver import channel, terminal
from quiver.results import Tier, UnloadPolicy

_EPILOG = """
A name is an id, "id@revision" (the first digits will do) or an alias.

  quiver adapters load support                  take up its newer content; running requests finish on the old

  quiver adapters alias production support      requests for "production" get this revision from now on

  quiver adapters alias production support@3f9c2a     and roll back

  quiver adapters unload support --running cancel
"""

adapters_app = typer.Typer(
    help="List, load, pin, alias, unload and watch a server's adapters.", epilog=_EPILOG, no_args_is_help=True
)

Server = Annotated[str, typer.Option(envvar="QUIVER_SERVER", metavar="HOST:PORT", help="The server to ask.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(metavar="ADAPTER", help="Its id, id@revision or alias.")]


@adapters_app.command("list")
def list_adapters(server: Server = channel.DEFAULT_TARGET, as_json: AsJson = False) -> None:
    """Show every adapter that the server knows."""
    with terminal.connected(server) as client:
        adapters = client.list_adapters()
    if as_json:
        terminal.print_json(adapters)
    else:
        terminal.print_adapters(adapters)


@adapters_app.command("show")
def show_adapter(adapter_id: Name, server: Server = channel.DEFAULT_TARGET, as_json: AsJson = False) -> None:
    """Show one adapter with everything the server knows about it."""
    with terminal.connected(server) as client:
        adapter = client.get_adapter(adapter_id)
    if as_json:
        terminal.print_json(adapter)
    else:
        terminal.print_adapter(adapter)


@adapters_app.command("load")
def load_adapter(
    adapter_id: Name,
    source: Annotated[str, typer.Option(help="Path or URL below a store of the server; none: where it is.")] = "",
    pin: Annotated[bool | None, typer.Option("--pin/--no-pin", help="Keep it on the device when unused.")] = None,
    tier: Annotated[Tier, typer.Option(help="How near: host reads and validates it into main memory.")] = Tier.DEVICE,
    server: Server = channel.DEFAULT_TARGET,
    as_json: AsJson = False,
) -> None:
    """Bring an adapter, or its newer content, into the server's memory."""
    with terminal.connected(server) as client:
        adapter = client.load_adapter(adapter_id, source=source, pin=pin, tier=tier)
    if as_json:
        terminal.print_json(adapter)
    else:
        revision = terminal.short_revision(adapter.revision)
        methods = f"{', '.join(adapter.methods)}, " if adapter.methods else ""
        print(f"{adapter.id} is {adapter.state}: {methods}revision {revision}")


@adapters_app.command("unload")
def unload_adapter(
    adapter_id: Name,
    running: Annotated[UnloadPolicy, typer.Option(help="What happens to its requests.")] = UnloadPolicy.WAIT,
    server: Server = channel.DEFAULT_TARGET,
    as_json: AsJson = False,
) -> None:
    """Take an adapter out of the server's memory, and its pin away."""
    with terminal.connected(server) as client:
        freed_bytes = client.unload_adapter(adapter_id, running=running)
    print(f'{{"freed_bytes": {freed_bytes}}}' if as_json else f"{adapter_id}: {decimal(freed_bytes)} given back")


@adapters_app.command("alias")
def alias_adapter(
    alias: Annotated[str, typer.Argument(metavar="NAME", help="The alias.")],
    target: Annotated[str, typer.Argument(metavar="[TARGET]", help="id, id@revision, or another alias.")] = "",
    delete: Annotated[bool, typer.Option("--delete", help="Take the alias away.")] = False,
    server: Server = channel.DEFAULT_TARGET,
    as_json: AsJson = False,
) -> None:
    """Let a name answer with one exact revision, in one step; move it back to roll back."""
    if bool(target) == delete:
        raise typer.BadParameter("give either a TARGET or --delete")
    with terminal.connected(server) as client:
        named = client.delete_alias(alias) if delete else client.set_alias(alias, target)
    if as_json:
        terminal.print_json(named)
    else:
        exact = f"{named.adapter_id}@{terminal.short_revision(named.revision)}"
        print(f"{alias} is deleted; it was {exact}" if delete else f"{alias} is {exact}")


@adapters_app.command("watch")
def watch_adapters(server: Server = channel.DEFAULT_TARGET, as_json: AsJson = False) -> None:
    """Print every adapter's state, then each change, until interrupted."""
    with terminal.connected(server) as client:
        for changes in client.watch_adapters():
            if as_json:
                terminal.print_json_line(changes)
            else:
                terminal.print_changes(changes)
