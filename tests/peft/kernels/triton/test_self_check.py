"""The check at a server's start: it passes what is right, refuses what is wrong, and says so."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from quiver_peft.kernels.paged_attention import check_triton_kernels, paged_attention_torch
from quiver_peft.kernels.triton import self_check
from quiver_peft.kernels.triton.self_check import check_adapter_kernels, check_attention_kernels

LINEARS = [(24, 40), (24, 24), (40, 24)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_is_used(dtype: torch.dtype, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    assert check_adapter_kernels(LINEARS, 24, dtype, device)
    assert check_attention_kernels(paged_attention_torch, 2, 16, dtype, device)
    assert not caplog.records


KERNELS = {
    "grouped LoRA": "add_grouped_lora_triton_",
    "grouped scales": "scale_outputs_triton_",
    "grouped bottlenecks": "add_grouped_bottleneck_triton_",
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_does_nothing_is_not_used(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing(*_: Any, **__: Any) -> None: ...

    monkeypatch.setattr(self_check, KERNELS[name], nothing)
    assert not check_adapter_kernels(LINEARS, 24, torch.float32, device)
    assert f"Triton kernel {name} disabled: error" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


def test_a_kernel_that_cannot_run_is_not_used(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(self_check, "paged_attention_triton", broken)
    assert not check_attention_kernels(paged_attention_torch, 1, 16, torch.float32, device)
    assert "Triton kernel paged attention disabled: it cannot run" in caplog.text
    assert "no kernel image is available" in caplog.text


def test_not_a_number_is_not_equal(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def nan(q: Tensor, *_: Any) -> Tensor:
        return torch.full_like(q, torch.nan)

    monkeypatch.setattr(self_check, "paged_attention_triton", nan)
    assert not check_attention_kernels(paged_attention_torch, 1, 16, torch.float32, device)


def test_the_dispatch_tries_it_once(device: torch.device) -> None:
    """By anything that calls the paged attention, on whatever device."""
    assert check_triton_kernels(2, 16, torch.float32, device)
    before = check_triton_kernels.cache_info().misses
    assert check_triton_kernels(2, 16, torch.float32, device)
    assert check_triton_kernels.cache_info().misses == before
