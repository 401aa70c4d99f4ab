"""Checkpoints of other programs, with objects that torch.load(weights_only=True) refuses."""

import argparse
import builtins
import collections
import enum
import functools
import importlib
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from checkpoints import CODES, make_movq, same_weights

from movq_ext import CheckpointError, from_pretrained, save_pretrained
from movq_ext.io import torch_files
from movq_ext.io.torch_archives import read_archive
from movq_ext.io.torch_files import MAX_FOREIGN_NAMES, read_torch_file
from movq_ext.io.torch_pickles import Placeholder


class Callback:
    def __init__(self):
        self.best = pathlib.Path("best.ckpt")


class Sizes(dict):
    __hash__ = object.__hash__


class Names(list):
    pass


class Kind(enum.Enum):
    A = 1


class Keywords:
    """Created with keywords, for which a pickle calls a functools.partial."""

    def __new__(cls, **values):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"a": 1}


class Call:
    """Pickles to a call of a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


LIGHTNING = {
    "epoch": 3,
    "pytorch-lightning_version": "2.5.0",
    "callbacks": {"ModelCheckpoint": Callback(), "best_model_score": torch.tensor(0.5)},
    "hyper_parameters": {
        "out": pathlib.Path("out"),
        "arguments": argparse.Namespace(rate=0.1),
        "counts": collections.defaultdict(int, a=1),
        "function": functools.partial(print, "hello"),
    },
    "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
}


@pytest.mark.parametrize("entry", LIGHTNING)
def test_a_lightning_checkpoint_gives_its_weights(tmp_path, entry):
    torch.save({"state_dict": make_movq().state_dict(), entry: LIGHTNING[entry]}, tmp_path / "last.ckpt")
    assert same_weights(from_pretrained(tmp_path / "last.ckpt"), make_movq())


def test_a_saved_module_gives_its_weights(tmp_path):
    model = make_movq()
    model.quantize.register_buffer("scratch", torch.zeros(3), persistent=False)
    torch.save(model, tmp_path / "model.pt")
    torch.save({"model": model, "step": 7}, tmp_path / "wrapped.pt")
    for name in ("model.pt", "wrapped.pt"):
        loaded = from_pretrained(tmp_path / name)
        assert same_weights(loaded, model) and loaded is not model
        assert torch.equal(loaded.decode_code(CODES), model.decode_code(CODES))


def test_the_error_names_the_objects(tmp_path):
    state = make_movq().state_dict()
    torch.save({"state_dict": state, "path": pathlib.Path("x")}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"objects other than tensors.*: pathlib.(_local.)?PosixPath\. If you") as raised:
        from_pretrained(tmp_path / "old.ckpt")
    assert "\\x1b" not in str(raised.value) and "add_safe_globals" not in str(raised.value)
    torch.save({"state_dict": state, "a": Call(os.getcwd), "b": Callback()}, tmp_path / "new.ckpt")
    with pytest.raises(
        CheckpointError,
        match=r"could run code: pathlib.(_local.)?PosixPath, posix.getcwd, test_torch_files.Callback\. If you trust",
    ):
        from_pretrained(tmp_path / "new.ckpt")
    torch.save(Callback(), tmp_path / "object.pt")
    with pytest.raises(CheckpointError, match=r"expected a dictionary of named tensors, got test_torch_files.Callback"):
        from_pretrained(tmp_path / "object.pt")


EVENTS = []  # of the audit hook, while a test collects them
WATCHED = ("exec", "compile", "open", "os.", "shutil.", "subprocess.", "socket.", "ctypes.", "import")


COLLECTING = threading.Event()


@functools.cache
def install_audit_hook():
    """Collect audited events while COLLECTING is set. A hook cannot be removed."""

    def hook(event, arguments, collecting=COLLECTING.is_set):  # bound: it also runs while the interpreter ends
        if collecting() and event.startswith(WATCHED):
            EVENTS.append((event, arguments))

    sys.addaudithook(hook)


def test_no_code_of_a_foreign_object_runs(tmp_path, monkeypatch):
    """Each object would leave a trace if its class were imported, created, called or given its state."""
    trace = tmp_path / "trace"
    (tmp_path / "trap.py").write_text(
        f"open({str(trace)!r}, 'w')\n"
        "class Trap:\n"
        "    def __new__(cls, *a): open(PATH, 'w'); return super().__new__(cls)\n"
        "    def __setstate__(self, state): open(PATH, 'w')\n"
        "    def __getattr__(self, name): open(PATH, 'w'); raise AttributeError(name)\n".replace("PATH", repr(str(trace)))
    )
    monkeypatch.syspath_prepend(tmp_path)
    trap = importlib.import_module("trap")
    instance = object.__new__(trap.Trap)
    write = f"open({str(trace)!r}, 'w')"
    objects = [
        instance, trap.Trap, Call(trap.Trap, 1), Call(eval, write), Call(exec, write), Call(builtins.open, str(trace), "w"),
        Call(subprocess.Popen, ["touch", str(trace)]), Call(functools.partial, eval, write), Call(map, eval, [write]),
        Call(importlib.import_module, "trap"), Call(shutil.copy, __file__, str(trace)), Call(getattr, trap.Trap, "x"),
        Call(pickle.loads, pickle.dumps(Call(eval, write))), Call(torch.load, str(tmp_path / "0.ckpt")),
        Call(torch.hub.load, str(tmp_path), "trap"),
        {instance: instance}, (instance, [instance]),
    ]  # fmt: skip
    state = make_movq().state_dict()
    torch.save({"state_dict": state, "bytes": b"\xff"}, tmp_path / "intact.ckpt")
    for i, value in enumerate(objects):
        torch.save({"state_dict": state, "extra": value}, tmp_path / f"{i}.ckpt")
    trace.unlink()  # importing and saving left it
    sys.modules.pop("trap")
    install_audit_hook()
    read_torch_file(tmp_path / "intact.ckpt")  # imports what every read needs
    for i in range(len(objects)):
        EVENTS.clear()
        COLLECTING.set()
        try:
            found = read_torch_file(tmp_path / f"{i}.ckpt")
        finally:
            COLLECTING.clear()
        assert found.keys() == {("state_dict",)}
        others = [event for event in EVENTS if event[0] != "open" or str(event[1][0]) != str(tmp_path / f"{i}.ckpt")]
        assert not others, (objects[i], others)
    assert not trace.exists() and "trap" not in sys.modules


def test_a_placeholder_only_stores_items_and_state(tmp_path):
    value = Sizes(a=1)
    value.__dict__ = {"__class__": dict, "x": 1, "__setstate__": print}
    torch.save(value, tmp_path / "sizes.pt")
    placeholder, names = read_archive(tmp_path / "sizes.pt")
    assert type(placeholder) is Placeholder and placeholder.original == "test_torch_files.Sizes" and dict(placeholder) == {"a": 1}
    assert placeholder.state["x"] == 1 and not hasattr(placeholder, "x")
    assert names == {"test_torch_files.Sizes", "builtins.dict", "builtins.print"}


def tuple_in_itself(length):
    inner = []
    outer = (inner,) * length
    inner.append(outer)
    return outer


@pytest.mark.parametrize("value", [
    Sizes(a=1), Names(["a"]), collections.deque([1, 2], maxlen=3), collections.Counter("aab"), {(1, 2): {3, 4}},
    np.float64(0.5), np.zeros(3), bytearray(b"x"), 1j, torch.optim.SGD([torch.zeros(1)], 0.1), torch.device("cpu"),
    torch.bfloat16, torch.Generator().get_state(), Kind.A, Keywords(a=1), torch.eye(3).to_sparse(), 1 << 3000,
    tuple_in_itself(1), tuple_in_itself(4),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_any_value_may_stand_beside_the_weights(tmp_path, value):
    """As in checkpoints of yacs and EasyDict (subclasses of dict), and of training loops that log NumPy scalars."""
    torch.save({"state_dict": make_movq().state_dict(), "value": value}, tmp_path / "last.ckpt")
    assert same_weights(from_pretrained(tmp_path / "last.ckpt"), make_movq())


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["to_sparse_csr", "to_sparse_csc"])
def test_a_compressed_sparse_tensor_may_stand_beside_the_weights(tmp_path, layout):
    torch.save({"state_dict": make_movq().state_dict(), "value": getattr(torch.eye(3), layout)()}, tmp_path / "last.ckpt")
    assert same_weights(from_pretrained(tmp_path / "last.ckpt"), make_movq())


def test_tied_weights_load_once_and_save(tmp_path):
    """In another dtype too: a file of a few bytes could otherwise take the memory of as many tensors as it has names."""
    state = make_movq().half().state_dict()
    state["decoder.norm_out.conv_b.bias"] = state["decoder.norm_out.conv_y.bias"].detach()
    torch.save(state, tmp_path / "movq.pt")
    model = from_pretrained(tmp_path / "movq.pt")
    norm = model.decoder.norm_out
    assert norm.conv_b.bias.data_ptr() == norm.conv_y.bias.data_ptr() and norm.conv_b.bias.dtype == torch.float32
    save_pretrained(model, tmp_path / "saved")
    assert same_weights(from_pretrained(tmp_path / "saved"), model)


def test_weights_in_a_subclass_of_dict_are_found(tmp_path):
    torch.save(Sizes(state_dict=Sizes(make_movq().state_dict())), tmp_path / "last.ckpt")
    assert same_weights(from_pretrained(tmp_path / "last.ckpt"), make_movq())


def test_no_name_stays_allowed(tmp_path):
    """torch keeps one list of allowed names for the process. Threads share it, and torch.load afterwards must refuse again."""
    before = set(torch.serialization.get_safe_globals())
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": make_movq().state_dict(), **LIGHTNING}, path)
    threads = [threading.Thread(target=lambda: loaded.append(read_torch_file(path))) for _ in range(8)]
    loaded = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 8
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_limits(tmp_path, monkeypatch):
    classes = [type(f"C{i}", (), {}) for i in range(MAX_FOREIGN_NAMES + 1)]
    for each in classes:
        monkeypatch.setattr(sys.modules[__name__], each.__name__, each, raising=False)
    torch.save({"state_dict": make_movq().state_dict(), "classes": classes}, tmp_path / "many.ckpt")
    with pytest.raises(CheckpointError, match=r"could run code: .*C0, .* and 249 more"):
        from_pretrained(tmp_path / "many.ckpt")
    model = torch.nn.Linear(1, 1)
    model.child = torch.nn.Sequential(model)  # a cycle
    torch.save({"model": model}, tmp_path / "cycle.pt")
    assert read_torch_file(tmp_path / "cycle.pt")[("model",)].keys() == {"weight", "bias"}
    nested = {"x": torch.zeros(1)}
    nested["self"] = nested
    torch.save(nested, tmp_path / "nested.pt")
    assert list(read_torch_file(tmp_path / "nested.pt")) == [()]


def test_another_protocol_is_named(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"expected pickle protocol 2, torch\.save's default, got opcode FRAME"):
        from_pretrained(tmp_path / "a.pt")


def test_a_forged_module_is_refused_or_read(tmp_path):
    model = torch.nn.BatchNorm1d(1)
    model._non_persistent_buffers_set = ["running_mean"]  # PyTorch's is a set: a long list would be searched for every name
    torch.save(model, tmp_path / "list.pt")
    assert "running_mean" in read_torch_file(tmp_path / "list.pt")[()]
    model._modules[Sizes(a=1)] = torch.nn.Linear(1, 1)  # the text of a key may be longer than the file
    torch.save(model, tmp_path / "key.pt")
    with pytest.raises(CheckpointError, match="expected text as the names of a saved module's entries"):
        read_torch_file(tmp_path / "key.pt")


def test_entries_of_modules_are_limited_in_all(tmp_path, monkeypatch):
    """A submodule of several saved modules gives its entries once, and the limit holds for the file."""
    shared = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(4)))
    torch.save({f"m{i}": torch.nn.Sequential(shared) for i in range(3)}, tmp_path / "shared.pt")
    found = read_torch_file(tmp_path / "shared.pt").values()
    assert sum(map(len, found)) == len(shared.state_dict())
    torch.save({f"m{i}": torch.nn.Linear(1, 1) for i in range(3)}, tmp_path / "many.pt")
    monkeypatch.setattr(torch_files, "MAX_MODULE_ENTRIES", 5)
    with pytest.raises(CheckpointError, match=r"expected saved modules of at most 5 entries in all, .* got more"):
        read_torch_file(tmp_path / "many.pt")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_zip_archives_of_other_programs_are_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "scripted.pt")
    with pytest.raises(CheckpointError, match=r"scripted.pt is a TorchScript archive"):
        from_pretrained(tmp_path / "scripted.pt")
    with zipfile.ZipFile(tmp_path / "weights.zip", "w") as archive:
        archive.writestr("movq/config.json", "{}")
    with pytest.raises(CheckpointError, match=r"weights.zip is a zip archive that torch.save did not write"):
        from_pretrained(tmp_path / "weights.zip")
