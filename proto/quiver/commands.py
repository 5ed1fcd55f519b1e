"""The `quiver` commands that talk to a server, and the help that names all commands."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from quiver import channel, terminal
from quiver.adapter_commands import AsJson, Server, adapters_app
from quiver.client import Client
from quiver.dispatch import run_command
from quiver.exit_codes import EXIT_CODES, FAILED
from quiver.request_messages import GenerateOptions

_EXAMPLES = f"""
Examples:

  quiver train recipes/routing.yaml

  quiver serve --base models/base --adapters adapters

  quiver generate "Where is my order?" --adapter routing

  quiver adapters list

Environment of the commands that talk to a server: QUIVER_SERVER, QUIVER_TOKEN, and for TLS QUIVER_TLS_CA,
QUIVER_TLS_CERT, QUIVER_TLS_KEY (PEM files).

{EXIT_CODES}"""

app = typer.Typer(
    help="One frozen base model, many hot-swappable adapters, one batch.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(adapters_app, name="adapters")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"quiver {version('quiver')}")
        raise typer.Exit()


@app.callback()
def _app_options(  # pyright: ignore[reportUnusedFunction]  # Typer calls it
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


_PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=_PASS_THROUGH)
def train(context: typer.Context) -> None:
    """Train an adapter from a YAML recipe."""
    raise typer.Exit(run_command("train", context.args))


@app.command(context_settings=_PASS_THROUGH)
def predict(context: typer.Context) -> None:
    """Write an adapter's answers for a JSONL file."""
    raise typer.Exit(run_command("predict", context.args))


@app.command(context_settings=_PASS_THROUGH)
def publish(context: typer.Context) -> None:
    """Put an adapter into a store, once it has loaded and measures as recorded."""
    raise typer.Exit(run_command("publish", context.args))


@app.command(context_settings=_PASS_THROUGH)
def merge(context: typer.Context) -> None:
    """Fold an adapter into its base's weights."""
    raise typer.Exit(run_command("merge", context.args))


@app.command(context_settings=_PASS_THROUGH)
def export(context: typer.Context) -> None:
    """Write an adapter as Hugging Face PEFT folders."""
    raise typer.Exit(run_command("export", context.args))


@app.command(name="import", context_settings=_PASS_THROUGH)
def import_(context: typer.Context) -> None:
    """Write an adapter made elsewhere, a NeMo archive for one, as a folder to serve."""
    raise typer.Exit(run_command("import", context.args))


@app.command(context_settings=_PASS_THROUGH)
def serve(context: typer.Context) -> None:
    """Serve a base model and its adapters over gRPC."""
    raise typer.Exit(run_command("serve", context.args))


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help='The prompt. "-", or none and no --file: standard input.')
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    adapter: Annotated[str, typer.Option(help="Adapter id; none: the base model alone.")] = "",
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.")] = None,
    priority: Annotated[int, typer.Option(help="Among the adapter's waiting requests, -10 to 10.")] = 0,
    stream: Annotated[bool, typer.Option(help="Print the text while it is generated.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")] = False,
    server: Server = channel.DEFAULT_TARGET,
) -> None:
    """Answer a prompt."""
    text = _read_prompt(prompt, file)
    options = GenerateOptions(
        adapter=adapter,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop,
        priority=priority,
    )
    with terminal.connected(server) as client:
        if as_json:
            terminal.print_json(client.generate(text, **options))
        elif stream:
            _print_stream(client, text, options)
        else:
            print(client.generate(text, **options).text)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the command line, or a file or standard input less its last newline."""
    if file is not None:
        if prompt is not None:
            raise typer.BadParameter("give either PROMPT or --file, not both")
        try:
            return file.read_text("utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"cannot read {file}: {error}") from None
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter('give a PROMPT, a --file, or "-" to type one')
    return sys.stdin.read().removesuffix("\n")


def _print_stream(client: Client, prompt: str, options: GenerateOptions) -> None:
    try:
        for piece in client.stream(prompt, **options):
            print(piece.text, end="", flush=True)
    finally:
        print(flush=True)


@app.command()
def score(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    continuations: Annotated[list[str], typer.Argument(metavar="CONTINUATION...", help="What may follow it.")],
    adapter: Annotated[str, typer.Option(help="Adapter id; none: the base model alone.")] = "",
    as_json: AsJson = False,
    server: Server = channel.DEFAULT_TARGET,
) -> None:
    """Tell how likely texts are to follow a prompt: quiver score "The sky is" " blue" " green"."""
    with terminal.connected(server) as client:
        scoring = client.score(prompt, continuations, adapter=adapter)
    if as_json:
        terminal.print_json(scoring)
    else:
        terminal.print_scores(continuations, scoring.scores)


@app.command()
def model(server: Server = channel.DEFAULT_TARGET, as_json: AsJson = False) -> None:
    """Describe the server's base model."""
    with terminal.connected(server) as client:
        description = client.get_model()
    if as_json:
        terminal.print_json(description)
    else:
        terminal.print_fields(description)


@app.command()
def health(server: Server = channel.DEFAULT_TARGET) -> None:
    """Exit 0 when the server can take requests, 1 when not."""
    with terminal.connected(server) as client:
        healthy = client.is_healthy()
    print(f"{server} is {'serving' if healthy else 'not serving'}", file=sys.stdout if healthy else sys.stderr)
    raise typer.Exit(0 if healthy else FAILED)
