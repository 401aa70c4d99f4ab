"""The choice between attention's backends: the table, MOVQ_EXT_ATTENTION, fallbacks, and what explain() says."""

import json
import warnings

import pytest
import torch
from operators import needs_extension, needs_gpu
from pretend_gpu import RIGHT, PretendGpu
from spies import record_calls
from tolerances import assert_close

import movq_ext
from movq_ext.ops import attention_backends, cuda, extension, functional, native, self_test
from movq_ext.ops.attention_backends import Problem, choose

VARIABLE = attention_backends.VARIABLE
GPUS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
CPU = torch.device("cpu")


def problem(dtype=torch.bfloat16, head_size=512, tokens=4096, shared_kv=True, gradient=False, exporting=False):
    return Problem(0, dtype, head_size, tokens, shared_kv, gradient, exporting)


def tensors(*shape, dtype=torch.bfloat16, count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).as_subclass(PretendGpu) for _ in range(count)]


# --- The table


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("dtype", extension.KERNEL_DTYPES)
@pytest.mark.parametrize("gradient", [False, True])
def test_on_paper(machine, capability, dtype, gradient):
    """The Hopper kernels are never chosen before they are measured."""
    machine.become(capability)
    for head_size in (16, 128, 512):
        for tokens in (1, 1024, 36864, None):
            for shared_kv in (False, True):
                choice = choose(problem(dtype, head_size, tokens, shared_kv, gradient))
                assert choice.backend == "tile" and not choice.is_fallback


ROWS = [
    {"shared_kv": True, "dtype": "bfloat16", "head_size": 512, "gradient": False, "tokens": 1024, "backend": "tile"},
    {"shared_kv": True, "dtype": "bfloat16", "head_size": 512, "gradient": False, "tokens": 4096, "backend": "hopper"},
    {"shared_kv": True, "dtype": "bfloat16", "head_size": 512, "gradient": True, "tokens": 1024, "backend": "cublas"},
    {"shared_kv": True, "dtype": "float32", "head_size": 512, "gradient": False, "tokens": 1024, "backend": "native"},
]
MEASURED = {"9.0": {"device": "NVIDIA X100", "rows": [{**row, "ms": {"tile": 2.5, row["backend"]: 1.25}} for row in ROWS]}}


def test_a_measured_row_decides(machine):
    """The largest number of tokens that does not exceed the problem's."""
    machine.measure(MEASURED)
    for tokens, backend in ((1, "tile"), (4095, "tile"), (4096, "hopper"), (10**6, "hopper"), (None, "hopper")):
        assert choose(problem(tokens=tokens)).backend == choose(problem(torch.float16, tokens=tokens)).backend == backend
    assert choose(problem(gradient=True)).backend == "cublas"
    reason = "the fastest on NVIDIA X100 for 1024 tokens, in ms: native 1.25, tile 2.5"
    assert choose(problem(torch.float32)) == ("native", reason, False)
    assert choose(problem(shared_kv=False)).backend == choose(problem(head_size=128)).backend == "tile"  # not measured
    machine.become((8, 0))
    assert choose(problem(tokens=10**6)).backend == "tile"


@pytest.mark.parametrize(
    "change",
    [{"arch_list": "8.0"}, {"head_size": 400}],
)
def test_where_a_measured_backend_cannot_run_the_next_one_does(machine, change):
    machine.measure(MEASURED)
    machine.become((9, 0), change.get("arch_list", "9.0a"))
    choice = choose(problem(head_size=change.get("head_size", 512)))
    assert choice.backend == "tile" and "Hopper kernels" in choice.reason and not choice.is_fallback


def test_the_committed_table_is_valid():
    table = attention_backends.read_measured(attention_backends.MEASURED)
    for capability, device in table.items():
        assert capability.count(".") == 1 and {"device", "driver", "torch", "commit", "rows"} <= device.keys()
        for row in device["rows"]:
            assert row["backend"] == min(row["ms"], key=row["ms"].get) and row["backend"] in attention_backends.BACKENDS
            assert {"shared_kv", "dtype", "head_size", "gradient", "tokens"} <= row.keys()


def test_without_kernels_the_native_path_runs(machine):
    machine.become((9, 0), reason="it was built without kernels")
    assert choose(problem()) == ("native", "it was built without kernels", True)
    machine.request("cublas")
    assert choose(problem()).backend == "cublas"  # it needs no kernels
    assert choose(problem(exporting=True)).backend == choose(problem(torch.float64)).backend == "native"


def test_an_exported_program_needs_no_python(machine):
    machine.measure(MEASURED)
    assert choose(problem(gradient=True)).backend == "cublas"
    assert choose(problem(gradient=True, exporting=True)).backend == "tile"


def test_large_heads(machine):
    assert choose(problem(head_size=513)) == ("native", "the CUDA kernels of attention take heads of up to 512, got 513", True)
    machine.request("cublas")
    assert choose(problem(head_size=513)).backend == "cublas"


# --- MOVQ_EXT_ATTENTION


@pytest.mark.parametrize("backend", attention_backends.BACKENDS)
def test_the_variable_decides(machine, backend):
    machine.request(backend)
    assert choose(problem()) == (backend, f"{VARIABLE}={backend}", False)


@pytest.mark.parametrize("value", ["fast", "Hopper", "tile,cublas"])
def test_an_unknown_name_is_an_error(machine, value):
    machine.request(value)
    message = f"MOVQ_EXT_ATTENTION must be one of hopper, tile, cublas, native, or unset, got '{value}'"
    q, kv = tensors(1, 1, 5, 16, count=2)
    for call in (lambda: movq_ext.shared_kv_attention(q, kv), lambda: movq_ext.explain(q, "attention")):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "capability, arch_list, given, reason",
    [
        ((8, 0), "8.0 9.0a", {}, "the Hopper kernels need compute capability 9.0, got 8.0"),
        ((10, 0), "8.0 9.0a", {}, "the Hopper kernels need compute capability 9.0, got 10.0"),
        ((9, 0), "8.0 9.0", {}, "movq_ext._C was compiled for 8.0 9.0, without the Hopper kernels' 9.0a"),
        ((9, 0), "9.0a", {"dtype": torch.float32}, "the Hopper kernels take float16 and bfloat16, got float32"),
        ((9, 0), "9.0a", {"head_size": 320}, "the Hopper kernels take heads of 128, 256, 512, got another size"),
        ((9, 0), "9.0a", {"shared_kv": False}, "the Hopper kernels take keys and values as one tensor (shared_kv_attention)"),
    ],
)
def test_a_request_that_cannot_be_followed_falls_back(machine, capability, arch_list, given, reason):
    machine.become(capability, arch_list)
    machine.request("hopper")
    assert choose(problem(**given)) == ("tile", f"MOVQ_EXT_ATTENTION=hopper cannot be followed: {reason}", True)


def test_a_request_that_cannot_be_followed_warns_once(machine):
    machine.become((8, 0))
    machine.request("hopper")
    q, kv = tensors(1, 1, 5, 16, dtype=torch.float32, count=2)
    reason = "the Hopper kernels need compute capability 9.0, got 8.0"
    message = f"MOVQ_EXT_ATTENTION=hopper cannot be followed: {reason}; tile runs instead"
    with pytest.warns(RuntimeWarning) as seen:
        movq_ext.shared_kv_attention(q, kv)
    assert [str(warning.message) for warning in seen] == [message]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        movq_ext.shared_kv_attention(q, kv)
    assert machine.kernels.calls["shared_kv_attention_forward"] > 2


# --- What runs


@pytest.mark.parametrize("backend, name, flag", [("hopper", "", True), ("tile", "", False), ("cublas", "chunked_", None)])
def test_forward_and_backward_run_on_the_chosen_backend(machine, backend, name, flag):
    q, kv = (x.requires_grad_() for x in tensors(1, 1, 6, 128, count=2))
    machine.request(backend)
    seen = []
    for direction in ("forward", "backward"):
        key = f"{name}shared_kv_attention_{direction}"
        machine.kernels.plant(key, lambda *arguments, key=key: seen.append((key, arguments[-1])) or RIGHT[key](*arguments))
    monkeypatch = machine.monkeypatch
    monkeypatch.setenv(self_test.VARIABLE, "0")
    out = movq_ext.shared_kv_attention(q, kv)
    out.sum().backward()
    assert [key for key, _ in seen] == [f"{name}shared_kv_attention_{direction}" for direction in ("forward", "backward")]
    assert all(last is flag for _, last in seen) or flag is None
    assert_close(torch.Tensor(out), (q.double() @ kv.double().mT * 128**-0.5).softmax(3) @ kv.double())


@pytest.mark.parametrize("name", ["attention", "shared_kv_attention"])
def test_the_native_backend_runs_without_a_warning(machine, monkeypatch, name):
    machine.request("native")
    calls = record_calls(monkeypatch, functional.native, name, lambda *_: name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(movq_ext, name)(*tensors(1, 1, 5, 16, count=3 if name == "attention" else 2))
    assert calls == [name] and not any(machine.kernels.calls.values())


def test_gradients_and_sizes_reach_the_table(machine, monkeypatch):
    problems = record_calls(monkeypatch, attention_backends, "choose", lambda choice, problem: problem)
    q, k, v = tensors(1, 1, 6, 16)
    movq_ext.attention(q, k, v)
    movq_ext.attention(q, k.requires_grad_(), v)
    with torch.no_grad():
        movq_ext.shared_kv_attention(q, k)
    maps = tensors(1, 16, 2, 3, count=2)
    functional.spatial_shared_kv_attention(*maps)
    movq_ext.explain(maps[0].requires_grad_(), "spatial_attention")
    assert [(p.tokens, p.head_size, p.shared_kv, p.gradient) for p in problems] == [
        (6, 16, False, False),
        (6, 16, False, True),
        (6, 16, True, False),
        (6, 16, True, False),
        (6, 16, False, True),
    ]


@pytest.mark.parametrize("backend", ["hopper", "tile", "cublas"])
def test_the_self_test_covers_the_chosen_backend(machine, backend):
    """A wrong kernel is replaced by the native path; the other backends still run."""
    q, kv = tensors(1, 1, 6, 128, count=2)
    name = "chunked_shared_kv_attention_forward" if backend == "cublas" else "shared_kv_attention_forward"

    def wrong(*arguments):
        out, lse = RIGHT[name](*arguments)
        is_hopper = len(arguments) > 3 and arguments[3]
        return (out + 1 if is_hopper == (backend == "hopper") else out), lse

    machine.kernels.plant(name, wrong)
    machine.request(backend)
    with pytest.warns(RuntimeWarning, match=f"PyTorch's own operators: the self test of {name} .* relative error"):
        out = movq_ext.shared_kv_attention(q, kv)
    assert_close(torch.Tensor(out), (q.double() @ kv.double().mT * 128**-0.5).softmax(3) @ kv.double(), slack=2)
    assert movq_ext.explain(q, "shared_kv_attention").startswith(f"native: the self test of {name}")
    other = "tile" if backend == "hopper" else "hopper" if backend == "tile" else "tile"
    machine.request(other)
    assert movq_ext.explain(q, "shared_kv_attention").endswith(f"{other} kernels: {VARIABLE}={other}")


# --- explain()


def test_explain(machine):
    q = tensors(1, 1, 8, 512, count=1)[0]
    paper = "on paper it is faster than cuBLAS, or as fast with less memory"
    assert movq_ext.explain(q, "attention") == f"cuda: compiled for NVIDIA X100; tile kernels: {paper}"
    machine.request("hopper")
    assert movq_ext.explain(q, "shared_kv_attention").endswith("hopper kernels: MOVQ_EXT_ATTENTION=hopper")
    assert "tile kernels: MOVQ_EXT_ATTENTION=hopper cannot be followed" in movq_ext.explain(q, "attention")
    machine.request("cublas")
    assert movq_ext.explain(q, "attention") == "cublas: MOVQ_EXT_ATTENTION=cublas"
    machine.request("native")
    assert movq_ext.explain(q, "attention") == "native: MOVQ_EXT_ATTENTION=native"


# --- Compilers


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_choice_is_traced(machine, dynamic):
    """As a constant, and for all sizes: the row of the most tokens."""
    rows = [{**row, "backend": "cublas" if row["tokens"] > 1024 else "tile", "ms": {}} for row in ROWS[:2]]
    machine.measure({"9.0": {"device": "NVIDIA X100", "rows": rows}})

    def backend(x):
        choice = choose(Problem(None, x.dtype, x.shape[3], None, True, False, native.is_exporting()))
        return x + {"hopper": 1, "tile": 2, "cublas": 3, "native": 4}[choice.backend]

    torch._dynamo.reset()
    compiled = torch.compile(backend, backend="eager", fullgraph=True, dynamic=dynamic)
    assert compiled(torch.zeros(1, 1, 3, 512, dtype=torch.bfloat16)).unique().item() == 3
    assert compiled(torch.zeros(1, 1, 3, 64, dtype=torch.bfloat16)).unique().item() == 2


# --- On a GPU


@needs_extension
@needs_gpu
@pytest.mark.parametrize("dtype", extension.KERNEL_DTYPES)
@pytest.mark.parametrize("size", [512, 256, 128, 40])
def test_every_backend_on_this_gpu(monkeypatch, dtype, size):
    q, kv, dout = (torch.randn(2, 3, n, size, device="cuda", dtype=dtype) for n in (70, 300, 70))
    doubles = [x.double().requires_grad_() for x in (q, kv)]
    expected = (doubles[0] @ doubles[1].mT * size**-0.5).softmax(3) @ doubles[1]
    expected_grads = torch.autograd.grad(expected, doubles, dout.double())
    torch.backends.cuda.matmul.allow_tf32 = False
    inputs = [x.requires_grad_() for x in (q, kv)]
    for backend in ("hopper", "tile", "cublas"):
        monkeypatch.setenv(VARIABLE, backend)
        if not choose(Problem(0, dtype, size, 70, True, True)).is_fallback:
            out = movq_ext.shared_kv_attention(*inputs)
            assert backend in movq_ext.explain(inputs[0], "shared_kv_attention")
            assert_close(out, expected)
            for grad, want in zip(torch.autograd.grad(out, inputs, dout), expected_grads, strict=True):
                assert_close(grad, want, slack=2.0)


@needs_extension
@needs_gpu
@pytest.mark.parametrize("backend", ["hopper", "tile", "cublas"])
def test_a_graph_captures_every_backend(backend):
    q, kv = (torch.randn(1, 1, n, 512, device="cuda", dtype=torch.bfloat16) for n in (70, 300))
    expected = cuda.shared_kv_attention(q, kv, 0.05, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda.shared_kv_attention(q, kv, 0.05, backend)
    graph.replay()
    assert torch.equal(out, expected)


def test_reading_the_table(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(MEASURED))
    assert attention_backends.read_measured(path) == MEASURED
