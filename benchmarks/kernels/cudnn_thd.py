"""cuDNN's attention on packed (THD) documents, through the package nvidia-cudnn-frontend.

A packed tensor is declared as [documents, heads, longest, H] whose documents lie where a tensor of
ragged offsets says; the graphs are built once per row and run on raw storage.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .contest import Problem, Run, Tensors

ROUND_TOKENS = 64  # what the number of tokens that sizes the workspace is rounded up to
TABLES = ("lengths", "q_offsets", "kv_offsets")


class CudnnRow:
    """Forward and backward graphs for the documents of one row, causal, bf16 or fp16.

    Args:
        cudnn: the module.
        lengths: int64 [documents] of the row.
        heads: (N, K, H).
        scale: factor of the scores.
        like: of the dtype and on the device of q, k, v.
    """

    def __init__(
        self,
        cudnn: Any,
        lengths: np.ndarray,
        heads: tuple[int, int, int],
        scale: float,
        like: torch.Tensor,
    ) -> None:
        self.cudnn, self.scale, self.dtype = cudnn, scale, like.dtype
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.batch, self.longest = len(lengths), int(lengths.max())
        self.num_tokens = int(lengths.sum())
        starts = np.concatenate([[0], np.cumsum(lengths)])

        def upload(values: np.ndarray, kind: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=kind, device=like.device).view(-1, 1, 1, 1)

        self.lengths = upload(lengths, torch.int32)
        self.q_offsets = upload(starts * self.num_heads * self.head_dim, torch.int64)
        self.kv_offsets = upload(starts * self.num_kv_heads * self.head_dim, torch.int64)
        shape = (self.batch, self.num_heads, self.longest, 1)
        self.stats = torch.empty(shape, dtype=torch.float32, device=like.device)

    def layout(self, num_heads: int) -> tuple[list[int], list[int]]:
        """Shape and strides that a packed tensor is declared with."""
        token = num_heads * self.head_dim
        shape = [self.batch, num_heads, self.longest, self.head_dim]
        return shape, [self.longest * token, self.head_dim, token, 1]

    def _begin(self, handle: Any, names: str) -> tuple[Any, dict[str, Any]]:
        """A graph, and its nodes by name: the tables all graphs read, and packed inputs."""
        kinds = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
        wide = self.cudnn.data_type.FLOAT
        graph = self.cudnn.pygraph(
            io_data_type=getattr(self.cudnn.data_type, kinds[self.dtype]),
            intermediate_data_type=wide,
            compute_data_type=wide,
            handle=handle,
        )
        nodes = {name: graph.tensor_like(getattr(self, name)) for name in TABLES}
        for name in names.split():
            kind, num_heads = self._kind(name)
            shape, strides = self.layout(num_heads)
            nodes[name] = graph.tensor(name=name, dim=shape, stride=strides)
            nodes[name].set_ragged_offset(nodes[kind])
        return graph, nodes

    def _kind(self, name: str) -> tuple[str, int]:
        is_key = name in ("k", "v", "dk", "dv")
        return ("kv_offsets", self.num_kv_heads) if is_key else ("q_offsets", self.num_heads)

    def _finish(
        self, graph: Any, nodes: dict[str, Any], outputs: str, handle: Any
    ) -> Callable[..., None]:
        """A call that runs the graph on tensors by name, once its packed outputs are declared."""
        for name in outputs.split():
            kind, num_heads = self._kind(name)
            shape, strides = self.layout(num_heads)
            nodes[name].set_output(True).set_dim(shape).set_stride(strides)
            nodes[name].set_ragged_offset(nodes[kind])
        graph.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        size = max(1, graph.get_workspace_size())
        workspace = torch.empty(size, dtype=torch.uint8, device=self.stats.device)
        tables = {nodes[name]: getattr(self, name) for name in TABLES}

        def run(**tensors: torch.Tensor) -> None:
            pack = {nodes[name]: tensor for name, tensor in tensors.items()}
            graph.execute({**pack, **tables}, workspace, handle=handle)

        return run

    def _mask(self, nodes: dict[str, Any]) -> dict[str, Any]:
        return {
            "attn_scale": self.scale,
            "use_padding_mask": True,
            "seq_len_q": nodes["lengths"],
            "seq_len_kv": nodes["lengths"],
            "diagonal_alignment": self.cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }

    def forward(self, handle: Any) -> Callable[..., None]:
        """A call with the tensors q, k, v, o, stats by name, the last two written."""
        graph, nodes = self._begin(handle, "q k v")
        inputs = {name: nodes[name] for name in ("q", "k", "v")}
        nodes["o"], nodes["stats"] = graph.sdpa(
            name="sdpa", **inputs, generate_stats=True, **self._mask(nodes)
        )
        nodes["stats"].set_output(True).set_data_type(self.cudnn.data_type.FLOAT)
        return self._finish(graph, nodes, "o", handle)

    def backward(self, handle: Any) -> Callable[..., None]:
        """A call with q, k, v, o, dO, stats, and dq, dk, dv that are written."""
        graph, nodes = self._begin(handle, "q k v o dO")
        nodes["stats"] = graph.tensor_like(self.stats)
        inputs = {name: nodes[name] for name in ("q", "k", "v", "o", "dO", "stats")}
        total = -(-self.num_tokens // ROUND_TOKENS) * ROUND_TOKENS
        nodes["dq"], nodes["dk"], nodes["dv"] = graph.sdpa_backward(
            name="sdpa_backward",
            **inputs,
            max_total_seq_len_q=total,
            max_total_seq_len_kv=total,
            **self._mask(nodes),
        )
        return self._finish(graph, nodes, "dq dk dv", handle)


def run_graphs(
    problem: Problem,
    stats: torch.Tensor,
    forward: Callable[..., None],
    backward: Callable[..., None],
) -> Run:
    """A problem's forward and backward, from calls that run the graphs on tensors by name."""
    q, k, v = (x.detach() for x in problem.fresh_inputs())
    named = {"q": q, "k": k, "v": v, "stats": stats}

    def run_forward() -> Tensors:
        named["o"] = torch.empty_like(q)
        forward(**named)
        return [named["o"]]

    def run_backward() -> Tensors:
        grads = {f"d{name}": torch.empty_like(named[name]) for name in ("q", "k", "v")}
        backward(**named, **grads, dO=problem.douts[0])
        return list(grads.values())

    return Run({"fwd": run_forward, "bwd": run_backward})
