"""Linear cross entropy: loss, gradients, memory, and the vocabulary cut over two processes."""

import pytest
import torch
import torch.distributed as dist

from lclm_kernels.linear_cross_entropy import linear_cross_entropy, per_token_loss
from tests.distributed import DistributedError, run_distributed
from tests.kernels.bounds import assert_within_torch_error, max_error
from tests.kernels.implementations import device_of, each_implementation
from tests.tolerances import CROSS_ENTROPY_FP32, CROSS_ENTROPY_GRAD_FP32

T, D, V = 50, 24, 70
on_both = each_implementation("reference", "triton")


def make_inputs(dtype=torch.float64, num_tokens=T, implementation="reference"):
    hidden = torch.randn(num_tokens, D, dtype=torch.float64).to(dtype)
    weight = (0.5 * torch.randn(V, D, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, V, (num_tokens,))
    labels[::7] = -100
    return [tensor.to(device_of(implementation)) for tensor in (hidden, weight, labels)]


def by_definition(hidden, weight, labels, label_weights=None):
    losses = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    return (losses if label_weights is None else losses * label_weights).sum()


def run(function, hidden, weight, *arguments):
    """(loss, dhidden, dweight) of the mean over 40 tokens, as a trainer takes it."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = function(hidden, weight, *arguments)
    (loss / 40).backward()
    return loss.detach(), hidden.grad, weight.grad


def test_loss_and_gradients_fp64():
    check_loss_and_gradients(torch.float64, 16, "reference")


@on_both
@pytest.mark.parametrize("chunk_tokens", [1, 16, 50, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients(dtype, chunk_tokens, implementation):
    check_loss_and_gradients(dtype, chunk_tokens, implementation)


def check_loss_and_gradients(dtype, chunk_tokens, implementation):
    hidden, weight, labels = make_inputs(dtype, implementation=implementation)
    truth = run(by_definition, hidden.double(), weight.double(), labels)
    of_torch = run(by_definition, hidden, weight, labels)
    settings = {"chunk_tokens": chunk_tokens, "implementation": implementation}
    results = run(lambda *x: linear_cross_entropy(*x, **settings)[0], hidden, weight, labels)
    assert results[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, result, torch_result, exact in zip(
        ("loss", "dhidden", "dweight"), results, of_torch, truth
    ):
        assert_within_torch_error(name, result.to(dtype), torch_result, exact)
    assert results[1].dtype == results[2].dtype == dtype


@on_both
def test_vocabulary_of_several_blocks(implementation):
    """Rows longer than a program reads at a time, and no multiple of it."""
    hidden, _, labels = make_inputs(torch.float32, 3, implementation)
    weight = 0.5 * torch.randn(9001, D, device=hidden.device)
    labels[:] = torch.tensor([0, 9000, 4096])
    truth = run(by_definition, hidden.double(), weight.double(), labels)
    of_torch = run(by_definition, hidden, weight, labels)
    settings = {"implementation": implementation}
    results = run(lambda *x: linear_cross_entropy(*x, **settings)[0], hidden, weight, labels)
    for name, result, torch_result, exact in zip(
        ("loss", "dhidden", "dweight"), results, of_torch, truth
    ):
        assert_within_torch_error(name, result, torch_result, exact)


def test_many_bf16_chunks_do_not_wear_the_weight_gradient():
    """Summed in bf16 over 4,096 chunks the gradient would lose most of its bits."""
    hidden, weight, labels = make_inputs(torch.bfloat16, 4096)
    hidden, labels = hidden.abs(), torch.zeros_like(labels)  # all push the same way
    truth = run(by_definition, hidden.double(), weight.double(), labels)[2]
    chunked = run(lambda *x: linear_cross_entropy(*x, chunk_tokens=1)[0], hidden, weight, labels)[2]
    whole = run(lambda *x: linear_cross_entropy(*x)[0], hidden, weight, labels)[2]
    assert_within_torch_error("dweight", chunked, whole, truth)


@on_both
def test_counts_and_weights(implementation):
    hidden, weight, labels = make_inputs(torch.float32, implementation=implementation)
    settings = {"implementation": implementation}
    _, num_labels = linear_cross_entropy(hidden, weight, labels, **settings)
    assert num_labels.dtype == torch.int64
    assert num_labels.item() == (labels != -100).sum().item() == 42
    settings["label_weights"] = label_weights = torch.rand(T, device=hidden.device)
    label_weights[:10] = 0.0
    loss, num_labels = linear_cross_entropy(hidden, weight, labels, **settings)
    assert num_labels.item() == (labels[10:] != -100).sum().item()
    truth = run(by_definition, hidden.double(), weight.double(), labels, label_weights.double())
    weighted = run(
        lambda h, w: linear_cross_entropy(h, w, labels, **settings)[0],
        hidden,
        weight,
    )
    assert max_error(loss, truth[0]) <= CROSS_ENTROPY_FP32
    for result, exact in zip(weighted[1:], truth[1:]):
        assert max_error(result, exact) <= CROSS_ENTROPY_GRAD_FP32
    assert not weighted[1][:10].any() and not weighted[1][::7].any()


@on_both
def test_nothing_labelled(implementation):
    hidden, weight, labels = make_inputs(torch.float32, implementation=implementation)
    for part in (slice(0), slice(None)):
        ignored = torch.full_like(labels[part], -100)
        loss, dhidden, dweight = run(
            lambda *x: linear_cross_entropy(*x, implementation=implementation)[0],
            hidden[part],
            weight,
            ignored,
        )
        assert loss.item() == 0.0 and not dhidden.any() and not dweight.any()


@on_both
def test_per_token_loss(implementation):
    hidden, weight, labels = make_inputs(torch.float32, implementation=implementation)
    settings = {"chunk_tokens": 16, "implementation": implementation}
    losses = per_token_loss(hidden.requires_grad_(), weight, labels, **settings)
    assert losses.shape == (T,) and losses.dtype == torch.float32 and not losses.requires_grad
    assert not losses[::7].any()
    logits = hidden.double() @ weight.double().t()
    truth = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert max_error(losses, truth) <= CROSS_ENTROPY_FP32


def test_nothing_is_spent_on_gradients_without_autograd(monkeypatch):
    def refuse(*_):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr("lclm_kernels.linear_cross_entropy.ops._add_matmul", refuse)
    hidden, weight, labels = make_inputs(torch.float32)
    inputs = (hidden.requires_grad_(), weight.requires_grad_(), labels)
    with pytest.raises(AssertionError, match="a gradient was made"):
        linear_cross_entropy(*inputs)
    with torch.no_grad():
        linear_cross_entropy(*inputs)


def test_gradcheck_fp64():
    hidden, weight, labels = make_inputs()
    arguments = (hidden[:9].requires_grad_(), weight[:, :].requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels[:9], chunk_tokens=4)[0], arguments
    )


@on_both
def test_strided_inputs(implementation):
    hidden, weight, labels = make_inputs(torch.float32, implementation=implementation)
    settings = {"implementation": implementation}
    expected = run(lambda *x: linear_cross_entropy(*x, **settings)[0], hidden, weight, labels)
    hidden_t, weight_t = hidden.t().contiguous().t(), weight.t().contiguous().t()
    labels_2 = torch.stack([labels, labels], dim=1)[:, 0]
    results = run(lambda *x: linear_cross_entropy(*x, **settings)[0], hidden_t, weight_t, labels_2)
    assert max_error(results[0], expected[0]) <= CROSS_ENTROPY_FP32
    for result, other in zip(results[1:], expected[1:]):
        assert max_error(result, other) <= CROSS_ENTROPY_GRAD_FP32


@on_both
def test_backward_twice_gives_the_same(implementation):
    hidden, weight, labels = make_inputs(torch.float32, implementation=implementation)
    weight.requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, labels, implementation=implementation)
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])


@on_both
def test_large_logits_stay_finite(implementation):
    hidden, weight, labels = make_inputs(torch.float32, implementation=implementation)
    settings = {"implementation": implementation}
    loss, dhidden, dweight = run(
        lambda *x: linear_cross_entropy(*x, **settings)[0], 1e4 * hidden, weight, labels
    )
    assert loss.isfinite() and dhidden.isfinite().all() and dweight.isfinite().all()


def test_logits_exist_for_one_chunk_only(monkeypatch):
    sizes = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: sizes.append(len(a)) or matmul(a, b)
    )
    hidden, weight, labels = make_inputs(torch.float32)
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=16)
    assert sizes == [16, 16, 16, 2]


def _on_rank(implementation, *inputs):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hidden, weight, labels, label_weights = (x.to(device_of(implementation)) for x in inputs)
    start, end = (V * r // world_size for r in (rank, rank + 1))
    hidden, shard = hidden.requires_grad_(), weight[start:end].clone().requires_grad_()
    state = (start, dist.group.WORLD, 16)
    settings = {"implementation": implementation}
    loss, num_labels = linear_cross_entropy(
        hidden, shard, labels, *state, label_weights, **settings
    )
    (loss / 40).backward()
    dist.all_reduce(hidden.grad)
    losses = per_token_loss(hidden, shard, labels, *state, **settings)
    large = per_token_loss(1e3 * hidden, shard, labels, *state, **settings)
    tensors = (hidden.grad, shard.grad, losses, large)
    return loss.item(), num_labels.item(), *(tensor.detach().cpu() for tensor in tensors)


def _label_outside(hidden, weight, labels):
    rank = dist.get_rank()
    shard = weight[rank * 35 : (rank + 1) * 35]
    linear_cross_entropy(hidden, shard, labels, rank * 35, dist.group.WORLD)


@on_both
def test_vocabulary_cut_over_two_processes(implementation):
    hidden, weight, labels = make_inputs(torch.float32)
    label_weights = torch.rand(T)
    truth = run(by_definition, hidden.double(), weight.double(), labels, label_weights.double())
    logits = hidden.double() @ weight.double().t()
    truth_losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    ranks = run_distributed(_on_rank, 2, implementation, hidden, weight, labels, label_weights)
    for loss, num_labels, dhidden, _, losses, large in ranks:
        assert abs(loss - truth[0].item()) <= CROSS_ENTROPY_FP32
        assert num_labels == 42
        assert max_error(dhidden, truth[1]) <= CROSS_ENTROPY_GRAD_FP32
        assert max_error(losses, truth_losses) <= CROSS_ENTROPY_FP32
        assert large.isfinite().all()
    dweight = torch.cat([rank[3] for rank in ranks])
    assert max_error(dweight, truth[2]) <= CROSS_ENTROPY_GRAD_FP32


def test_label_in_no_shard_is_refused_on_every_process():
    hidden, weight, labels = make_inputs(torch.float32)
    labels[5] = V
    with pytest.raises(DistributedError) as error:
        run_distributed(_label_outside, 2, hidden, weight, labels)
    assert str(error.value).count(f"label {V} is in no vocabulary shard") == 2


def refusals():
    hidden, weight, labels = make_inputs(torch.float32)
    outside = labels.clone()
    outside[3] = V
    return {
        "hidden": ((hidden[0], weight, labels), r"hidden must be \[T, D\]"),
        "sizes": ((hidden, weight[:, :9], labels), r"got \[50, 24\] and \[70, 9\]"),
        "dtypes": ((hidden, weight.bfloat16(), labels), "hidden is torch.float32, weight is"),
        "label dtype": ((hidden, weight, labels.int()), r"labels must be int64 \[50\]"),
        "label count": ((hidden, weight, labels[:9]), r"labels must be int64 \[50\], .* \[9\]"),
        "no vocabulary": ((hidden, weight[:0], labels), "weight has no rows"),
        "chunk": ((hidden, weight, labels, 0, None, 0), "chunk_tokens must be at least 1, got 0"),
        "weights": (
            (hidden, weight, labels, 0, None, 9, labels),
            r"label_weights must be float32 \[50\]",
        ),
        "weights elsewhere": (
            (hidden, weight, labels, 0, None, 9, torch.ones(50, device="meta")),
            "label_weights must be .* on cpu .* on meta",
        ),
        "weights with a gradient": (
            (hidden, weight, labels, 0, None, 9, torch.ones(50, requires_grad=True)),
            "label_weights must be .* without a gradient, .* requires_grad=True",
        ),
        "vocab_start": ((hidden, weight, labels, -1), "vocab_start must be at least 0, got -1"),
        "outside": ((hidden, weight, outside), "label 70 is in no vocabulary shard"),
        "negative": ((hidden, weight, -outside.abs() - 1), "label -.* is in no vocabulary shard"),
        "other shard": ((hidden, weight[:35], labels), "holds entries 0 to 34"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refuses(case):
    arguments, message = refusals()[case]
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
        linear_cross_entropy(*arguments)


@on_both
def test_label_in_no_shard_never_passes(implementation):
    hidden, weight, labels = make_inputs(torch.float32, implementation=implementation)
    labels[3] = V
    if hidden.device.type == "cuda":
        loss, _ = linear_cross_entropy(hidden, weight, labels, implementation=implementation)
        assert loss.isnan()
    else:
        with pytest.raises(ValueError, match="label 70 is in no vocabulary shard"):
            linear_cross_entropy(hidden, weight, labels, implementation=implementation)


def test_triton_refuses_fp64():
    with pytest.raises(ValueError, match="linear_cross_entropy: implementation='triton' cannot"):
        linear_cross_entropy(*make_inputs(), implementation="triton")
