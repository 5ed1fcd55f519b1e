"""Exit codes of every `quiver` command: 2 where something given is wrong, 1 where it failed while it ran."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import tiny_llama, tiny_tokenizer

from quiver import cli
from quiver.dispatch import COMMANDS
from quiver.exit_codes import EXIT_CODES
from quiver_peft import GPT, LoraPEFTConfig

ROW = '{"prompt": "Where is my parcel?", "completion": " Shipping"}\n'
RECIPE = """\
base: base
output: out
adapter: {method: lora, adapter_dim: 2}
data: {train: rows.jsonl}
epochs: 9
"""
ADAPTER = ("--adapter", "{tmp}/adapter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, rows, a recipe, and a file where a folder would be needed."""
    root = tmp_path_factory.mktemp("commands")
    tiny_llama(root / "base")
    tiny_tokenizer(root / "base")
    model = GPT.from_pretrained(root / "base")
    model.add_adapter(LoraPEFTConfig(adapter_dim=2))
    model.save_adapter(root / "adapter")
    files = {"rows.jsonl": ROW, "bad.jsonl": "{", "deep.jsonl": "[" * 100_000, "recipe.yaml": RECIPE, "file": ""}
    for name, text in files.items():
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`quiver serve` installs a handler for its process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def serve(*options: str) -> list[str]:
    return ["serve", "--base", "{tmp}/base", "--adapters", "{tmp}", "--port", "0", "--metrics-port", "-1", *options]


def predict(*options: str) -> list[str]:
    return ["predict", "--base", "{tmp}/base", "{tmp}/rows.jsonl", "{tmp}/answers.jsonl", *options]


MISTAKES = [
    serve("--dtypo", "float32"),
    serve("--dtype", "float8"),
    serve("--device", "quantum"),
    serve("--base", "{tmp}/nowhere"),
    serve("--adapters", "{tmp}/nowhere"),
    serve("--adapters", "ftp://host/x"),
    serve("--token-file", "{tmp}/nowhere.toml"),
    ["train"],
    ["train", "{tmp}/nowhere.yaml"],
    ["train", "{tmp}/recipe.yaml", "epochs=none"],
    ["train", "{tmp}/recipe.yaml", "base={tmp}"],
    ["train", "{tmp}/recipe.yaml", "data.train={tmp}/bad.jsonl"],
    ["train", "{tmp}/recipe.yaml", "data.train={tmp}/deep.jsonl"],
    predict("--max-new-tokens", "0"),
    predict("--device", "quantum"),
    predict("--base", "{tmp}/nowhere"),
    predict("--adapter", "{tmp}/base"),
    ["predict", "--base", "{tmp}/base", "{tmp}/bad.jsonl", "{tmp}/answers.jsonl"],
    ["publish"],
    ["publish", "--base", "{tmp}/nowhere", "{tmp}/adapter", "{tmp}/store"],
    ["publish", "--base", "{tmp}/base", "{tmp}/adapter", "{tmp}/store"],
    ["publish", "--base", "{tmp}/base", "--unmeasured", "{tmp}/adapter", "ftp://host/x"],
    *([command, "--base", "{tmp}/nowhere", *ADAPTER, "{tmp}/new"] for command in ("merge", "export", "import")),
    *([command, "--base", "{tmp}/base", *ADAPTER, "{tmp}/base"] for command in ("merge", "export", "import")),
    ["generate", "hello", "--temprature", "1"],
    ["generate", "hello", "--max-new-tokens", "-1"],
    ["generate", "--file", "{tmp}/nowhere.txt"],
    ["adapters", "alias", "live"],
]
FAILURES = [
    serve("--port", "{taken}"),
    serve("--metrics-port", "{taken}"),
    ["train", "{tmp}/recipe.yaml", "optimizer.learning_rate=1e30", "optimizer.max_gradient_norm=null"],
    ["train", "{tmp}/recipe.yaml", "output={tmp}/file/out"],
    ["predict", "--base", "{tmp}/base", "{tmp}/rows.jsonl", "{tmp}/file/answers.jsonl"],
    ["publish", "--base", "{tmp}/base", "--unmeasured", "{tmp}/adapter", "{tmp}/file/store"],
    *([command, "--base", "{tmp}/base", *ADAPTER, "{tmp}/file/new"] for command in ("merge", "export", "import")),
    ["generate", "hello", "--server", "127.0.0.1:2"],
    ["adapters", "list", "--server", "127.0.0.1:2"],
    ["health", "--server", "127.0.0.1:2"],
]
CASES = [*((arguments, 2) for arguments in MISTAKES), *((arguments, 1) for arguments in FAILURES)]


@pytest.mark.parametrize(
    ("arguments", "code"), CASES, ids=lambda case: " ".join(case) if isinstance(case, list) else str(case)
)
def test_exit_code(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {"tmp": str(folder), "taken": str(taken.getsockname()[1])}
        monkeypatch.setattr(sys, "argv", ["quiver", *(word.format(**values) for word in arguments)])
        try:
            found = cli.main()
        except SystemExit as stop:  # the client's commands end so
            found = stop.code
    assert found == code
    assert caplog.text + capsys.readouterr().err, "it says why"


@pytest.mark.parametrize("command", ["serve", "train", "predict", "merge"])
def test_unknown_kernels_are_a_mistake(folder: Path, command: str) -> None:
    lines = {
        "serve": serve(),
        "train": ["train", "{tmp}/recipe.yaml"],
        "predict": predict(),
        "merge": ["merge", "--base", "{tmp}/base", *ADAPTER, "{tmp}/merged"],
    }
    arguments = [word.format(tmp=folder) for word in lines[command]]
    environment = {**os.environ, "QUIVER_KERNELS": "foo"}
    process = [sys.executable, "-m", "quiver.cli", *arguments]
    done = subprocess.run(process, env=environment, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert (done.returncode, "QUIVER_KERNELS=foo: must be auto, avx2 or torch" in said) == (2, True), said
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_tells_the_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["quiver", *command.split(), "--help"])
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code
    assert " ".join(EXIT_CODES.split()) in " ".join(capsys.readouterr().out.split())
