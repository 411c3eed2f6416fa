"""What only the Triton kernels of interval attention have: ways of reading, shapes, refusals."""

import pytest
import torch

from lclm_kernels.backend import IS_INTERPRETED, choose, triton_candidate
from lclm_kernels.interval_attention import (
    backward,
    check_head_size,
    forward,
    interval_attention,
    make_plan,
    ops,
)
from lclm_kernels.interval_attention import tilings as tilings_module
from tests.kernels.bounds import assert_within_torch_error
from tests.kernels.implementations import device_of, each_implementation
from tests.kernels.masks import (
    MASKS,
    dense_attention,
    document_intervals,
    random_inputs,
    torch_attention,
)

SCALE = 0.2
LENGTHS = [5, 1, 60, 70]


def small_plan():
    return make_plan(*document_intervals(LENGTHS), sum(LENGTHS))


def run_autograd(q, k, v, dout, plan, implementation):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = interval_attention(q, k, v, plan, SCALE, implementation)
    out.backward(dout)
    return out.detach(), q.grad, k.grad, v.grad


def run_in_place(q, k, v, dout, plan, implementation, grads=None):
    """(out, lse, dq, dk, dv), the gradients fp32, in the accumulators given or in new ones."""
    out, lse = forward(q, k, v, plan, SCALE, implementation=implementation)
    delta = (dout.float() * out.float()).sum(dim=-1).t()
    grads = grads or [torch.zeros(x.shape, device=x.device) for x in (q, k, v)]
    state = (out, lse, delta, plan, SCALE, *grads)
    backward(dout, q, k, v, *state, implementation=implementation)
    return out, lse, *grads


def run_with_carry(q, k, v, plan, implementation, out):
    """(out, lse) after two passes over the same keys, which join in `out`."""
    lse = torch.full((q.shape[0], q.shape[1]), float("-inf"), device=q.device).t()
    for _ in range(2):
        forward(q, k, v, plan, SCALE, (out, lse), implementation)
    return out, lse


def check_against_fp64(inputs, plan, implementation):
    truth = dense_attention(*(x.double() for x in inputs), plan, SCALE)
    of_torch = torch_attention(*inputs, plan, SCALE)
    on_device = [x.to(device_of(implementation)) for x in inputs]
    results = run_autograd(*on_device, plan, implementation)
    for name, result, torch_result, exact in zip(
        ("out", "dq", "dk", "dv"), results, of_torch, (truth[0], *truth[2:])
    ):
        assert_within_torch_error(name, result, torch_result, exact)


@each_implementation("triton")
@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim"),
    [
        (torch.bfloat16, (2, 1), 20),  # rows that TMA cannot address: read by pointers
        (torch.bfloat16, (2, 1), 40),
        (torch.bfloat16, (2, 1), 80),
        (torch.bfloat16, (2, 1), 160),
        (torch.bfloat16, (3, 1), 96),
        (torch.bfloat16, (2, 2), 128),
        (torch.bfloat16, (2, 1), 256),
        (torch.float32, (2, 1), 33),
        (torch.float32, (2, 1), 80),
        (torch.float32, (1, 1), 192),
        (torch.float32, (2, 1), 96),
        (torch.float32, (1, 1), 128),
    ],
)
def test_head_sizes(heads, head_dim, dtype, implementation):
    plan = small_plan()
    inputs = [x.to(dtype) for x in random_inputs(plan, *heads, head_dim)]
    check_against_fp64(inputs, plan, implementation)


@each_implementation("triton")
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_16_bit_inputs_by_pointers(head_dim, implementation, monkeypatch):
    from lclm_kernels.interval_attention import triton_impl

    monkeypatch.setattr(triton_impl, "use_tma_for", lambda device, dtype, head_dim: False)
    plan = small_plan()
    inputs = [x.bfloat16() for x in random_inputs(plan, 2, 1, head_dim)]
    check_against_fp64(inputs, plan, implementation)


@each_implementation("triton")
def test_same_inputs_same_bits(implementation):
    plan = small_plan()
    q, k, v, dout = (
        x.bfloat16().to(device_of(implementation)) for x in random_inputs(plan, 2, 1, 64)
    )
    results = [run_in_place(q, k, v, dout, plan, implementation) for _ in range(2)]
    for one, other in zip(*results):
        assert torch.equal(one, other)


@each_implementation("triton")
def test_rows_that_see_nothing_keep_the_bits_of_the_carry(implementation):
    plan = MASKS["some rows empty"]
    device = device_of(implementation)
    q, k, v, _ = (x.float().to(device) for x in random_inputs(plan, 2, 1, 64))
    out, lse = torch.randn(q.shape, device=device), torch.randn(2, 7, device=device)
    before = out.clone(), lse.clone()
    forward(q, k, v, plan, SCALE, (out, lse), implementation)
    is_empty = plan.lo == plan.hi
    assert is_empty.sum() == 4
    for rows, is_kept in ((is_empty, True), (~is_empty, False)):
        rows = rows.to(device)
        assert torch.equal(out[rows], before[0][rows]) == is_kept
        assert torch.equal(lse[:, rows], before[1][:, rows]) == is_kept


@each_implementation("triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_that_lie_awkwardly(dtype, implementation):
    """Addresses TMA cannot take, columns apart, one number for a whole gradient."""
    plan = make_plan(*document_intervals([3, 37]), 40)
    device = device_of(implementation)
    q, k, v, _ = (x.to(device, dtype) for x in random_inputs(plan, 2, 1, 64))
    dout = torch.ones((), device=device, dtype=dtype).expand(q.shape)
    plain = run_in_place(q, k, v, dout.contiguous(), plan, implementation)
    shifted = torch.empty(q.numel() + 1, device=device, dtype=dtype)[1:].view(q.shape).copy_(q)
    columns_apart = torch.stack([k, k], dim=-1)[..., 0]
    assert shifted.data_ptr() % 16 and columns_apart.stride(-1) == 2
    grads = [torch.zeros(*x.shape, 2, device=device)[..., 0] for x in (q, k, v)]
    results = run_in_place(shifted, columns_apart, v, dout, plan, implementation, grads)
    for result, expected in zip(results, plain):
        assert torch.equal(result, expected)
    plain = run_with_carry(q, k, v, plan, implementation, torch.zeros(q.shape, device=device))
    out = torch.zeros(*q.shape, 2, device=device)[..., 0]
    results = run_with_carry(shifted, columns_apart, v, plan, implementation, out)
    for result, expected in zip(results, plain):
        assert torch.equal(result, expected)


@each_implementation("triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elements_beyond_32_bits(dtype, implementation, tmp_path):
    """Tokens 2^30 elements apart: TMA (bf16) and pointers (fp32); memory between is not touched."""
    plan = make_plan(*document_intervals([3]), 3)
    step, device = 2**30, device_of(implementation)
    near = [x.to(device, dtype) for x in random_inputs(plan, 2, 1, 64)]
    expected = run_in_place(*near, plan, implementation)
    carry = torch.zeros(near[0].shape, device=device)
    expected_carry = run_with_carry(*near[:3], plan, implementation, carry)
    size = 2 * step + 1024
    if device.type == "cpu":  # a file with holes takes neither memory nor disk
        base = torch.from_file(str(tmp_path / "holes"), shared=True, size=size, dtype=dtype)
    else:
        base = torch.empty(size, dtype=dtype, device=device)
    far = []
    for index, x in enumerate(near):
        view = base.as_strided(x.shape, (step, 64, 1), index * 128)
        far.append(view.copy_(x))
    grads = [torch.zeros(x.shape, device=device) for x in near[:3]]
    if dtype == torch.float32:  # the accumulators too
        for index in (0, 1):
            place = 512 + 128 * index
            grads[index] = base.as_strided(near[index].shape, (step, 64, 1), place).zero_()
    for result, exact in zip(run_in_place(*far, plan, implementation, grads), expected):
        assert torch.equal(result, exact)
    carry = torch.zeros_like(carry)
    if dtype == torch.float32:
        carry = base.as_strided(carry.shape, (step, 64, 1), 768).zero_()
    results = run_with_carry(*far[:3], plan, implementation, carry)
    for result, exact in zip(results, expected_carry):
        assert torch.equal(result, exact)


def test_what_triton_refuses(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(tilings_module, "_capability", lambda device: (9, 0))
    for head_dim in (1, 64, 80, 96, 128, 256):
        assert tilings_module.refuse_triton(head_dim, 1.0, cuda) == ""
    assert tilings_module.use_tma_for(cuda, torch.bfloat16, 128)
    assert not tilings_module.use_tma_for(cuda, torch.float32, 128)
    assert not tilings_module.use_tma_for(cuda, torch.bfloat16, 20)
    of_head_dim = "takes head sizes up to 256, the tensors have 257"
    assert tilings_module.refuse_triton(257, 1.0, cuda) == of_head_dim
    assert tilings_module.refuse_triton(64, -1.0, cuda) == "takes scale >= 0, got -1.0"
    for capability in ((8, 6), (12, 0)):  # what TMA's tiles take is too much for the latter
        monkeypatch.setattr(tilings_module, "_capability", lambda device, found=capability: found)
        assert not tilings_module.use_tma_for(cuda, torch.bfloat16, 128)
    monkeypatch.setattr(tilings_module, "_capability", lambda device: (7, 5))
    assert "capability 8.0 or newer, cuda:0 has 7.5" in tilings_module.refuse_triton(64, 1.0, cuda)


def test_triton_is_chosen_on_cuda_or_the_reason_is_given():
    cuda = torch.device("cuda", 0)

    def chosen(refusal, wish="auto", dtype=torch.bfloat16):
        refused = {"triton": refusal}
        return choose("interval_attention", wish, cuda, dtype, ops._CANDIDATES, refused)

    assert chosen("") == "triton"
    reason = "takes head sizes up to 256, the tensors have 257"
    for wish in ("auto", "triton"):
        with pytest.raises(ValueError, match="takes head sizes up to 256, the tensors have 257"):
            chosen(reason, wish)
    with pytest.raises(ValueError, match=r"'triton' cannot run: it takes .* are float64"):
        chosen("", "triton", torch.float64)
    assert triton_candidate(torch.bfloat16).name == "triton"


def test_a_wish_for_triton_names_the_rule():
    plan = MASKS["63 tokens"]
    q, k, v, _ = (x.float() for x in random_inputs(plan, 2, 1, 257))
    reason = "takes head sizes up to 256, the tensors have 257" if IS_INTERPRETED else "runs"
    with pytest.raises(ValueError, match=f"implementation='triton' cannot run: it {reason}"):
        forward(q, k, v, plan, SCALE, implementation="triton")


def test_a_model_with_heads_too_large_for_cuda_is_refused_at_the_start():
    check_head_size(257, torch.device("cpu"))
    check_head_size(256, torch.device("cuda", 0))
    with pytest.raises(ValueError, match="head size 257 on cuda:0; the CUDA kernels take"):
        check_head_size(257, torch.device("cuda", 0))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_accumulators_that_want_gradients_are_refused(implementation):
    plan = MASKS["63 tokens"]
    q, k, v, dout = (x.float() for x in random_inputs(plan))
    out, lse = torch.zeros_like(q), torch.full((4, 63), float("-inf"))
    carry = (out.clone().requires_grad_(), lse)
    with pytest.raises(ValueError, match=r"carry out \[63, 4, 16\] requires grad"):
        forward(q, k, v, plan, SCALE, carry, implementation)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    grads[1].requires_grad_()
    with pytest.raises(ValueError, match=r"dk \[63, 2, 16\] requires grad"):
        backward(dout, q, k, v, out, lse, lse, plan, SCALE, *grads, implementation=implementation)


def test_tensors_on_two_devices_are_refused():
    plan = MASKS["63 tokens"]
    q, k, v, _ = (x.float() for x in random_inputs(plan))
    with pytest.raises(ValueError, match=r"k must be .* on cpu, got .* on meta"):
        forward(q, k.to("meta"), v, plan, SCALE)
