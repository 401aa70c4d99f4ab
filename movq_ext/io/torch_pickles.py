"""Interpret the pickle of a ``torch.save`` file. Nothing that it names is imported or called."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from typing import IO, Any

import torch

from .files import MAX_SHOWN_CHARACTERS, printable
from .stored_tensors import Storage, StorageView, StoredTensor

DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
STORAGE_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64, "Untyped": torch.uint8,
    "QUInt8": torch.quint8, "QInt8": torch.qint8, "QInt32": torch.qint32, "QUInt4x2": torch.quint4x2,
    "QUInt2x4": torch.quint2x4,
}  # fmt: skip
PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # protocol 2 has their old names
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONTAINERS: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
MAX_KEY_BITS = 31  # of an integer: the hashes of larger ones repeat, as do those of floats
MAX_NAME_CHARACTERS = 1 << 10  # of a class or function


class Global:
    """A class or function that the pickle names."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Placeholder(dict[Any, Any]):
    """Takes the place of an object whose class is not imported. Holds the object's items and state and does nothing else."""

    __slots__ = ("original", "state")

    def __init__(self, original: str) -> None:
        super().__init__()
        self.original = original  # the qualified name of the object's class, or of the function that returned it
        self.state: Any = None

    __hash__ = object.__hash__  # type: ignore[assignment]  # a pickle may use it as a key
    __eq__ = object.__eq__
    __ne__ = object.__ne__


class PickleReader:
    """Reads pickles as `torch.save` writes them (protocol 2).

    Containers, numbers and strings become themselves, `torch.nn.Parameter` and tensors `StoredTensor`, and every other object a
    `Placeholder`. A value never takes more than a small multiple of its bytes in the pickle.

    Args:
        find_storage: returns the storage of a persistent id, or a view of it.
        max_opcodes: of all pickles. An opcode of one byte can make an object of 64.

    Attributes:
        names: the classes and functions that the pickles name.
    """

    def __init__(self, find_storage: Callable[[Any], Storage | StorageView], max_opcodes: int) -> None:
        self.find_storage, self.max_opcodes, self.opcodes = find_storage, max_opcodes, 0
        self.names: set[str] = set()
        self._stack: list[Any] = []
        self._marks: list[int] = []

    def read(self, file: IO[bytes]) -> Any:
        """Return the value of the pickle at the file's position, and leave the position after it.

        Raises ValueError, or any error of a wrong type or a missing value, for a damaged pickle.
        """
        self._stack, self._marks = [], []
        memo: dict[int, Any] = {}
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            self._count(1)
            match opcode.name:
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = self._stack[-1]
                case "BINGET" | "LONG_BINGET":
                    self._stack.append(memo[argument])
                case "BINUNICODE" | "SHORT_BINSTRING" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                    self._stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    self._stack.append(CONSTANTS[opcode.name])
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    self._stack.append(CONTAINERS[opcode.name]())
                case "MARK":
                    self._marks.append(len(self._stack))
                case "POP":  # of a tuple that holds itself, as is the next
                    self._pop(1)
                case "POP_MARK":
                    self._pop_marked()
                case "TUPLE":
                    self._stack.append(tuple(self._pop_marked()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    self._stack.append(tuple(self._pop(int(opcode.name[-1]))))
                case "APPEND" | "APPENDS":
                    items = self._pop(1) if opcode.name == "APPEND" else self._pop_marked()
                    _extend(self._stack[-1], items)
                case "SETITEM" | "SETITEMS":
                    items = self._pop(2) if opcode.name == "SETITEM" else self._pop_marked()
                    _update(self._stack[-1], zip(items[::2], items[1::2], strict=True))
                case "GLOBAL":
                    if len(argument) > MAX_NAME_CHARACTERS:
                        raise ValueError(f"expected names of at most {MAX_NAME_CHARACTERS} characters, got {len(argument)}")
                    module, _, name = argument.partition(" ")
                    full_name = f"{PYTHON_2_MODULES.get(module, module)}.{name}"
                    self.names.add(full_name)
                    self._stack.append(Global(full_name))
                case "BINPERSID":
                    self._stack.append(self.find_storage(self._stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    function, arguments = self._pop(2)
                    self._stack.append(self._call(function, arguments))
                case "BUILD":
                    state = self._stack.pop()
                    if isinstance(self._stack[-1], Placeholder):
                        self._stack[-1].state = state
                case "STOP":
                    return self._stack.pop()
                case "PROTO":
                    pass
                case _:
                    raise ValueError(f"expected pickle protocol 2, torch.save's default, got opcode {opcode.name}")

    def _count(self, opcodes: int) -> None:
        self.opcodes += opcodes
        if self.opcodes > self.max_opcodes:
            raise ValueError(f"expected a pickle of at most {self.max_opcodes} opcodes for a file of this size, got more")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_marked(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return the tensor or container that a known function would return, or a placeholder."""
        if not isinstance(arguments, tuple):
            raise TypeError(f"expected a tuple of arguments, got {type(arguments).__name__}")
        if isinstance(function, Placeholder):  # protocol 2 calls functools.partial objects
            return Placeholder(function.original)
        if not isinstance(function, Global):
            raise TypeError(f"expected a function, got {type(function).__name__}")
        match function.name:
            case "collections.OrderedDict":
                ordered: dict[Any, Any] = {}
                for pairs in arguments[:1]:  # of Python 2
                    self._count(len(pairs))  # one list may be in many dictionaries
                    _update(ordered, pairs)
                return ordered
            case "builtins.set":
                items = arguments[0] if arguments else []
                self._count(len(items))
                return {item for item in items if _is_key(item)}
            case "torch.Size":
                return arguments[0]
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
                return self._tensor(arguments[0].dtype, arguments[:4], arguments[6:7])
            case "torch._utils._rebuild_tensor_v3":
                return self._tensor(DTYPES[arguments[6].name], arguments[:4], arguments[7:8])
            case (
                "torch.nn.parameter.Parameter" | "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state"
            ):
                return arguments[0] if arguments and isinstance(arguments[0], StoredTensor) else Placeholder(function.name)
            case "torch._tensor._rebuild_from_type_v2":
                inner, subclass, inner_arguments = arguments[:3]
                if isinstance(inner, Global) and inner.name == function.name:
                    raise ValueError("expected a tensor of a subclass, got one that is nested in another")
                tensor = self._call(inner, inner_arguments)
                plain = subclass.name in ("torch.Tensor", "torch.nn.parameter.Parameter")
                return tensor if plain or not isinstance(tensor, StoredTensor) else tensor.without_data()
            case "torch._utils._rebuild_meta_tensor_no_storage":
                dtype, shape = arguments[:2]
                return self._tensor(DTYPES[dtype.name], (None, 0, shape, ()))
            case "torch._utils._rebuild_qtensor":
                return self._tensor(arguments[0].dtype, arguments[:4]).without_data()
            case "torch._utils._rebuild_sparse_tensor":  # (indices, values, shape, flag) or (indices, indices, values, shape)
                values, shape = arguments[1][-2:] if isinstance(arguments[1][-1], tuple) else arguments[1][-3:-1]
                return self._tensor(values.dtype, (None, 0, shape, ()))
        return Placeholder(function.name)

    def _tensor(self, dtype: torch.dtype, arguments: tuple[Any, ...], metadata: tuple[Any, ...] = ()) -> StoredTensor:
        storage, offset, shape, stride = arguments
        self._count(len(shape) + len(stride))  # one tuple may be in many tensors
        if isinstance(storage, StorageView):
            offset += storage.first
            storage = storage.storage
        flags = metadata[0] if metadata and isinstance(metadata[0], dict) else {}
        return StoredTensor(storage, dtype, offset, shape, stride, conj=flags.get("conj") is True, neg=flags.get("neg") is True)


def storage_dtype(storage_class: Any) -> torch.dtype:
    """Return the dtype of a storage class that a persistent id names, such as ``torch.FloatStorage``."""
    name = storage_class.name.rpartition(".")[2]
    if not name.endswith("Storage") or name.removesuffix("Storage") not in STORAGE_DTYPES:
        raise ValueError(f"expected a storage class, got {printable(storage_class.name, MAX_SHOWN_CHARACTERS)}")
    return STORAGE_DTYPES[name.removesuffix("Storage")]


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Placeholder):  # of a subclass of list, or of a deque
        raise TypeError(f"expected a list to append to, got {type(target).__name__}")


def _update(target: Any, pairs: Iterable[Any]) -> None:
    if not isinstance(target, dict):
        raise TypeError(f"expected a dictionary, got {type(target).__name__}")
    for key, value in pairs:
        target[key if _is_key(key) else Placeholder(type(key).__name__)] = value


def _is_key(value: Any) -> bool:
    """Return True for a value whose hash takes no time, and that a file cannot choose to collide with others."""
    if isinstance(value, int):
        return value.bit_length() <= MAX_KEY_BITS
    return value is None or isinstance(value, (str, Placeholder))
