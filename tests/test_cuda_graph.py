"""CUDAGraphDecoder: on a CPU with stand-ins for CUDA graphs, and on a GPU."""

import threading
from unittest import mock

import pytest
import torch
from models import latents, make_decoder
from tolerances import assert_close
from torch import nn

from movq_ext import CUDAGraphDecoder, MOVQDecoder
from movq_ext.deploy import cuda_graph

SMALL = dict(ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=[])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Recording:
    """A stand-in for DecodeGraph on a CPU: logs what is recorded, replayed and closed, and decodes eagerly."""

    def __init__(self, decoder, z, zq, sharing):
        self.decoder, self.shape, self.pool = decoder, tuple(z.shape[2:]), sharing.pool if sharing else object()
        Recording.log.append(("record", self.shape))

    def replay(self, z, zq):
        assert tuple(z.shape[2:]) == self.shape
        Recording.log.append(("replay", self.shape))
        return self.decoder(z, zq)

    def close(self):
        Recording.log.append(("close", self.shape))


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(cuda_graph, "DecodeGraph", Recording)
    monkeypatch.setattr(cuda_graph, "_eager_reason", lambda z: None)
    monkeypatch.setattr(Recording, "log", [], raising=False)
    return Recording.log


def events(log, kind):
    return [shape for logged, shape in log if logged == kind]


@torch.no_grad()
def test_on_a_cpu_it_runs_the_decoder_and_says_so():
    decoder = make_decoder(**SMALL)
    graphed = CUDAGraphDecoder(decoder)
    assert graphed.eager_reason is None
    assert torch.equal(graphed(*latents()), decoder(*latents()))
    assert graphed.eager_reason == "CUDA graphs do not run on cpu tensors" and len(graphed) == 0


@torch.no_grad()
def test_each_size_is_recorded_once_and_the_least_recently_used_is_dropped(log):
    graphed = CUDAGraphDecoder(make_decoder(**SMALL), max_graphs=2)
    a, b, c = ((2, 2), (2, 4), (4, 4))
    for grid in (a, b, a, c, a, b):
        graphed(*latents(grid))
        assert len(graphed) <= 2 and len({graph.pool for graph in graphed._graphs.values()}) == 1
    assert events(log, "record") == [a, b, c, b] and events(log, "close") == [b, c]
    assert events(log, "replay") == [a, b, a, c, a, b]
    graphed.clear()
    assert len(graphed) == 0 and events(log, "close")[2:] == [a, b]


@torch.no_grad()
def test_shapes_dtypes_and_autocast_have_their_own_graphs(log, monkeypatch):
    graphed = CUDAGraphDecoder(make_decoder(**SMALL))
    z, zq = latents((2, 2))

    def recorded(*args):
        before = len(events(log, "record"))
        graphed(*args)
        return len(events(log, "record")) - before

    assert recorded(z, zq) == 1 and recorded(z.clone(memory_format=torch.channels_last), zq) == 0
    assert recorded(z, zq[:, :, :1]) == 1 and recorded(z[:1], zq[:1]) == 1
    with torch.autocast("cpu"):
        assert recorded(z.bfloat16(), zq) == 1
    with monkeypatch.context() as patch:  # torch.autocast does nothing without a GPU
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        for dtype in (torch.bfloat16, torch.float16):
            patch.setattr(torch, "get_autocast_dtype", lambda device, dtype=dtype: dtype)
            assert recorded(z, zq) == 1 and recorded(z, zq) == 0
    with torch.inference_mode():
        assert recorded(z, zq) == 0


def assign(decoder):
    decoder.load_state_dict({name: x.clone() for name, x in decoder.state_dict().items()}, assign=True)


def other_storage(decoder):
    decoder.conv_in.weight.data = decoder.conv_in.weight.data.clone()


def other_layout(decoder):
    decoder.to(memory_format=torch.channels_last)


def other_layer(decoder):
    decoder.conv_in = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1))


def new_buffer(decoder):
    decoder.conv_in.register_buffer("shift", torch.zeros(3))


@pytest.mark.parametrize("change", [assign, other_storage, other_layout, other_layer, new_buffer])
@torch.no_grad()
def test_graphs_are_recorded_again_when_weights_move(log, change, monkeypatch):
    monkeypatch.setattr(MOVQDecoder, "check_latents", lambda self, z, zq: None)  # it needs conv_in.weight
    decoder = make_decoder(**SMALL)
    graphed = CUDAGraphDecoder(decoder)
    for grid in ((2, 2), (2, 4), (2, 2)):
        graphed(*latents(grid))
    decoder.conv_in.bias += 1
    decoder.load_state_dict(make_decoder(3, **SMALL).state_dict())
    graphed(*latents((2, 2)))
    assert len(events(log, "record")) == 2 and not events(log, "close")
    change(decoder)
    graphed(*latents((2, 2)))
    assert events(log, "close") == [(2, 4), (2, 2)] and events(log, "record")[2:] == [(2, 2)] and len(graphed) == 1


def test_invalid_calls(log):
    decoder = make_decoder(**SMALL)
    graphed = CUDAGraphDecoder(decoder)
    with pytest.raises(RuntimeError, match=r"must not require gradients: call under torch.no_grad\(\) or torch.inf"):
        graphed(*latents())
    decoder.requires_grad_(False)
    graphed(*latents())
    with pytest.raises(RuntimeError, match="must not require gradients"):
        graphed(latents()[0].requires_grad_(), latents()[1])
    with pytest.raises(ValueError, match="z and zq must have the same batch size"):
        graphed(latents()[0][:1], latents()[1])
    decoder.train()
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="decoder must be in evaluation mode, got training mode"),
    ):
        graphed(*latents())
    with pytest.raises(TypeError, match="decoder must be a MOVQDecoder, got Identity"):
        CUDAGraphDecoder(nn.Identity())
    with pytest.raises(ValueError, match="max_graphs must be a positive integer, got 0"):
        CUDAGraphDecoder(decoder, max_graphs=0)


class Rerun:
    """A stand-in for torch.cuda.CUDAGraph on a CPU: a replay decodes the recorded inputs into the recorded output."""

    output = None

    def replay(self):
        if self.output is not None:  # the recording itself computed the first one
            self.output.copy_(self.decoder(*self.inputs))

    def reset(self):
        pass


@pytest.fixture
def rerun(monkeypatch):
    monkeypatch.setattr(cuda_graph, "_eager_reason", lambda z: None)
    for name in ("Stream", "Event", "current_stream", "graph_pool_handle", "device", "stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", mock.create_autospec(torch.cuda.graph))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Rerun)


def test_replays_do_not_overwrite_earlier_results(rerun):
    decoder = make_decoder(**SMALL)
    graphed, results = CUDAGraphDecoder(decoder), []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for scale in (1, 2):
            z, zq = (scale * x for x in latents())
            with mode():
                out = graphed(z, zq)
                (graph,) = graphed._graphs.values()
                # From now on a replay decodes; the first call's output was computed while recording.
                graph._graph.decoder, graph._graph.inputs, graph._graph.output = decoder, graph._inputs, graph._output
                out = graphed(z, zq)
                results.append((out, out.clone(), decoder(z, zq)))
    for out, copy, expected in results:
        assert torch.equal(out, copy) and torch.equal(out, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_gpu_replays_match_the_decoder(dtype):
    decoder = make_decoder().to("cuda", dtype)
    graphed = CUDAGraphDecoder(decoder, max_graphs=2)
    results = []
    for grid, batch in [((4, 6), 2), ((8, 8), 1), ((4, 6), 2), ((3, 5), 1), ((8, 8), 1), ((4, 6), 2)]:
        for sign in (1, -1):
            z, zq = (sign * x for x in latents(grid, batch, dtype, device="cuda"))
            out = graphed(z, zq)
            results.append((out, out.clone(), decoder(z, zq)))
            assert graphed.eager_reason is None and len(graphed) <= 2
    for out, copy, expected in results:
        assert torch.equal(out, copy)  # later replays did not overwrite it
        assert_close(out, expected.double(), slack=10)


@needs_gpu
@torch.no_grad()
def test_gpu_replays_see_weights_that_change_in_place():
    decoder, z, zq = make_decoder().cuda(), *latents(device="cuda")
    graphed = CUDAGraphDecoder(decoder)
    graphed(z, zq)
    (graph,) = graphed._graphs.values()
    for change in (lambda p: p.mul_(1.5), lambda p: p.data.mul_(0.5)):  # the second does not change the parameter's version
        for parameter in decoder.parameters():
            change(parameter)
        out = graphed(z, zq)
        twin = make_decoder().cuda()
        twin.load_state_dict(decoder.state_dict())
        assert_close(out, twin(z, zq).double(), slack=10)
    assert list(graphed._graphs.values()) == [graph]
    decoder.load_state_dict(make_decoder(seed=5).cuda().state_dict(), assign=True)
    assert_close(graphed(z, zq), decoder(z, zq).double(), slack=10)
    assert graphed._graphs and list(graphed._graphs.values()) != [graph]


@needs_gpu
def test_gpu_replays_in_every_mode():
    decoder, z, zq = make_decoder().cuda(), *latents(device="cuda")
    graphed = CUDAGraphDecoder(decoder)
    with torch.inference_mode():
        first = graphed(z, zq)
        expected = decoder(z, zq)
    with torch.no_grad():
        second = graphed(z, zq)
        with torch.autocast("cuda", torch.bfloat16):
            mixed, mixed_expected = graphed(z, zq), decoder(z, zq)
        decoder.conv_out.weight.mul_(2)  # a cached cast would still have the old weight
        with torch.autocast("cuda", torch.bfloat16):
            later, later_expected = graphed(z, zq), decoder(z, zq)
    assert len(graphed) == 2 and mixed.dtype == torch.bfloat16
    for out, eager in ((first, expected), (second, expected), (mixed, mixed_expected), (later, later_expected)):
        assert_close(out.clone(), eager.double(), slack=10)
    with pytest.raises(RuntimeError, match="must not require gradients"):
        graphed(z, zq)


@needs_gpu
def test_gpu_replays_from_threads_with_their_own_streams():
    decoder = make_decoder().cuda()
    graphed, wrong = CUDAGraphDecoder(decoder), []

    @torch.no_grad()
    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(20):
                z, zq = (x * (seed + i) for x in latents(((4, 6), (8, 8))[i % 2], device="cuda"))
                out, expected = graphed(z, zq), decoder(z, zq)
                if (out - expected).norm() > 1e-4 * expected.norm():
                    wrong.append((seed, i))
            torch.cuda.current_stream().synchronize()

    with torch.no_grad():
        for grid in ((4, 6), (8, 8)):
            graphed(*latents(grid, device="cuda"))
    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
