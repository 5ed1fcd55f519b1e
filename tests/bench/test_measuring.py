"""The whole of a measurement on a tiny model: our server, Hugging Face as the rival, over the real wires."""

import sys
from pathlib import Path

import pytest
from bench.against import Duel, play
from bench.cells import Cell, ServerSpec
from bench.grid import measure
from bench.measuring import best_possible, our_result, paired
from bench.our_server import make_models, running
from bench.results import Report
from bench.rival import running_rival
from bench.rival_settings import Match, settings
from bench.roofline import Machine
from rich.console import Console
from rich.progress import Progress

LORA = Cell("tiny-lora", ServerSpec("tiny", "lora"), 4, 4, 8, max_new_tokens=6)
MIX = Cell("tiny-mix", ServerSpec("tiny", "mix"), 16, 8, 16, max_new_tokens=4)
MACHINE = Machine(30e9, 160e9)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make_models(folder / "models", [LORA.server, MIX.server])
    return folder


def test_a_cell_with_adapters_of_four_methods(work: Path) -> None:
    (result,) = measure([MIX], 2, MACHINE, work, Console(quiet=True))
    assert len(result.runs) == 2
    for run in result.runs:
        assert len(run.first_token_seconds) == 16
        assert run.num_steps is not None and 8 <= run.num_steps <= 64
        assert run.in_steps_seconds is not None and 0 < run.in_steps_seconds < run.throughput.seconds
    assert 0 < result.output_tokens_per_second < (result.roofline or 0)
    assert result.startup_seconds > 0 and result.rss_bytes > 50 * 2**20
    assert result.mean_adapter_bytes > 0


def test_a_rival_answers_the_same_list_with_the_same_tokens(work: Path) -> None:
    """Hugging Face, whose packages are here as well, in the process and by the lines that every rival has."""
    duel = Duel(Match("hf", LORA.name, "4 adapters", 1.0), LORA)
    told = settings(duel.match, LORA, work / "models")
    log = work / "logs" / "hf.log"
    with running(LORA.server, work / "models", work / "logs") as ours:
        with running_rival("hf", Path(sys.executable), told, log) as rival, Progress(disable=True) as progress:
            play(duel, ours, rival, 1, work, progress)
            assert rival.versions["peft"] and rival.rss_bytes > 50 * 2**20
        report = Report("test", MACHINE, cells=[our_result(LORA, ours, duel.ours, 1, MACHINE, work / "models")])
    assert duel.same == [1.0]
    ratio = paired("ours", duel.match.name, duel.ours, duel.theirs, duel.match.target)
    assert ratio.pairs[0] == pytest.approx(
        duel.ours[0].throughput.output_tokens_per_second / duel.theirs[0].throughput.output_tokens_per_second
    )
    assert report.cells[0].roofline == best_possible(LORA, 1, MACHINE, work / "models").output_tokens_per_second


def test_a_rival_that_cannot_start_says_where_its_words_are(tmp_path: Path) -> None:
    """Its packages are not in this environment."""
    log = tmp_path / "openvino.log"
    rival = running_rival("openvino", Path(sys.executable), {}, log)
    with pytest.raises(RuntimeError, match=r"openvino ended; its log: .*openvino.log"), rival:
        pass
    assert "No module named 'openvino'" in log.read_text()
