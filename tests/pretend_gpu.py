"""A GPU that this machine does not have: tensors that count as a GPU's, and kernels planted in place of the compiled ones."""

import torch

from movq_ext.ops import attention_backends
from movq_ext.ops.registration import CPU_IMPLEMENTATIONS

CHUNKED = {f"chunked_{name}": right for name, right in CPU_IMPLEMENTATIONS.items() if "attention" in name}
RIGHT = {**CPU_IMPLEMENTATIONS, **CHUNKED}


class PretendGpu(torch.Tensor):
    """A CPU tensor for which the public functions choose the kernels."""

    is_cuda = property(lambda self: True)


class Kernels:
    """The planted kernels, which count their calls."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.calls = monkeypatch, dict.fromkeys(RIGHT, 0)
        for name, right in RIGHT.items():
            self.plant(name, right)

    def plant(self, name, kernel):
        def counted(*arguments):
            self.calls[name] += 1
            return kernel(*arguments)

        self.monkeypatch.setattr(torch.ops.movq_ext, name, counted, raising=False)

    def plant_error_of(self, name, change):
        right = RIGHT[name]

        def wrong(*arguments):
            results = right(*arguments)
            for result in arguments[:1] if results is None else results:
                change(result)
            return results

        self.plant(name, wrong)


class Machine:
    """A GPU that this machine does not have, for which the extension is compiled, with planted kernels."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.kernels = monkeypatch, Kernels(monkeypatch)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA X100")
        self.measure({})
        self.become((9, 0))

    def become(self, capability, arch_list="8.0 9.0a 10.0", reason=None):
        self.monkeypatch.setattr(attention_backends, "device_capability", lambda index: capability)
        self.monkeypatch.setattr(attention_backends, "arch_list", lambda: arch_list)
        self.monkeypatch.setattr(attention_backends, "device_reason", lambda index: reason)

    def measure(self, table):
        self.monkeypatch.setattr(attention_backends, "read_measured", lambda path: table)

    def request(self, backend):
        self.monkeypatch.setenv(attention_backends.VARIABLE, backend)
