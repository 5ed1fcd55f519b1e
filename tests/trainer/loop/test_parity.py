"""Gradients and AdamW steps equal Hugging Face's: PEFT's LoRA, transformers' loss, torch's optimizer, their loop."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from support.tiny import EOS, PAD, VOCAB_SIZE, assert_close, hf_lora, hf_model, hf_peft
from torch import Tensor
from trainer.conftest import ROWS, write_rows
from transformers.modeling_utils import PreTrainedModel

from quiver_peft import GPT
from quiver_peft.adapters.methods.lora import LoraPair
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer import OptimizerSection, ScheduleSection, TrainConfig, Trainer
from quiver_trainer.data.batching import collate
from quiver_trainer.data.dataset import read_dataset
from quiver_trainer.data.jsonl import Encoder
from quiver_trainer.loop.metrics import completion_loss

RATE = 3e-3
DECAY = 0.1


def hf_batch(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """All rows as transformers takes them: padded, with a mask, and -100 where there is nothing to learn."""
    prompts = [tokenizer.encode(prompt) for prompt, _ in ROWS]
    answers = [[*tokenizer.encode(f" {answer}", add_special_tokens=False), EOS] for _, answer in ROWS]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(ROWS), longest), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def hf_train(model: PeftModel | PreTrainedModel, batch: dict[str, Tensor], steps: int) -> list[float]:
    """The loop that a user of transformers would write; returns the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_recipe(make_config: Callable[..., TrainConfig], name: str, steps: int) -> TrainConfig:
    """Every step sees all rows, at a constant rate, without clipping."""
    return make_config(
        name,
        epochs=steps,
        batch_size=len(ROWS),
        optimizer=OptimizerSection(learning_rate=RATE, weight_decay=DECAY, max_gradient_norm=None),
        schedule=ScheduleSection(kind="constant", warmup_fraction=0),
    )


@pytest.fixture
def hf_folder(base_folder: Path, tmp_path: Path) -> Path:
    """A LoRA made by Hugging Face PEFT, both of its factors random."""
    hf_lora(base_folder, tmp_path / "hf", rank=4, alpha=6, targets="all-linear")
    return tmp_path / "hf"


def trainable_hf(base_folder: Path, hf_folder: Path) -> PeftModel:
    model = hf_peft(base_folder, hf_folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def test_loss_and_gradients_are_theirs(base_folder: Path, hf_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(base_folder)
    theirs = trainable_hf(base_folder, hf_folder)
    loss = theirs(**hf_batch(tokenizer)).loss
    loss.backward()
    model = GPT.from_pretrained(base_folder)
    model.load_adapters(hf_folder)
    data = read_dataset(write_rows(tmp_path / "rows.jsonl"), Encoder(tokenizer, EOS, VOCAB_SIZE, 256))
    ours = completion_loss(model, collate(data, model))
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    assert model.adapter is not None and model.adapter.lora is not None
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    pairs = [pair for pair in model.adapter.lora.pairs if isinstance(pair, LoraPair)]
    assert len(gradients) == 2 * len(pairs) == 2 * 2 * 7
    for pair in pairs:
        for factor, parameter in (("lora_A", pair.a), ("lora_B", pair.b)):
            expected = gradients[f"base_model.model.{pair.target.name}.{factor}.default.weight"]
            assert parameter.grad is not None
            assert_close(parameter.grad, expected, tolerance=1e-5)


@pytest.mark.parametrize("steps", [1, 10])
def test_weights_after_training_are_theirs(
    steps: int, base_folder: Path, hf_folder: Path, make_config: Callable[..., TrainConfig]
) -> None:
    theirs = trainable_hf(base_folder, hf_folder)
    losses = hf_train(theirs, hf_batch(Tokenizer(base_folder)), steps)
    model = GPT.from_pretrained(base_folder)
    model.load_adapters(hf_folder)
    config = plain_recipe(make_config, "ours", steps)
    record = Trainer(config).fit(model).record
    assert record["steps"] == steps
    assert record["train_loss"] == pytest.approx(losses[-1], abs=1e-4)
    ours = load_file(config.output / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(theirs)
    start = load_file(hf_folder / "adapter_model.safetensors")
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        assert_close(ours[name], tensor)
        assert (tensor - start[name]).abs().max() > 0.5 * RATE, "nothing was learnt that could differ"


def test_full_fine_tuning_is_theirs(base_folder: Path, make_config: Callable[..., TrainConfig]) -> None:
    theirs = hf_model(base_folder)
    losses = hf_train(theirs, hf_batch(Tokenizer(base_folder)), 5)
    config = plain_recipe(make_config, "whole", 5)
    result = Trainer(config).fit(GPT.from_pretrained(base_folder))
    assert result.revision == ""
    assert result.record["train_loss"] == pytest.approx(losses[-1], abs=1e-4)
    ours = dict(hf_model(config.output).named_parameters())
    for name, parameter in theirs.named_parameters():
        assert_close(ours[name].detach(), parameter.detach())
