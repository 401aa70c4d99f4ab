"""annotate: the ranges that a profiler sees, and that no hook or range is left behind."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import movq_ext
from movq_ext import profiling


def make_decoder():
    torch.manual_seed(0)
    channels = dict(ch=32, out_ch=3, ch_mult=(1, 2), in_channels=3, z_channels=4)
    return movq_ext.MOVQDecoder(**channels, num_res_blocks=1, attn_resolutions=[16], resolution=32).eval()


@pytest.fixture
def decoder():
    return make_decoder()


@pytest.fixture
def z():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def profile_ranges(model, run, *more, layer_by_layer=True):
    """Return the ranges of the model's layers while run() runs: the parent of each by name, and all names in order.

    Args:
        more: names of other ranges to look for.
        layer_by_layer: record gradients, so that layers are called and the decode is not in strips.
    """
    names = {name for name, _ in model.named_modules()} | {type(model).__name__, *more}
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.set_grad_enabled(layer_by_layer):
        run()
    found = sorted((event for event in profiler.events() if event.name in names), key=lambda event: event.time_range.start)

    def parent(event):
        while (event := event.cpu_parent) is not None:
            if event.name in names:
                return event.name
        return None

    return {event.name: parent(event) for event in found}, [event.name for event in found]


def range_names(model, run, *more):
    _, names = profile_ranges(model, run, *more)
    return names


def assert_nothing_left(model):
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._forward_hooks_always_called, name
    assert not profiling._annotated and not profiling._open_ranges.stack
    assert profiling.layer_range(model) is profiling.NO_RANGE


def test_every_layer_is_a_range_inside_its_block(decoder, z):
    with movq_ext.annotate(decoder):
        parents, names = profile_ranges(decoder, lambda: decoder(z, z))
    assert len(names) == len(set(names))
    assert parents["up.1.block.0.norm1"] == "up.1.block.0"
    assert parents["mid.attn_1.norm"] == "mid.attn_1"
    assert parents["up.1.block.0"] == parents["conv_in"] == "MOVQDecoder"
    assert parents["MOVQDecoder"] is None
    leaves = (nn.Conv2d, nn.Dropout, nn.GroupNorm)
    bypassed = {name for name, layer in decoder.named_modules() if type(layer) in leaves and "." in name}
    never_run = {"mid", "up", *(f"up.{i}{part}" for i in range(2) for part in ("", ".block", ".attn"))}
    assert set(names) == {name for name, _ in decoder.named_modules() if name} - bypassed - never_run | {"MOVQDecoder"}
    assert_nothing_left(decoder)
    assert range_names(decoder, lambda: decoder(z, z)) == []


def test_layers_have_ranges_in_strips_too(decoder, z, in_strips):
    with movq_ext.annotate(decoder):
        parents, names = profile_ranges(decoder, lambda: decoder(z, z), layer_by_layer=False)
    expected = [
        name
        for name, layer in decoder.named_modules()
        if isinstance(layer, (movq_ext.ResnetBlock, movq_ext.AttnBlock, movq_ext.Upsample))
    ]
    expected += [f"{name}.{part}" for name in expected if "block" in name for part in ("norm1", "conv1", "norm2", "conv2")]
    assert {"conv_in", "norm_out", "conv_out", *expected} <= set(names)
    assert parents["up.1.block.0.norm1"] == parents["up.1.block.0.conv1"] == "up.1.block.0"
    assert names.count("up.1.block.0") == 1 and names.count("mid.attn_1.norm") == 2  # for keys and values, and for queries


def test_layers_that_a_block_computes_itself_have_a_range_and_no_hooks(decoder):
    block = decoder.mid.block_1
    with movq_ext.annotate(decoder):
        hooked = {name for name, module in decoder.named_modules() if module._forward_hooks}
        assert "conv_in" in hooked and "mid.block_1" in hooked
        assert not hooked & {"mid.block_1.conv1", "mid.attn_1.q", "up.1.upsample.conv", "mid.block_1.norm1.conv_y"}
        assert not hooked & {"mid.block_1.dropout", "mid.block_1.norm1.norm_layer"}

        def run():
            with profiling.layer_range(block), profiling.layer_range(block.conv1):
                pass

        parents, _ = profile_ranges(decoder, run)
    assert parents == {"mid.block_1": None, "mid.block_1.conv1": "mid.block_1"}


def test_a_subclassed_layer_is_hooked(decoder, z):
    class Lora(nn.Conv2d):
        pass

    decoder.mid.block_1.conv1 = Lora(64, 64, 3, padding=1)
    with movq_ext.annotate(decoder):
        parents, _ = profile_ranges(decoder, lambda: decoder(z, z))
    assert parents["mid.block_1.conv1"] == "mid.block_1"


def test_results_are_bit_equal(decoder, z):
    with torch.no_grad():
        expected = decoder(z, z)
        with movq_ext.annotate(decoder):
            assert torch.equal(decoder(z, z), expected)


def test_gradients_are_bit_equal(decoder, z):
    z.requires_grad_()
    (expected,) = torch.autograd.grad(decoder(z, z).square().sum(), z)
    with movq_ext.annotate(decoder):
        (actual,) = torch.autograd.grad(decoder(z, z).square().sum(), z)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("early", [False, True], ids=["in forward", "in a hook before forward"])
def test_an_exception_closes_all_ranges_and_leaves_no_hooks(decoder, z, nvtx, error, early):
    def fail(*_, **__):
        raise error("planted")

    block = decoder.mid.block_2
    if early:
        handle = block.register_forward_pre_hook(fail)
    else:
        block.forward = fail
    with pytest.raises(error, match="planted"), movq_ext.annotate(decoder):
        decoder(z, z)
    if early:
        handle.remove()
    assert_nothing_left(decoder)
    assert nvtx.balanced() and "mid.block_2" in nvtx.names


def test_a_caught_exception_closes_the_ranges_inside_it(decoder, z, nvtx):
    def fail(*_, **__):
        raise KeyError("planted")

    with movq_ext.annotate(decoder):
        handle = decoder.mid.block_2.norm1.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            decoder(z, z)
        handle.remove()
        assert nvtx.balanced()
        nvtx.names.clear()
        decoder(z, z)
    assert nvtx.balanced() and nvtx.names[0] == "MOVQDecoder"


def test_a_hook_that_raises_before_its_range_opens_closes_no_other_range(decoder, z):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = decoder.conv_in, decoder.up[0]

        def forward(self, z):
            with contextlib.suppress(KeyError):
                self.first(z)
            return self.second.block[0](decoder.up[1].block[0](decoder.conv_in.__class__.forward(self.first, z), zq=z), zq=z)

    def fail(*_):
        raise KeyError("planted")

    outer = Outer()
    with movq_ext.annotate(outer):
        outer.first.register_forward_pre_hook(fail, prepend=True)
        parents, _ = profile_ranges(outer, lambda: outer(z))
    assert parents["second.block.0"] == "Outer" and "first" not in parents


def test_nested_contexts_open_one_range_per_layer_with_its_first_name(decoder, z):
    with movq_ext.annotate(decoder):
        with movq_ext.annotate(decoder), movq_ext.annotate(decoder.up[0]):
            names = range_names(decoder, lambda: decoder(z, z), "block.0", "block.0.norm1")
        assert len(names) == len(set(names)) and "up.0.block.0.norm1" in names and "block.0.norm1" not in names
        assert range_names(decoder, lambda: decoder(z, z)) == names
    assert_nothing_left(decoder)


def test_contexts_may_exit_in_any_order(decoder, z):
    first, second = movq_ext.annotate(decoder), movq_ext.annotate(decoder)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert "conv_in" in range_names(decoder, lambda: decoder(z, z))
    second.__exit__(None, None, None)
    assert_nothing_left(decoder)


def test_other_hooks_are_kept(decoder, z):
    calls = []
    handle = decoder.mid.block_1.register_forward_hook(lambda *_: calls.append("hook"))
    with movq_ext.annotate(decoder):
        assert sum(not profiling.is_range_hook(hook) for hook in decoder.mid.block_1._forward_hooks.values()) == 1
        decoder(z, z)
    decoder(z, z)
    assert calls == ["hook"] * 2
    handle.remove()
    assert_nothing_left(decoder)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies(decoder, z, duplicate):
    with torch.no_grad():
        expected = decoder(z, z)
    with movq_ext.annotate(decoder):
        inside = duplicate(decoder)
        assert range_names(inside, lambda: inside(z, z)) == []
        decoder(z, z)
    outside = duplicate(decoder)
    assert_nothing_left(outside)
    with torch.no_grad():
        assert torch.equal(inside(z, z), expected) and torch.equal(outside(z, z), expected)


def test_the_state_dict_does_not_change(decoder):
    keys = list(decoder.state_dict())
    with movq_ext.annotate(decoder):
        assert list(decoder.state_dict()) == keys


def test_threads_share_a_model(decoder, z, nvtx):
    """Eight threads enter and exit contexts and decode, each at its own pace."""
    failures = []

    def work():
        try:
            for _ in range(5):
                with movq_ext.annotate(decoder), torch.no_grad():
                    decoder(z, z)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert_nothing_left(decoder)
    assert nvtx.balanced() and nvtx.names.count("MOVQDecoder") == 40


def test_only_modules_are_accepted():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"), movq_ext.annotate(3):
        pass


def test_compiling_inside_and_outside_the_context(z):
    """A compiled program has no ranges and no graph breaks, and entering a context does not recompile it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = make_decoder()

        def forward(self, z):
            with profiling.layer_range(self.decoder.conv_in):
                return self.decoder(z, z)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for first_inside in (True, False):
        torch._dynamo.reset()
        graphs.clear()
        model = Model().eval()
        with torch.no_grad():
            expected = model(z)
            compiled = torch.compile(model, backend=backend, fullgraph=True)
            contexts = [movq_ext.annotate(compiled), contextlib.nullcontext(), movq_ext.annotate(model)]
            for context in contexts if first_inside else contexts[1:]:
                with context:
                    assert torch.allclose(compiled(z), expected, atol=1e-5)
        assert len(graphs) == (2 if first_inside else 1)
        assert not any("record_function" in graph.code for graph in graphs)
        assert_nothing_left(model)


def test_a_compiled_model_has_the_original_models_names(decoder, z):
    with movq_ext.annotate(torch.compile(decoder, backend="eager")):
        names = range_names(decoder, lambda: decoder(z, z), "OptimizedModule")
    assert "up.1.block.0.norm1" in names and "OptimizedModule" not in names


def test_without_a_range_one_shared_context_is_returned(decoder):
    assert profiling.layer_range(decoder) is profiling.layer_range(decoder.conv_in) is profiling.NO_RANGE
    with movq_ext.annotate(decoder.mid):
        assert profiling.layer_range(decoder.conv_in) is profiling.NO_RANGE
        assert profiling.layer_range(decoder.mid.block_1) is not profiling.NO_RANGE


@pytest.fixture
def nvtx(monkeypatch):
    """A fake NVTX that counts the open ranges of each thread."""

    class Nvtx(threading.local):
        names, open = [], []

        def __init__(self):
            self.depth = 0
            self.open.append(self)

        def push(self, name):
            self.names.append(name)
            self.depth += 1

        def pop(self):
            self.depth -= 1
            assert self.depth >= 0

        def balanced(self):
            return self.depth == 0

    fake = Nvtx()
    Nvtx.names = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", fake.push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", fake.pop)
    return fake


def test_nvtx_ranges_are_opened_with_a_gpu(decoder, z, nvtx):
    with movq_ext.annotate(decoder):
        decoder(z, z)
    assert nvtx.balanced()
    assert nvtx.names[:4] == ["MOVQDecoder", "conv_in", "mid.block_1", "mid.block_1.norm1"]


def test_nvtx_is_not_called_without_a_gpu(decoder, z, nvtx, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with movq_ext.annotate(decoder):
        decoder(z, z)
    assert nvtx.names == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_kernels_are_inside_the_models_range(decoder, z):
    decoder, z = decoder.cuda(), z.cuda()
    with movq_ext.annotate(decoder), torch.no_grad():
        decoder(z, z)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            decoder(z, z)
            torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.kernels and event.cpu_parent is not None]
    assert kernels
    for event in kernels:
        while event.cpu_parent is not None:
            event = event.cpu_parent
        assert event.name == "MOVQDecoder"
