"""`quiver import`: a NeMo archive becomes a folder that a server serves; refusals with code and message."""

from pathlib import Path

import pytest
import torch
from parity.nemo.nemo_files import BOTTLENECK, LORA, PTUNING, VIRTUAL, make_full, shape_of, write_nemo
from parity.nemo.nemo_formulas import nemo_logits
from support.live_server import LiveServer, answer_tokens
from support.tiny import hf_model, random_tokens

from quiver_trainer.cli.import_adapter import main

SCHEMES = {"lora": {**LORA, "target_modules": ["all"]}, "ia3": {}, "adapter": BOTTLENECK, "ptuning": PTUNING}
PROMPT = random_tokens(1, 10, seed=1)


def run(base: Path, adapter: Path, output: Path) -> int:
    return main(["--base", str(base), "--adapter", str(adapter), str(output)])


def test_a_nemo_archive_is_served(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = hf_model(base_folder)
    shape = shape_of(theirs.config, is_mcore=True)
    full = make_full(shape, SCHEMES)
    file = write_nemo(tmp_path / "all.nemo", shape, SCHEMES, full, tensor_parallel=2, mode="w:gz")
    assert run(base_folder, file, tmp_path / "adapters" / "all") == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'adapters' / 'all'}: ptuning, lora, ia3, canonical of all.nemo, revision " in printed
    server = LiveServer(base_folder, tmp_path / "adapters", tmp_path / "server.log")
    try:
        with server.client() as client:
            answer = client.generate(PROMPT[0].tolist(), adapter="all", max_new_tokens=5)
    finally:
        assert server.stop() == 0
    expected, tokens = list[int](), PROMPT
    for _ in range(5):
        expected.append(int(nemo_logits(theirs, shape, SCHEMES, full, tokens)[0, -1].argmax()))
        tokens = torch.cat([tokens, torch.tensor([expected[-1:]])], dim=1)
    assert answer_tokens(answer) == expected
    assert answer.usage.virtual_tokens == VIRTUAL
    assert answer.adapter is not None and answer.adapter.revision[:12] in printed


def test_refusals(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.nemo"
    file.write_bytes(b"no archive")
    assert run(base_folder, file, tmp_path / "out") == 2
    assert f"quiver import: {file}: not a whole tar archive" in capsys.readouterr().err
    assert run(base_folder, tmp_path / "none.nemo", tmp_path / "out") == 2
    assert run(base_folder, file, tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([]) == 2
