"""The interpreter of torch.save's pickles, and what a forged pickle can make it do."""

import functools
import io
import json
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import forged_checkpoints as forged
import pytest
import torch

from movq_ext.io.stored_tensors import Storage
from movq_ext.io.torch_pickles import PickleReader, Placeholder, storage_dtype

HERE = Path(__file__).parent
STORAGE = Storage(Path("a.pt"), (), torch.float32, 48)


def read(value, max_opcodes=100_000):
    """Return the value of a pickle of opcodes. Every persistent id is STORAGE's."""
    return PickleReader(lambda persistent_id: STORAGE, max_opcodes).read(io.BytesIO(forged.PROTOCOL + value + forged.STOP))


# --- Memory and time


def test_forged_pickles_take_no_memory(tmp_path):
    """In a process that can have 256 MiB more, where torch.load fails for lack of memory."""
    script = textwrap.dedent("""
        import json, re, resource
        import forged_checkpoints as forged
        from pathlib import Path
        from movq_ext import CheckpointError, from_pretrained

        def read(path, write=None, *arguments):
            if write is not None:
                write(path, *arguments)
            try:
                from_pretrained(path)
            except CheckpointError as error:
                return str(error)

        values = {name: forged.dictionary(a=value) for name, value in forged.ALLOCATING_PICKLES.items()}
        zipped, legacy = Path("a.ckpt"), Path("a.pt")
        read(zipped, forged.write_archive, forged.dictionary(a=b"N"))  # imports what every read needs
        used = int(re.search(r"VmSize:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
        errors = {name: read(zipped, forged.write_archive, value) for name, value in values.items()}
        errors["legacy"] = read(legacy, forged.write_legacy, values["bytearray"])
        errors["storage"] = read(legacy, forged.write_legacy, forged.dictionary(a=forged.scalar(forged.BIG // 4, b"N")))
        errors["directories"] = read(Path("directories.ckpt"))
        errors["opcodes"] = read(zipped, forged.write_archive, forged.dictionary(a=b"](" + b"}" * (5 << 20) + b"e"))
        errors["memo"] = read(zipped, forged.write_archive, forged.dictionary(a=b"Nr" + bytes([255]) * 4))
        print(json.dumps(errors))
    """)
    small = functools.partial(forged.write_archive, value=forged.dictionary(a=forged.scalar()))
    large = functools.partial(small, storages=[bytes(forged.BIG)], compression=zipfile.ZIP_DEFLATED)
    forged.write_two_directories(tmp_path / "directories.ckpt", small, large)
    env = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    errors = json.loads(run.stdout)
    assert len(errors) == len(forged.ALLOCATING_PICKLES) + 5
    failed = {name: error for name, error in errors.items() if error is None or re.search("memory|alloc", error, re.IGNORECASE)}
    assert not failed


def test_a_key_that_holds_itself_many_times_takes_no_time():
    doubled = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    (key,) = read(b"}" + doubled + b"Ns")
    assert isinstance(key, Placeholder)


def test_opcodes_are_limited():
    assert len(read(b"](" + b"}" * 90 + b"e", max_opcodes=95)) == 90
    with pytest.raises(ValueError, match="expected a pickle of at most 93 opcodes for a file of this size, got more"):
        read(b"](" + b"}" * 90 + b"e", max_opcodes=93)
    pairs = b"](" + forged.tuple_of(forged.text("a"), b"N") * 50 + b"e"
    with pytest.raises(ValueError, match="at most 500 opcodes"):  # one list in many dictionaries
        read(forged.list_of(pairs, b"ccollections\nOrderedDict\nh\0\x85R", 10), max_opcodes=500)


# --- What is read


def test_values():
    assert read(b"}(" + forged.text("a") + b"K\1" + forged.number(-1) + b"](NI0\n"[:3] + b"\x88\x89G" + bytes(8) + b"eu") == {
        "a": 1, -1: [None, True, False, 0.0]
    }  # fmt: skip
    assert read(forged.tuple_of() + b"\x85") == ((),) and read(b"U\3abc") == "abc"
    assert read(b"ccollections\nOrderedDict\n]](X\1\0\0\0aK\1ea\x85R") == {"a": 1}  # as Python 2 writes it


def test_tensors():
    tensor = read(forged.tensor(12, 2, forged.sizes(2, 3), forged.sizes(4, 1)))
    assert (tensor.storage, tensor.dtype, tensor.offset, tensor.shape, tensor.stride) == (
        STORAGE,
        torch.float32,
        2,
        (2, 3),
        (4, 1),
    )
    for function in ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"):
        parameter = read(forged.call(function, forged.tensor(12, 0, forged.sizes(12), forged.sizes(1)), b"\x88", b"}"))
        assert parameter.shape == (12,)


@pytest.mark.parametrize(("value", "message"), [
    (b"c__builtin__\neval\n\x85R.", "stack|tuple|index"), (b"N)R", "expected a function, got NoneType"),
    (b"ca\nb\nNR", "expected a tuple of arguments, got NoneType"), (b"N(NNu", "expected a dictionary, got NoneType"),
    (b"N(Ne", "expected a list to append to, got NoneType"), (b"\x8c\1a", "opcode SHORT_BINUNICODE, which"),
    (b"\xff", "opcode b'\\\\xff' unknown"), (b"h\7", "7"), (b"e", "pop"),
    (forged.tensor(1, 0, forged.sizes(13), forged.sizes(1)), r"a tensor of shape \(13,\) does not lie within its storage"),
    (forged.tensor(1, 11, forged.sizes(2, 1), forged.sizes(1, 9)), r"shape \(2, 1\) does not lie within"),
    (forged.tensor(1, 0, forged.sizes(2), forged.sizes(-1)), r"expected at most 64 sizes and as many strides, got \(0, 2, -1\)"),
    (forged.tensor(1, 0, forged.sizes(1), forged.sizes()), "as many strides"),
    (forged.tensor(1, 0, forged.sizes(*[1] * 65), forged.sizes(*[1] * 65)), "at most 64 sizes"),
    (forged.tensor(1, 0, b"\x88\x85", forged.sizes(1)), "as many strides, got"),
])  # fmt: skip
def test_a_damaged_pickle_is_an_error(value, message):
    with pytest.raises((ValueError, TypeError, IndexError, KeyError), match=message):
        read(value)


def test_storage_classes():
    assert storage_dtype(read(b"ctorch\nBFloat16Storage\n")) == torch.bfloat16
    with pytest.raises(ValueError, match=r"expected a storage class, got os\.system"):
        storage_dtype(read(b"cos\nsystem\n"))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_every_dtype_of_a_storage_is_known():
    for kind in torch._storage_classes:
        if kind.__name__ != "TypedStorage":
            expected = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            assert storage_dtype(read(f"ctorch\n{kind.__name__}\n".encode())) == expected
