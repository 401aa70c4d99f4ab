"""Latents that are not finite: an error where codes leave, and never a valid code where the check cannot run."""

import numpy as np
import pytest
import torch
from models import SMALL_MOVQ
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from movq_ext import MOVQ, save_pretrained
from movq_ext.cli import main
from movq_ext.model.value_checks import can_read_values

X = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def overflowing_model():
    """A model whose latents overflow in float16, and only there."""
    torch.manual_seed(0)
    model = MOVQ(**SMALL_MOVQ).eval()
    torch.nn.init.constant_(model.quant_conv.weight, 0)
    torch.nn.init.constant_(model.quant_conv.bias, 5e4)
    with torch.no_grad():
        model.encoder.conv_out.bias.fill_(5e4)
        model.quant_conv.weight[:, :, 0, 0] = torch.eye(4)
    return model


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("method", ["encode", "encode_code", "forward"])
def test_an_overflow_in_float16_is_an_error(method, gradients):
    model = overflowing_model()
    with torch.set_grad_enabled(gradients):
        getattr(model, method)(X)
        with pytest.raises(FloatingPointError, match=r"NaN or infinity in torch.float16: .* use bfloat16 or float32"):
            getattr(model.half(), method)(X.half())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["encode", "encode_code", "forward"])
def test_an_image_that_is_not_finite_is_refused(method, value):
    x = X.clone()
    x[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="x must be finite, got NaN or infinity"):
        getattr(overflowing_model(), method)(x)


def test_a_training_step_is_not_interrupted():
    model, x = overflowing_model().train(), torch.full_like(X, torch.nan)
    image, loss = model(x)
    assert image.isnan().all() and loss.isnan()
    with pytest.raises(ValueError, match="x must be finite"):
        model.encode_code(x)  # a training step computes no codes


@pytest.mark.parametrize("program", ["compiled", "exported"])
def test_a_program_returns_no_valid_code(program):
    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = overflowing_model()

        def forward(self, x):
            return self.model.encode_code(x)

    module = Encode()
    if program == "compiled":
        run = torch.compile(module, fullgraph=True, backend="aot_eager")
    else:
        run = torch.export.export(module, (X,)).module()
    assert torch.equal(run(X), module(X))
    codes = run(torch.full_like(X, torch.nan))
    assert (codes == -1).all()
    with pytest.raises(ValueError, match=r"indices must be in \[0, 64\), got values from -1 to -1"):
        module.model.decode_code(codes)


def test_when_values_can_be_read():
    assert can_read_values(X)
    assert not can_read_values(X.to("meta"))
    assert not torch.func.vmap(lambda x: torch.as_tensor(can_read_values(x)))(X).any()
    with FakeTensorMode() as mode:
        assert not can_read_values(mode.from_tensor(X))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_codes_are_captured_in_a_cuda_graph():
    model, x = overflowing_model().cuda(), X.cuda()
    with torch.no_grad():
        expected = model.encode_code(x)  # warm-up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            codes = model.encode_code(x)
        graph.replay()
        assert torch.equal(codes, expected)
        x.fill_(torch.nan)
        graph.replay()
        assert (codes == -1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_training_step_does_not_wait_for_the_gpu():
    model, x = overflowing_model().cuda().train(), X.cuda()
    model(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_command_line_counts_the_picture_as_failed(tmp_path, capsys):
    save_pretrained(overflowing_model(), tmp_path / "model")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    arguments = ["encode", tmp_path / "a.png", "-o", tmp_path / "codes.safetensors", "--model", tmp_path / "model",
                 "--device", "cpu", "--dtype", "float16"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr()
    assert "encoded 0, already there 0, failed 1" in printed.out
    assert "a.png: the encoder computed NaN or infinity in torch.float16" in printed.err
    assert not (tmp_path / "codes.safetensors").exists()
