"""The processes of a parallel run, as `torchrun` starts them, in their groups: tensor parallel x data parallel."""

import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """This process's place. A base lies over the ranks of `tensor`; those of `data` have the same of other rows.

    sequence: between the linears each rank of `tensor` keeps a share of the tokens (sequence parallelism).
    """

    tensor: ProcessGroup
    data: ProcessGroup
    device: torch.device
    sequence: bool = False

    @property
    def tensor_size(self) -> int:
        """Over how many ranks a base lies."""
        return self.tensor.size()

    @property
    def tensor_rank(self) -> int:
        """Which share of the base this is."""
        return self.tensor.rank()

    @property
    def data_size(self) -> int:
        """Over how many ranks the rows of a batch are dealt."""
        return self.data.size()

    @property
    def data_rank(self) -> int:
        """Which share of the rows this is."""
        return self.data.rank()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return dist.get_rank() == 0

    def layer_config(self, dtype: torch.dtype) -> ModelParallelConfig:
        """What Megatron's layers are told. Their weights are read, never initialised."""
        return ModelParallelConfig(
            tensor_model_parallel_size=self.tensor_size,
            sequence_parallel=self.sequence,
            params_dtype=dtype,
            use_cpu_initialization=self.device.type == "cpu",
            perform_initialization=False,
            gradient_accumulation_fusion=False,  # needs Apex
        )


@contextmanager
def start_mesh(*, tensor: int = 1, sequence: bool = False, device: str = "auto") -> Generator[Mesh]:
    """Join the other processes: NCCL with one GPU for each, or gloo on CPUs.

    tensor: must divide the number of processes. Environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
    """
    where = _this_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    with _megatron_without_cuda() if where.type == "cpu" else nullcontext():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        try:
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
            ranks, copies = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()
            assert isinstance(ranks, ProcessGroup) and isinstance(copies, ProcessGroup)
            yield Mesh(ranks, copies, where, sequence=sequence and tensor > 1)
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _this_device(name: str) -> torch.device:
    """The GPU of this process's rank on its machine, or the CPU."""
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def _megatron_without_cuda() -> Generator[None]:
    """Makes the CPU the "current CUDA device" while a mesh on CPUs exists.

    Megatron-Core 0.16 allocates its buffers on CUDA's current device and synchronizes with it without checking that
    there is one: when its layers are built, and in each training step. Only where tensors lie changes.
    """
    current_device, synchronize = torch.cuda.current_device, torch.cuda.synchronize
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.current_device, torch.cuda.synchronize = current_device, synchronize
