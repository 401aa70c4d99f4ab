"""Programs of torch.jit.trace and torch.onnx.export: PyTorch's own operators, for other sizes than the example's."""

import importlib
import warnings

import pytest
import torch
from accelerated_models import decode, kl, vq
from models import SMALL_MOVQ, latents, make_decoder
from tolerances import assert_close
from torch import nn

import movq_ext
from movq_ext.ops import paths

SLACK = 10  # a decode is some thirty operators


class Calls(nn.Module):
    """A module whose forward is the given function of a model, as the tracers want it."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model.eval(), function

    def forward(self, *args):
        return self.function(self.model, *args)


def decoder(**changes):
    return Calls(make_decoder(ch_mult=(1, 1), num_res_blocks=0, **changes), lambda model, z, zq: model(z, zq))


def movq(function):
    torch.manual_seed(0)
    return Calls(movq_ext.MOVQ(**SMALL_MOVQ), function)


def accelerated(model):
    movq_ext.accelerate(model)
    return Calls(model, decode)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def codes(*shape):
    return torch.randint(0, SMALL_MOVQ["n_embed"], shape, generator=torch.Generator().manual_seed(sum(shape)))


# For each model: the module, the arguments to trace it with, and arguments of other sizes.
PROGRAMS = {
    "MOVQDecoder": lambda: (decoder(), latents((6, 4), 2), latents((3, 5), 1)),
    "MOVQDecoder, add_conv, another grid of zq": lambda: (
        decoder(add_conv=True), latents((6, 4), 2, zq_grid=(3, 4)), latents((3, 5), 1, zq_grid=(2, 7))
    ),
    "MOVQ.decode": lambda: (movq(lambda model, quant: model.decode(quant)), [draw(2, 4, 6, 4)], [draw(1, 4, 3, 5)]),
    "MOVQ.decode_code": lambda: (movq(lambda model, x: model.decode_code(x)), [codes(2, 6, 4)], [codes(1, 3, 5)]),
    "MOVQ.encode_code": lambda: (movq(lambda model, x: model.encode_code(x)), [draw(2, 3, 12, 8)], [draw(1, 3, 6, 10)]),
    "MOVQ": lambda: (movq(lambda model, x: model(x)[0]), [draw(2, 3, 12, 8)], [draw(1, 3, 6, 10)]),
    "accelerated VQModel": lambda: (accelerated(vq()), [draw(2, 4, 6, 4)], [draw(1, 4, 3, 5)]),
    "accelerated AutoencoderKL": lambda: (accelerated(kl()), [draw(2, 4, 6, 4)], [draw(1, 4, 3, 5)]),
}  # fmt: skip
every_program = pytest.mark.parametrize("name", PROGRAMS)


def assert_same(actual, expected):
    if expected.is_floating_point():
        assert_close(actual, expected.double(), SLACK)
    else:
        assert torch.equal(actual, expected)


@every_program
@pytest.mark.parametrize("gradients", [False, True])
def test_a_traced_program_takes_other_sizes(name, gradients):
    module, args, others = PROGRAMS[name]()
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of the argument checks, which hold for the example only
        program = torch.jit.trace(module, tuple(args))
    assert {node.kind().partition("::")[0] for node in program.inlined_graph.nodes()} <= {"aten", "prim"}
    with torch.no_grad():
        for inputs in (args, others):
            assert_same(program(*inputs), module(*inputs))


def run_onnx(path, args):
    session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in zip(names, args, strict=True)})[0])


def onnx_domains(path):
    return {node.domain for node in importlib.import_module("onnx").load(path).graph.node}


def export_onnx(name, path, dynamo):
    """Export a program for any batch, height and width, and return its module and arguments."""
    module, args, others = PROGRAMS[name]()
    names = [f"input{i}" for i in range(len(args))]
    sizes = [{dim: f"size{dim}" for dim in range(x.dim()) if x.dim() == 3 or dim != 1} for x in args]  # codes have no channels
    if dynamo:
        shapes = {"dynamic_shapes": (tuple({dim: torch.export.Dim.DYNAMIC for dim in dims} for dims in sizes),)}
    else:
        shapes = {"dynamic_axes": dict(zip(names, sizes, strict=True))}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, tuple(args), path, dynamo=dynamo, input_names=names, verbose=False, **shapes)
    return module, args, others


# The newer exporter takes several seconds, so it exports one model: the whole one.
@pytest.mark.parametrize(("name", "dynamo"), [*((name, False) for name in PROGRAMS), ("MOVQ", True)])
def test_onnxruntime_runs_an_exported_program(tmp_path, name, dynamo):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    path = str(tmp_path / "model.onnx")
    module, args, others = export_onnx(name, path, dynamo)
    assert onnx_domains(path) == {""}  # standard operators only
    with torch.no_grad():
        for inputs in (args, others):
            assert_same(run_onnx(path, inputs), module(*inputs))


def test_a_traced_group_norm_is_as_exact_as_an_eager_one():
    """torch's group_norm loses accuracy to a large mean in channels_last; a program may be given that layout later."""
    norm = movq_ext.GroupNorm(1, 8)
    f = (draw(2, 8, 16, 24) + 100).contiguous(memory_format=torch.channels_last)
    program = torch.jit.trace(norm, (f.contiguous(),))
    assert_close(program(f), norm.double()(f.double()), slack=20)


def test_gpu_tensors_are_traced_without_kernels(monkeypatch):
    monkeypatch.setattr(paths, "device_reason", lambda index: None)
    x, reasons = torch.empty(1, 32, 4, 4), []

    def record(x):
        reasons.append(paths.why_native(x))
        return x + 1

    record(x)
    torch.jit.trace(record, (x,), check_trace=False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    record(x)
    assert reasons == [None, *2 * ["torch.jit.trace and torch.onnx.export trace PyTorch's operators only"]]
