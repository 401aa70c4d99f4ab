"""Random damage to bytes, JSON and pickles."""

import json
import os
import struct
import subprocess

NUMBERS = [0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, 10**30, -1, -(2**31)]
JUNK = [*NUMBERS, None, True, 0.5, 1e308, float("inf"), "", "x", "1", "\ud800", "\0", "../x", "__metadata__", [], {}, [1, 2],
        [[]], {"a": 1}]  # fmt: skip

OPCODES = b"()]}NR\x81b\x85\x86\x87tesuaQ0.\x88h\0q\0\x8f"  # of pickles, mostly without arguments


class Code:
    """Pickles to a call of os.mkdir(trace), which runs if the pickle is loaded unsafely."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


class ForeignCall:
    """Pickles to a call of a function that torch does not block, unlike those of os."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return subprocess.call, (["mkdir", self.trace],)


def nested(value, levels):
    for _ in range(levels):
        value = [value]
    return value


def damage(random, data, others):
    """Cut, flip, overwrite, delete, duplicate or replace bytes with those of another file, mostly near the start."""
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 4, 16])):
        reach = random.choice([16, 64, 512, 4096, len(data)])
        at = random.randrange(max(1, min(reach, len(data))))
        if random.random() < 0.2:
            at = max(0, len(data) - 1 - at)
        length = random.choice([1, 2, 4, 8, 100, 5000])
        other = others[random.choice(list(others))]
        number = struct.pack(random.choice("<>") + "Q", random.choice(NUMBERS) % 2**64)
        action = random.randrange(8)
        if action == 0:
            del data[at:]
        elif action == 1 and data:
            data[at] ^= 1 << random.randrange(8)
        elif action == 2:
            data[at : at + length] = random.randbytes(length)
        elif action == 3:
            del data[at : at + length]
        elif action == 4:
            data[at:at] = data[at : at + length]
        elif action == 5:
            data[at : at + length] = other[at : at + length]
        elif action == 6:
            width = random.choice([1, 2, 4, 8])
            data[at : at + width] = number[:width] if random.random() < 0.5 else number[-width:]
        else:
            data[at : at + length] = bytes(length)
    return bytes(data)


def damage_json(random, value):
    """Return value as JSON text, with parts replaced, nested deeply, repeated or grown."""
    text = json.dumps(value)
    for _ in range(random.choice([0, 1, 1, 2, 5])):
        junk = random.choice(JUNK)
        value = replace_part(random, value, junk)
        text = json.dumps(value)
    extreme = random.randrange(30)
    if extreme == 0:
        text = text.replace(":", ":" + "[" * 10**6, 1)
    elif extreme == 1:
        text = "[" * 10**6 + "]" * 10**6
    elif extreme == 2 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    elif extreme == 3:
        text = text.replace("1", "9" * 10**4, 1)
    elif extreme == 4:
        text = text[:-1] + ', "more": [' + "{}," * 10**6 + "{}]}"
    elif extreme == 5:
        text = "\ufeff" + text
    return text


def replace_part(random, value, junk):
    """Return a copy of value with one part, at any depth, deleted or replaced with junk."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, (list, tuple)) else []
    if not keys or random.random() < 0.1:
        return junk
    key, copy = random.choice(keys), dict(value) if isinstance(value, dict) else list(value)
    action = random.randrange(6)
    if action == 0:
        del copy[key]
    elif action == 1 and isinstance(copy, dict):
        copy[random.choice(["remap", "x", "dropout", "gradient_checkpointing", "self", "beta", "\ud800"])] = junk
    else:
        copy[key] = replace_part(random, copy[key], junk)
    return copy


def change_numbers(random, pickled):
    """Replace integers in a pickle, such as sizes, strides and offsets."""
    places = [i for i in range(len(pickled) - 5) if pickled[i] in b"KMJ"]
    out = bytearray(pickled)
    for i in sorted(random.sample(places, min(len(places), random.choice([1, 2, 8]))), reverse=True):
        width = {b"K": 1, b"M": 2, b"J": 4}[pickled[i : i + 1]]
        number = random.choice([-1, 0, 1, 2, 2**16, 2**31, 2**33, 10**12, 2**62])
        out[i : i + 1 + width] = b"\x8a\x08" + struct.pack("<q", number)
    return bytes(out)


def change_opcodes(random, pickled):
    """Delete, repeat or replace bytes of a pickle without arguments, so that most of it stays a pickle."""
    out = bytearray(pickled)
    for _ in range(random.choice([0, 1, 1, 2, 8])):
        at = random.randrange(len(out))
        out[at : at + random.randrange(2)] = bytes([random.choice(OPCODES)]) * random.choice([0, 1, 1, 5, 10**4])
    return bytes(out)


def pickled_call(module, name, *arguments):
    packed = b"".join(b"\x8a\x08" + struct.pack("<q", argument) for argument in arguments)
    return b"\x80\x02c" + module + b"\n" + name + b"\n(" + packed + b"tR."


def crafted_pickle(random, trace):
    """Return opcodes that no object pickles to."""
    return random.choice([
        pickled_call(b"builtins", b"bytearray", 10**13), pickled_call(b"torch", b"FloatTensor", 10**13),
        pickled_call(b"torch.storage", b"UntypedStorage", 10**13), pickled_call(b"torch", b"Tensor", 10**6, 10**6),
        pickled_call(b"builtins", b"eval", 1), pickled_call(b"collections", b"OrderedDict", 1),
        b"\x80\x02" + b"]" * 10**5 + b".", b"\x80\x02X\xff\xff\xff\xffabc.", b"\x80\x02" + b"(" * 10**5,
        b"\x80\x02j\xff\xff\xff\xff.", b"\x80\x02.", b"\x80\x02(((ttt.", b"\x80\x02]q\0h\0a.", b"\x80\x02}q\0X\x01\0\0\0ah\0s.",
        b"\x80\x02" + b"\x8a\xff" + b"\x7f" * 255 + b".", b"cos\nmkdir\n(S'" + trace.encode() + b"'\ntR.",
    ])  # fmt: skip
