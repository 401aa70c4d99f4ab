"""One model that several threads, streams or processes decode with."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from movq_ext import MOVQ, annotate, decode_tiled

THREADS, ROUNDS = 8, 3
DDCONFIG = dict(
    ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=(16,), in_channels=3, resolution=32, z_channels=4
)
LEAST = 10_752  # bytes for each column of the latents: the second map of the decode goes to a file
SIZES = [(4, 4), (3, 5), (8, 4), (6, 6), (2, 9), (7, 1), (1, 1), (5, 8)]


def make(**changes):
    torch.manual_seed(0)
    model = MOVQ({**DDCONFIG, **changes}, 64, 4).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.02, 0.1)
    return model


def jobs(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (1, *SIZES[i]), generator=generator).to(device) for i in range(THREADS)]


def latents(model, codes):
    quantised = model.quantize.get_codebook_entry(codes, (*codes.shape, 4))
    return model.post_quant_conv(quantised), quantised


@torch.inference_mode()
def in_strips(model, codes):
    return model.decode_code(codes)


def in_files(model, codes):
    with torch.no_grad():
        z, zq = latents(model, codes)
    return decode_tiled(model.decoder, z, zq, max_memory=LEAST * z.shape[3])


@torch.no_grad()
def under_autocast(model, codes):
    with torch.autocast(codes.device.type, torch.bfloat16):
        return model.decode_code(codes)


@torch.no_grad()
def layer_by_layer(model, codes):
    return model.decoder.forward_with_features_output(*latents(model, codes))[0]


def with_gradients(model, codes):
    z, zq = (x.detach().requires_grad_() for x in latents(model, codes))
    out = model.decoder(z, zq)
    return torch.cat([x.flatten() for x in (out, *torch.autograd.grad(out.square().sum(), (z, zq)))])


@torch.no_grad()
def in_half_precision(model, codes):
    return model.decode_code(codes)


@torch.no_grad()
def annotated(model, codes):
    with annotate(model):
        return model.decode_code(codes)


WAYS = [in_strips, in_files, under_autocast, layer_by_layer, with_gradients, in_half_precision, annotated]


@pytest.mark.parametrize("add_conv", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_threads_share_a_model(way, add_conv):
    """All begin at once with a model that nobody has used, so that what it derives and keeps is made by all of them."""
    wanted = [way(prepared(way, add_conv), codes) for codes in jobs()]
    for _ in range(ROUNDS):
        model, barrier = prepared(way, add_conv), threading.Barrier(THREADS)

        def work(codes, model=model, barrier=barrier):
            barrier.wait()
            return [way(model, codes) for _ in range(2)]

        with ThreadPoolExecutor(THREADS) as pool:
            for results, expected in zip(pool.map(work, jobs()), wanted, strict=True):
                for result in results:
                    torch.testing.assert_close(result, expected)


def prepared(way, add_conv):
    model = make(add_conv=add_conv)
    return model.half() if way is in_half_precision else model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", [in_strips, in_files, under_autocast, layer_by_layer, with_gradients])
def test_streams_share_a_model(way):
    """Two threads, each with a stream of its own."""
    wanted = [way(make().cuda(), codes) for codes in jobs("cuda")]
    for _ in range(ROUNDS):
        model, barrier = make().cuda(), threading.Barrier(2)
        torch.cuda.synchronize()

        def work(offset, model=model, barrier=barrier):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                barrier.wait()
                results = [way(model, codes) for codes in jobs("cuda")[offset::2]]
            stream.synchronize()
            return results

        with ThreadPoolExecutor(2) as pool:
            for offset, results in enumerate(pool.map(work, range(2))):
                tolerance = 2e-2 if way is under_autocast else 1e-3
                for result, expected in zip(results, wanted[offset::2], strict=True):
                    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


class Decoded(Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return THREADS

    def __getitem__(self, index):
        return in_strips(self.model, jobs()[index]).clone(), in_files(self.model, jobs()[index])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start):
    """Forked after the model was used here, or started anew with a pickled model."""
    model = make()
    wanted = [(in_strips(model, codes), in_files(model, codes)) for codes in jobs()]
    loader = DataLoader(Decoded(model), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120)
    for got, expected in zip(loader, wanted, strict=True):
        torch.testing.assert_close(tuple(got), expected)
