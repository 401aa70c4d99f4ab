"""The interpreter of torch.save's pickles, and what a forged pickle can make it do."""

import functools
import io
import json
import re
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import forged_checkpoints as forged
import pytest
import torch

from movq_ext.io.stored_tensors import Storage
from movq_ext.io.torch_pickles import PickleReader, Placeholder, storage_dtype

HERE = Path(__file__).parent
FLOAT = forged.name("torch.float32")
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


def doubled_list(times):
    """A list that holds itself 2**times times."""
    return b"]" + b"".join(b"q" + bytes([i]) + b"0](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(times))


def test_keys_of_equal_hashes_become_placeholders():
    """Python's integers and floats repeat their hashes; a dictionary of equal hashes takes quadratic time."""
    period = sys.hash_info.modulus
    large = b"".join(forged.number(i * period) + b"N" for i in range(1, 9))
    value = read(b"}(" + large + b"G" + bytes(8) + b"NK\1N" + forged.number(-1) + b"Nu")
    assert [key for key in value if not isinstance(key, Placeholder)] == [1, -1]
    assert [key.original for key in value if isinstance(key, Placeholder)] == ["int"] * 8 + ["float"]
    items = b"](K\1" + forged.number(period) + b"G" + bytes(8) + forged.text("a") + b"Ne"
    assert read(forged.call("builtins.set", items)) == {1, "a", None}


@pytest.mark.parametrize("function", ["torch._utils._rebuild_tensor_v2", "builtins.set"])
def test_unused_arguments_take_no_time(function):
    """They would take seconds if each of the calls copied them."""
    first = forged.storage(1) + b"K\0))" if "tensor" in function else b"]" * 4
    many = forged.name(function) + b"q\1" + b"(" + first + (b"N" if "tensor" in function else b"]") * 100_000 + b"tq\2R"
    start = time.process_time()
    read(many + b"h\1h\2R" * 20_000, max_opcodes=200_000)
    assert time.process_time() - start < 2


def test_opcodes_are_limited():
    assert len(read(b"](" + b"}" * 90 + b"e", max_opcodes=95)) == 90
    with pytest.raises(ValueError, match="expected a pickle of at most 93 opcodes for a file of this size, got more"):
        read(b"](" + b"}" * 90 + b"e", max_opcodes=93)
    many = forged.sizes(*[1] * 50)
    with pytest.raises(ValueError, match="at most 500 opcodes"):  # one shape in many tensors
        read(forged.list_of(forged.tuple_of(forged.storage(1), b"K\0", many, many),
                            forged.name("torch._utils._rebuild_tensor") + b"h\0R", 9), max_opcodes=500)  # fmt: skip
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
    (b"N(Ne", "expected a list to append to, got NoneType"), (b"\x8c\1a", "got opcode SHORT_BINUNICODE"),
    (b"\xff", "opcode b'\\\\xff' unknown"), (b"h\7", "7"), (b"e", "pop"),
    (forged.tensor(1, 0, forged.sizes(13), forged.sizes(1)), r"a tensor of shape \(13,\) does not lie within its storage"),
    (forged.tensor(1, 11, forged.sizes(2, 1), forged.sizes(1, 9)), r"shape \(2, 1\) does not lie within"),
    (forged.tensor(1, 0, forged.sizes(2), forged.sizes(-1)), "expected sizes, strides and an offset from 0 on, got 0, 2, -1$"),
    (forged.tensor(1, 0, forged.sizes(1), forged.sizes()), "expected 1 strides for as many sizes, got 0"),
    (forged.tensor(1, 0, forged.sizes(*[1] * 65), forged.sizes(*[1] * 65)), "expected a tuple of at most 64 sizes or strides"),
    (forged.tensor(1, 0, b"\x88\x85", forged.sizes(1)), "an offset from 0 on, got 0, bool, 1$"),
    # Later opcodes can change a list or a dictionary.
    (forged.tensor(1, 0, b"]K\1a", forged.sizes(1)), "expected a tuple of at most 64 sizes or strides, got list"),
    (forged.tensor(1, 0, forged.sizes(1), b"]K\1a"), "sizes or strides, got list"),
    (forged.tensor(1, 0, forged.call("torch.Size", b"]K\1a"), forged.sizes(1)), "sizes or strides, got list"),
    (forged.tensor(1, 0, b"}", b"}"), "sizes or strides, got dict"),
    (forged.call("torch._utils._rebuild_meta_tensor_no_storage", FLOAT, b"]K\1a", b")", b"\x89"), "got list"),
    (forged.call("torch._utils._rebuild_tensor_v2", forged.scalar(), b"K\0", b")", b")"), "of a storage, got StoredTensor"),
    (forged.tensor(1, 0, forged.sizes(2**63), forged.sizes(1)), "an offset from 0 on, got 0, int, 1$"),
    # The text of a list that holds itself many times would fill the memory.
    (forged.tensor(1, 0, doubled_list(16) + b"\x85", forged.sizes(1)), "an offset from 0 on, got 0, list, 1$"),
    (b"ca" + b"b" * 1024 + b"\nc\n", "expected names of at most 1024 characters, got 1027"),
    (forged.call("torch._tensor._rebuild_from_type_v2", forged.name("torch._tensor._rebuild_from_type_v2"),
                 forged.name("torch.Tensor"), forged.tuple_of()), "expected a tensor of a subclass, got one that is nested"),
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
