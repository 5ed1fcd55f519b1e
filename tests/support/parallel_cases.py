"""What the ranks of the parallel tests do: see ranks.py. Asserts here fail the test that asked."""

import io
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from support.megatron_models import megatron_logits, megatron_model
from support.ranks import die_with_parent
from torch import Tensor, nn

from quiver_peft.adapters.formats.adapter_folder import read_adapter
from quiver_peft.adapters.methods.bottleneck import CanonicalAdaptersPEFTConfig
from quiver_peft.adapters.methods.configs import PEFTConfig
from quiver_peft.adapters.methods.ia3 import IA3PEFTConfig
from quiver_peft.adapters.methods.lora import LoraPEFTConfig
from quiver_peft.adapters.methods.prefix import PrefixPEFTConfig
from quiver_peft.adapters.methods.prompt import PromptTuningPEFTConfig, PtuningPEFTConfig
from quiver_peft.adapters.training.trainable_adapter import TrainableAdapter
from quiver_peft.errors import QuiverError
from quiver_peft.model import GPT, T5, AnyModel, load_model, model_of
from quiver_peft.parallel.adapters import gather_adapter, split_adapter
from quiver_peft.parallel.bases import load_split_base
from quiver_peft.parallel.megatron_checkpoint import read_megatron, write_megatron
from quiver_peft.parallel.mesh import Mesh, start_mesh
from quiver_peft.parallel.shards import gather
from quiver_peft.tokenizer import Tokenizer
from quiver_trainer import TrainConfig, TrainingInterrupted
from quiver_trainer.parallel import convert
from quiver_trainer.parallel.launch import train_on_mesh
from quiver_trainer.parallel.measure import greedy_answers
from quiver_trainer.reports.terminal import Reporter

torch.set_num_threads(1)

METHODS: dict[str, PEFTConfig] = {
    "lora": LoraPEFTConfig(adapter_dim=3, target_modules=("all",)),
    "lora of parts": LoraPEFTConfig(adapter_dim=3, target_modules=("attention", "mlp"), variant="canonical"),
    "dora": LoraPEFTConfig(adapter_dim=3, target_modules=("all",), use_dora=True),
    "ia3": IA3PEFTConfig(),
    "ia3 elsewhere": IA3PEFTConfig(target_modules=".*(o|o_proj|c_proj|wi_0|up_proj|c_fc|mlp.c_fc)"),
    "ia3 on a whole input": IA3PEFTConfig(
        target_modules=".*(EncDecAttention.q|c_attn|o_proj|k_proj)",
        feedforward_modules=".*(EncDecAttention.q|c_attn|o_proj)",
    ),
    "canonical": CanonicalAdaptersPEFTConfig(adapter_dim=5, bias=True, source="output_before_bias"),
    "ptuning": PtuningPEFTConfig(virtual_tokens=4, embedding_dim=6, bottleneck_dim=7),
    "prompt tuning": PromptTuningPEFTConfig(virtual_tokens=4),
    "prefix": PrefixPEFTConfig(virtual_tokens=4),
    "prefix by a network": PrefixPEFTConfig(virtual_tokens=4, projection=True, encoder_hidden_size=5),
}


def split_model(folder: str, mesh: Mesh) -> AnyModel:
    """A folder's model without an adapter, over the ranks."""
    base = load_split_base(folder, mesh)
    return model_of(base)


def batch_of(model: AnyModel) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """What `hidden` takes, where the loss is taken in its flattened output, and the targets."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, model.base.config.vocab_size, (3, 12), generator=generator)
    targets = torch.randint(3, model.base.config.vocab_size, (3 * 12,), generator=generator)
    if isinstance(model, T5):
        return (tokens, tokens.flip(1), torch.tensor([12, 7, 9])), torch.arange(36), targets
    return (tokens,), torch.arange(36), targets


def loss_of(model: AnyModel) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the batch, and its logits."""
    inputs, positions, targets = batch_of(model)
    hidden = model.hidden(*inputs).flatten(0, 1)[positions]
    return model.base.cross_entropy(hidden, targets).mean(), model.base.logits(hidden.detach())


def randomize(module: nn.Module, seed: int = 7, std: float = 0.2) -> None:
    """Nothing is zero any more, nor one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * std)


def whole_gradients(module: nn.Module, mesh: Mesh) -> dict[str, Tensor]:
    """{name: gradient of the whole parameter}; a share of a gradient is summed as Megatron does at a step's end."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=mesh.tensor)
        found[name] = gather(gradient, mesh, getattr(parameter, "quiver_shard", None))
    return found


def require_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Absolutely, and in proportion to what is large."""
    error = (actual - expected).abs().max().item()
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert error <= tolerance * max(1.0, expected.abs().max().item()), (what, error, expected.abs().max().item())


def compare_gradients(folder: str, tensor: int, sequence: bool, methods: list[str]) -> dict[str, float]:
    """Loss, logits and gradients of each method over the ranks are those of one device; returns the losses."""
    losses: dict[str, float] = {}
    with start_mesh(tensor=tensor, sequence=sequence) as mesh:
        for name in methods:
            losses[name] = _compare_method(folder, name, mesh)
    return losses


def _compare_method(folder: str, name: str, mesh: Mesh) -> float:
    alone, split = load_model(folder), split_model(folder, mesh)
    if name == "full":
        trained, trained_split = alone.base, split.base
    else:
        for model in (alone, split):
            model.base.requires_grad_(False)
        torch.manual_seed(3)
        fresh = TrainableAdapter.create(alone.base, [METHODS[name]])
        torch.manual_seed(3)
        fresh_split = split_adapter(TrainableAdapter.create(split.base, [METHODS[name]]), split.base, mesh)
        for (key, parameter), expected in zip(fresh_split.named_parameters(), fresh.parameters(), strict=True):
            require_close(gather(parameter, mesh), expected, f"{name}: fresh {key}", 1e-6)
        randomize(fresh)
        whole = TrainableAdapter.create(split.base, [METHODS[name]])
        whole.load_state_dict(fresh.state_dict())
        alone.adapter, split.adapter = fresh, split_adapter(whole, split.base, mesh)
        trained, trained_split = alone.adapter, split.adapter
    loss, logits = loss_of(alone)
    split_loss, split_logits = loss_of(split)
    require_close(split_loss, loss, f"{name}: loss", 1e-6)
    require_close(split_logits, logits, f"{name}: logits")
    loss.backward()
    split_loss.backward()
    expected = {key: p.grad for key, p in trained.named_parameters() if p.grad is not None}
    found = whole_gradients(trained_split, mesh)
    assert found.keys() >= expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, (name, key)
        require_close(found[key], gradient, f"{name}: gradient of {key}")
    if split.adapter is not None and alone.adapter is not None:
        back = gather_adapter(split.adapter, TrainableAdapter.create(split.base, [METHODS[name]]), mesh)
        for (key, parameter), whole in zip(back.named_parameters(), alone.adapter.parameters(), strict=True):
            assert torch.equal(parameter, whole), (name, key)
    return loss.item()


def refusal(folder: str, tensor: int, sequence: bool = False) -> str:
    """What a base says that cannot be cut, or a GPT whose sequences cannot."""
    with start_mesh(tensor=tensor, sequence=sequence) as mesh:
        try:
            model = split_model(folder, mesh)
            assert isinstance(model, GPT)
            model.hidden(torch.ones(1, 5, dtype=torch.long))
        except QuiverError as error:
            return str(error)
    return ""


def count_collectives(folder: str, methods: list[str]) -> dict[str, int]:
    """How often the ranks talk in one forward and backward pass, for each method; "full": as the bare base must."""
    counts: dict[str, int] = {}
    with start_mesh(tensor=2) as mesh:
        for name in methods:
            model = split_model(folder, mesh)
            if name != "full":
                model.base.requires_grad_(False)
                model.adapter = split_adapter(TrainableAdapter.create(model.base, [METHODS[name]]), model.base, mesh)
            with ExitStack() as stack:
                spies = [
                    stack.enter_context(patch.object(dist, call, wraps=getattr(dist, call)))
                    for call in ("all_reduce", "all_gather", "broadcast", "reduce")
                ]
                loss = loss_of(model)[0]
                loss.backward()
            counts[name] = sum(spy.call_count for spy in spies)
    return counts


def train(
    recipes: list[dict[str, Any]], stop_after: int | None = None, kill: tuple[int, float] | None = None
) -> list[str]:
    """Each recipe over the ranks, as `torchrun -m quiver_trainer` would; returns the revisions.

    stop_after: one of the ranks is asked to stop after so many steps of each. kill: one of them is killed, so many
    seconds after it began so manieth a step of this process.
    """
    _save_without_starting_python()
    configs = [TrainConfig.model_validate_json(json.dumps(recipe)) for recipe in recipes]
    parallel = configs[0].parallel
    revisions: list[str] = []
    with start_mesh(tensor=parallel.tensor, sequence=parallel.sequence) as mesh:
        for config in configs:
            stops = itertools.count()
            is_last = dist.get_rank() == dist.get_world_size() - 1

            def should_stop(stops: Iterator[int] = stops, is_last: bool = is_last) -> bool:
                step = next(stops)
                if kill is not None and is_last and step == kill[0]:
                    threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
                return step == stop_after and is_last

            try:
                result = train_on_mesh(
                    config, mesh, reporter=Reporter(quiet=True, warns=False), should_stop=should_stop
                )
                revisions.append(result.revision)
            except TrainingInterrupted as error:
                revisions.append(str(error))
    return revisions


def answers(base: str, adapters: list[str], prompts: list[str]) -> list[list[list[int]]]:
    """For each adapter folder the greedy answer to each prompt, at most 8 tokens, from a base over the ranks."""
    found: list[list[list[int]]] = []
    tokenizer = Tokenizer(base)
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    alone = load_model(base)
    with start_mesh(tensor=2) as mesh:
        for adapter in adapters:
            model = split_model(base, mesh)
            whole = TrainableAdapter.from_weights(alone.base, read_adapter(adapter, alone.base))
            model.adapter = split_adapter(whole, model.base, mesh).eval()
            found.append(greedy_answers(model, tokens, 8, mesh))
    return found


def megatron_both_ways(folder: str, scratch: str) -> dict[str, float]:
    """The largest difference between our logits and those of Megatron's own model, in proportion to the largest logit:
    after and before it has read what we wrote, and after we have read what it wrote."""
    _save_without_starting_python()
    alone = load_model(folder)
    tokens, target = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(5)), None
    if isinstance(alone, T5):
        target = tokens.flip(1)[:, :11].contiguous()
    # T5 1.0 scales what goes into its tied head; Megatron's T5Model does not.
    scale = alone.base.config.hidden_size**-0.5 if getattr(alone.base.config, "scaled_head", False) else 1.0
    found: dict[str, float] = {}
    with start_mesh() as mesh:
        theirs = megatron_model(alone.base.config)
        found["before"] = _difference(alone, theirs, scale, tokens, target)
        randomize(theirs, std=0.1)  # with 0.2 rounding alone differs by up to 1e-4, from process to process
        for name, parameter in theirs.named_parameters():
            if name == "lm_head.output_layer.bias":
                parameter.data.zero_()
        second = Path(scratch, "theirs")
        second.mkdir()
        dist_checkpointing.save(theirs.sharded_state_dict(), str(second))
        other = load_model(folder)
        read_megatron(other.base, second)
        found["read"] = _difference(other, theirs, scale, tokens, target)
        first = Path(scratch, "ours")
        write_megatron(alone.base, first)
        # Without what Transformer Engine's layers keep of FP8, of which there is nothing here.
        wanted = {key: value for key, value in theirs.sharded_state_dict().items() if "_extra_state" not in key}
        loaded: Any = dist_checkpointing.load(wanted, str(first))
        theirs.load_state_dict(loaded, strict=False)
        found["written"] = _difference(alone, theirs, scale, tokens, target)
        assert mesh.is_first
    return found


def _difference(ours: AnyModel, theirs: nn.Module, scale: float, tokens: Tensor, target: Tensor | None) -> float:
    with torch.no_grad():
        expected = ours(tokens) if target is None else ours(tokens, target)
    difference = (megatron_logits(theirs, tokens, target) * scale - expected).abs().max()
    return (difference / expected.abs().max()).item()


def megatron_refusal(folder: str, other: str, scratch: str) -> str:
    """What is said of the checkpoint of another architecture."""
    _save_without_starting_python()
    with start_mesh():
        write_megatron(load_model(folder).base, Path(scratch))
        try:
            read_megatron(load_model(other).base, Path(scratch))
        except QuiverError as error:
            return str(error)
    return ""


def convert_bases(words: list[str]) -> tuple[int, str, str]:
    """The command `python -m quiver_trainer.parallel.convert`: its exit code, and what it printed on either stream."""
    _save_without_starting_python()
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = convert.main(words)
    return code, out.getvalue(), err.getvalue()


def _save_without_starting_python() -> None:
    """Megatron's checkpoints collect their results through a process that starts Python anew: seconds, here forked."""
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(die_with_parent)
    filesystem_async._results_queue = manager.Queue()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def gpu_train(settings: dict[str, Any], base: str) -> dict[str, Any]:
    """What a rank of the GPU script does for one layout."""
    from bench.gpu_train_ranks import train

    with start_mesh(tensor=settings["tensor"], sequence=settings["sequence"]) as mesh:
        return train(settings, Path(base), mesh)
