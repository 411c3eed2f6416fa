"""AdamW: the numbers of torch.optim.AdamW, and where its state lies."""

import copy

import pytest
import torch

from lclm_kernels.adamw import AdamW

SHAPES = [(5, 4), (7,), (1,), (3, 2, 2)]


def make_params():
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


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
            param.grad = grad.clone()


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


def test_first_step_by_hand():
    param = torch.nn.Parameter(torch.tensor([2.0]))
    param.grad = torch.tensor([0.5])
    AdamW([param], lr=0.1, eps=1e-8, weight_decay=0.5).step()
    # decay to 2 * (1 - 0.05); the corrected moments are 0.5 and 0.25, so the step is 0.1 * 1
    torch.testing.assert_close(param.detach(), torch.tensor([1.9 - 0.1]))


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
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ],
)
def test_refuses_numbers(settings, message):
    with pytest.raises(ValueError, match=f"adamw: {message}"):
        AdamW(make_params(), **settings)
    with pytest.raises(ValueError, match=f"adamw: {message}"):
        AdamW([{"params": make_params(), **settings}])


def test_refuses_other_dtypes():
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    param.grad = torch.zeros_like(param)
    with pytest.raises(ValueError, match=r"adamw: group 0 holds a torch.bfloat16 .*fp32 master"):
        AdamW([param]).step()
