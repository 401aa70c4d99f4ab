"""Which decoders can run in strips."""

import pytest
from models import circular, hooked_norm, larger, latents, make_decoder, other_norm, quantised
from tolerances import assert_close
from torch import nn

from movq_ext import decode_tiled
from movq_ext.model.strip_checks import check_decoder_layers, check_no_dropout

PLENTY = 1 << 30  # bytes


def unknown_layer(decoder):
    decoder.mid.block_1 = nn.Identity()


REFUSED = {
    circular: r"must be 3x3 nn.Conv2d padded with zeros, got .*circular.* in mid.block_1",
    quantised: r"nn.Conv2d padded with zeros, got Sequential.* in the decoder",
    larger: r"3x3 nn.Conv2d .* got .*\(5, 5\).* in up.1.upsample",
    other_norm: r"unmodified nn.GroupNorm, got Trebled",
    hooked_norm: r"unmodified nn.GroupNorm, got GroupNorm.* in up.0.block.0.norm2",
    unknown_layer: r"must be ResnetBlock, AttnBlock or Upsample, got Identity",
}


@pytest.mark.parametrize("change", REFUSED)
def test_unsupported_layers_are_refused(change):
    decoder = make_decoder()
    change(decoder)
    with pytest.raises(TypeError, match=f"(?s){REFUSED[change]}"):
        check_decoder_layers(decoder)
    with pytest.raises(TypeError, match=f"(?s){REFUSED[change]}"):
        decode_tiled(decoder, *latents((4, 6)), max_memory=PLENTY)


def test_a_circular_convolution_of_zq_is_refused():
    decoder, (z, zq) = make_decoder(add_conv=True), latents((6, 4))
    decoder.up[0].block[0].norm1.conv.padding_mode = "circular"
    with pytest.raises(TypeError, match=r"padded with zeros, got .*circular.* in up.0.block.0.norm1"):
        decode_tiled(decoder, z, zq, max_memory=PLENTY)
    expected = decoder(z, zq)
    assert_close(decoder.requires_grad_(False)(z, zq), expected.double(), slack=5)  # layer by layer, as is_plain_network is False


@pytest.mark.parametrize("changes", [{}, dict(add_conv=True), dict(resamp_with_conv=False), dict(attn_resolutions=[8, 16])])
def test_decoders_of_this_package_are_accepted(changes):
    check_decoder_layers(make_decoder(**changes))


def test_dropout_is_refused_only_while_it_is_active():
    check_no_dropout("decoder", make_decoder(dropout=0.1).eval())
    check_no_dropout("decoder", make_decoder(dropout=0.0).train())
    with pytest.raises(ValueError, match=r"decoder must be in evaluation mode: call decoder.eval\(\) first"):
        check_no_dropout("decoder", make_decoder(dropout=0.1).train())


def test_a_hooked_spatial_norm_is_refused():
    decoder = make_decoder()
    decoder.mid.block_1.norm1.register_forward_hook(lambda layer, inputs, out: 3 * out)
    with pytest.raises(TypeError, match=r"(?s)decoder's norms must be unmodified .*SpatialNorm, got .* in mid.block_1"):
        decode_tiled(decoder, *latents((4, 6)), max_memory=PLENTY)
