"""The decoder under torch.compile and torch.export: no graph breaks, and our operators in programs for a GPU."""

import time
import types

import pytest
import torch
from models import TINY, latents, make_decoder
from tolerances import assert_close
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from movq_ext import MOVQDecoder
from movq_ext.ops import attention_backends, extension, paths
from movq_ext.ops.extension import extension_available

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class GraphCounter:
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
    decoder, backend = make_decoder(num_res_blocks=0).train(training), GraphCounter()
    compiled = torch.compile(decoder, fullgraph=True, dynamic=True, backend=backend)
    # No size equals the number of channels, 4: sizes that are equal in the first call share a symbol.
    for grid, batch in (((6, 7), 2), ((3, 5), 3), ((8, 4), 5)):
        assert_close(compiled(*latents(grid, batch)), decoder(*latents(grid, batch)).double(), slack=10)
    assert backend.graphs == 1 and len(backend.placeholders[0]) >= 3


def test_compiling_breaks_no_graph():
    torch._dynamo.reset()
    report = torch._dynamo.explain(make_decoder(num_res_blocks=0))(*latents())
    assert report.graph_count == 1 and report.graph_break_count == 0, report.break_reasons


def layers_of(graph):
    """Count the calls of convolutions and of batched products in a graph of torch.compile or torch.export."""
    names = [str(getattr(node.target, "__name__", "")).partition(".")[0] for node in graph.nodes]
    return {name: names.count(name) for name in ("conv2d", "conv_transpose2d", "baddbmm")}


def test_compiled_and_exported_programs_fold_and_join_layers():
    """As in an eager call: upsampling is folded, q, k and v are one convolution, conv_y and conv_b one product."""
    torch._dynamo.reset()
    decoder, graphs = make_decoder(num_res_blocks=0), []

    def backend(module, example):
        graphs.append(module.graph)
        return module.forward

    torch.compile(decoder, fullgraph=True, backend=backend)(*latents())
    graphs.append(torch.export.export(decoder, tuple(latents())).graph)
    # The decoder has four ResNet blocks and two attention blocks.
    convolutions = 2 + 4 * 2 + 1 + 2 * 2  # conv_in, conv_out; conv1 and conv2 of blocks, one shortcut; q, k, v and proj_out
    norms = 4 * 2 + 2 + 1
    assert [layers_of(graph) for graph in graphs] == 2 * [{"conv2d": convolutions, "conv_transpose2d": 1, "baddbmm": norms}]


def test_the_choice_of_path_is_a_constant_of_compiled_programs(monkeypatch):
    """The functions that choose it ask the compiled library and warn, which cannot be traced."""

    def library_says(index):
        time.sleep(0)
        return {"binary_version": 0, "device_capability": 75}

    def program(x):
        if reason := extension.device_reason(0):
            extension.warn_once(reason)
        if attention_backends.choose(attention_backends.Problem(0, x.dtype, 512, 64, True, False)).is_fallback:
            attention_backends.warn_of_request_once("a request that cannot be followed", "tile")
        return x + 1

    monkeypatch.setattr(extension, "extension", types.SimpleNamespace(device_support=library_says))
    monkeypatch.setenv(attention_backends.VARIABLE, "hopper")
    cached = extension.device_reason, extension.warn_once, attention_backends.warn_of_request_once
    for function in cached:
        function.cache_clear()
    try:
        with pytest.warns(RuntimeWarning) as warned:
            compiled = torch.compile(program, fullgraph=True, backend="eager")
            assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    finally:
        for function in cached:
            function.cache_clear()
    messages = [str(warning.message) for warning in warned]
    assert sum("but device 0 has 7.5" in message for message in messages) == 1
    assert sum("a request that cannot be followed" in message for message in messages) == 1


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def fake_cuda(monkeypatch, request):
    """Fake GPU tensors, without data, for a machine without a GPU; the kernels count as compiled for it."""
    for module in (paths, attention_backends):
        monkeypatch.setattr(module, "device_reason", lambda index: None)
    mode = FakeTensorMode()
    torch.set_default_dtype(request.param)
    with mode, torch.device("cuda"):
        decoder = MOVQDecoder(**TINY).eval()
        inputs = torch.empty(2, 4, 4, 6), torch.empty(2, 5, 4, 6)
    torch.set_default_dtype(torch.float32)
    return mode, decoder, inputs


def operators(graph):
    counts = {}
    for node in graph.nodes:
        if (name := str(node.target).removesuffix(".default")).startswith("movq_ext."):
            counts[name] = counts.get(name, 0) + 1
    return counts


NORMS = 2 * 6 + 3 + 1  # of TINY: two in each of six ResNet blocks, one in each of three attention blocks, norm_out
MAPS_FORWARD = {"movq_ext.spatial_norm_forward": NORMS, "movq_ext.fold_upsampling": 1}
MAPS_BACKWARD = {"movq_ext.spatial_norm_backward": NORMS, "movq_ext.fold_upsampling_backward": 1}
FORWARD = MAPS_FORWARD | {"movq_ext.attention_forward": 3}
BACKWARD = MAPS_BACKWARD | {"movq_ext.attention_backward": 3}
FORWARD_OF = {torch.float32: FORWARD, torch.bfloat16: MAPS_FORWARD | {"movq_ext.shared_kv_attention_forward": 3}}


@pytest.mark.skipif(not extension_available(), reason="needs the compiled extension")
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_gpu_decoder_calls_our_operators(fake_cuda, dynamic):
    _, decoder, inputs = fake_cuda
    sizes = {0: torch.export.Dim("batch", max=8), 2: torch.export.Dim("height", max=64), 3: torch.export.Dim("width", max=64)}
    with torch.no_grad():
        program = torch.export.export(decoder, inputs, dynamic_shapes=(sizes, sizes) if dynamic else None)
    assert operators(program.graph) == FORWARD_OF[inputs[0].dtype]
    assert not any("group_norm" in str(node.target) or "scaled_dot" in str(node.target) for node in program.graph.nodes)


@needs_gpu
@pytest.mark.skipif(not extension_available(), reason="needs the compiled extension")
def test_a_traced_gpu_training_step_calls_our_operators():
    """On a real GPU, because autograd queries the device.

    make_fx runs the step eagerly, so the size decides how to upsample; folding pays from 16x16 pixels on, with and without TF32.
    """
    decoder = make_decoder().cuda()
    step = lambda z, zq: torch.autograd.grad(decoder(z, zq).sum(), [*decoder.parameters()])
    assert operators(make_fx(step)(*latents((16, 16), device="cuda")).graph) == FORWARD | BACKWARD


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
    assert operators(seen[0]) == FORWARD_OF[inputs[0].dtype]


@needs_gpu
@torch.no_grad()
def test_gpu_compiling_breaks_no_graph():
    torch._dynamo.reset()
    # No further blocks: generating code for each takes most of the time.
    decoder, args = make_decoder(num_res_blocks=0).cuda(), latents(device="cuda")
    assert_close(torch.compile(decoder, fullgraph=True)(*args), decoder(*args).double(), slack=100)
