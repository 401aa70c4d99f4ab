"""Checkpoints that torch.save does not write: pickles of chosen opcodes, and zip archives with chosen directories."""

import io
import struct
import zipfile

PROTOCOL, STOP = b"\x80\x02", b"."
ONE = struct.pack("<f", 1)
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
SIGNATURE, MEMBER, END64, LOCATOR64, END = b"PK\3\4", b"PK\1\2", b"PK\6\6", b"PK\6\7", b"PK\5\6"


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value):
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def tuple_of(*values):
    return b"(" + b"".join(values) + b"t"


def name(dotted):
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(dotted, *arguments):
    """Opcodes that call a function with arguments, which are opcodes themselves."""
    return name(dotted) + tuple_of(*arguments) + b"R"


def storage(elements, key="0", kind="torch.FloatStorage", view=None):
    """The persistent id of a storage. Only the format before torch 1.6 has a view: opcodes, or b"N" for none."""
    return (
        tuple_of(text("storage"), name(kind), text(key), text("cpu"), number(elements), *([] if view is None else [view])) + b"Q"
    )


def sizes(*values):
    return tuple_of(*map(number, values))


def tensor(elements, offset, size, stride, view=None):
    """A tensor of a storage of float32."""
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", storage(elements, view=view), number(offset), size, stride, b"\x89", hooks)


def scalar(elements=1, view=None):
    """A tensor without dimensions, the first element of a storage."""
    return tensor(elements, 0, b")", b")", view)


def dictionary(**values):
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def write_archive(path, value, storages=(ONE,), compression=zipfile.ZIP_STORED, mode="w"):
    """Write a zip archive that holds the pickle of opcodes, and storages ``data/0``, ``data/1``..."""
    with zipfile.ZipFile(path, mode, compression) as archive:
        archive.writestr("a/data.pkl", PROTOCOL + value + STOP)
        archive.writestr("a/version", "3\n")
        for i, data in enumerate(storages):
            archive.writestr(f"a/data/{i}", data)


def write_legacy(path, value, storages=(ONE,), itemsize=4):
    """Write the format before torch 1.6."""
    keys = b"](" + b"".join(text(str(i)) for i in range(len(storages))) + b"e"
    pickles = [number(MAGIC), number(VERSION), b"}", value, keys]
    data = [struct.pack("<q", len(storage) // itemsize) + storage for storage in storages]
    path.write_bytes(b"".join(PROTOCOL + pickle + STOP for pickle in pickles) + b"".join(data))


def write_two_directories(path, for_zipfile, for_torch):
    """Write an archive in which zipfile and torch find different directories.

    Of two zip64 records, zipfile reads the one before the locator, and torch the one that the locator points to.

    Args:
        path: file to write.
        for_zipfile, for_torch: functions that write an archive to a path or file.
    """
    hidden = io.BytesIO()
    for_torch(hidden, mode="w")
    body, record = _with_zip64_record(hidden.getvalue())
    path.write_bytes(body + record)
    for_zipfile(path, mode="a")
    shown, shown_record = _with_zip64_record(path.read_bytes())
    locator = LOCATOR64 + struct.pack("<IQI", 0, len(body), 1)
    end = END + struct.pack("<4H2IH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(shown + shown_record + locator + end)


def _with_zip64_record(archive):
    """Return (archive without its end record, the zip64 record in its place)."""
    body, end = archive[:-22], archive[-22:]
    count, size, offset = struct.unpack("<10xHII2x", end)
    return body, END64 + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, offset)


BIG = 1 << 29  # bytes
ALIASED = b"q\0"  # the value on the stack becomes h\0 (BINGET 0)


def list_of(first, repeated, times):
    """A list of one value and many that refer to it as h\\0."""
    return b"](" + first + ALIASED + repeated * times + b"e"


def digits(times):
    """Hexadecimal digits of hexadecimal digits: each time doubles the length."""
    value = call("_codecs.encode", text("a" * 1024), text("latin1"))
    for _ in range(times):
        value = call("_codecs.encode", value, text("hex"))
    return value


#: Short pickles of functions that torch.load(weights_only=True) allows, and that create 512 MiB or more from them.
ALLOCATING_PICKLES = {
    "bytearray": call("builtins.bytearray", number(BIG)),
    "hexadecimal digits": digits(19),
    "torch.Tensor": call("torch.Tensor", number(BIG // 4)),
    "tensor class": call("torch.FloatTensor", number(BIG // 4)),
    "untyped storage": call("torch.storage.UntypedStorage", number(BIG)),
    "typed storage": call("torch.storage.TypedStorage", number(BIG // 4)),
    "quantised": call("torch._utils._rebuild_qtensor", storage(4, kind="torch.QInt8Storage"), number(0), sizes(BIG), sizes(0),
                      tuple_of(name("torch.per_tensor_affine"), b"G" + struct.pack(">d", 1), number(0)), b"\x89",
                      call("collections.OrderedDict")),
    "dense copy": call("torch._utils._rebuild_device_tensor_from_cpu_tensor", tensor(1, 0, sizes(BIG // 8), sizes(0)),
                       name("torch.float64"), text("cpu"), b"\x89"),
    "tensor state": call("torch.Tensor") + tuple_of(storage(1), number(0), sizes(BIG // 4), sizes(1)) + b"b",
    "larger than its storage": tensor(1, 0, sizes(BIG // 4), sizes(1)),
    "far offset": tensor(1, BIG // 4, sizes(1), sizes(1)),
    "dictionaries": list_of(b"](" + b"".join(tuple_of(number(i), b"N") for i in range(3000)) + b"e",
                            b"ccollections\nOrderedDict\nh\0\x85R", 3000),
    "counters": list_of(b"](" + b"".join(map(number, range(9000))) + b"e", b"ccollections\nCounter\nh\0\x85R", 1500),
    "sets": list_of(b"](" + b"".join(map(number, range(9000))) + b"e", b"cbuiltins\nset\nh\0\x85R", 1500),
    "shapes": list_of(sizes(*[1] * 60000), b"ctorch\nSize\nh\0\x85R", 1500),
}  # fmt: skip
