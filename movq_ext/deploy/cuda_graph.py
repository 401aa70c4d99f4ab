"""Decode with CUDA graphs: the kernels of a decode are recorded once for each size, and later launched together."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..model.checks import check_positive
from ..model.decoder import MOVQDecoder

WARM_UP_DECODES = 2  # before recording: libraries choose and load their kernels in the first


class CUDAGraphDecoder:
    """Wraps a decoder to record its decodes on a GPU as CUDA graphs, one for each size, and replay them.

    Call it like the decoder, with gradients off; it returns a new tensor::

        graphed = movq_ext.CUDAGraphDecoder(decoder.eval())
        with torch.inference_mode():
            image = graphed(z, zq)

    The first call with a combination of shapes, dtypes, device and autocast state records a graph, and later calls replay it. All
    graphs share one memory pool, so many sizes take little more memory than the largest. Calls from several threads and streams
    wait for one another. On an H200 a replay of 256x256 in bfloat16 takes 2.1 ms, where an eager decode waits for Python.

    Replays see weights that change in place, because a graph reads their memory and derives folded weights in every replay. All
    graphs are recorded again when a weight or buffer has moved in memory or changed its dtype or layout, as after
    ``decoder.to(...)``, ``parameter.data = ...``, ``load_state_dict(assign=True)`` or replacing a layer. Replays run no Python
    hooks and ignore settings such as ``torch.backends.cudnn.allow_tf32``: call `clear` after changing those.

    On devices other than a GPU, the decoder runs without graphs and ``eager_reason`` says why.

    Args:
        decoder: in evaluation mode.
        max_graphs: number of graphs to hold; the least recently used one is dropped for a new one.

    Attributes:
        eager_reason: why the last call did not use a graph; None if it did, or before the first call.

    Raises:
        TypeError: decoder is not a MOVQDecoder.
        ValueError: max_graphs is not a positive integer.
    """

    def __init__(self, decoder: MOVQDecoder, max_graphs: int = 8) -> None:
        if not isinstance(decoder, MOVQDecoder):
            raise TypeError(f"decoder must be a MOVQDecoder, got {type(decoder).__name__}")
        check_positive(max_graphs=max_graphs)
        self.decoder, self.max_graphs = decoder, max_graphs
        self.eager_reason: str | None = None
        self._graphs: OrderedDict[Hashable, DecodeGraph] = OrderedDict()  # from least to most recently used
        self._weight_layouts: Hashable = None  # that the graphs were recorded with
        self._lock = threading.Lock()

    def __call__(self, z: Tensor, zq: Tensor) -> Tensor:
        """Return ``decoder(z, zq)``.

        Raises what `MOVQDecoder.forward` raises, and RuntimeError in training mode or if a gradient would be recorded.
        """
        decoder = self.decoder
        decoder.check_latents(z, zq)
        if decoder.training:
            raise RuntimeError("decoder must be in evaluation mode, got training mode: call decoder.eval() first")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (z, zq, *decoder.parameters())):
            raise RuntimeError(
                "decoder, z and zq must not require gradients: call under torch.no_grad() or torch.inference_mode()"
            )
        self.eager_reason = _eager_reason(z)
        if self.eager_reason:
            return decoder(z, zq)  # type: ignore[no-any-return]
        with self._lock:
            return self._find_or_record(z, zq).replay(z, zq)

    def __len__(self) -> int:
        """Return the number of graphs."""
        return len(self._graphs)

    def clear(self) -> None:
        """Free all graphs and their memory. The next call with a size records it again."""
        with self._lock:
            self._drop_oldest(len(self._graphs))

    def _find_or_record(self, z: Tensor, zq: Tensor) -> DecodeGraph:
        weight_layouts = tuple(_memory_layout(x) for x in (*self.decoder.parameters(), *self.decoder.buffers()))
        if weight_layouts != self._weight_layouts:
            self._drop_oldest(len(self._graphs))
            self._weight_layouts = weight_layouts
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = (*((x.shape, x.dtype, x.device) for x in (z, zq)), autocast)
        if key not in self._graphs:
            self._drop_oldest(len(self._graphs) + 1 - self.max_graphs)
            sharing = next(iter(self._graphs.values()), None)
            self._graphs[key] = DecodeGraph(self.decoder, z, zq, sharing)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _drop_oldest(self, count: int) -> None:
        for _ in range(count):
            self._graphs.popitem(last=False)[1].close()


class DecodeGraph:
    """Records one decode, of latents with the shapes and dtypes of z and zq, and replays it.

    Args:
        decoder, z, zq: what to record.
        sharing: another graph on the same device to share a memory pool with, or None.
    """

    _pool: Any  # torch has no public name for its type
    _done: torch.cuda.Event  # the end of the last replay in the pool

    def __init__(self, decoder: MOVQDecoder, z: Tensor, zq: Tensor, sharing: DecodeGraph | None) -> None:
        self._pool = sharing._pool if sharing else torch.cuda.graph_pool_handle()
        self._done = sharing._done if sharing else torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        # Inference mode is off even if the caller has it on: inference tensors cannot be written outside it.
        with torch.cuda.device(z.device), torch.inference_mode(False), torch.no_grad(), _autocast_uncached():
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            self._inputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) for x in (z, zq)]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_DECODES):
                    decoder(*self._inputs)
            current.wait_stream(side)
            with torch.cuda.graph(self._graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                self._output: Tensor = decoder(*self._inputs)

    def replay(self, z: Tensor, zq: Tensor) -> Tensor:
        """Return the decode of z and zq as a new tensor: the next replay overwrites the graph's own output."""
        with torch.cuda.device(z.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # a replay on another stream may still use the pool
            for static, x in zip(self._inputs, (z, zq), strict=True):
                static.copy_(x)
            self._graph.replay()
            out = self._output.clone()
            self._done.record(stream)
        return out

    def close(self) -> None:
        """Free the memory after the last replay has ended."""
        self._done.synchronize()
        self._graph.reset()


def _eager_reason(z: Tensor) -> str | None:
    return None if z.is_cuda else f"CUDA graphs do not run on {z.device.type} tensors"


def _autocast_uncached() -> AbstractContextManager[None]:
    """Return autocast with its current settings and without its cache: a graph must cast weights in every replay."""
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False)


def _memory_layout(x: Tensor) -> Hashable:
    """Return the properties of x that must not change between replays that read it."""
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x.device
