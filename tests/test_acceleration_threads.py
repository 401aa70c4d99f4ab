"""Another thread accelerates and restores a model while this one computes with it."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerated_models import assert_same, decode, kl, latents, vq
from torch import nn

from movq_ext import accelerate, restore
from movq_ext.model import fusion

MAX_TOGGLES = 400  # per part


def image(channels, size=(4, 6)):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def part_of(model, kind):
    return next(module for module in model.modules() if type(module).__name__ == kind)


# A part, and its inputs.
PARTS = {
    "Decoder": (lambda: kl(layers_per_block=1, mid_block_add_attention=False), (image(4),)),
    "Encoder": (lambda: kl(layers_per_block=1, mid_block_add_attention=False), (image(3),)),
    "ResnetBlock2D": (kl, (image(32), None)),
    "ResnetBlockCondNorm2D": (vq, (image(64), image(4, (2, 3)))),
    "SpatialNorm": (vq, (image(64), image(4, (2, 3)))),
    "Upsample2D": (kl, (image(64),)),
    "Attention": (kl, (image(64),)),
    "GroupNorm": (lambda: nn.Sequential(kl().decoder.conv_norm_out), (image(32),)),
}
PATHS = {"Decoder": "/movq_ext/diffusers/coders.py", "Encoder": "/movq_ext/diffusers/coders.py"}  # without those of their blocks


class Toggle:
    """Call a function at the n-th line that runs in diffusers or movq_ext.diffusers, as a switch to another thread would.

    path: count only lines of files that have this in their path.
    """

    def __init__(self, n, function, path="/diffusers/"):
        self.n, self.function, self.path, self.lines = n, function, path, 0

    def __enter__(self):
        self.previous = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(self.previous)

    def trace(self, frame, event, argument):
        if self.path not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.n:
                sys.settrace(None)
                self.function()
        return self.trace


@torch.no_grad()
@pytest.mark.parametrize("defers", [False, True], ids=["", "deferred biases"])
@pytest.mark.parametrize("before, toggle", [(accelerate, restore), (restore, accelerate)], ids=["restore", "accelerate"])
@pytest.mark.parametrize("kind", PARTS)
def test_a_toggle_at_every_line(kind, before, toggle, defers, monkeypatch):
    make, inputs = PARTS[kind]
    model = make()
    if kind == "GroupNorm":
        model = nn.ModuleDict({"conv_norm_out": model[0]})
    part = part_of(model, kind)
    expected = part(*inputs)
    if defers:  # as on a GPU
        monkeypatch.setattr(fusion, "runs_kernels", lambda x: True)
    for n in range(1, MAX_TOGGLES):
        before(model)
        with Toggle(n, lambda: toggle(model), PATHS.get(kind, "/diffusers/")) as line:
            out = part(*inputs)
        assert_same([out], [expected])
        if line.lines < n:
            break
    # torch's own group norm runs no line, and diffusers' own decoder none of these
    runs_few_lines = kind == "GroupNorm" or (kind in PATHS and before is restore)
    assert n < MAX_TOGGLES - 1 and (n > 5 or runs_few_lines)


@torch.no_grad()
def test_threads_decode_while_another_toggles():
    model, stop = vq(), threading.Event()
    z = latents(model)
    expected = decode(model, z)

    def toggle():
        while not stop.is_set():
            accelerate(model)
            restore(model)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(3) as pool:
        toggling = pool.submit(toggle)
        try:
            outs = [out for _ in range(5) for out in pool.map(lambda _: decode(model, z), range(2))]
        finally:
            stop.set()
            sys.setswitchinterval(interval)
        toggling.result()
    for out in outs:
        assert_same([out], [expected])
