"""The whole model: its parts compose, and it can be compiled, exported, copied and trained."""

import copy
import pickle

import pytest
import torch

from movq_ext import MOVQ

DDCONFIG = dict(
    ch=32, out_ch=3, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=[8], in_channels=3, resolution=32, z_channels=4
)


def make_model(**changes):
    torch.manual_seed(0)
    model = MOVQ(**{**dict(ddconfig=DDCONFIG, n_embed=64, embed_dim=5), **changes})
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


X = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_parts_compose():
    model = make_model()
    h = model.encode(X)
    assert h.shape == (2, 5, 4, 6)
    assert torch.equal(h, model.quant_conv(model.encoder(X)))
    quant, loss, (_, _, indices) = model.quantize(h)
    image = model.decode(quant)
    assert torch.equal(image, model.decoder(model.post_quant_conv(quant), quant))
    assert all(torch.equal(a, b) for a, b in zip(model(X), (image, loss), strict=True))
    codes = model.encode_code(X)
    assert torch.equal(codes, indices.view(2, 4, 6))
    torch.testing.assert_close(model.decode_code(codes), image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3)])
def test_decode_code_on_any_grid(grid):
    assert make_model().decode_code(torch.randint(0, 64, (2, *grid))).shape == (2, 3, 4 * grid[0], 4 * grid[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32], ids=str)
def test_decode_code_of_any_integers(dtype):
    codes = torch.randint(0, 64, (1, 2, 3))
    assert torch.equal(make_model().decode_code(codes.to(dtype)), make_model().decode_code(codes))


def test_encode_code_keeps_its_shape_with_remap_and_sane_index_shape():
    used = torch.arange(64).flip(0).numpy()
    plain = make_model().encode_code(X)
    assert torch.equal(make_model(sane_index_shape=True).encode_code(X), plain)
    remapped = make_model(remap=used)
    assert torch.equal(remapped.encode_code(X), 63 - plain)
    torch.testing.assert_close(remapped.decode_code(63 - plain), make_model().decode_code(plain))


def test_published_names():
    names = set(make_model().state_dict())
    assert {"quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.bias", "encoder.conv_in.weight",
            "encoder.down.0.downsample.conv.weight", "encoder.mid.attn_1.norm.weight", "decoder.up.2.upsample.conv.weight",
            "decoder.mid.block_1.norm1.norm_layer.weight"} <= names  # fmt: skip


def test_gradients_reach_every_parameter():
    model = make_model().train()
    image, loss = model(X)
    ((image - X).square().mean() + loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.quant_conv.weight.grad.norm() > 0


@pytest.mark.parametrize("method", ["forward", "decode", "decode_code", "encode_code"])
def test_compile_export_and_meta(method):
    model = make_model()
    argument = {
        "forward": X,
        "encode_code": X,
        "decode": torch.randn(1, 5, 4, 6),
        "decode_code": torch.randint(0, 64, (1, 4, 6)),
    }[method]

    class Method(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return getattr(self.model, method)(x)

    expected = Method()(argument)
    torch.testing.assert_close(
        torch.compile(Method(), fullgraph=True, backend="aot_eager")(argument), expected, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(torch.export.export(Method(), (argument,)).module()(argument), expected, rtol=1e-3, atol=1e-4)
    meta = copy.deepcopy(Method()).to("meta")(argument.to("meta"))
    assert torch.utils._pytree.tree_map(lambda t: t.shape, meta) == torch.utils._pytree.tree_map(lambda t: t.shape, expected)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies(twin_of):
    model = make_model()
    assert torch.equal(twin_of(model)(X)[0], model(X)[0])


def test_autocast():
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        image, loss = model(X)
    assert image.dtype == torch.bfloat16 and image.isfinite().all() and loss.isfinite()


CODES = torch.randint(0, 64, (1, 4, 6))
BAD = {
    "codes rank": (ValueError, r"indices must have shape \(batch, height, width\) and not be empty, got \(4, 6\)",
                   "decode_code", CODES[0]),
    "codes empty": (ValueError, r"indices must have shape .* got \(1, 0, 6\)", "decode_code", CODES[:, :0]),
    "codes range": (ValueError, r"indices must be in \[0, 64\), got values from 64 to 64",
                    "decode_code", torch.full((1, 2, 2), 64)),
    "codes list": (TypeError, "indices must be a tensor of integers, got list", "decode_code", [[[0]]]),
    "codes float": (TypeError, "indices must be integers, got torch.float32", "decode_code", CODES.float()),
    "image": (ValueError, r"x must have shape \(batch, 3, height, width\), got \(2, 1, 16, 24\)", "encode", X[:, :1]),
    "quant": (ValueError, r"quant must have shape \(batch, 5, height, width\), got \(2, 3, 16, 24\)", "decode", X),
    "quant dtype": (TypeError, "quant must have the model's dtype torch.float32, got torch.float64",
                    "decode", torch.zeros(1, 5, 2, 2).double()),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_model_refuses(case):
    error, message, method, argument = BAD[case]
    with pytest.raises(error, match=message):
        getattr(make_model(), method)(argument)
