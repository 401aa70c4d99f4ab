"""Attention in chunks of the scores: cuBLAS's path on a GPU, tested on a CPU with small chunks."""

import pytest
import torch
import torch.nn.functional as F
from operators import DEVICES
from spies import saved_for_backward
from tolerances import assert_close, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from movq_ext.ops import chunked_attention, cuda, native

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = DTYPES[1:]
FUNCTIONS = {"attention": cuda.attention, "shared_kv_attention": cuda.shared_kv_attention}
every_attention = pytest.mark.parametrize("name", FUNCTIONS)
every_device = pytest.mark.parametrize("device", DEVICES)


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def case(name, batch=2, heads=1, queries=30, keys=50, size=16, **options):
    """The inputs, which require gradients, and dout."""
    q, dout = (draw(batch, heads, queries, size, seed=seed, **options) for seed in (0, 1))
    tokens = [draw(batch, heads, keys, size, seed=seed, **options) for seed in (2, 3)]
    inputs = [q, *tokens[: 2 if name == "attention" else 1]]
    return [x.requires_grad_() for x in inputs], dout


def exact(inputs, scale):
    """The formula in float64: the output and the log-sum-exp."""
    q, k, v = (*inputs, inputs[-1])[:3]  # v is k where keys and values are shared
    scores = scale * q @ k.mT
    return scores.softmax(3) @ v, scores.logsumexp(3)


def operators(name):
    operators = torch.ops.movq_ext
    return getattr(operators, f"chunked_{name}_forward").default, getattr(operators, f"chunked_{name}_backward").default


@pytest.fixture(params=[2000, 32 << 20], ids=["small chunks", "one chunk"])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(chunked_attention, "MAX_CHUNK_BYTES", request.param)
    monkeypatch.setattr(chunked_attention, "TILE", 4)
    return request.param


@every_device
@every_attention
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [{}, {"heads": 3}, {"queries": 1}, {"keys": 1}, {"size": 5}, {"queries": 9, "size": 512}])
def test_it_is_the_formula(chunk_bytes, name, dtype, shape, device):
    """Most sizes are not multiples of a chunk's."""
    inputs, dout = case(name, dtype=dtype, device=device, **shape)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected, lse = exact(doubles, 0.3)
    forward, _ = operators(name)
    assert_close(forward(*(x.detach() for x in inputs), 0.3)[1], lse)
    out = FUNCTIONS[name](*inputs, 0.3, "cublas")
    assert out.dtype == dtype and out.is_contiguous()
    # cuBLAS may add a score's products one after the other. For 512 products in float32, that alone costs an error of 1.9e-6.
    assert_close(out, expected, slack=2.0 if dtype == torch.float32 and inputs[0].shape[3] == 512 else 1.0)
    expected = torch.autograd.grad(expected, doubles, dout.double())
    for grad, want in zip(torch.autograd.grad(out, inputs, dout), expected, strict=True):
        assert grad.dtype == dtype
        if want.norm() < 1e-9:  # q and k of a single key have no effect
            assert grad.norm() <= 1e-3 * dout.norm()
        else:
            assert_close(grad, want, slack=2.0)


@every_attention
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(chunk_bytes, name, dtype):
    """Views of a feature map, of every second token, and of a tensor with the heads beside the tokens."""
    inputs, dout = case(name, heads=2, dtype=dtype)
    with torch.no_grad():
        views = [x.mT.contiguous().mT for x in inputs]
        views[0] = views[0].repeat_interleave(2, dim=2)[:, :, ::2]
        views[-1] = inputs[-1].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in views)
    forward, backward = operators(name)
    plain = forward(*(x.detach() for x in inputs), 0.3)
    for actual, expected in zip(forward(*views, 0.3), plain, strict=True):
        assert_close(actual, expected.double(), slack=0.5)
    views_of_result = [dout.mT.contiguous().mT, *views, plain[0].mT.contiguous().mT]
    expected = backward(dout, *(x.detach() for x in inputs), *plain, 0.3)
    for actual, want in zip(backward(*views_of_result, plain[1], 0.3), expected, strict=True):
        assert_close(actual, want.double(), slack=0.5)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mean, std, of_math", [(0, 1, 1.5), (0, 3, 1.15), (0.5, 1, 1.05)])
def test_scores_and_softmax_are_float32(dtype, mean, std, of_math):
    """The error is that of fused kernels. PyTorch's math path does not round weights; scores of 16 bits would be much worse."""
    q, k, v = (draw(1, 1, n, 512, seed=seed) for seed, n in enumerate((128, 1024, 1024)))
    q, k, v = (std * q).to(dtype), (std * k).to(dtype), (v + mean).to(dtype)
    scale = 512**-0.5
    expected, _ = exact([q.double(), k.double(), v.double()], scale)
    with sdpa_kernel(SDPBackend.MATH):
        math_path = relative_error(F.scaled_dot_product_attention(q, k, v), expected)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = relative_error(F.scaled_dot_product_attention(q, k, v), expected)
    error = relative_error(cuda.attention(q, k, v, scale, "cublas"), expected)
    assert error < 1.08 * fused and error < of_math * math_path
    rounded_scores = (scale * q.float() @ k.float().mT).to(dtype).float().softmax(3).to(dtype).float() @ v.float()
    if mean == 0:
        assert relative_error(rounded_scores.to(dtype), expected) > 1.6 * error


def test_small_weights_do_not_underflow_in_float16():
    """The weights of 2^17 keys are below the smallest normal number, 6e-5."""
    q, k, v = (draw(1, 1, n, 8, seed=seed).half() for seed, n in enumerate((4, 1 << 17, 1 << 17)))
    expected, _ = exact([q.double(), k.double(), v.double()], 0.1)
    assert relative_error(cuda.attention(q, k, v, 0.1, "cublas"), expected) < 5e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype):
    """exp() of them overflows, and most weights are zero."""
    (q, k, v), dout = case("attention", dtype=dtype)
    q, k, v = (x.detach().requires_grad_() for x in (10 * q, 10 * k, v))
    expected = exact([x.double() for x in (q, k, v)], 1.0)
    forward, _ = operators("attention")
    out, lse = forward(*(x.detach() for x in (q, k, v)), 1.0)
    assert lse.max() > 500
    assert_close(out, expected[0], slack=20 if dtype == torch.float32 else 1)
    assert_close(lse, expected[1])
    grads = torch.autograd.grad(cuda.attention(q, k, v, 1.0, "cublas"), (q, k, v), dout)
    assert all(grad.isfinite().all() for grad in grads)


def test_minus_infinity_is_a_weight_of_zero():
    q, k, v = (draw(1, 1, n, 8, seed=seed) for seed, n in enumerate((6, 9, 9)))
    q, k = q.abs(), k.abs()
    k[:, :, :3] = -torch.inf
    out, lse = operators("attention")[0](q, k, v, 1.0)
    expected, expected_lse = exact([x.double() for x in (q, k[:, :, 3:], v[:, :, 3:])], 1.0)
    assert_close(out, expected)
    assert_close(lse, expected_lse)


class Largest(TorchDispatchMode):
    """The bytes of the largest result of an operator, and the most elements of a result of a product."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries, keys", [(1000, 1000), (40, 20000), (20000, 40)])
def test_no_tensor_is_larger_than_a_chunk_or_an_input(monkeypatch, dtype, queries, keys):
    monkeypatch.setattr(chunked_attention, "MAX_CHUNK_BYTES", 1 << 20)
    size = 4
    inputs, dout = case("attention", 2, 1, queries, keys, size, dtype=dtype)
    q, k, v = (x.detach() for x in inputs)
    sum_bytes = 4 * 2 * max(queries, keys) * size  # of an input in float32, of both images
    with Largest() as largest:
        out, lse = chunked_attention.forward(q, k, v, 0.3)
        chunked_attention.backward(dout, q, k, v, out, lse, 0.3, shared_kv=False)
    assert (1 << 18) < largest.bytes <= max(1 << 20, sum_bytes)
    assert queries * keys * 4 * 2 > 4 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "images, queries, keys", [(1, 16384, 16384), (8, 1024, 1024), (1, 1, 10**8), (10**6, 1, 1), (3, 40000, 7)]
)
def test_chunks_are_as_large_as_allowed(dtype, images, queries, keys):
    q, k = (torch.empty(images, n, 512, dtype=dtype, device="meta") for n in (queries, keys))
    limit = chunked_attention.MAX_CHUNK_BYTES
    chunk_images, rows = chunked_attention._row_chunk(q, k)
    forward_bytes = chunk_images * min(rows, queries) * keys * (4 if dtype == torch.float32 else 6)
    chunk_images, rows, columns = chunked_attention._square_chunk(q, k)
    backward_bytes = chunk_images * rows * min(columns, keys) * (8 if dtype == torch.float32 else 12)
    per_score = (4, 8) if dtype == torch.float32 else (6, 12)
    for size, bytes_of_all in zip((forward_bytes, backward_bytes), (n * images * queries * keys for n in per_score), strict=True):
        assert size <= limit or rows == 1
        assert size >= min(0.6 * limit, bytes_of_all)


def test_backward_takes_squares():
    q = torch.empty(1, 16384, 512, dtype=torch.bfloat16, device="meta")
    _, rows, columns = chunked_attention._square_chunk(q, q)
    assert (rows, columns) == (1664, 1664)
    assert chunked_attention._row_chunk(q, q) == (1, 256)


@every_attention
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(name, dtype):
    inputs, dout = case(name, 1, 2, 6, 7, 8, dtype=dtype)
    inputs = [x.detach() for x in inputs]
    forward, backward = operators(name)
    torch.library.opcheck(forward, (*inputs, 0.3))
    torch.library.opcheck(backward, (dout, *inputs, *forward(*inputs, 0.3), 0.3))


@every_attention
def test_autocast_does_not_reach_the_products(name):
    inputs, dout = case(name)
    expected = FUNCTIONS[name](*inputs, 0.3, "cublas")
    with torch.autocast("cpu", torch.bfloat16):
        out = FUNCTIONS[name](*inputs, 0.3, "cublas")
        grads = torch.autograd.grad(out, inputs, dout)
    assert torch.equal(out, expected)
    for grad, want in zip(grads, torch.autograd.grad(expected, inputs, dout), strict=True):
        assert torch.equal(grad, want)


@every_attention
def test_double_backward(name):
    inputs, dout = case(name)
    plain = {"attention": native.attention, "shared_kv_attention": native.shared_kv_attention}[name]

    def second(function, *backend):
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(function(*inputs, 0.3, *backend), inputs, dout, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    for grad, want in zip(second(FUNCTIONS[name], "cublas"), second(plain), strict=True):
        assert_close(grad, want, slack=5.0)


@every_attention
def test_backward_keeps_no_scores_and_returns_what_is_needed(name):
    inputs, dout = case(name)
    inputs[0].requires_grad_(False)
    with saved_for_backward() as saved:
        out = FUNCTIONS[name](*inputs, 0.3, "cublas")
    assert sorted(x.numel() for x in saved) == sorted([*(x.numel() for x in inputs), out.numel(), out.numel() // 16])
    out.backward(dout)
    assert [x.grad is not None for x in inputs] == [False, True, True][: len(inputs)]


@every_attention
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_to_one_operator(name, dynamic):
    inputs, dout = case(name)
    nodes = []

    def backend(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def function(*inputs):
        return FUNCTIONS[name](*inputs, 0.3, "cublas")

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    expected = function(*inputs)
    assert torch.equal(compiled(*inputs), expected)
    grads = torch.autograd.grad(compiled(*inputs), inputs, dout)
    assert all(torch.equal(*pair) for pair in zip(grads, torch.autograd.grad(expected, inputs, dout), strict=True))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
        program = torch.export.export(Module(function), tuple(x.detach() for x in inputs)).run_decompositions()
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets[0] == f"movq_ext.chunked_{name}_forward.default" and nodes
    assert not any("bmm" in target or "softmax" in target for target in targets)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)
