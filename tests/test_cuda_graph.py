"""CUDAGraphDecoder, on a CPU with stand-ins for CUDA graphs, and the programs that torch compiles and exports for a GPU."""

import threading
from unittest import mock

import pytest
import torch
from models import TINY, latents, make_decoder
from tolerances import assert_close
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from movq_ext import CUDAGraphDecoder, MOVQDecoder
from movq_ext.deploy import cuda_graph
from movq_ext.ops import functional
from movq_ext.ops.extension import extension_available

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


class Counting:
    """A backend of torch.compile that counts graphs and lists their symbolic sizes."""

    def __init__(self):
        self.graphs, self.placeholders = 0, []

    def __call__(self, module, inputs):
        self.graphs += 1
        self.placeholders.append([x for x in inputs if isinstance(x, torch.SymInt)])
        return module.forward


@pytest.mark.parametrize("training", [False, True])
def test_one_compiled_graph_serves_all_sizes(training):
    torch._dynamo.reset()
    decoder, backend = make_decoder(num_res_blocks=0).train(training), Counting()
    compiled = torch.compile(decoder, fullgraph=True, dynamic=True, backend=backend)
    # No size equals the number of channels, 4: sizes that are equal in the first call share a symbol.
    for grid, batch in (((6, 7), 2), ((3, 5), 3), ((8, 4), 5)):
        assert_close(compiled(*latents(grid, batch)), decoder(*latents(grid, batch)).double(), slack=10)
    assert backend.graphs == 1 and len(backend.placeholders[0]) >= 3


def test_compiling_breaks_no_graph():
    torch._dynamo.reset()
    report = torch._dynamo.explain(make_decoder(num_res_blocks=0))(*latents())
    assert report.graph_count == 1 and report.graph_break_count == 0, report.break_reasons


@pytest.fixture
def fake_cuda(monkeypatch):
    """Fake GPU tensors, without data, for a machine without a GPU; the kernels count as compiled for it."""
    monkeypatch.setattr(functional, "device_reason", lambda index: None)
    mode = FakeTensorMode()
    with mode, torch.device("cuda"):
        decoder = MOVQDecoder(**TINY).eval()
        inputs = torch.empty(2, 4, 4, 6), torch.empty(2, 5, 4, 6)
    return mode, decoder, inputs


def operators(graph):
    counts = {}
    for node in graph.nodes:
        if (name := str(node.target).removesuffix(".default")).startswith("movq_ext."):
            counts[name] = counts.get(name, 0) + 1
    return counts


NORMS = 2 * 6 + 3 + 1  # of TINY: two in each of six blocks, one in each of three attention blocks, the last
FORWARD = {"movq_ext.spatial_norm_forward": NORMS, "movq_ext.attention_forward": 3}
BACKWARD = {"movq_ext.spatial_norm_backward": NORMS, "movq_ext.attention_backward": 3}


@pytest.mark.skipif(not extension_available(), reason="needs the compiled extension")
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_gpu_decoder_calls_our_operators(fake_cuda, dynamic):
    _, decoder, inputs = fake_cuda
    sizes = {0: torch.export.Dim("batch", max=8), 2: torch.export.Dim("height", max=64), 3: torch.export.Dim("width", max=64)}
    with torch.no_grad():
        program = torch.export.export(decoder, inputs, dynamic_shapes=(sizes, sizes) if dynamic else None)
    assert operators(program.graph) == FORWARD
    assert not any("group_norm" in str(node.target) or "scaled_dot" in str(node.target) for node in program.graph.nodes)


@needs_gpu
@pytest.mark.skipif(not extension_available(), reason="needs the compiled extension")
def test_a_traced_gpu_training_step_calls_our_operators():
    """On a real GPU, because autograd queries the device."""
    decoder = make_decoder().cuda()
    step = lambda z, zq: torch.autograd.grad(decoder(z, zq).sum(), [*decoder.parameters()])
    assert operators(make_fx(step)(*latents(device="cuda")).graph) == FORWARD | BACKWARD


@pytest.mark.skipif(not extension_available(), reason="needs the compiled extension")
def test_a_compiled_gpu_decoder_is_one_graph_that_calls_our_operators(fake_cuda):
    torch._dynamo.reset()
    mode, decoder, inputs = fake_cuda
    seen = []

    def backend(module, example):
        seen.append(module.graph)
        return module.forward

    with mode, torch.no_grad():
        out = torch.compile(decoder, fullgraph=True, backend=backend)(*inputs)
    assert out.shape == (2, 3, 8, 12) and out.is_cuda and len(seen) == 1
    assert operators(seen[0]) == FORWARD


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
    for out, wanted in ((first, expected), (second, expected), (mixed, mixed_expected), (later, later_expected)):
        assert_close(out.clone(), wanted.double(), slack=10)
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


@needs_gpu
@torch.no_grad()
def test_gpu_compiling_breaks_no_graph():
    torch._dynamo.reset()
    decoder, args = make_decoder().cuda(), latents(device="cuda")
    assert_close(torch.compile(decoder, fullgraph=True)(*args), decoder(*args).double(), slack=100)
