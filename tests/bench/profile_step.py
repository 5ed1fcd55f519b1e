"""Where each millisecond of an engine step goes, in this process, without a client.

    python tests/bench/profile_step.py --base path/to/base --running 8 --adapters 8

Fills the batch with prompts of 32 to 256 random tokens and random adapters of the method asked for, then times the
prefill, per prompt token, and the decoding steps: each compiled kernel, the rest of the model, and what is around it.
Shares are of the fastest step of each kind. Steps are run from their programs, each one call; --by-kernel has Python
make every call, so that each kernel's share is seen. QUIVER_KERNELS=torch shows the same without the compiled kernels.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from quiver_peft import CanonicalAdaptersPEFTConfig, IA3PEFTConfig, LoraPEFTConfig, PtuningPEFTConfig
from quiver_peft.adapters.serving.banks import BASE_SLOT, AdapterBanks
from quiver_peft.adapters.training.trainable_adapter import TrainableAdapter
from quiver_peft.base.base import Base
from quiver_peft.base.load import load_base
from quiver_peft.base.packing import pack
from quiver_peft.base.paged import PagedKV
from quiver_peft.base.t5 import T5Base
from quiver_peft.kernels.cpp.library import configure_process, library
from quiver_server.engine import engine as engine_module
from quiver_server.engine.block_pool import BlockPool
from quiver_server.engine.engine import Engine
from quiver_server.engine.model_runner import ModelRunner
from quiver_server.engine.scheduler import Scheduler
from quiver_server.engine.sequence import SamplingParams, Sequence
from quiver_server.telemetry.metrics import Metrics

BLOCK_TOKENS = 16
NEW_TOKENS = 64
KERNELS = (
    "linear", "add_lora", "paged_attention", "store_rows", "rms_norm", "layer_norm", "activate", "rotate", "rotary",
    "add", "gather", "best", "scale_inputs", "scale_outputs", "add_bottleneck",
)  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraPEFTConfig(target_modules=["all"], adapter_dim=16, alpha=32),
    "ia3": IA3PEFTConfig,
    "canonical": lambda: CanonicalAdaptersPEFTConfig(adapter_dim=32),
    "ptuning": lambda: PtuningPEFTConfig(virtual_tokens=20),
}


@dataclass
class Clock:
    """Seconds of the current step by what they were spent on."""

    spent: dict[str, float] = field(default_factory=dict[str, float])

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added under `name`."""

        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments)
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - started
            return result

        return run


@dataclass
class Steps:
    """The steps that were timed: seconds, and the shares of the fastest."""

    seconds: list[float] = field(default_factory=list[float])
    shares: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, seconds: float, shares: dict[str, float]) -> None:
        """One more."""
        if not self.seconds or seconds < min(self.seconds):
            self.shares = dict(shares)
        self.seconds.append(seconds)


def random_adapters(base: Base, methods: list[str], count: int) -> tuple[AdapterBanks, list[int], list[int]]:
    """Banks with so many adapters, the methods in turn; their slots, and the virtual tokens of each."""
    made = [TrainableAdapter.create(base, [CONFIGS[methods[i % len(methods)]]()]) for i in range(count)]
    for adapter in made:
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    weights = [adapter.eval().weights(base) for adapter in made]
    device = base.embedding.weight.device
    banks = AdapterBanks(1, torch.float32, device)
    banks = AdapterBanks(sum(banks.num_bytes(item) for item in weights) + 64, torch.float32, device)
    slots = [banks.insert(item) for item in weights]
    return banks, [slot for slot in slots if slot is not None], [item.num_virtual_tokens for item in weights]


def make_sequences(base: Base, running: int, slots: list[int], virtual: list[int], seed: int) -> list[Sequence]:
    """One for each place in the batch, adapters in turn. seed: of prompts that no cache has."""
    draw = random.Random(seed)
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    found: list[Sequence] = []
    for i in range(running):
        ids = [draw.randrange(base.config.vocab_size) for _ in range(32 + 224 * i // max(running - 1, 1))]
        slot, num_virtual = (slots[i % len(slots)], virtual[i % len(slots)]) if slots else (BASE_SLOT, 0)
        item = Sequence(
            prompt=[base.config.start_token_id] if isinstance(base, T5Base) else ids,
            encoder_input=ids if isinstance(base, T5Base) else [],
            params=params,
            index=0,
            emit=lambda event: None,
            slot=slot,
            num_virtual_tokens=num_virtual,
            revision=f"revision-{slot}",
        )
        found.append(item)
    return found


def make_engine(
    base: Base, banks: AdapterBanks, running: int, clock: Clock, *, by_kernel: bool, kv_dtype: torch.dtype
) -> tuple[Engine, Scheduler]:
    """An engine whose parts report to the clock."""
    assert hasattr(base, "logits")
    num_blocks = running * (2 * (256 + 20 + NEW_TOKENS) // BLOCK_TOKENS + 2)
    kv = PagedKV(base.config, num_blocks, BLOCK_TOKENS, kv_dtype, base.embedding.weight.device)
    blocks = BlockPool(num_blocks, BLOCK_TOKENS)
    scheduler = Scheduler(blocks, running, 512)
    runner: Any = ModelRunner(base, banks, kv, 512)  # pyright: ignore[reportArgumentType]
    engine: Any = Engine(
        runner,
        scheduler,
        block_size=BLOCK_TOKENS,
        device=kv.keys.device,
        metrics=Metrics(),
        deliver=lambda _: None,
        on_dead=lambda: None,
    )
    if by_kernel:
        runner._step_graphs = None
    runner.run = clock.timed("model", runner.run)
    engine._postprocess = clock.timed("sample and deliver", engine._postprocess)
    module: Any = engine_module
    module.prepare_batch = clock.timed("prepare batch", module.prepare_batch)
    scheduler.schedule = clock.timed("schedule", scheduler.schedule)
    cpp = library()
    for name in ("run", *KERNELS):
        if cpp is not None:
            setattr(cpp, name, clock.timed(f"  {name}", getattr(cpp, name)))
    return engine, scheduler


def run(engine: Engine, scheduler: Scheduler, sequences: list[Sequence], clock: Clock) -> tuple[Steps, Steps, int]:
    """All sequences from their prompts to their ends: prefill steps, decode steps of the full batch, prefill tokens."""
    prefill, decode = Steps(), Steps()
    num_prompt_tokens = sum(len(item.prompt) + len(item.encoder_input) + item.num_virtual_tokens for item in sequences)
    for item in sequences:
        scheduler.add(item)
    while scheduler.running or scheduler.waiting:
        clock.spent.clear()
        all_prefilled = all(item.generated for item in sequences)
        whole_batch = len(scheduler.running) == len(sequences)
        started = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - started
        if not all_prefilled:
            prefill.add(seconds, clock.spent)
        elif whole_batch:
            decode.add(seconds, clock.spent)
    return prefill, decode, num_prompt_tokens


def show(console: Console, steps: Steps, title: str) -> None:
    """A table of the fastest step."""
    table = Table(title=title)
    table.add_column("part")
    table.add_column("ms", justify="right")
    total = min(steps.seconds)
    inside = sum(seconds for name, seconds in steps.shares.items() if name.startswith(" "))
    shares = dict(steps.shares)
    shares["  other operators and Python"] = shares.get("model", 0.0) - inside
    shares["rest of the step"] = total - sum(s for name, s in steps.shares.items() if not name.startswith(" "))
    for name, seconds in sorted(shares.items(), key=lambda item: (item[0].startswith(" "), -item[1])):
        table.add_row(name, f"{seconds * 1e3:.2f}")
    table.add_row("step", f"{total * 1e3:.2f}")
    console.print(table)


def profile(
    base: Annotated[Path, typer.Option(help="A Hugging Face folder.")],
    running: Annotated[int, typer.Option(help="Sequences in the batch.", min=1)] = 8,
    adapters: Annotated[int, typer.Option(help="Adapters, in turn; 0: the base alone.", min=0)] = 8,
    methods: Annotated[str, typer.Option(help=f"Of the adapters, in turn: {', '.join(CONFIGS)}.")] = "lora",
    threads: Annotated[int, typer.Option(help="Threads of the compiled kernels.", min=1)] = 2,
    repeats: Annotated[int, typer.Option(help="Times the whole batch is run.", min=1)] = 2,
    by_kernel: Annotated[bool, typer.Option(help="Python makes every call: each kernel's share.")] = False,
    widen: Annotated[bool, typer.Option(help="Store 16-bit weights as fp32.")] = False,
    kv_dtype: Annotated[str, typer.Option(help="Of cached keys and values: float32, bfloat16, float16.")] = "float32",
) -> None:
    """Profile the engine's step in this process."""
    torch.set_num_threads(threads)
    loaded = load_base(base, keep_storage=not widen)
    banks, slots, virtual = random_adapters(loaded, methods.split(","), adapters)
    with torch.inference_mode():
        pack(loaded)
    configure_process()
    clock = Clock()
    cache_type: torch.dtype = getattr(torch, kv_dtype)
    engine, scheduler = make_engine(loaded, banks, running, clock, by_kernel=by_kernel, kv_dtype=cache_type)
    best: tuple[Steps, Steps, int] | None = None
    for repeat in range(repeats):
        found = run(engine, scheduler, make_sequences(loaded, running, slots, virtual, repeat), clock)
        if best is None or min(found[1].seconds) < min(best[1].seconds):
            best = found
    assert best is not None
    prefill, decode, num_tokens = best
    console = Console()
    show(console, prefill, "fastest prefill step")
    show(console, decode, f"fastest decoding step, {running} sequences, {adapters} adapters ({methods})")
    per_token = sum(prefill.seconds) / num_tokens
    median = sorted(decode.seconds)[len(decode.seconds) // 2]
    wave = per_token * num_tokens + min(decode.seconds) * NEW_TOKENS
    console.print(
        f"prefill {per_token * 1e3:.2f} ms per token; decoding {min(decode.seconds) * 1e3:.1f} ms (median "
        f"{median * 1e3:.1f}); {running * NEW_TOKENS / wave:.0f} output tokens per second if all steps were so"
    )


if __name__ == "__main__":
    typer.run(profile)
