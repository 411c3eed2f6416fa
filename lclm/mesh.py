"""Who this process is: device, type, process groups and its place on every axis of the mesh.

The only importer of `megatron.core.parallel_state`. Axes: tp (tensor), cp (context), dp (data),
pp (pipeline), fastest first; neighbours on tp sit next to each other.
"""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lclm.config import Config, ConfigError, check_world

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)
# What torchrun sets. A pod may set some of it for all programs: then one process stands alone.
_LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Mesh:
    """Sizes, ranks and groups of this process."""

    device: torch.device
    dtype: torch.dtype
    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    cp_size: int
    cp_rank: int
    cp_group: dist.ProcessGroup
    dp_size: int
    dp_rank: int
    dp_cp_group: dist.ProcessGroup
    pp_size: int
    pp_rank: int
    pp_group: dist.ProcessGroup
    has_joined: bool
    """Whether `build_mesh` initialized torch.distributed, rather than its caller."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this pipeline stage holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this pipeline stage holds the loss."""
        return self.pp_rank == self.pp_size - 1


def choose_device(config: Config) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: if CUDA is asked for and there is none.
    """
    wish = config.train.device
    has_cuda = torch.cuda.is_available()
    if wish == "cuda" and not has_cuda:
        raise ConfigError("train.device = 'cuda': PyTorch finds no CUDA here; use 'auto' or 'cpu'")
    if wish == "cpu" and has_cuda:
        raise ConfigError(
            "train.device = 'cpu': Megatron-core takes CUDA where PyTorch sees it; "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= or use 'auto'"
        )
    if not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def build_mesh(config: Config) -> Mesh:
    """Join the process group of `torchrun` (or stand alone) and lay the mesh.

    Raises:
        ConfigError: if the layout does not fit the number of processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dp_size = check_world(config, world_size)
    device = choose_device(config)
    if device.type == "cuda":
        # One hardware queue keeps sequence parallelism's communication ahead of the matrix product
        # that it overlaps; Megatron-core asks for it. Read when CUDA starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
    else:
        from lclm.cpu import use_cpu

        use_cpu()
    has_joined = _join(device, world_size)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.parallel.tp,
            pipeline_model_parallel_size=config.parallel.pp,
            context_parallel_size=config.parallel.cp,
        )
    # lclm draws nothing at random inside a layer, but Megatron-core's layers ask for the tracker.
    model_parallel_cuda_manual_seed(config.seed)
    wish = config.train.dtype
    use_bf16 = wish == "bf16" or (wish == "auto" and device.type == "cuda")
    return Mesh(
        device=device,
        dtype=torch.bfloat16 if use_bf16 else torch.float32,
        world_size=world_size,
        rank=dist.get_rank(),
        tp_size=config.parallel.tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        cp_size=config.parallel.cp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_size=dp_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pp_size=config.parallel.pp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        has_joined=has_joined,
    )


def split_context(
    cp_group: dist.ProcessGroup, inner: int
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The parts of this process's context group: `inner` neighbours, and those of equal place.

    All processes of the world must call it at the same time: each takes part in making every group.
    """
    mine = dist.get_process_group_ranks(cp_group)
    by_rank: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, mine)
    found: dict[str, dist.ProcessGroup] = {}
    for ranks in sorted({tuple(ranks) for ranks in by_rank}):
        heads = [("heads", ranks[n : n + inner]) for n in range(0, len(ranks), inner)]
        rings = [("ring", ranks[n::inner]) for n in range(inner)]
        for kind, part in heads + rings:
            group = dist.new_group(part, timeout=TIMEOUT)
            if dist.get_rank() in part:
                found[kind] = group
    return found["heads"], found["ring"]


def _join(device: torch.device, world_size: int) -> bool:
    """Initialize torch.distributed, NCCL on CUDA, gloo on CPU; False if the caller has done it."""
    if dist.is_initialized():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    missing = [name for name in _LAUNCH if name not in os.environ]
    if not missing:
        dist.init_process_group(backend, timeout=TIMEOUT)
    elif world_size == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT
        )
    else:
        raise ConfigError(
            f"WORLD_SIZE = {world_size} but {', '.join(missing)} is not set; start the run with "
            "torchrun"
        )
    return True


def leave(mesh: Mesh) -> None:
    """Take the mesh down; torch.distributed too, if `build_mesh` initialized it."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if mesh.has_joined:
        dist.destroy_process_group()
