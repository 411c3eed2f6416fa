"""cuDNN's attention on packed (THD) documents, through the package nvidia-cudnn-frontend.

A packed tensor is declared as [documents, heads, longest, H] whose documents lie where a tensor of
ragged offsets says; the graphs are built once per row and run on raw storage.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .attention_problem import AttentionProblem
from .contest import Run, autograd_run

__all__ = ["CudnnRow", "attention_of_graphs", "cudnn_packed"]

_ROUND_TOKENS = 64  # what the number of tokens that sizes the workspace is rounded up to


class CudnnRow:
    """Forward and backward graphs for the documents of one row, causal, bf16 or fp16.

    Args:
        cudnn: the module.
        lengths: int64 [documents] of the row.
        heads: (N, K, H).
        scale: factor of the scores.
        dtype, device: of q, k, v.
    """

    def __init__(
        self,
        cudnn: Any,
        lengths: np.ndarray,
        heads: tuple[int, int, int],
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.cudnn = cudnn
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.batch, self.longest = len(lengths), int(lengths.max())
        self.num_tokens = int(lengths.sum())
        self.scale, self.dtype = scale, dtype
        starts = np.concatenate([[0], np.cumsum(lengths)])

        def upload(values: np.ndarray, kind: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=kind, device=device).view(-1, 1, 1, 1)

        self.lengths = upload(lengths, torch.int32)
        self.q_offsets = upload(starts * self.num_heads * self.head_dim, torch.int64)
        self.kv_offsets = upload(starts * self.num_kv_heads * self.head_dim, torch.int64)
        shape = (self.batch, self.num_heads, self.longest, 1)
        self.stats = torch.empty(shape, dtype=torch.float32, device=device)

    def _graph(self, handle: Any) -> Any:
        kinds = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
        return self.cudnn.pygraph(
            io_data_type=getattr(self.cudnn.data_type, kinds[self.dtype]),
            intermediate_data_type=self.cudnn.data_type.FLOAT,
            compute_data_type=self.cudnn.data_type.FLOAT,
            handle=handle,
        )

    def _layout(self, num_heads: int) -> tuple[list[int], list[int]]:
        """Shape and strides that a packed tensor is declared with."""
        token = num_heads * self.head_dim
        shape = [self.batch, num_heads, self.longest, self.head_dim]
        return shape, [self.longest * token, self.head_dim, token, 1]

    def _inputs(self, graph: Any, names: str) -> tuple[dict[str, Any], dict[Any, torch.Tensor]]:
        """Packed inputs by name (of them k and v have kv heads), and the tables all graphs read."""
        tables = {
            name: graph.tensor_like(table)
            for name, table in (
                ("lengths", self.lengths),
                ("q_offsets", self.q_offsets),
                ("kv_offsets", self.kv_offsets),
            )
        }
        nodes = dict(tables)
        for name in names.split():
            is_key = name in ("k", "v")
            shape, strides = self._layout(self.num_kv_heads if is_key else self.num_heads)
            nodes[name] = graph.tensor(name=name, dim=shape, stride=strides)
            nodes[name].set_ragged_offset(tables["kv_offsets" if is_key else "q_offsets"])
        return nodes, {node: getattr(self, name) for name, node in tables.items()}

    def _mark_output(self, node: Any, num_heads: int, offsets: Any) -> None:
        shape, strides = self._layout(num_heads)
        node.set_output(True).set_dim(shape).set_stride(strides)
        node.set_ragged_offset(offsets)

    def _mask(self, nodes: dict[str, Any]) -> dict[str, Any]:
        return {
            "attn_scale": self.scale,
            "use_padding_mask": True,
            "seq_len_q": nodes["lengths"],
            "seq_len_kv": nodes["lengths"],
            "diagonal_alignment": self.cudnn.diagonal_alignment.TOP_LEFT,
            "diagonal_band_right_bound": 0,
        }

    def forward_graph(self, handle: Any) -> tuple[Any, dict[str, Any], dict[Any, torch.Tensor]]:
        """(graph, nodes q, k, v, o, stats; tables to run it with)."""
        graph = self._graph(handle)
        nodes, tables = self._inputs(graph, "q k v")
        inputs = {name: nodes[name] for name in ("q", "k", "v")}
        nodes["o"], nodes["stats"] = graph.sdpa(
            name="sdpa", **inputs, generate_stats=True, **self._mask(nodes)
        )
        self._mark_output(nodes["o"], self.num_heads, nodes["q_offsets"])
        nodes["stats"].set_output(True).set_data_type(self.cudnn.data_type.FLOAT)
        return graph, nodes, tables

    def backward_graph(self, handle: Any) -> tuple[Any, dict[str, Any], dict[Any, torch.Tensor]]:
        """(graph, nodes q, k, v, o, dO, stats, dq, dk, dv; tables to run it with)."""
        graph = self._graph(handle)
        nodes, tables = self._inputs(graph, "q k v o dO")
        nodes["stats"] = graph.tensor_like(self.stats)
        inputs = {name: nodes[name] for name in ("q", "k", "v", "o", "dO", "stats")}
        total = -(-self.num_tokens // _ROUND_TOKENS) * _ROUND_TOKENS
        nodes["dq"], nodes["dk"], nodes["dv"] = graph.sdpa_backward(
            name="sdpa_backward",
            **inputs,
            max_total_seq_len_q=total,
            max_total_seq_len_kv=total,
            **self._mask(nodes),
        )
        self._mark_output(nodes["dq"], self.num_heads, nodes["q_offsets"])
        for name in ("dk", "dv"):
            self._mark_output(nodes[name], self.num_kv_heads, nodes["kv_offsets"])
        return graph, nodes, tables


def _build(
    parts: tuple[Any, dict[str, Any], dict[Any, torch.Tensor]], cudnn: Any, handle: Any
) -> Callable[..., None]:
    """A call that runs a graph on tensors by name."""
    graph, nodes, tables = parts
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    device = next(iter(tables.values())).device
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device)

    def run(**tensors: torch.Tensor) -> None:
        pack = {nodes[name]: tensor for name, tensor in tensors.items()}
        graph.execute({**pack, **tables}, workspace, handle=handle)

    return run


def attention_of_graphs(
    row: CudnnRow, forward: Callable[..., None], backward: Callable[..., None]
) -> Callable[..., torch.Tensor]:
    """Attention of q, k, v with autograd, from calls that run the graphs on tensors by name."""

    class CudnnAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(q)
            forward(q=q, k=k, v=v, o=out, stats=row.stats)
            ctx.save_for_backward(q, k, v, out)
            return out

        @staticmethod
        def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q, k, v, out = ctx.saved_tensors
            dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
            backward(q=q, k=k, v=v, o=out, dO=dout, stats=row.stats, dq=dq, dk=dk, dv=dv)
            return dq, dk, dv

    return CudnnAttention.apply


def cudnn_packed(problem: AttentionProblem) -> Run:
    """cuDNN with ragged offsets, one document or many."""
    import cudnn

    q, k, _ = problem.inputs
    heads = (q.shape[1], k.shape[1], q.shape[2])
    row = CudnnRow(cudnn, problem.lengths, heads, problem.scale, q.dtype, q.device)
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    forward = _build(row.forward_graph(handle), cudnn, handle)
    backward = _build(row.backward_graph(handle), cudnn, handle)
    return autograd_run(attention_of_graphs(row, forward, backward), problem)
