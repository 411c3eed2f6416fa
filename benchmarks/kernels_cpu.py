"""Times the operators on the CPU: one thread, fp32, beside PyTorch; `kernels.py` runs it.

Times are CPU seconds of the process, the least of several runs: on a busy machine they vary less
than those of the clock. What is compared ran in this process, in turns.
"""

import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels_gpu.contest import describe, relative_error
from kernels_gpu.report import append_record
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lclm_kernels.adamw import AdamW
from lclm_kernels.interval_attention import IntervalPlan, forward, interval_attention, make_plan
from lclm_kernels.linear_cross_entropy import linear_cross_entropy
from lclm_kernels.rms_norm import rms_norm
from lclm_kernels.rope import apply_rope, build_rope_table
from lclm_kernels.swiglu import swiglu

__all__ = ["run"]

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
SCALE = HEAD_DIM**-0.5
# Largest relative error (of the Frobenius norm) of fp32 against fp64; measured about 3e-7.
MAX_ERROR = 1e-5

Call = Callable[[], Any]
Case = tuple[str, str, Call, Call, int]  # operator, description, ours, PyTorch's, repeats


def ragged_lengths(num_tokens: int, seed: int = 0) -> list[int]:
    """Document lengths that fill a row: lognormal, median 403 tokens, mean about 830."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := num_tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(1, int(rng.lognormal(6.0, 1.2)))))
    return lengths


def document_plan(lengths: list[int]) -> IntervalPlan:
    """The causal mask of packed documents."""
    ends = np.cumsum([0, *lengths])
    lo = np.repeat(ends[:-1], lengths).astype(np.int32)
    return make_plan(lo, np.arange(1, len(lo) + 1, dtype=np.int32), len(lo))


def attention_inputs(num_tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v that want gradients, and the gradient of the output."""
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)
    x = [torch.randn(num_tokens, n, HEAD_DIM, dtype=dtype) for n in heads]
    return [*(tensor.requires_grad_() for tensor in x[:3]), x[3]]


def dense_mask(plan: IntervalPlan) -> torch.Tensor:
    """The plan's mask, bool [T, S]."""
    keys = torch.arange(plan.num_keys)
    return (keys >= plan.lo[:, None]) & (keys < plan.hi[:, None])


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Any:
    """PyTorch's attention with a dense mask, [T, N, H]."""
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = functional.scaled_dot_product_attention(
        *heads_first, attn_mask=mask[None, None], scale=SCALE, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def run_attention(inputs: list[torch.Tensor], attend: Callable[..., torch.Tensor]) -> Call:
    """A call of forward and backward."""

    def run() -> list[torch.Tensor]:
        out = attend(*inputs[:3])
        return [out, *torch.autograd.grad(out, inputs[:3], inputs[3])]

    return run


def time_calls(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Least CPU seconds of each call, after one run unmeasured; the calls alternate."""
    best = dict.fromkeys(calls, float("inf"))
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            spent = time.process_time() - start
            if repeat:
                best[name] = min(best[name], spent)
    return best


def attention_cases(quick: bool) -> list[tuple[str, list[int], int]]:
    """(name, document lengths, repeats)."""
    sizes = (2048, 4096, 8192) if quick else (2048, 4096, 8192, 16384, 32768)
    cases = [(f"one document of {n}", [n], max(1, 3 * 8192 // n)) for n in sizes]
    cases += [(f"ragged row of {n}", ragged_lengths(n), max(1, 8 * 8192 // n)) for n in sizes]
    return [*cases, ("2048 documents of 4", [4] * 2048, 5), ("8192 documents of 1", [1] * 8192, 5)]


def bench_attention(quick: bool) -> list[dict[str, Any]]:
    """Time per visible pair, per query head and head element, for long and for short documents."""
    rows = []
    print(f"\ninterval_attention cpu, N {NUM_HEADS}, K {NUM_KV_HEADS}, H {HEAD_DIM}, fwd + bwd")
    print(f"{'mask':<28}{'documents':>10}{'pairs':>13}{'ms':>10}{'ps/pair/N/H':>13}{'plan ms':>9}")
    for name, lengths, repeats in attention_cases(quick):
        start = time.process_time()
        plan = document_plan(lengths)
        plan_s = time.process_time() - start
        inputs = attention_inputs(plan.num_queries)
        call = run_attention(inputs, lambda q, k, v, p=plan: interval_attention(q, k, v, p, SCALE))
        spent = time_calls({"cpu": call}, repeats)["cpu"]
        per_pair = 1e12 * spent / (plan.num_pairs * NUM_HEADS * HEAD_DIM)
        rows.append(
            {
                "mask": name,
                "documents": len(lengths),
                "pairs": plan.num_pairs,
                "ms": 1e3 * spent,
                "ps_per_pair_head_element": per_pair,
                "plan_ms": 1e3 * plan_s,
            }
        )
        print(
            f"{name:<28}{len(lengths):>10}{plan.num_pairs:>13}{1e3 * spent:>10.1f}"
            f"{per_pair:>13.1f}{1e3 * plan_s:>9.1f}",
            flush=True,
        )
    return rows


def bench_against_flex() -> dict[str, Any]:
    """Forward alone against FlexAttention's compiled CPU path, which has no backward.

    Compiling takes a C++ compiler; without one, or where it fails, the result says why.
    """
    lengths = ragged_lengths(8192)
    plan = document_plan(lengths)
    document = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))

    def sees(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (document[query] == document[key]) & (query >= key)

    q, k, v = (x.detach() for x in attention_inputs(8192)[:3])
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    mask = create_block_mask(sees, None, None, 8192, 8192, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex() -> torch.Tensor:
        out = compiled(*heads_first, block_mask=mask, scale=SCALE, enable_gqa=True)
        return out[0].transpose(0, 1)

    def ours() -> torch.Tensor:
        return forward(q, k, v, plan, SCALE)[0]

    print("\ninterval_attention cpu, forward alone, ragged row of 8192; FlexAttention, compiled")
    try:
        with torch.no_grad():
            error = relative_error(flex(), ours())
            if not error <= MAX_ERROR:
                raise RuntimeError(f"FlexAttention differs from ours by {error:.1e}")
            spent = time_calls({"ours": ours, "flex": flex}, 10)
    except Exception as error:  # compilers fail in many ways; the table says how
        reason = f"FlexAttention was not timed (it needs a C++ compiler): {describe(error)}"
        print(reason)
        return {"reason": reason}
    ratio = spent["flex"] / spent["ours"]
    print(
        f"ours {1e3 * spent['ours']:.1f} ms, FlexAttention {1e3 * spent['flex']:.1f}, {ratio:.2f}"
    )
    return {"ours_ms": 1e3 * spent["ours"], "flex_ms": 1e3 * spent["flex"], "ratio": ratio}


def bench_against_torch(ops: Sequence[str]) -> list[dict[str, Any]]:
    """Each operator against the same in plain PyTorch."""
    rows = []
    print(f"\n{'operator, fp32, fwd + bwd':<54}{'ours ms':>10}{'torch ms':>10}{'ratio':>8}")
    for op, name, ours, of_torch, repeats in comparison_cases():
        if op not in ops:
            continue
        spent = time_calls({"ours": ours, "torch": of_torch}, repeats)
        ratio = spent["torch"] / spent["ours"]
        title = f"{op}, {name}"
        rows.append({"operator": title, "ours_ms": 1e3 * spent["ours"], "ratio": ratio})
        rows[-1]["torch_ms"] = 1e3 * spent["torch"]
        print(
            f"{title:<54}{1e3 * spent['ours']:>10.1f}{1e3 * spent['torch']:>10.1f}{ratio:>8.2f}",
            flush=True,
        )
    return rows


def with_gradients(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Call:
    """A call of function's forward and backward for the inputs that want gradients."""
    wanted = [x for x in inputs if x.requires_grad]

    def run() -> list[torch.Tensor]:
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, wanted, torch.ones_like(out))]

    return run


def comparison_cases() -> list[Case]:
    """What is compared, attention first and AdamW last."""
    plan = document_plan(ragged_lengths(8192))
    mask, inputs = dense_mask(plan), attention_inputs(8192)
    attention = (
        "interval_attention",
        "ragged row of 8192; dense mask",
        run_attention(inputs, lambda q, k, v: interval_attention(q, k, v, plan, SCALE)),
        run_attention(inputs, lambda q, k, v: dense_attention(q, k, v, mask)),
        2,
    )
    x, weight = torch.randn(4096, 512, requires_grad=True), torch.ones(512, requires_grad=True)
    norm = (
        "rms_norm",
        "[4096, 512]",
        with_gradients(lambda x, w: rms_norm(x, w, 1e-5), x, weight),
        with_gradients(lambda x, w: functional.rms_norm(x, (512,), w, 1e-5), x, weight),
        20,
    )
    gates = torch.randn(4096, 2048, requires_grad=True)
    gated = (
        "swiglu",
        "[4096, 2 * 1024]",
        with_gradients(swiglu, gates),
        with_gradients(lambda x: functional.silu(x[..., :1024]) * x[..., 1024:], gates),
        20,
    )
    heads = torch.randn(4096, 8, 64, requires_grad=True)
    cos, sin = build_rope_table(torch.arange(4096), 64, 5e5)
    wide_cos, wide_sin = (torch.cat([table, table], dim=-1)[:, None] for table in (cos, sin))
    rotated = (
        "rope",
        "[4096, 8, 64]",
        with_gradients(lambda x: apply_rope(x, cos, sin), heads),
        with_gradients(lambda x: x * wide_cos + rotate_half(x) * wide_sin, heads),
        20,
    )
    hidden = torch.randn(4096, 256, requires_grad=True)
    table = (0.02 * torch.randn(16384, 256)).requires_grad_()
    labels = torch.randint(0, 16384, (4096,))
    loss = (
        "linear_cross_entropy",
        "[4096, 256], vocabulary 16384",
        with_gradients(lambda h, w: linear_cross_entropy(h, w, labels)[0], hidden, table),
        with_gradients(
            lambda h, w: functional.cross_entropy(h @ w.t(), labels, reduction="sum"), hidden, table
        ),
        3,
    )
    return [attention, norm, gated, rotated, loss, adamw_case()]


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(first, second) -> (-second, first), the usual way of writing RoPE."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def adamw_case() -> Case:
    """A step on 100 parameters of 64K elements."""
    steps = []
    for make in (AdamW, torch.optim.AdamW):
        params = [torch.nn.Parameter(torch.randn(65536)) for _ in range(100)]
        for param in params:
            param.grad = torch.randn_like(param)
        steps.append(make(params, lr=1e-3).step)
    return ("adamw", "100 x 65536 (step)", steps[0], steps[1], 20)


def find_errors() -> list[str]:
    """What is wrong with the operators against fp64 by definition; empty if nothing."""
    errors = []
    plan = document_plan([4] * 20 + ragged_lengths(700))
    inputs, mask = attention_inputs(780), dense_mask(plan)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = run_attention(wide, lambda q, k, v: dense_attention(q, k, v, mask))()
    ours = run_attention(inputs, lambda q, k, v: interval_attention(q, k, v, plan, SCALE))()
    for name, actual, exact in zip(("out", "dq", "dk", "dv"), ours, truth):
        if not relative_error(actual, exact) <= MAX_ERROR:
            errors.append(f"interval_attention {name}")
    for op, _, our_call, torch_call, _ in comparison_cases()[1:-1]:  # cheap, and plain fp32
        for number, (actual, exact) in enumerate(zip(our_call(), torch_call())):
            if not relative_error(actual, exact.detach().double()) <= MAX_ERROR:
                errors.append(f"{op} result {number}")
    return errors


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def run(ops: Sequence[str], quick: bool, results: Path, command: str) -> int:
    """Check, time, print, append; the exit code, 1 if a result was wrong."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    errors = find_errors()
    if errors:
        print(f"error: wrong results, nothing timed: {'; '.join(errors)}", file=sys.stderr)
        return 1
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": describe_machine(),
        "clock": "CPU seconds of the process, least of several runs",
        "against_torch": bench_against_torch(ops),
    }
    if "interval_attention" in ops:
        record["forward_against_flex"] = bench_against_flex()
        record["interval_attention"] = bench_attention(quick)
    append_record(results, record)
    print(f"\nappended to {results}")
    return 0
