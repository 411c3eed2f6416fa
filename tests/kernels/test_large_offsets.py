"""Elements that lie more than 2^31 places into a tensor: addresses need 64 bits."""

import pytest
import torch

from lclm_kernels.rms_norm import rms_norm
from lclm_kernels.rope import apply_rope, build_rope_table
from lclm_kernels.swiglu import swiglu
from tests.kernels.implementations import device_of, each_implementation

ROW_STRIDE = 2**30  # bf16: rows 2 GiB apart; the memory between them is never touched
ROWS = 3

OPERATIONS = {
    "rms_norm": lambda x, implementation: rms_norm(
        x, torch.ones(16, device=x.device, dtype=x.dtype), 1e-5, implementation
    ),
    "swiglu": swiglu,
    "rope": lambda x, implementation: apply_rope(
        x.unsqueeze(1),
        *(table.to(x.device) for table in build_rope_table(torch.arange(ROWS), 16, 1e4)),
        implementation,
    ),
}


@each_implementation("reference", "triton")
@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_far_apart(name, implementation):
    near = torch.randn(ROWS, 16, device=device_of(implementation)).bfloat16()
    buffer = torch.empty((ROWS - 1) * ROW_STRIDE + 16, dtype=torch.bfloat16, device=near.device)
    far = buffer.as_strided((ROWS, 16), (ROW_STRIDE, 1))
    far.copy_(near)
    results, gradients = [], []
    for x in (near, far):
        x = x.detach().requires_grad_()
        results.append(OPERATIONS[name](x, implementation))
        (gradient,) = torch.autograd.grad(results[-1], x, torch.ones_like(results[-1]))
        gradients.append(gradient)
    assert torch.equal(*results) and torch.equal(*gradients)
