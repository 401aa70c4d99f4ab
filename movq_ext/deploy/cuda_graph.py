"""Decoding by CUDA graphs: the kernels of a decode are recorded once for each size and then launched as one."""

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

WARM_UPS = 2  # decodes before the recording: libraries choose and load their kernels in the first


class CUDAGraphDecoder:
    """A decoder whose decodes on a GPU are recorded, on the first call with a size, and replayed from then on.

    Call it like the decoder, with gradients off: ``(z, zq)`` to an image that is the caller's to keep. A graph is kept for each
    combination of shapes, dtypes, device and autocast. Graphs share one memory pool, so that many sizes take little more than the
    largest, and calls from several threads and streams wait for one another. Not yet measured on a GPU.

    What a graph sees: weights that are changed in place, by whatever means, since it reads their memory and makes what follows
    from them anew. All graphs are recorded again when a weight or buffer is elsewhere in memory or has another dtype or layout
    (``decoder.to(...)``, ``parameter.data = ...``, ``load_state_dict(assign=True)``, a layer that was put in). What it does not
    see: hooks in Python, which ran at the recording for the last time, and settings such as
    ``torch.backends.cudnn.allow_tf32``; call `clear` after changing those.

    On other devices than a GPU the decoder just runs, and ``eager_reason`` says so.

    Args:
        decoder: in evaluation.
        max_graphs: how many are kept; that which was not used for longest is dropped for a new one.

    Attributes:
        eager_reason: why the last call was no replay; None if it was one, or there was no call.

    Raises:
        TypeError: decoder is no MOVQDecoder.
        ValueError: max_graphs is not a positive integer.
    """

    def __init__(self, decoder: MOVQDecoder, max_graphs: int = 8) -> None:
        if not isinstance(decoder, MOVQDecoder):
            raise TypeError(f"decoder must be a MOVQDecoder, got {type(decoder).__name__}")
        check_positive(max_graphs=max_graphs)
        self.decoder, self.max_graphs = decoder, max_graphs
        self.eager_reason: str | None = None
        self._graphs: OrderedDict[Hashable, DecodeGraph] = OrderedDict()  # the last is the last that was used
        self._weights: Hashable = None
        self._lock = threading.Lock()

    def __call__(self, z: Tensor, zq: Tensor) -> Tensor:
        """As `MOVQDecoder.forward`, whose errors it raises; RuntimeError in training or where gradients would be recorded."""
        decoder = self.decoder
        decoder.check_latents(z, zq)
        if decoder.training:
            raise RuntimeError("CUDAGraphDecoder cannot train: call decoder.eval() first, or call the decoder itself")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (z, zq, *decoder.parameters())):
            raise RuntimeError("no gradient goes through a CUDA graph: call under torch.no_grad() or torch.inference_mode()")
        self.eager_reason = _eager_reason(z)
        if self.eager_reason:
            return decoder(z, zq)  # type: ignore[no-any-return]
        with self._lock:
            return self._graph(z, zq).replay(z, zq)

    def __len__(self) -> int:
        """How many graphs are held."""
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs and their memory; each size is recorded again when it next comes."""
        with self._lock:
            self._drop(len(self._graphs))

    def _graph(self, z: Tensor, zq: Tensor) -> DecodeGraph:
        weights = tuple(_place(x) for x in (*self.decoder.parameters(), *self.decoder.buffers()))
        if weights != self._weights:
            self._drop(len(self._graphs))
            self._weights = weights
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = (*((x.shape, x.dtype, x.device) for x in (z, zq)), autocast)
        if key not in self._graphs:
            self._drop(len(self._graphs) + 1 - self.max_graphs)
            shared = next(iter(self._graphs.values()), None)
            self._graphs[key] = DecodeGraph(self.decoder, z, zq, shared)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _drop(self, count: int) -> None:
        for _ in range(count):
            self._graphs.popitem(last=False)[1].close()


class DecodeGraph:
    """One recorded decode, of latents like z and zq. ``shared`` is another graph, of the same device, to share memory with."""

    _pool: Any  # torch has no public name for its type
    _done: torch.cuda.Event  # of the pool's last replay

    def __init__(self, decoder: MOVQDecoder, z: Tensor, zq: Tensor, shared: DecodeGraph | None) -> None:
        self._pool = shared._pool if shared else torch.cuda.graph_pool_handle()
        self._done = shared._done if shared else torch.cuda.Event()
        self._graph = torch.cuda.CUDAGraph()
        # Not in inference mode, though the caller may be: its tensors could not be written outside of it.
        with torch.cuda.device(z.device), torch.inference_mode(False), torch.no_grad(), _autocast_uncached():
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            self._inputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) for x in (z, zq)]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    decoder(*self._inputs)
            current.wait_stream(side)
            with torch.cuda.graph(self._graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                self._output: Tensor = decoder(*self._inputs)

    def replay(self, z: Tensor, zq: Tensor) -> Tensor:
        """The decode of z and zq, in memory of its own: that of the graph is the next replay's."""
        with torch.cuda.device(z.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # another stream's replay may be using the pool
            for static, x in zip(self._inputs, (z, zq), strict=True):
                static.copy_(x)
            self._graph.replay()
            out = self._output.clone()
            self._done.record(stream)
        return out

    def close(self) -> None:
        """Give the memory back, once no replay uses it."""
        self._done.synchronize()
        self._graph.reset()


def _eager_reason(z: Tensor) -> str | None:
    return None if z.is_cuda else f"CUDA graphs do not run on {z.device.type} tensors"


def _autocast_uncached() -> AbstractContextManager[None]:
    """Autocast as it is, but for its memory of cast weights: a graph must cast them itself, in every replay."""
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False)


def _place(x: Tensor) -> Hashable:
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x.device
