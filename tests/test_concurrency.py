"""Several threads, streams or processes decode with one model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from movq_ext import MOVQ, annotate, decode_tiled

pytestmark = pytest.mark.usefixtures("in_strips")

THREADS, ROUNDS = 8, 3
DDCONFIG = dict(
    ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=(16,), in_channels=3, resolution=32, z_channels=4
)
COLUMN_MEMORY = 10_752  # bytes per column of the latents: too few for the second map, which goes to a file
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
    return decode_tiled(model.decoder, z, zq, max_memory=COLUMN_MEMORY * z.shape[3])


@torch.no_grad()
def under_autocast(model, codes):
    # All threads share PyTorch's cache of converted weights, and no stream waits for the one that fills or empties it.
    with torch.autocast(codes.device.type, torch.bfloat16, cache_enabled=not codes.is_cuda):
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


WAYS_TO_DECODE = [in_strips, in_files, under_autocast, layer_by_layer, with_gradients, in_half_precision, annotated]


@pytest.mark.parametrize("add_conv", [False, True])
@pytest.mark.parametrize("decode", WAYS_TO_DECODE)
def test_threads_share_a_model(decode, add_conv):
    """All threads start together on an unused model, so that they race to fill its caches."""
    expected_results = [decode(prepared(decode, add_conv), codes) for codes in jobs()]
    for _ in range(ROUNDS):
        model, barrier = prepared(decode, add_conv), threading.Barrier(THREADS)

        def work(codes, model=model, barrier=barrier):
            barrier.wait()
            return [decode(model, codes) for _ in range(2)]

        with ThreadPoolExecutor(THREADS) as pool:
            for results, expected in zip(pool.map(work, jobs()), expected_results, strict=True):
                for result in results:
                    torch.testing.assert_close(result, expected)


def prepared(decode, add_conv):
    model = make(add_conv=add_conv)
    return model.half() if decode is in_half_precision else model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decode", [in_strips, in_files, under_autocast, layer_by_layer, with_gradients])
def test_streams_share_a_model(decode):
    """Two threads, each on its own stream."""
    expected_results = [decode(make().cuda(), codes) for codes in jobs("cuda")]
    for _ in range(ROUNDS):
        model, barrier = make().cuda(), threading.Barrier(2, timeout=30)  # if one thread fails, the other must not wait forever
        torch.cuda.synchronize()

        def work(offset, model=model, barrier=barrier):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                barrier.wait()
                results = [decode(model, codes) for codes in jobs("cuda")[offset::2]]
            stream.synchronize()
            return results

        with ThreadPoolExecutor(2) as pool:
            for offset, results in enumerate(pool.map(work, range(2))):
                tolerance = 2e-2 if decode is under_autocast else 1e-3
                for result, expected in zip(results, expected_results[offset::2], strict=True):
                    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


class DecodedImages(Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return THREADS

    def __getitem__(self, index):
        return in_strips(self.model, jobs()[index]).clone(), in_files(self.model, jobs()[index])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start):
    """Workers are forked after the parent has used the model, or spawned with a pickled model."""
    model = make()
    expected_results = [(in_strips(model, codes), in_files(model, codes)) for codes in jobs()]
    loader = DataLoader(DecodedImages(model), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120)
    for got, expected in zip(loader, expected_results, strict=True):
        torch.testing.assert_close(tuple(got), expected)
