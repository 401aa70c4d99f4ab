"""Kernels as functions of tensors, one module for each operator: on the emulator everywhere, on the GPU where there is one."""

import emulator
import pytest
import torch

import movq_ext

MISSING = {"emulator": "needs Linux and a host C++ compiler", "gpu": "needs a GPU and the extension"}


def usable(name):
    if name == "emulator":
        return emulator.available()
    return torch.cuda.is_available() and movq_ext.build_info()["extension"] == "loaded"


def backends(**classes):
    """A fixture that is each of the classes in turn: emulator=..., gpu=..."""

    @pytest.fixture(params=classes)
    def backend(request):
        if not usable(request.param):
            pytest.skip(MISSING[request.param])
        return classes[request.param]()

    return backend


def on_gpu(x):
    """A copy with x's strides and its distance from a 16-byte boundary."""
    if x is None:
        return None
    store = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device="cuda")
    return store.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
