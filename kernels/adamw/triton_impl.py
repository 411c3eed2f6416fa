"""One AdamW step over many tensors in one Triton launch.

The addresses of all tensors go to the device as one table, each program finds its tensor and block
there. Tables are kept from step to step while addresses and sizes stay the same.
"""

import torch
import triton
import triton.language as tl

from ..backend import on_device
from .reference import GroupTensors, Hyperparameters

BLOCK = 1024  # 8 fp32 per thread and tensor
NUM_WARPS = 4


@triton.jit
def adamw_kernel(
    addresses_ptr, sizes_ptr, block_tensor_ptr, first_block_ptr,
    num_tensors, beta1_complement, beta2, beta2_complement, keep, step_size, root_correction, eps,
    STATE_DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one block of one parameter and its moments.

    addresses int64 [4, num_tensors]: parameters, gradients (fp32), first, second moments;
    IS_ALIGNED: all of them are multiples of 16 bytes, which makes loads of 16 bytes. The order of
    the operations is torch.optim.AdamW's.
    """
    i_block = tl.program_id(0)
    i_tensor = tl.load(block_tensor_ptr + i_block)
    first_block = tl.load(first_block_ptr + i_tensor)
    size = tl.load(sizes_ptr + i_tensor)
    p_table = addresses_ptr + i_tensor
    param_ptr = tl.load(p_table).to(tl.pointer_type(tl.float32))
    grad_ptr = tl.load(p_table + num_tensors).to(tl.pointer_type(tl.float32))
    exp_avg_ptr = tl.load(p_table + 2 * num_tensors).to(tl.pointer_type(STATE_DTYPE))
    exp_avg_sq_ptr = tl.load(p_table + 3 * num_tensors).to(tl.pointer_type(STATE_DTYPE))
    if IS_ALIGNED:
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
        exp_avg_ptr = tl.multiple_of(exp_avg_ptr, 16)
        exp_avg_sq_ptr = tl.multiple_of(exp_avg_sq_ptr, 16)
    o = (i_block - first_block).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_param = tl.load(param_ptr + o, mask=m, other=0.0)  # [BLOCK]
    b_grad = tl.load(grad_ptr + o, mask=m, other=0.0)
    b_exp_avg = tl.load(exp_avg_ptr + o, mask=m, other=0.0).to(tl.float32)
    b_exp_avg_sq = tl.load(exp_avg_sq_ptr + o, mask=m, other=0.0).to(tl.float32)
    b_param = b_param * keep
    b_exp_avg = b_exp_avg + beta1_complement * (b_grad - b_exp_avg)
    b_exp_avg_sq = b_exp_avg_sq * beta2 + beta2_complement * b_grad * b_grad
    b_denominator = tl.div_rn(tl.sqrt_rn(b_exp_avg_sq), root_correction) + eps
    b_param = b_param - step_size * tl.div_rn(b_exp_avg, b_denominator)
    tl.store(param_ptr + o, b_param, mask=m)
    tl.store(exp_avg_ptr + o, b_exp_avg.to(STATE_DTYPE), mask=m)
    tl.store(exp_avg_sq_ptr + o, b_exp_avg_sq.to(STATE_DTYPE), mask=m)


class AdamWTables:
    """The device tables of one parameter group; rebuilt when tensors move or change size."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._addresses: list[int] = []
        self._tables: tuple[torch.Tensor, ...] = ()
        self._device_addresses = torch.empty(0, dtype=torch.int64)

    def step(self, tensors: GroupTensors, hyperparameters: Hyperparameters) -> None:
        """Update parameters and moments in place.

        All are on one device, the four tensors of a parameter laid out alike without gaps, the
        moments all fp32 or all bf16.
        """
        used = [i for i, param in enumerate(tensors.params) if param.numel()]
        if not used:
            return
        self._refresh([[kind[i] for i in used] for kind in tensors])
        sizes, block_tensor, first_block = self._tables
        step, lr, (beta1, beta2), eps, weight_decay = hyperparameters
        is_bf16 = tensors.exp_avgs[0].dtype == torch.bfloat16
        with on_device(self._device_addresses.device):
            adamw_kernel[(block_tensor.numel(),)](
                *(self._device_addresses, sizes, block_tensor, first_block, len(used)),
                *(1.0 - beta1, beta2, 1.0 - beta2, 1.0 - lr * weight_decay),
                *(lr / (1.0 - beta1**step), (1.0 - beta2**step) ** 0.5, eps),
                STATE_DTYPE=tl.bfloat16 if is_bf16 else tl.float32,
                IS_ALIGNED=all(address % 16 == 0 for address in self._addresses),
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )

    def _refresh(self, tensors: list[list[torch.Tensor]]) -> None:
        device = tensors[0][0].device
        sizes = [param.numel() for param in tensors[0]]
        is_new = sizes != self._sizes or self._device_addresses.device != device
        if is_new:
            counts = (torch.tensor(sizes) + BLOCK - 1) // BLOCK
            block_tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
            first_block = counts.cumsum(0) - counts
            tables = (torch.tensor(sizes), block_tensor.int(), first_block.int())
            self._tables = tuple(table.to(device) for table in tables)
            self._sizes = sizes
        addresses = [tensor.data_ptr() for kind in tensors for tensor in kind]
        if is_new or addresses != self._addresses:
            self._device_addresses = torch.tensor(addresses).to(device)
            self._addresses = addresses
