"""The `quiver` command as a process, against a real server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.scripted_server import FAIL_HALFWAY, REVISION, Failure, Script, ScriptedServer

from quiver import Client
from quiver.dispatch import COMMANDS
from quiver.status import status_details
from quiver.v1 import adapters_pb2, generation_pb2

PROTO = Path(__file__).parents[2] / "proto"
NOBODY = "127.0.0.1:1"


def _quiver(*arguments: str, server: ScriptedServer | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROTO), "PYTHONSAFEPATH": "1", "NO_COLOR": "1"}
    environment["QUIVER_SERVER"] = server.target if server else NOBODY
    return subprocess.run(
        [sys.executable, "-m", "quiver.cli", *arguments],
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def _succeeds(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_help_names_every_command_and_shows_examples() -> None:
    text = _succeeds(_quiver("--help"))

    for command in (*COMMANDS, "generate", "score", "adapters", "model", "health"):
        assert f" {command} " in text
    assert 'quiver generate "Where is my order?" --adapter routing' in text


def test_version() -> None:
    assert _succeeds(_quiver("--version")).startswith("quiver ")


def test_generate_streams_the_answer(server: ScriptedServer) -> None:
    assert _succeeds(_quiver("generate", "hello", server=server)) == "first last\n"


def test_score_prints_a_table_and_json(server: ScriptedServer) -> None:
    table = _succeeds(_quiver("score", "The sky is", " blue", " green", "--adapter", "support", server=server))

    assert [line.split() for line in table.splitlines() if "' " in line] == [
        ["'", "blue'", "-0.5000", "1", "yes"],
        ["'", "green'", "-1.5000", "1"],
    ]
    assert server.script.score_request.adapter_id == "support"
    scores = json.loads(_succeeds(_quiver("score", "a", "b", "--json", server=server)))["scores"]
    assert scores[0]["total_logprob"] == -0.5


def test_the_token_comes_from_the_environment(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIVER_TOKEN", "secret")
    _succeeds(_quiver("generate", "hello", server=server))

    assert server.script.metadata["authorization"] == "Bearer secret"


def test_certificates_that_cannot_be_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIVER_TLS_CA", "nowhere.pem")
    run = _quiver("model")

    assert (run.returncode, "nowhere.pem" in run.stderr, "Traceback" in run.stderr) == (2, True, False)


def test_generate_can_wait_for_the_whole_answer(server: ScriptedServer) -> None:
    assert _succeeds(_quiver("generate", "hello", "--no-stream", server=server)) == "one two three\n"


def test_generate_sends_its_options(server: ScriptedServer) -> None:
    options = [
        "--adapter",
        "support",
        "--max-new-tokens",
        "9",
        "--temperature",
        "0.5",
        "--seed",
        "3",
        "--priority",
        "-4",
        "--stop",
        "END",
        "--stop",
        "###",
    ]

    _succeeds(_quiver("generate", "hello", *options, server=server))

    request = server.script.generate_request
    assert (request.text, request.adapter_id, request.priority) == ("hello", "support", -4)
    assert request.sampling == generation_pb2.Sampling(temperature=0.5, seed=3)
    assert request.stopping == generation_pb2.Stopping(max_new_tokens=9, strings=["END", "###"])


def test_generate_in_json_is_the_whole_answer(server: ScriptedServer) -> None:
    answer = json.loads(_succeeds(_quiver("generate", "hello", "--adapter", "support", "--json", server=server)))

    assert answer["candidates"][0]["text"] == "one two three"
    assert answer["candidates"][0]["finish_reason"] == "length"
    assert answer["adapter"] == {"id": "support", "revision": REVISION, "methods": ["lora"]}
    assert answer["usage"]["virtual_tokens"] == 20


@pytest.mark.parametrize("arguments", [["-"], []])
def test_generate_reads_standard_input(server: ScriptedServer, arguments: list[str]) -> None:
    _succeeds(_quiver("generate", *arguments, server=server, stdin="two\nlines\n"))

    assert server.script.generate_request.text == "two\nlines"


def test_generate_reads_a_file(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Wo ist meine Bestellung? ü\n", encoding="utf-8")

    _succeeds(_quiver("generate", "--file", str(tmp_path / "prompt.txt"), server=server))

    assert server.script.generate_request.text == "Wo ist meine Bestellung? ü"


def test_an_empty_prompt_is_the_servers_to_judge(server: ScriptedServer) -> None:
    _succeeds(_quiver("generate", "", server=server))

    assert server.script.generate_request.WhichOneof("prompt") == "text"


def test_wrong_usage_ends_with_2(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    for arguments, message in (
        (["generate", "hello", "--file", "x"], "not both"),
        (["generate", "--file", str(tmp_path / "absent")], "cannot read"),
        (["generate", "--file", str(tmp_path / "latin")], "cannot read"),
        (["generate", "hello", "--temprature", "1"], "No such option"),
        (["adapters", "load"], "Missing argument"),
        (["adapters", "alias", "live"], "give either a TARGET or --delete"),
        (["adapters", "alias", "live", "x", "--delete"], "give either a TARGET or --delete"),
        (["adapters", "unload", "x", "--running", "sometimes"], "is not one of"),
        (["shoot"], "No such command"),
        (["adapter", "list"], "No such command"),
    ):
        run = _quiver(*arguments)
        assert (run.returncode, message in run.stderr) == (2, True), (arguments, run.stderr)


def test_a_refusal_ends_with_2_and_its_message_alone(server: ScriptedServer) -> None:
    code, message = grpc.StatusCode.INVALID_ARGUMENT, "the request is malformed"
    details = status_details(code, message, field_violations={"sampling.temperature": "-1 is below 0"})
    server.script.failure = Failure(code, message, details)

    for stream in ("--stream", "--no-stream"):
        run = _quiver("generate", "hello", stream, server=server)
        assert run.stderr == "quiver: the request is malformed; sampling.temperature: -1 is below 0\n"
        assert run.returncode == 2


def test_a_value_that_cannot_be_sent_ends_with_2_and_its_name(server: ScriptedServer) -> None:
    run = _quiver("generate", "hello", "--max-new-tokens", "-1", server=server)

    assert "max_new_tokens is -1" in run.stderr and "Traceback" not in run.stderr
    assert run.returncode == 2


def test_a_stream_that_fails_halfway_shows_what_came(server: ScriptedServer) -> None:
    run = _quiver("generate", FAIL_HALFWAY, server=server)

    assert (run.stdout, run.stderr) == ("first\n", "quiver: the engine stopped\n")
    assert run.returncode == 1


def test_a_server_that_is_not_there_is_named() -> None:
    run = _quiver("model", "--server", "127.0.0.1:2")

    assert run.stderr.startswith("quiver: no answer from the server at 127.0.0.1:2")
    assert run.returncode == 1


def test_health_answers_by_its_exit_code(server: ScriptedServer) -> None:
    assert _succeeds(_quiver("health", server=server)) == f"{server.target} is serving\n"

    server.set_serving(False)

    run = _quiver("health", server=server)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", f"{server.target} is not serving\n")


def test_model_is_described(server: ScriptedServer) -> None:
    text = _succeeds(_quiver("model", server=server))
    data = json.loads(_succeeds(_quiver("model", "--json", server=server)))

    assert "llama" in text and "1,234,567" in text
    assert (data["context_length"], data["adapter_methods"]) == (512, ["lora"])


def test_an_adapters_life(server: ScriptedServer) -> None:
    loaded = _succeeds(_quiver("adapters", "load", "support", "--source", "here", "--pin", server=server))
    shown = _succeeds(_quiver("adapters", "show", "support", server=server))
    unloaded = _succeeds(_quiver("adapters", "unload", "support", server=server))
    gone = _quiver("adapters", "show", "support", server=server)

    assert loaded == "support is resident: lora, revision 0123456789ab\n"
    tier = adapters_pb2.LoadAdapterRequest.TIER_DEVICE
    assert server.script.load_request == adapters_pb2.LoadAdapterRequest(
        adapter_id="support", source="here", pin=True, tier=tier
    )
    assert REVISION in shown and "1.5 MB" in shown and "resident" in shown
    assert unloaded == "support: 1.5 MB given back\n"
    assert (gone.returncode, gone.stderr) == (1, "quiver: no adapter 'support'\n")


def _know_two_adapters(script: Script) -> None:
    script.adapters["a-name-[red]much-longer-than-a-narrow-terminal-is-wide[/red]" + "x" * 40] = adapters_pb2.Adapter(
        id="a-name-[red]much-longer-than-a-narrow-terminal-is-wide[/red]" + "x" * 40,
        revision=REVISION,
        methods=["ptuning", "canonical_adapters"],
        state=adapters_pb2.Adapter.STATE_RESIDENT,
        device_bytes=2_000_000,
        pinned=True,
        running=3,
        waiting=17,
    )
    script.adapters["broken"] = adapters_pb2.Adapter(
        id="broken", state=adapters_pb2.Adapter.STATE_FAILED, failure_reason="lora_A is missing"
    )


def test_adapters_are_listed_as_a_table(server: ScriptedServer) -> None:
    _know_two_adapters(server.script)

    lines = _succeeds(_quiver("adapters", "list", server=server)).splitlines()

    row = next(line for line in lines if "a-name" in line)
    assert "[red]much-longer-than-a-narrow-terminal-is-wide[/red]" + "x" * 40 in row
    for cell in ("resident (pinned)", "ptuning, canonical_adapters", "0123456789ab", "2.0 MB", "3", "17"):
        assert cell in row
    assert lines[-1] == "broken failed: lora_A is missing"


def test_results_in_json_are_what_the_client_answers(server: ScriptedServer, client: Client) -> None:
    _know_two_adapters(server.script)

    def answer(*arguments: str) -> Any:
        return json.loads(_succeeds(_quiver(*arguments, "--json", server=server)))

    assert [adapter["id"] for adapter in answer("adapters", "list")] == [a.id for a in client.list_adapters()]
    assert answer("adapters", "show", "broken")["failure_reason"] == "lora_A is missing"
    assert answer("adapters", "load", "support")["state"] == "resident"
    assert answer("adapters", "alias", "live", "support")["name"] == "live"
    assert answer("adapters", "unload", "support") == {"freed_bytes": 1_500_000}


def test_aliases_are_moved_and_deleted(server: ScriptedServer) -> None:
    _succeeds(_quiver("adapters", "load", "support", server=server))
    moved = _succeeds(_quiver("adapters", "alias", "live", "support", server=server))
    shown = _succeeds(_quiver("adapters", "show", "support", server=server))
    deleted = _succeeds(_quiver("adapters", "alias", "live", "--delete", server=server))
    gone = _quiver("adapters", "alias", "live", "--delete", server=server)

    assert moved == "live is support@0123456789ab\n"
    assert any("0123456789ab" in line and "live" in line and "resident" in line for line in shown.splitlines())
    assert deleted == "live is deleted; it was support@0123456789ab\n"
    assert (gone.returncode, gone.stderr) == (1, "quiver: no alias 'live'\n")


def test_how_an_adapter_is_loaded_and_unloaded(server: ScriptedServer) -> None:
    loads, unloads = adapters_pb2.LoadAdapterRequest, adapters_pb2.UnloadAdapterRequest
    _succeeds(_quiver("adapters", "load", "support", "--tier", "host", server=server))
    assert (server.script.load_request.tier, server.script.load_request.HasField("pin")) == (loads.TIER_HOST, False)
    _succeeds(_quiver("adapters", "load", "support", "--no-pin", server=server))
    assert (server.script.load_request.HasField("pin"), server.script.load_request.pin) == (True, False)
    for option, expected in (
        ((), unloads.RUNNING_WAIT),
        (("--running", "refuse"), unloads.RUNNING_REFUSE),
        (("--running", "cancel"), unloads.RUNNING_CANCEL),
    ):
        _succeeds(_quiver("adapters", "load", "support", server=server))
        _succeeds(_quiver("adapters", "unload", "support", *option, server=server))
        assert server.script.unload_request.running == expected


def test_a_watch_prints_a_line_for_each_change(server: ScriptedServer) -> None:
    _know_two_adapters(server.script)

    run = _quiver("adapters", "watch", server=server)
    lines = [json.loads(line) for line in _quiver("adapters", "watch", "--json", server=server).stdout.splitlines()]

    assert run.stdout.splitlines()[1:] == ["broken failed: lora_A is missing", "old gone"]
    assert "resident (pinned), revision 0123456789ab" in run.stdout
    assert (run.returncode, run.stderr) == (1, "quiver: no more changes\n")
    assert [line["is_snapshot"] for line in lines] == [True, False]
    assert lines[1]["removed_ids"] == ["old"]
