"""The process that runs emulated kernels for emulator.Library. An error that AddressSanitizer finds ends this process only.

Reads pickled calls from standard input and answers on standard output.
"""

import ctypes
import json
import os
import pickle
import struct
import sys

LETTERS = {
    "r": ctypes.c_void_p,
    "P": ctypes.c_void_p,
    "?": ctypes.c_bool,
    "i": ctypes.c_int32,
    "I": ctypes.c_uint32,
    "q": ctypes.c_int64,
    "Q": ctypes.c_uint64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}


class Export(ctypes.Structure):
    _fields_ = [("parameters", ctypes.c_char_p), ("types", ctypes.c_char_p), ("call", ctypes.c_void_p)]


def run_once(library, call, seed):
    """Run once on fresh copies of the buffers; return the error, the counters and the contents of the buffers."""
    library.emu_begin(seed, call["multiprocessors"], call["shared_limit"], call["dependent_launches"])
    for kernel, (first, end) in call["run_blocks"].items():
        library.emu_choose_blocks(kernel.encode(), first, end)
    addresses = [
        library.emu_buffer(name.encode(), data, len(data), offset, writable) for name, data, offset, writable in call["buffers"]
    ]
    export = Export.in_dll(library, "emu_export_" + call["function"])
    types = [LETTERS[letter] for letter in export.types.decode()]
    # Pointers are None or (buffer index, offset); all other values are numbers.
    values = [addresses[v[0]] + v[1] if isinstance(v, tuple) else v for v in call["values"]]
    ctypes.CFUNCTYPE(None, *types)(export.call)(*values)
    contents = []
    for i, (_, data, _, _) in enumerate(call["buffers"]):
        into = ctypes.create_string_buffer(len(data))
        library.emu_read(i, into)
        contents.append(into.raw)
    return library.emu_error().decode(), json.loads(library.emu_report()), contents


def run(library, call):
    """Run under every seed; results that differ in any bit are an error."""
    first = None
    for seed in call["seeds"]:
        error, report, contents = run_once(library, call, seed)
        if error:
            return {"error": f"{error} (seed {seed})"}
        if first is None:
            first = report, contents
        for (name, *_), expected, actual in zip(call["buffers"], first[1], contents, strict=True):
            if expected != actual:
                return {
                    "error": f"'{name}' depends on the order in which threads run: seeds {call['seeds'][0]} and {seed} differ"
                }
    return {"report": first[0], "contents": first[1]}


def main():
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of the kernel must not mix with the answers
    library = ctypes.CDLL(sys.argv[1])
    library.emu_begin.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_size_t, ctypes.c_bool]
    library.emu_choose_blocks.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    library.emu_buffer.restype = ctypes.c_void_p
    library.emu_buffer.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    library.emu_error.restype = library.emu_report.restype = ctypes.c_char_p
    while header := requests.read(8):
        call = pickle.loads(requests.read(struct.unpack("q", header)[0]))
        if "describe" in call:
            export = Export.in_dll(library, "emu_export_" + call["describe"])
            answer = {"parameters": export.parameters.decode(), "types": export.types.decode()}
        else:
            answer = run(library, call)
        data = pickle.dumps(answer)
        answers.write(struct.pack("q", len(data)) + data)
        answers.flush()


if __name__ == "__main__":
    main()
