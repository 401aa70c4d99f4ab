"""The quantiser against brute force, and its gradients, remapping and memory."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from movq_ext import VectorQuantizer
from movq_ext.model import quantize
from movq_ext.model.quantize import nearest_code


def make_quantizer(n_e=50, e_dim=4, beta=0.25, **keywords):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(n_e, e_dim, beta, **keywords)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


def brute_force(vectors, codebook):
    return (vectors.double()[:, None] - codebook.double()[None]).square().sum(2).argmin(1)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), codes=st.integers(1, 70), dim=st.integers(1, 6), rows=st.integers(1, 300), seed=st.integers(0, 99))
def test_nearest_code_in_chunks(n, codes, dim, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    codebook = torch.randn(codes, dim, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "MAX_DISTANCE_BYTES", 8 * codes * rows)
        assert torch.equal(nearest_code(vectors, codebook), brute_force(vectors, codebook))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_searched_in_float32(dtype):
    vectors, codebook = torch.randn(500, 4).to(dtype), torch.randn(300, 4).to(dtype)
    expected = brute_force(vectors, codebook)
    assert (nearest_code(vectors, codebook) == expected).float().mean() > 0.99


def test_first_of_equally_near_codes_wins():
    assert nearest_code(torch.zeros(3, 2), torch.ones(5, 2)).tolist() == [0, 0, 0]


def test_autocast_does_not_change_the_search():
    vectors, codebook = torch.randn(500, 4), torch.randn(300, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(vectors, codebook), brute_force(vectors, codebook))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_vectors_that_are_not_finite_have_no_nearest_code(value):
    vectors, codebook = torch.randn(6, 4), torch.randn(5, 4)
    expected = nearest_code(vectors, codebook)
    vectors[[1, 4], [0, 3]] = value
    expected[[1, 4]] = -1
    assert torch.equal(nearest_code(vectors, codebook), expected)
    codebook[2, 1] = torch.nan
    assert (nearest_code(torch.randn(6, 4), codebook) == -1).all()


def test_search_of_16384_codes_at_128x128_stays_under_1_gib():
    script = """
        import resource, torch
        from movq_ext import VectorQuantizer
        quantizer, z = VectorQuantizer(16384, 4, 0.25), torch.randn(1, 4, 128, 128)
        quantizer(z[:, :, :2])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quantizer(z)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    peak = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True).stdout
    # ru_maxrss is in KiB on Linux. All distances at once would take 1 GiB.
    assert int(peak) * 1024 < 300 << 20


@pytest.mark.parametrize("legacy", [True, False])
def test_forward(legacy):
    quantizer = make_quantizer(legacy=legacy)
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    z_q, loss, (perplexity, encodings, indices) = quantizer(z)
    assert perplexity is None and encodings is None
    expected = brute_force(z.permute(0, 2, 3, 1).reshape(-1, 4), quantizer.embedding.weight)
    assert torch.equal(indices, expected)
    codes = quantizer.embedding.weight[expected].view(2, 3, 5, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(z_q, codes)
    torch.testing.assert_close(loss, 1.25 * (z - codes).square().mean())

    gradient = torch.randn_like(z)
    torch.testing.assert_close(torch.autograd.grad(z_q, z, gradient, retain_graph=True)[0], gradient)  # straight through
    to_z, to_codes = torch.autograd.grad(loss, (z, quantizer.embedding.weight))
    per_element = 2 * (z - codes).detach() / z.numel()
    torch.testing.assert_close(to_z, per_element * (1 if legacy else 0.25))
    scattered = torch.zeros_like(to_codes).index_add_(0, expected, -per_element.permute(0, 2, 3, 1).reshape(-1, 4))
    torch.testing.assert_close(to_codes, scattered * (0.25 if legacy else 1))


def test_sane_index_shape():
    assert make_quantizer(sane_index_shape=True)(torch.randn(2, 4, 3, 5))[2][2].shape == (2, 3, 5)


USED = np.array([7, 3, 40, 11])


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("sane_index_shape", [False, True])
@pytest.mark.parametrize("unknown_index", ["random", "extra", 2])
def test_remap(tmp_path, as_file, sane_index_shape, unknown_index):
    np.save(tmp_path / "used.npy", USED)
    quantizer = make_quantizer(
        remap=tmp_path / "used.npy" if as_file else USED, unknown_index=unknown_index, sane_index_shape=sane_index_shape
    )
    wanted = torch.tensor([[[40, 7], [3, 25]]])  # 25 is not in use
    z = quantizer.embedding(wanted).permute(0, 3, 1, 2)
    indices = quantizer(z)[2][2]
    assert indices.shape == ((1, 2, 2) if sane_index_shape else (1, 4))
    *known, unknown = indices.flatten().tolist()
    assert known == [2, 0, 1]
    assert unknown in {"random": range(4), "extra": [4], 2: [2]}[unknown_index]
    assert quantizer.re_embed == (5 if unknown_index == "extra" else 4)
    codes = quantizer.get_codebook_entry(indices.view(1, 2, 2), (1, 2, 2, 4))
    torch.testing.assert_close(codes[..., 0, :], z[..., 0, :])
    torch.testing.assert_close(codes[:, :, 1, 0], z[:, :, 1, 0])
    if unknown_index == "extra":
        torch.testing.assert_close(codes[0, :, 1, 1], quantizer.embedding.weight[7])


@pytest.mark.parametrize("dtype", quantize.INTEGER_DTYPES, ids=str)
def test_codebook_entry(dtype):
    quantizer = make_quantizer()
    indices = torch.randint(0, 50, (2, 3, 5))
    codes = quantizer.embedding.weight[indices]
    assert torch.equal(quantizer.get_codebook_entry(indices.to(dtype)), codes)
    assert torch.equal(quantizer.get_codebook_entry(indices.to(dtype), (2, 3, 5, 4)), codes.permute(0, 3, 1, 2))
    remapped = make_quantizer(remap=np.arange(50)[::-1].copy())
    assert torch.equal(remapped.get_codebook_entry((49 - indices).to(dtype)), codes)


@pytest.mark.parametrize(("indices", "error", "message"), [
    (torch.tensor([50]), ValueError, r"indices must be in \[0, 50\), got values from 50 to 50"),
    (torch.tensor([3, -1]), ValueError, r"indices must be in \[0, 50\), got values from -1 to 3"),
    (torch.tensor([1.0]), TypeError, "indices must be integers, got torch.float32"),
    (torch.tensor([True]), TypeError, "indices must be integers, got torch.bool"),
    (torch.tensor([1j]), TypeError, "indices must be integers, got torch.complex64"),
    (torch.tensor([2**63], dtype=torch.uint64), ValueError, r"indices must be in \[0, 50\), got values from -922"),
    (torch.zeros(1, dtype=torch.long, device="meta"), ValueError, "indices must be on the model's device cpu, got meta"),
    (np.zeros(1, np.int64), TypeError, "indices must be a tensor of integers, got ndarray"),
])  # fmt: skip
def test_codebook_entry_refuses(indices, error, message):
    with pytest.raises(error, match=message):
        make_quantizer().get_codebook_entry(indices)


@pytest.mark.parametrize("z", [torch.zeros(4, 3, 5), torch.zeros(2, 3, 3, 5)])
def test_forward_refuses(z):
    with pytest.raises(ValueError, match=r"z must have shape \(batch, 4, height, width\), got"):
        make_quantizer()(z)


@pytest.mark.parametrize("remap", [None, USED])
def test_latents_that_are_not_finite(remap):
    quantizer, z = make_quantizer(remap=remap).eval(), torch.randn(2, 4, 3, 5)
    z[1, 2, 0, 4] = torch.nan
    with pytest.raises(ValueError, match="z must be finite, got NaN or infinity: 1 of 30 vectors have no nearest code"):
        quantizer(z)
    z_q, loss, (_, _, indices) = quantizer.train()(z)  # a training step is not interrupted
    assert indices.flatten()[19] == -1 and (indices < 0).sum() == 1
    assert loss.isnan() and z_q[1, :, 0, 4].isnan().any() and not z_q[0].isnan().any()
    with torch.no_grad(), pytest.raises(ValueError, match="z must be finite"):
        quantizer(z)
    quantizer.embedding.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="the codebook must be finite, got NaN or infinity: 30 of 30 vectors"):
        quantizer.eval()(torch.randn(2, 4, 3, 5))


def test_search_is_a_registered_operator():
    torch.library.opcheck(nearest_code, (torch.randn(7, 4), torch.randn(5, 4)))


def test_no_vector_takes_a_code_from_a_damaged_codebook():
    quantizer, z = make_quantizer().train(), torch.randn(1, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        quantizer.embedding.weight[5] = torch.nan
    z_q, loss, (_, _, indices) = quantizer(z.requires_grad_())
    assert (indices == -1).all() and z_q.isnan().all() and loss.isnan()
