"""Time interval attention on an NVIDIA GPU beside what else torch can do with the same row.

    python benchmarks/attention_gpu.py [--quick]

Shapes of Llama-3-8B (32 query heads, 8 kv heads of 128) and of a tp-8 rank of Llama-3-70B (8, 1);
rows of one document and of ragged documents drawn from MagiAttention's published histogram. Peers:
SDPA on cuDNN and on flash (dense causal, so one document only), torch.nn.attention.varlen, and
FlexAttention with a document mask. Forward and backward apart, bf16, random data, medians of
interleaved runs. TFLOP/s count 4 N H per visible pair forward and 2.5 times that backward. A peer
that this torch does not have or that fails is named with its reason. Prints a table and appends one
JSON object to benchmarks/results/attention_gpu.jsonl. Our results are first checked against fp32
by definition; if they are wrong nothing is timed and the exit code is 1.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lclm.context.lengths import read_histogram
from lclm_kernels.interval_attention import interval_attention, make_plan

FOLDER = Path(__file__).resolve().parent
HISTOGRAM = FOLDER / "data" / "doc_lengths_magi.csv"
RESULTS = FOLDER / "results" / "attention_gpu.jsonl"
HEAD_DIM = 128
SCALE = HEAD_DIM**-0.5
K = 1024
MODELS = {"Llama-3-8B": (32, 8), "Llama-3-70B, tp 8": (8, 1)}
# Largest relative error (Frobenius norm) of bf16 against fp32: two roundings of 2^-9.
MAX_ERROR = 1e-2

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def document_bounds(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lo and hi of causal attention in packed documents, int32 [T]."""
    ends = np.cumsum(lengths)
    lo = np.repeat(ends - lengths, lengths).astype(np.int32)
    return lo, np.arange(1, len(lo) + 1, dtype=np.int32)


def random_inputs(num_tokens: int, num_heads: int, num_kv_heads: int) -> list[torch.Tensor]:
    """q, k, v that want gradients, and the gradient of the output; bf16, [T, heads, H]."""
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    shapes = [(num_tokens, n, HEAD_DIM) for n in heads]
    x = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    return [*(tensor.requires_grad_() for tensor in x[:3]), x[3]]


def our_attention(lengths: np.ndarray) -> Attend:
    """This package's kernel; the plan is made here, as the loader does ahead of time."""
    plan = make_plan(*document_bounds(lengths), int(lengths.sum()))
    return lambda q, k, v: interval_attention(q, k, v, plan, SCALE, "triton")


def dense_attention(backend: SDPBackend) -> Attend:
    """torch's SDPA with one backend, causal over the whole row."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(
                *heads_first, is_causal=True, scale=SCALE, enable_gqa=True
            )
        return out[0].transpose(0, 1)

    return attend


def varlen_attention(lengths: np.ndarray) -> Attend:
    """torch's FlashAttention-2 on packed documents."""
    from torch.nn.attention.varlen import varlen_attn

    ends = np.concatenate([[0], np.cumsum(lengths)])
    starts = torch.tensor(ends, dtype=torch.int32, device="cuda")
    longest = int(lengths.max())

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        sizes = (starts, starts, longest, longest)
        return varlen_attn(q, k, v, *sizes, scale=SCALE, window_size=(-1, 0), enable_gqa=True)

    return attend


def flex_attention(lengths: np.ndarray) -> Attend:
    """Compiled FlexAttention with a causal document mask, made here and not timed."""
    from torch.nn.attention import flex_attention as flex

    numbers = np.repeat(np.arange(len(lengths)), lengths)
    document = torch.tensor(numbers, dtype=torch.int32, device="cuda")

    def sees(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (document[query] == document[key]) & (query >= key)

    mask = flex.create_block_mask(
        sees, None, None, len(document), len(document), device="cuda", _compile=True
    )
    run = torch.compile(flex.flex_attention)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = run(*heads_first, block_mask=mask, scale=SCALE, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def makers_for(lengths: np.ndarray) -> dict[str, Callable[[], Attend]]:
    """How each contestant is made for this row; dense ones know no documents."""
    makers: dict[str, Callable[[], Attend]] = {"ours": lambda: our_attention(lengths)}
    if len(lengths) == 1:
        makers["SDPA cuDNN"] = lambda: dense_attention(SDPBackend.CUDNN_ATTENTION)
        makers["SDPA flash"] = lambda: dense_attention(SDPBackend.FLASH_ATTENTION)
    makers["varlen"] = lambda: varlen_attention(lengths)
    makers["FlexAttention"] = lambda: flex_attention(lengths)
    return makers


def prepare(
    makers: dict[str, Callable[[], Attend]], inputs: list[torch.Tensor]
) -> tuple[dict[str, Attend], dict[str, str]]:
    """The contestants that run here, and why the others do not. Our own failure is not caught."""
    ready: dict[str, Attend] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            attend = make()
            torch.autograd.grad(attend(*inputs[:3]), inputs[:3], inputs[3])
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            if name == "ours":
                raise
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            ready[name] = attend
    return ready, absent


def time_apart(
    ready: dict[str, Attend], inputs: list[torch.Tensor], repeats: int
) -> dict[str, tuple[float, float]]:
    """Median milliseconds (forward, backward) of each contestant, run in turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, attend in ready.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            events[0].record()
            out = attend(*inputs[:3])
            events[1].record()
            torch.autograd.grad(out, inputs[:3], inputs[3])
            events[2].record()
            torch.cuda.synchronize()
            forward_ms = events[0].elapsed_time(events[1])
            times[name].append((forward_ms, events[1].elapsed_time(events[2])))
    return {
        name: (statistics.median(f for f, _ in runs), statistics.median(b for _, b in runs))
        for name, runs in times.items()
    }


def find_errors() -> list[str]:
    """What of ours is wrong against fp32 by definition on a ragged row; empty if nothing."""
    lengths = np.array([1, 700, 5, 300, 1042])
    inputs = random_inputs(int(lengths.sum()), 8, 2)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    lo, hi = (torch.from_numpy(bound).cuda() for bound in document_bounds(lengths))
    keys = torch.arange(len(lo), device="cuda")
    mask = (keys >= lo[:, None]) & (keys < hi[:, None])

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH):
            out = scaled_dot_product_attention(
                *heads_first, attn_mask=mask, scale=SCALE, enable_gqa=True
            )
        return out[0].transpose(0, 1)

    errors = []
    results = []
    for attend, x in ((our_attention(lengths), inputs), (dense, wide)):
        out = attend(*x[:3])
        results.append([out, *torch.autograd.grad(out, x[:3], x[3])])
    for name, actual, exact in zip(("out", "dq", "dk", "dv"), *results):
        error = ((actual.float() - exact).norm() / exact.norm()).item()
        if not error <= MAX_ERROR:
            errors.append(f"{name} is off by {error:.1e}, allowed {MAX_ERROR:.0e}")
    return errors


def bench(quick: bool) -> list[dict[str, Any]]:
    """One record per model, row and contestant."""
    rng = np.random.default_rng(0)
    histogram = read_histogram(HISTOGRAM)
    records: list[dict[str, Any]] = []
    for model, (num_heads, num_kv_heads) in MODELS.items():
        for num_tokens in (8 * K, 32 * K) if quick else (8 * K, 32 * K, 64 * K, 128 * K):
            ragged = histogram.draw_row(rng, num_tokens, num_tokens // 4)
            for row, lengths in (("one", np.array([num_tokens])), ("ragged", ragged)):
                inputs = random_inputs(num_tokens, num_heads, num_kv_heads)
                ready, absent = prepare(makers_for(lengths), inputs)
                spent = time_apart(ready, inputs, repeats=5 if num_tokens > 64 * K else 15)
                pairs = int((lengths.astype(np.int64) * (lengths + 1) // 2).sum())
                flops = 4 * num_heads * HEAD_DIM * pairs
                place = {"model": model, "tokens": num_tokens, "row": row}
                print(f"\n{model}, {num_tokens} tokens, {len(lengths)} documents")
                for name, (fwd_ms, bwd_ms) in spent.items():
                    fwd, bwd = flops / fwd_ms / 1e9, 2.5 * flops / bwd_ms / 1e9
                    print(
                        f"  {name:<14} fwd {fwd_ms:9.3f} ms {fwd:6.0f} TFLOP/s   "
                        f"bwd {bwd_ms:9.3f} ms {bwd:6.0f} TFLOP/s",
                        flush=True,
                    )
                    times = {"fwd_ms": fwd_ms, "bwd_ms": bwd_ms}
                    speeds = {"fwd_tflops": fwd, "bwd_tflops": bwd}
                    records.append({**place, "name": name, **times, **speeds})
                for name, reason in absent.items():
                    print(f"  {name:<14} not run: {reason}")
                    records.append({**place, "name": name, "reason": reason})
    return records


def main() -> int:
    """Check, time, print, append."""
    parser = argparse.ArgumentParser(description="Time interval attention on an NVIDIA GPU.")
    parser.add_argument("--quick", action="store_true", help="rows of at most 32K tokens")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "error: torch sees no NVIDIA GPU; on a CPU run benchmarks/kernels.py", file=sys.stderr
        )
        return 2
    torch.manual_seed(0)
    errors = find_errors()
    if errors:
        print(f"error: wrong results, nothing timed: {'; '.join(errors)}", file=sys.stderr)
        return 1
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "attention": bench(arguments.quick),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="ascii") as file:
        file.write(json.dumps(record) + "\n")
    print(f"\nappended to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
