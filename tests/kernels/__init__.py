"""Kernels as functions of tensors, one module per operator: on the emulator everywhere, and on a GPU if there is one."""

import emulator
import pytest
import torch

import movq_ext

MISSING = {
    "emulator": "needs Linux and a host C++ compiler",
    "gpu": "needs a GPU and the extension",
}


def usable(name):
    """Return True if the backend ("emulator" or "gpu") can run here."""
    if name == "emulator":
        return emulator.available()
    return torch.cuda.is_available() and movq_ext.build_info()["extension"] == "loaded"


def backends(**classes):
    """Return a fixture with one parameter per backend: emulator=..., gpu=..."""

    @pytest.fixture(params=classes)
    def backend(request):
        if not usable(request.param):
            pytest.skip(MISSING[request.param])
        return classes[request.param]()

    return backend


def on_gpu(x):
    """Return a copy on the GPU with x's strides and alignment."""
    if x is None:
        return None
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device="cuda")
    return storage.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)
