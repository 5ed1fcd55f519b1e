"""A short soak, as `make soak MINUTES=30` does for long: every answer right, memory flat, figures and picture."""

from pathlib import Path

import pytest
from reliability.sizes import size
from reliability.soak import run

SECONDS = size(60, 300)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 240)
def test_everything_at_once(tmp_path: Path) -> None:
    found = run(tmp_path, SECONDS / 60, lambda _: None)
    print({key: value for key, value in found.items() if key != "samples"})
    assert not found["num_wrong"], found["wrong"]
    outcomes = found["outcomes"]
    deeds = {"ask", "stream", "draw_with_seed", "score", "leave", "hurry", "ask_badly", "load_or_unload", "replace"}
    assert deeds <= outcomes.keys()
    assert outcomes.get("refused without a hint", 0) == 0
    assert sum(outcomes[deed] for deed in deeds) > 0.8 * found["deeds"], "most were refused"
    assert found["adapter_evictions"] > 0
    assert found["memory_mib"]["growth"] < 0.03
    assert (tmp_path / "soak.json").stat().st_size > 0
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
