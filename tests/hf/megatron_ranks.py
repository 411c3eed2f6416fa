"""Program of one rank: Megatron loads a step folder cut over tp, compares, and saves it again.

    python tests/hf/megatron_ranks.py SOURCE EXPECTED.safetensors TARGET

with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, on the CPU with gloo. Each rank asks for
its tp shard of every weight, as Megatron's layers describe them, and for bias-like weights whole.
Prints `equal N` where N weights had the bits expected.
"""

import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file

# dim that tensor parallelism cuts, by the last parts of a weight's name
CUT_DIMS = {
    "word_embeddings": 0,
    "output_layer": 0,
    "linear_qkv": 0,
    "linear_fc1": 0,
    "linear_proj": 1,
    "linear_fc2": 1,
}


def main() -> None:
    from lclm.cpu import use_cpu

    source, expected_file, target = sys.argv[1:]
    use_cpu()
    dist.init_process_group("gloo")
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, world_size = dist.get_rank(), dist.get_world_size()
    expected = load_file(expected_file)

    def describe(key: str, weight: torch.Tensor) -> dict[str, ShardedTensor]:
        """This rank's shards of one weight, empty."""
        dim = CUT_DIMS.get(key.split(".")[-2])
        if dim is None:
            whole = torch.empty_like(weight)
            return {key: ShardedTensor.from_rank_offsets(key, whole, replica_id=rank)}
        # gate and up are two shards of one tensor: parts `rank` and `world_size + rank`
        parts = [rank, world_size + rank] if "linear_fc1" in key else [rank]
        num_parts = len(parts) * world_size
        empty = weight.chunk(num_parts, dim)[0]
        return {
            f"{key}/{part}": ShardedTensor.from_rank_offsets(
                key, torch.empty_like(empty).contiguous(), (dim, part, num_parts)
            )
            for part in parts
        }

    state = {}
    for key, weight in expected.items():
        state.update(describe(key, weight))
    loaded = dist_checkpointing.load(state, source)
    num_equal = 0
    for key, weight in expected.items():
        dim = CUT_DIMS.get(key.split(".")[-2])
        if dim is None:
            assert torch.equal(loaded[key], weight), key
        else:
            names = [name for name in loaded if name.startswith(f"{key}/")]
            num_parts = len(names) * world_size
            for name in names:
                part = weight.chunk(num_parts, dim)[int(name.rsplit("/")[-1])]
                assert torch.equal(loaded[name], part), name
        num_equal += 1
    state = {}
    for key, weight in expected.items():
        state.update(describe(key, weight))
    for name, shard in state.items():
        shard.data = loaded[name]
    if rank == 0:
        os.makedirs(target)
    dist.barrier()
    dist_checkpointing.save({**state, "note": "not a tensor"}, target)
    print(f"equal {num_equal}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
