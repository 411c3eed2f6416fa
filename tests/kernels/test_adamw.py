"""AdamW: the numbers of torch.optim.AdamW, and where its state lies."""

import copy

import pytest
import torch

from lclm_kernels.adamw import AdamW
from tests.kernels.bounds import max_error
from tests.kernels.implementations import device_of, each_implementation
from tests.tolerances import ADAMW_BF16_STATE, ADAMW_FP32

SHAPES = [(5, 4), (7,), (1,), (3, 2, 2), (0,)]
on_both = each_implementation("reference", "triton")


def make_params(implementation="reference", shapes=SHAPES):
    device = device_of(implementation)
    return [torch.nn.Parameter(torch.randn(shape).to(device)) for shape in shapes]


def make_groups(params):
    """A decayed and an undecayed group with its own learning rate."""
    return [
        {"params": params[:2]},
        {"params": params[2:], "weight_decay": 0.0, "lr": 3e-3},
    ]


def set_gradients(step, *param_lists):
    generator = torch.Generator().manual_seed(step)
    for group in zip(*param_lists):
        grad = torch.randn(group[0].shape, generator=generator)
        for param in group:
            param.grad = grad.to(param.device, copy=True)


def test_twenty_steps_equal_torch_bit_for_bit():
    ours = make_params()
    theirs = copy.deepcopy(ours)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = AdamW(make_groups(ours), **settings)
    of_torch = torch.optim.AdamW(make_groups(theirs), **settings)
    for step in range(20):
        set_gradients(step, ours, theirs)
        for group, other in zip(optimizer.param_groups, of_torch.param_groups):
            group["lr"] = other["lr"] = other["lr"] * 0.9  # a schedule
        optimizer.step()
        of_torch.step()
        for param, other in zip(ours, theirs):
            assert torch.equal(param, other)


@on_both
@pytest.mark.parametrize("shapes", [SHAPES, [(4097,), (0, 3), (2048,), (5, 1)], [(3,)], [(0,)]])
def test_twenty_steps_are_those_of_torch(implementation, shapes):
    """One block, several, tensors without elements; states and gradients at other addresses."""
    ours = make_params(implementation, shapes)
    theirs = [torch.nn.Parameter(param.detach().double().cpu()) for param in ours]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = AdamW(make_groups(ours), **settings, implementation=implementation)
    of_torch = torch.optim.AdamW(make_groups(theirs), **settings)
    for step in range(20):
        set_gradients(step, ours)
        for param, other in zip(ours, theirs):
            other.grad = param.grad.double().cpu()
        if step == 10:
            ours[0].grad = theirs[0].grad = None
        optimizer.step()
        of_torch.step()
    for param, other in zip(ours[1:], theirs[1:]):
        assert max_error(param, other) <= ADAMW_FP32
        assert max_error(optimizer.state[param]["exp_avg"], of_torch.state[other]["exp_avg"]) <= (
            ADAMW_FP32
        )


@on_both
def test_bf16_moments(implementation):
    """Moments rounded once per step; the arithmetic before is in fp32."""
    ours, plain = make_params(implementation), make_params(implementation)
    for param, other in zip(ours, plain):
        other.data.copy_(param.data)
    narrow = AdamW(ours, lr=1e-2, state_dtype=torch.bfloat16, implementation=implementation)
    wide = AdamW(plain, lr=1e-2, implementation=implementation)
    for step in range(5):
        set_gradients(step, ours, plain)
        narrow.step()
        wide.step()
    for param, other in zip(ours, plain):
        for name in ("exp_avg", "exp_avg_sq"):
            moment, exact = narrow.state[param][name], wide.state[other][name]
            assert moment.dtype == torch.bfloat16
            assert max_error(moment, exact) <= ADAMW_BF16_STATE
        assert max_error(param, other) <= ADAMW_BF16_STATE
    state = copy.deepcopy(narrow.state_dict())
    narrow.load_state_dict(state)
    for param in ours:
        assert narrow.state[param]["exp_avg"].dtype == torch.bfloat16


@on_both
def test_tensors_at_any_address(implementation):
    """Views of one buffer, as a sharded optimizer has them, that start on no round address."""
    buffers = torch.randn(2, 2100, device=device_of(implementation))
    params = [torch.nn.Parameter(buffers[0, start : start + 7]) for start in (1, 100, 2001)]
    plain = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for param, other, start in zip(params, plain, (3, 50, 1999)):
        param.grad = buffers[1, start : start + 7]
        other.grad = param.grad.clone()
    for group in (params, plain):
        AdamW(group, lr=0.1, implementation=implementation).step()
    assert all(torch.equal(param, other) for param, other in zip(params, plain))


@on_both
def test_transposed_parameters(implementation):
    param = torch.nn.Parameter(torch.randn(3, 5, device=device_of(implementation)).t())
    plain = torch.nn.Parameter(param.detach().contiguous())
    param.grad = torch.ones(3, 5, device=param.device).t()
    plain.grad = param.grad.contiguous()
    for each in (param, plain):
        AdamW([each], lr=0.1, implementation=implementation).step()
    assert torch.equal(param, plain)


def test_triton_refuses_gaps():
    param = torch.nn.Parameter(torch.randn(4, 6)[:, ::2])
    param.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match="adamw: implementation='triton' cannot run: it"):
        AdamW([param], implementation="triton").step()


@on_both
def test_first_step_by_hand(implementation):
    param = torch.nn.Parameter(torch.tensor([2.0], device=device_of(implementation)))
    param.grad = torch.tensor([0.5], device=param.device)
    AdamW([param], lr=0.1, eps=1e-8, weight_decay=0.5, implementation=implementation).step()
    # decay to 2 * (1 - 0.05); the corrected moments are 0.5 and 0.25, so the step is 0.1 * 1
    torch.testing.assert_close(param.detach().cpu(), torch.tensor([1.9 - 0.1]))


def test_state_lies_where_a_sharded_optimizer_looks():
    params = make_params()
    optimizer = AdamW(make_groups(params))
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]
    set_gradients(0, params)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    for param in params:
        state = optimizer.state[param]
        assert sorted(state) == ["exp_avg", "exp_avg_sq"]
        assert all(x.dtype == torch.float32 and x.shape == param.shape for x in state.values())


def test_continues_bit_for_bit_from_a_state_dict():
    straight = make_params()
    resumed = copy.deepcopy(straight)
    first = AdamW(make_groups(straight), lr=1e-2)
    second = AdamW(make_groups(resumed), lr=1e-2)
    for step in range(3):
        set_gradients(step, straight, resumed)
        first.step()
        second.step()
    third = AdamW(make_groups(resumed), lr=9.0)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for step in range(3, 6):
        set_gradients(step, straight, resumed)
        first.step()
        third.step()
    for param, other in zip(straight, resumed):
        assert torch.equal(param, other)


def test_parameters_without_gradient_stay():
    params = make_params()
    before = copy.deepcopy(params)
    optimizer = AdamW(params)
    set_gradients(0, params)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before[1]) and params[1] not in optimizer.state
    assert not torch.equal(params[0], before[0])


def test_closure():
    params = make_params()

    def closure():
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    assert AdamW(params).step(closure).item() > 0
    assert all(param.grad is not None for param in params)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1"),
        ({"betas": (0.9, 1.0)}, r"betas must be each in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps must be greater than 0, got 0"),
        ({"state_dtype": torch.float16}, "state_dtype must be torch.float32 or torch.bfloat16"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ],
)
def test_refuses_numbers(settings, message):
    with pytest.raises(ValueError, match=f"adamw: {message}"):
        AdamW(make_params(), **settings)
    if "state_dtype" not in settings:  # a group may override it
        with pytest.raises(ValueError, match=f"adamw: {message}"):
            AdamW([{"params": make_params(), **settings}])


def test_refuses_other_dtypes():
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    param.grad = torch.zeros_like(param)
    with pytest.raises(ValueError, match=r"adamw: group 0 holds a torch.bfloat16 .*fp32 master"):
        AdamW([param]).step()
