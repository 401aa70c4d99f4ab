"""The compiled operators as differentiable functions: autograd, compilation, export, and their kernels on a GPU."""

import pytest
import torch
from kernels import on_gpu
from operators import (
    DEVICES,
    GROUPS,
    LAYOUTS,
    attention_arguments,
    compiled_norm,
    detached,
    epilogue_arguments,
    native_norm,
    needs_extension,
    needs_gpu,
    norm_arguments,
    shared_kv_arguments,
)
from spies import saved_for_backward
from tolerances import assert_close
from torch.nn.attention import SDPBackend, sdpa_kernel

import movq_ext
from movq_ext.ops import cuda, extension, native
from movq_ext.ops.functional import add_bias_residual_

pytestmark = needs_extension


def gradients(function, inputs, dout, silu, create_graph=False):
    out = function(*inputs, GROUPS, 1e-6, silu)
    wanted = [x for x in inputs if x is not None]
    return out, torch.autograd.grad(out, wanted, dout, create_graph=create_graph)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("zq_size, affine", [((2, 4), torch.float32), ((3, 5), None), (None, torch.float32)])
def test_gradients_match_the_native_path(device, layout, silu, zq_size, affine):
    inputs, dout = norm_arguments(torch.float32, layout, zq_size, affine, device)
    out, grads = gradients(compiled_norm, inputs, dout, silu)
    expected, expected_grads = gradients(native_norm, inputs, dout, silu)
    assert_close(out, expected)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert_close(grad, want, slack=2.0)


@pytest.mark.parametrize("device", DEVICES)
def test_double_backward(device):
    inputs, dout = norm_arguments(device=device)

    def second(function):
        _, grads = gradients(function, inputs, dout, True, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    for grad, want in zip(second(compiled_norm), second(native_norm), strict=True):
        assert_close(grad, want, slack=5.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_f_bias_is_added_before_the_norm(device, layout, dtype):
    inputs, _ = norm_arguments(dtype, layout, device=device)
    f, *rest = detached(inputs)
    f_bias = torch.linspace(-1, 1, 32, device=device)
    out = compiled_norm(f, *rest, GROUPS, 1e-6, True, f_bias)
    rest = [x.double() for x in rest]
    assert out.dtype == dtype and out.stride() == f.stride()
    assert_close(out, native_norm(f.double() + f_bias.double()[:, None, None], *rest, GROUPS, 1e-6, True), slack=2.0)
    # test_compiles_to_one_graph_with_the_operator generates code; here a graph and the fake implementation are enough.
    compiled = torch.compile(lambda *x: compiled_norm(*x, GROUPS, 1e-6, True, f_bias), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    assert_close(compiled(f, *detached(inputs)[1:]), out.double())


def test_only_the_gradients_that_are_needed_are_returned():
    inputs, dout = norm_arguments()
    inputs[1].requires_grad_(False)
    compiled_norm(*inputs, GROUPS, 1e-6, True).backward(dout)
    assert [x.grad is not None for x in inputs] == [True, False, True, True, True]


def test_backward_keeps_no_map_but_f():
    inputs, _ = norm_arguments()
    with saved_for_backward() as saved:
        compiled_norm(*inputs, GROUPS, 1e-6, True)
    big = [x for x in saved if x.numel() >= inputs[0].numel()]
    assert len(big) == 1 and big[0].data_ptr() == inputs[0].data_ptr()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_to_one_graph_with_the_operator(device, layout):
    inputs, dout = norm_arguments(layout=layout, device=device)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda *x: compiled_norm(*x, GROUPS, 1e-6, True), backend=backend, fullgraph=True)(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: compiled_norm(*x, GROUPS, 1e-6, True), fullgraph=True)
    out = compiled(*inputs)
    assert seen and out.stride() == inputs[0].stride()
    expected, expected_grads = gradients(compiled_norm, inputs, dout, True)
    assert_close(out, expected)
    for grad, want in zip(torch.autograd.grad(out, inputs, dout), expected_grads, strict=True):
        assert_close(grad, want, slack=2.0)


def test_exports_with_the_operator():
    class Norm(torch.nn.Module):
        def forward(self, *x):
            return compiled_norm(*x, GROUPS, 1e-6, True)

    inputs = tuple(detached(norm_arguments()[0]))
    program = torch.export.export(Norm(), inputs).run_decompositions()
    assert any("movq_ext.spatial_norm_forward" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(*inputs), Norm()(*inputs))


# --- Attention


ATTENTION = {
    "attention": (cuda.attention, native.attention, attention_arguments),
    "shared_kv_attention": (cuda.shared_kv_attention, native.shared_kv_attention, shared_kv_arguments),
}
every_attention = pytest.mark.parametrize("name", ATTENTION)


@every_attention
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_attention_match_the_native_path(device, name):
    compiled, plain, arguments = ATTENTION[name]
    inputs, dout = arguments(device=device)
    out, expected = compiled(*inputs, 0.2), plain(*inputs, 0.2)
    assert_close(out, expected)
    for grad, want in zip(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout), strict=True):
        assert_close(grad, want, slack=2.0)


@every_attention
@pytest.mark.parametrize("device", DEVICES)
def test_double_backward_of_attention(device, name):
    compiled, plain, arguments = ATTENTION[name]
    inputs, dout = arguments(device=device)

    def second(function):
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(function(*inputs, 0.2), inputs, dout, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    for grad, want in zip(second(compiled), second(plain), strict=True):
        assert_close(grad, want, slack=5.0)


@every_attention
def test_attention_returns_only_the_gradients_that_are_needed(name):
    compiled, _, arguments = ATTENTION[name]
    inputs, dout = arguments()
    inputs[1].requires_grad_(False)
    compiled(*inputs, 0.2).backward(dout)
    assert [x.grad is not None for x in inputs] == [True, False, True][: len(inputs)]


@every_attention
def test_attention_keeps_no_scores_for_backward(name):
    compiled, _, arguments = ATTENTION[name]
    inputs, _ = arguments()
    with saved_for_backward() as saved:
        out = compiled(*inputs, 0.2)
    assert sorted(x.numel() for x in saved) == sorted([*(x.numel() for x in inputs), out.numel(), out.numel() // 32])


@every_attention
@pytest.mark.parametrize("device", DEVICES)
def test_attention_compiles_to_one_graph_with_the_operator(device, name):
    function, _, arguments = ATTENTION[name]
    inputs, dout = arguments(device=device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: function(*x, 0.2), fullgraph=True)
    out = compiled(*inputs)
    assert_close(out, function(*inputs, 0.2))
    expected = torch.autograd.grad(function(*inputs, 0.2), inputs, dout)
    for grad, want in zip(torch.autograd.grad(out, inputs, dout), expected, strict=True):
        assert_close(grad, want, slack=2.0)
    program = torch.export.export(AttentionModule(function), tuple(detached(inputs))).run_decompositions()
    assert any(f"movq_ext.{name}_forward" in str(node.target) for node in program.graph.nodes)


class AttentionModule(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x, 0.2)


# --- The epilogue of a convolution


@pytest.mark.parametrize("device", DEVICES)
def test_the_epilogue_compiles_to_one_graph_with_the_operator(device):
    x, bias, residual = epilogue_arguments(layout="channels_last", device=device)
    weight = torch.randn(32, 32, 3, 3, device=device)

    def convolution(x):
        return cuda.add_bias_residual_(torch.nn.functional.conv2d(x, weight, padding=1), bias, residual)

    torch._dynamo.reset()
    assert_close(torch.compile(convolution, fullgraph=True)(x), convolution(x), slack=2.0)
    program = torch.export.export(Epilogue(), (x, bias, residual)).run_decompositions()
    assert any("add_bias_residual_" in str((node.target, node.args)) for node in program.graph.nodes)
    expected = x + bias[:, None, None] + residual
    program.module()(x, bias, residual)
    assert_close(x, expected)


class Epilogue(torch.nn.Module):
    def forward(self, x, bias, residual):
        return cuda.add_bias_residual_(x, bias, residual)


@needs_gpu
class TestOnGpu:
    def test_the_public_function_runs_the_kernels(self):
        inputs, _ = norm_arguments(device="cuda")
        assert movq_ext.explain(inputs[0]).startswith("cuda")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            movq_ext.spatial_norm(*inputs, GROUPS, 1e-6, "silu")
        assert any("movq::spatial_norm" in event.key for event in profile.key_averages())

    def test_a_graph_captures_a_norm(self):
        inputs = detached(norm_arguments(device="cuda")[0])
        expected = movq_ext.spatial_norm(*inputs, GROUPS, 1e-6, "silu")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = movq_ext.spatial_norm(*inputs, GROUPS, 1e-6, "silu")
        graph.replay()
        assert torch.equal(out, expected)

    def test_a_norm_runs_on_the_current_stream(self):
        inputs = detached(norm_arguments(device="cuda")[0])
        expected = movq_ext.spatial_norm(*inputs, GROUPS, 1e-6, "silu")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            f = inputs[0].clone()
            out = movq_ext.spatial_norm(f, *inputs[1:], GROUPS, 1e-6, "silu")
        stream.synchronize()
        assert torch.equal(out, expected)

    def test_an_unsupported_dtype_takes_the_native_path_and_warns(self):
        extension.warn_once.cache_clear()
        f = torch.randn(1, 32, 4, 4, device="cuda", dtype=torch.float64)
        with pytest.warns(RuntimeWarning, match="the CUDA kernels take float32, float16, bfloat16, got float64"):
            movq_ext.spatial_norm(f, None, None, None, None, GROUPS)
        assert movq_ext.explain(f).startswith("native: the CUDA kernels take")

    def test_autocast_keeps_the_dtype_of_f(self):
        inputs = detached(norm_arguments(torch.bfloat16, device="cuda")[0])
        with torch.autocast("cuda", torch.float16):
            assert movq_ext.spatial_norm(*inputs, GROUPS, 1e-6, "silu").dtype == torch.bfloat16

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_the_public_function_runs_the_attention_kernels(self, layout):
        q = torch.randn(2, 64, 8, 12, device="cuda", dtype=torch.bfloat16)
        q = q.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else q
        assert movq_ext.explain(q, "spatial_attention").startswith("cuda")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out = movq_ext.spatial_attention(q, q, q)
        names = [event.key for event in profile.key_averages()]
        assert any("movq::attention" in name for name in names) and out.stride() == q.stride()
        if layout == "channels_last":
            assert not any("copy" in name for name in names), names
        assert_close(out, native_map(q.double()))

    def test_attention_of_unaligned_and_strided_tensors(self):
        wanted = torch.randn(1, 1, 50, 40, device="cuda")
        store = torch.empty(wanted.numel() + 1, device="cuda")[1:].view(wanted.shape)
        tensors = [
            store.copy_(wanted),
            wanted.mT.contiguous().mT,
            torch.cat([wanted, wanted], 3)[..., :40],
            wanted.expand(2, 3, -1, -1),
            torch.randn(2, 50, 39, 3, device="cuda").permute(0, 3, 1, 2),  # channels_last, if heads are channels
        ]
        for x in tensors:
            expected = native.attention(*[x.double()] * 3, None)
            assert_close(movq_ext.attention(x, x, x), expected)
            assert_close(movq_ext.shared_kv_attention(x, x), expected)

    @every_attention
    def test_a_graph_captures_attention(self, name):
        function, arguments = getattr(movq_ext, name), ATTENTION[name][2]
        inputs = detached(arguments(torch.bfloat16, device="cuda")[0])
        expected = function(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(*inputs)
        graph.replay()
        assert torch.equal(out, expected)

    def test_attention_of_larger_heads_takes_the_native_path_and_warns(self):
        q = torch.randn(1, 1, 4, 640, device="cuda")
        with pytest.warns(RuntimeWarning, match="heads of up to 512, got 640"):
            movq_ext.attention(q, q, q)
        assert movq_ext.explain(q, "attention").startswith("native: the CUDA kernels of attention take heads of up to 512")

    def test_attention_casts_under_autocast(self):
        q = torch.randn(1, 1, 40, 64, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            assert movq_ext.attention(q, q, q).dtype == torch.bfloat16
            assert movq_ext.shared_kv_attention(q, q).dtype == torch.bfloat16

    def test_the_epilogue_is_one_kernel(self):
        for layout in LAYOUTS:
            x, bias, residual = epilogue_arguments(torch.bfloat16, layout, device="cuda")
            add_bias_residual_(x.clone(), bias, residual)  # the first call also runs the self test's kernels
            expected = (x.float() + bias[:, None, None] + residual.float()).bfloat16()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                add_bias_residual_(x, bias, residual)
            names = [event.key for event in profile.key_averages() if "elementwise" in event.key or "movq" in event.key]
            assert len(names) == 1 and "movq::epilogue" in names[0]
            assert torch.equal(x, expected)

    def test_the_epilogue_takes_a_residual_of_any_strides(self):
        x, bias, residual = epilogue_arguments(layout="channels_last", device="cuda")
        wide = torch.cat([residual, residual], 3)[..., ::2]
        for other in (residual.contiguous(), wide):
            assert_close(add_bias_residual_(x.clone(), bias, other), x.double() + bias.double()[:, None, None] + other.double())

    def test_the_epilogue_refuses_partial_overlap(self):
        store = torch.randn(2, 32, 8, 12, device="cuda")
        with pytest.raises(ValueError, match="residual must be x itself or not overlap it, got"):
            add_bias_residual_(store.flatten()[:-12].view(1, -1, 1, 12), None, store.flatten()[12:].view(1, -1, 1, 12))

    @pytest.mark.parametrize("change, message", [
        (dict(x=torch.zeros(2, 32, 8)), "x must have 4 dimensions"),
        (dict(x=torch.zeros(2, 33, 8, 12)[:, :32]), "x must be dense in NCHW or channels_last, got strides"),
        (dict(x=torch.zeros(2, 32, 8, 12).double()), "x must be float32, float16 or bfloat16"),
        (dict(bias=None, residual=None), "bias or residual must be given"),
        (dict(bias=torch.zeros(31)), "bias must have shape"),
        (dict(bias=torch.zeros(32).half()), "bias must be float32 or have x's dtype"),
        (dict(residual=torch.zeros(1, 32, 8, 12)), "residual must have x's shape"),
        (dict(residual=torch.zeros(2, 32, 8, 12).half()), "residual must have x's dtype"),
    ])  # fmt: skip
    def test_the_epilogue_operator_names_the_bad_argument(self, change, message):
        """Always by a ValueError: the stable ABI has no TypeError, which the public function raises before it calls this."""
        given = dict(zip(("x", "bias", "residual"), epilogue_arguments(), strict=True), **change)
        with pytest.raises(ValueError, match=message):
            torch.ops.movq_ext.add_bias_residual_(*map(on_gpu, given.values()))  # Tensor.cuda would make a view dense

    def test_the_epilogue_of_float64_takes_the_native_path_and_warns(self):
        x, bias, residual = (t.double() for t in epilogue_arguments(device="cuda"))
        expected = x + bias[:, None, None] + residual
        extension.warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match="the CUDA kernels take float32, float16, bfloat16, got float64"):
            assert_close(add_bias_residual_(x, bias, residual), expected)


def native_map(q):
    tokens = q.flatten(2).transpose(1, 2).unsqueeze(1)
    return native.attention(tokens, tokens, tokens, None).squeeze(1).transpose(1, 2).unflatten(2, q.shape[2:])
