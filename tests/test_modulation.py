"""conv_y and conv_b of many norms at once are those of each."""

import pytest
import torch
from models import latents, make_decoder
from tolerances import assert_close, relative_error

from movq_ext import SpatialNorm
from movq_ext.model import modulation
from movq_ext.model.modulation import Modulations, modulate


def norms(*channels, zq=5):
    torch.manual_seed(0)
    return [SpatialNorm(c, zq, num_groups=8).double() for c in channels]


@pytest.fixture
def products(monkeypatch):
    """Of how many norms each product that was made is."""
    made, plain = [], modulation.modulate
    monkeypatch.setattr(modulation, "modulate", lambda run, zq: (made.append(len(run)), plain(run, zq))[1])
    return made


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_modulate_is_two_convolutions_of_each_norm(layout):
    zq = torch.randn(3, 5, 4, 7, dtype=torch.float64).contiguous(memory_format=layout)
    layers = norms(16, 16, 16)
    for layer, maps in zip(layers, modulate(layers, zq), strict=True):
        for made, wanted in zip(maps, (layer.conv_y(zq), layer.conv_b(zq)), strict=True):
            assert made.is_contiguous(memory_format=torch.channels_last)
            assert_close(made, wanted)


@pytest.mark.parametrize("most, made", [(1 << 30, [4, 1]), (1, [1, 1, 1, 1, 1]), (2 * 2 * 16 * 28 * 8, [2, 2, 1])])
def test_runs_of_norms_share_a_product_within_its_bound(products, most, made):
    zq, layers = torch.randn(1, 5, 4, 7, dtype=torch.float64), norms(16, 16, 16, 16, 8)
    modulations = Modulations(layers, zq, most)
    for layer in layers:
        y, b = modulations.of(layer)
        assert_close(y, layer.conv_y(zq))
        assert_close(b, layer.conv_b(zq))
    assert products == made
    assert_close(modulations.of(layers[0])[0], layers[0].conv_y(zq))  # its product was given up, and is made again


def test_a_decode_makes_a_product_for_every_width(products):
    """On a device other than the CPU; here under autocast, which takes the same way."""
    decoder, (z, zq) = make_decoder(ch_mult=(1, 2, 2)), latents()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder(z, zq)
    assert products == [16, 4]  # of 64 and of 32 channels


def test_a_hooked_decoder_calls_its_layers():
    decoder, (z, zq) = make_decoder(), latents()
    with torch.no_grad():
        wanted, seen = decoder(z, zq), []
        decoder.norm_out.conv_y.register_forward_hook(lambda layer, inputs, out: seen.append(out))
        assert_close(decoder(z, zq), wanted.double(), slack=5)
        assert len(seen) == 1


def test_norms_that_are_no_product_are_called(products):
    decoder, (z, zq) = make_decoder(), latents()
    torch.manual_seed(1)
    decoder.norm_out.conv_y = torch.nn.Conv2d(5, 32, 1, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = decoder(z, zq)
        with torch.no_grad():
            assert relative_error(decoder(z, zq), wanted) < 2e-2
