"""Observe calls, hooks and saved tensors without changing anything."""

import contextlib

import torch


def record_calls(monkeypatch, owner, name, describe):
    """Return a list that receives ``describe(result, *args, **kwargs)`` after each call of ``owner.name``."""
    records, original = [], getattr(owner, name)

    def recorded(*args, **kwargs):
        result = original(*args, **kwargs)
        records.append(describe(result, *args, **kwargs))
        return result

    monkeypatch.setattr(owner, name, recorded)
    return records


@contextlib.contextmanager
def saved_for_backward():
    """Context manager: a list that receives the tensors that autograd saves for backward."""
    saved = []

    def save(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        yield saved


class KeepTensors:
    """A forward hook that keeps a layer's inputs and outputs, and copies of them from that moment."""

    def __init__(self):
        self.kept, self.copies = [], []

    def __call__(self, layer, inputs, output):
        for tensor in (inputs[0], output):
            self.kept.append(tensor)
            self.copies.append(tensor.clone())
