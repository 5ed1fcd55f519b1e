"""What NeMo 1.x got wrong about virtual tokens, merging and tying, each as a test; the oracle is transformers.

It is given the embeddings that should come in: the virtual tokens' rows, then those of the words, all of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import assert_close, assert_matters, hf_model, tiny_llama, tiny_t5, tiny_tokenizer
from torch import Tensor, nn

from quiver_peft import (
    CanonicalAdaptersPEFTConfig,
    LoraPEFTConfig,
    PromptTuningPEFTConfig,
    PtuningPEFTConfig,
    load_model,
)
from quiver_peft.adapters.merge import merge_into
from quiver_peft.joint_forward import ModelInput, joint_hidden
from quiver_peft.model import AnyModel
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer.data.jsonl import Encoder, JsonlRow
from quiver_trainer.loop.predict import predict_tokens


def with_adapter(folder: Path, *configs: Any) -> AnyModel:
    """Its virtual tokens are as large as words."""
    model = load_model(folder)
    torch.manual_seed(0)
    model.add_adapter(list(configs))
    model.eval()
    return model


def table_of(model: AnyModel) -> Tensor:
    assert model.adapter is not None
    prompt = model.adapter.weights(model.base).prompt
    assert prompt is not None
    return prompt.table


@torch.no_grad()
def ours(model: AnyModel, inputs: ModelInput) -> Tensor:
    return model.base.logits(joint_hidden([model], [inputs]))


@torch.no_grad()
def theirs(folder: Path, table: Tensor, tokens: Sequence[int], target: Sequence[int] = ()) -> Tensor:
    """Logits of the words alone: of the prompt of a GPT, of the target of a T5."""
    model: Any = hf_model(folder)
    words = model.get_input_embeddings()(torch.tensor(list(tokens)))
    embedded = torch.cat([table, words])[None]
    if model.config.is_encoder_decoder:
        return model(inputs_embeds=embedded, decoder_input_ids=torch.tensor([list(target)])).logits[0]
    return model(inputs_embeds=embedded).logits[0, len(table) :]


def test_a_beginning_token_stays_and_stands_behind_the_virtual_tokens(tmp_path: Path) -> None:
    """There: the virtual tokens overwrote it, and one placeholder remained among the words."""
    tiny_llama(tmp_path)
    tiny_tokenizer(tmp_path, add_bos=True)
    model = with_adapter(tmp_path, PtuningPEFTConfig(virtual_tokens=3, encoder="mlp"))
    tokenizer = Tokenizer(tmp_path)
    line = JsonlRow({"prompt": "Where is my parcel?", "completion": " Here."}, Path("rows"), 1)
    (sample,) = Encoder(tokenizer, 2, model.base.config.vocab_size, None).encode(line)
    assert sample.tokens[0] == tokenizer.encode("")[0], "the row begins with it"
    assert_close(ours(model, ModelInput([sample.tokens])), theirs(tmp_path, table_of(model), sample.tokens))


def test_one_virtual_token_replaces_no_generated_one(tmp_path: Path) -> None:
    """There: every step of one token met the condition for replacing embeddings."""
    tiny_llama(tmp_path)
    model = with_adapter(tmp_path, PromptTuningPEFTConfig(virtual_tokens=1))
    prompt = [40, 77, 101]
    (answer,) = predict_tokens(model, [prompt], max_new_tokens=6)
    expected = list(prompt)
    while len(expected) < len(prompt) + len(answer):
        expected.append(int(theirs(tmp_path, table_of(model), expected)[-1].argmax()))
    assert answer == expected[3:] and len(set(answer)) > 1


def test_a_t5_reads_its_whole_source_and_writes_its_whole_target(tmp_path: Path) -> None:
    """There: no placeholders were put in, so virtual tokens overwrote words of the source, and of the target too."""
    tiny_t5(tmp_path)
    model = with_adapter(tmp_path, PromptTuningPEFTConfig(virtual_tokens=4))
    source, target = [50, 60, 70, 80, 90], [0, 33, 44, 55, 66]
    found = ours(model, ModelInput([target], [source]))
    assert_close(found, theirs(tmp_path, table_of(model), source, target))
    assert_matters(found, theirs(tmp_path, table_of(model), source[4:], target))


@pytest.mark.parametrize("other", [CanonicalAdaptersPEFTConfig(adapter_dim=4), LoraPEFTConfig(adapter_dim=3)])
def test_beside_another_method_the_words_stay_too(other: Any, tmp_path: Path) -> None:
    """There: the number of virtual tokens was known only when P-Tuning was alone."""
    tiny_llama(tmp_path)
    model = with_adapter(tmp_path, PtuningPEFTConfig(virtual_tokens=5, encoder="mlp"), other)
    tokens = [31, 41, 59, 26, 53, 58]
    found = ours(model, ModelInput([tokens]))
    assert_close(found, theirs(tmp_path, table_of(model), tokens))
    assert_matters(found, theirs(tmp_path, table_of(model)[:0], tokens))


def test_merging_uses_alpha(tmp_path: Path) -> None:
    """There: the product was added as it was, wrong unless alpha is the rank."""
    tiny_llama(tmp_path)
    model = with_adapter(tmp_path, LoraPEFTConfig(adapter_dim=4, alpha=13.0, target_modules=["all"]))
    for parameter in model.trainable_parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    tokens = torch.tensor([[31, 41, 59, 26, 53, 58]])
    with torch.no_grad():
        expected, alone = model(tokens), load_model(tmp_path)(tokens)  # pyright: ignore[reportCallIssue]
    assert model.adapter is not None
    merge_into(model.base, model.adapter.weights(model.base))
    model.adapter = None
    with torch.no_grad():
        assert_close(model(tokens), expected)  # pyright: ignore[reportCallIssue]
    assert_matters(expected, alone)


def test_tied_bottlenecks_are_one_and_learn_from_all_layers(tmp_path: Path) -> None:
    """There: it could not be made at all."""
    tiny_llama(tmp_path)
    tied, untied = (
        with_adapter(tmp_path, CanonicalAdaptersPEFTConfig(adapter_dim=3, weight_tying=tying, places=["mlp"]))
        for tying in (True, False)
    )
    shared = {name.rpartition(".")[2]: p for name, p in tied.named_parameters() if p.requires_grad}
    own: dict[str, list[nn.Parameter]] = {}
    for name, parameter in untied.named_parameters():
        if parameter.requires_grad:
            own.setdefault(name.rpartition(".")[2], []).append(parameter)
            parameter.data.copy_(shared[name.rpartition(".")[2]])
    for model in (tied, untied):
        joint_hidden([model], [ModelInput([[31, 41, 59, 26]])]).square().sum().backward()
    of_layers = [parameter.grad for parameter in own["up_weight"]]
    assert len(of_layers) == tied.base.depth > 1
    expected = sum(gradient for gradient in of_layers if gradient is not None)
    assert isinstance(expected, Tensor) and shared["up_weight"].grad is not None
    assert_close(shared["up_weight"].grad / expected.abs().max(), expected / expected.abs().max())
