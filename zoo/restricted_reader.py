"""Read PyTorch's pickled checkpoints without running anything that is in them.

A ``.pth`` file is a program for the pickle machine, and published ones name whatever their author had at hand:
argparse namespaces, mm configs, numpy scalars. Here is a pickle machine over a closed set of values: text, numbers,
plain containers, tensors whose every bound is checked against the file, and ``Inert`` placeholders for all the rest.
A name in the file is only ever compared with the names below: nothing is imported, looked up or called, and no
attribute is set.

Both formats of ``torch.save`` are read: the zip archive (memory-mapped, so tensors nobody uses cost nothing) and the
stream of torch < 1.6.
"""

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from zoo.printable import printable

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
# Quantized tensors become placeholders, but their storages lie between the others in an old file and must be measured.
STORAGE_DTYPES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64},
    **{"QInt32": torch.int32, "QInt8": torch.int8, "QUInt8": torch.uint8},
    **{"QUInt4x2": torch.uint8, "QUInt2x4": torch.uint8, "Untyped": torch.uint8, "_Untyped": torch.uint8},
}
STORAGES = {
    f"{module}.{name}Storage": dtype
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, dtype in STORAGE_DTYPES.items()
}
MAPPINGS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
SEQUENCES = {
    "torch.Size": tuple,
    **{f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
}
PARAMETERS = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
}
CONSTANTS = {
    *("NONE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# An expanded tensor may be larger than its storage; what exceeds the file by more than this is an attack on the memory.
EXPANSION_ALLOWANCE = 64 * 2**20
MAX_DIMS = 64


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit; the message is one sentence for the user."""

    def __str__(self) -> str:
        return printable(super().__str__())  # it may hold names from the file


class Inert(dict):
    """What an object of any class unknown to this module becomes: its class's name and, if it was a mapping, its items.

    Attributes:
        name: the dotted name that the file gave, never looked up.
    """

    __slots__ = ("name",)
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __repr__(self) -> str:
        return f"<inert {self.name}>"


@dataclass(frozen=True)
class _Global:
    """A class or function that the file names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A flat run of elements; ``values`` is 1-D and may start inside a larger storage."""

    values: Tensor


def read_pickled(path: Path) -> Any:
    """Read what ``torch.save`` wrote, of either format, without running anything.

    Args:
        path: the file.

    Returns:
        What was saved, with CPU tensors; parameters come as plain tensors, ordered and default dicts as dicts, objects
        of unknown classes as ``Inert``. Tensors that shared memory share it. They map the file privately: writing to
        them does not write to it.

    Raises:
        CheckpointError: the file is damaged, hostile, or of another format.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise CheckpointError(f"{path} is empty: download it again.")
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            if view[:4] == b"PK\x03\x04":
                return _read_archive(file, view)
            if view[:1] == b"\x80":
                return _read_legacy(view)
            if view[257:262] == b"ustar":
                raise CheckpointError("it is in the tar format of torch < 0.2: load and save it with an older torch")
            raise CheckpointError(f"it begins with {view[:16]!r}, neither a PyTorch nor a safetensors file")
        except Exception as error:  # whatever step a damaged file makes fail, it is the file's fault
            reason = str(error).partition("\n")[0][:200]
            if not isinstance(error, CheckpointError):
                reason = f"it is damaged ({type(error).__name__}: {reason})"
            raise CheckpointError(f"Cannot read {path} as a checkpoint: {reason}.") from error


def _read_archive(file: BinaryIO, view: mmap.mmap) -> Any:
    """Read the zip format: <name>/data.pkl and one stored record <name>/data/<key> for each storage."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in records:
        raise CheckpointError("it is a zip archive without data.pkl, not written by torch.save")
    if "constants.pkl" in records:
        raise CheckpointError("it is a TorchScript archive: save the state dict of the module instead")

    def span(name: str) -> tuple[int, int]:
        if name not in records:
            raise CheckpointError(f"the record {name[:40]!r} is missing")
        info = records[name]
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError("its records are compressed, not as torch.save writes them: zip it with 'zip -0'")
        signature, name_size, extra_size = struct.unpack_from("<4s22x2H", view, info.header_offset)
        start = info.header_offset + 30 + name_size + extra_size
        if signature != b"PK\x03\x04" or start + info.file_size > len(view):
            raise CheckpointError(f"the record {name[:40]!r} lies outside the file")
        return start, info.file_size

    if "byteorder" in records:
        start, size = span("byteorder")
        if view[start : start + size] != b"little":
            raise CheckpointError("it is not little-endian: save it again on a little-endian machine")

    storages: dict[str, Tensor] = {}

    def load(key: str, nbytes: int) -> Tensor:
        if key not in storages:
            start, size = span(f"data/{key}")
            flat = torch.empty(0, dtype=torch.uint8)
            if size:  # frombuffer refuses empty ones
                flat = torch.frombuffer(view, dtype=torch.uint8, count=size, offset=start)
            # torch aligns its records, other zip programs do not, and vector instructions want alignment
            storages[key] = flat.clone() if flat.data_ptr() % 16 else flat
        if nbytes > len(storages[key]):
            raise CheckpointError(f"storage {key[:40]!r} claims {nbytes} bytes and has {len(storages[key])}")
        return storages[key]

    start, size = span("data.pkl")
    return _Machine(io.BytesIO(view[start : start + size]), len(view), load).run()


def _read_legacy(view: mmap.mmap) -> Any:
    """Read the format of torch < 1.6: five pickles, then (element count, elements) for each storage."""
    storages: dict[str, Tensor] = {}
    claimed = 0

    def load(key: str, nbytes: int) -> Tensor:
        nonlocal claimed
        if key not in storages:
            claimed += nbytes
            if claimed > len(view):
                raise CheckpointError("its storages claim more bytes than the file has")
            storages[key] = torch.empty(nbytes, dtype=torch.uint8)  # filled below
        if nbytes > len(storages[key]):
            raise CheckpointError(f"storage {key[:40]!r} is used at two sizes")
        return storages[key]

    machines = [_Machine(view, len(view), load) for _ in range(5)]
    if machines[0].run() != LEGACY_MAGIC or machines[1].run() != LEGACY_PROTOCOL:
        raise CheckpointError("it is a pickle, but not one written by torch.save")
    machines[2].run()  # facts about the machine that wrote it
    content = machines[3].run()
    keys = machines[4].run()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(storages):
        raise CheckpointError("its list of storages is not the one that its tensors use")
    offset = view.tell()
    for key in keys:
        (count,) = struct.unpack_from("<q", view, offset)
        storage = storages[key]
        if len(storage) % count if count > 0 else count != len(storage):
            raise CheckpointError(f"storage {key[:40]!r} has {count} elements, which do not fill {len(storage)} bytes")
        if len(storage):
            storage.copy_(torch.frombuffer(view, dtype=torch.uint8, count=len(storage), offset=offset + 8))
        offset += 8 + len(storage)
    return content


def _key(value: Any) -> Any:
    """A safe dict key: hashing a tuple nested a million deep overflows the C stack, and huge integers may collide."""
    safe = abs(value) < 2**60 if type(value) is int else isinstance(value, (str, bytes, bool, float, type(None), Inert))
    return value if safe else Inert(type(value).__name__)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


class _Machine:
    """Runs one pickle. ``pickletools`` decodes the opcodes; what they do is here.

    Args:
        stream: positioned at the pickle; left behind its end.
        file_size: bytes of the whole file, the measure of what it may claim.
        load: gives the bytes of a storage by key, at least as many as asked.
    """

    def __init__(self, stream: BinaryIO | mmap.mmap, file_size: int, load: Callable[[str, int], Tensor]) -> None:
        self.stream, self.file_size, self.load = stream, file_size, load
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self) -> Any:
        """The value that the pickle builds."""
        for opcode, argument, _ in pickletools.genops(self.stream):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise CheckpointError("its pickle has no end")

    def step(self, opcode: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        match opcode:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GLOBAL":  # genops joins the module and the name with a space
                stack.append(_Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Global(f"{module:s}.{name:s}"))
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                self.push(tuple(self.pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                first = len(stack) - int(opcode[-1])
                if first < 0:
                    raise CheckpointError("its pickle is cut off or damaged")
                stack[first:] = [tuple(stack[first:])]
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack[-1] = self.call(stack[-1], arguments)
            case "NEWOBJ_EX":  # keyword arguments, which nothing known here takes
                _, arguments = stack.pop(), stack.pop()
                stack[-1] = self.call(stack[-1], arguments)
            case "OBJ":
                function, *arguments = self.pop_mark()
                self.push(self.call(function, tuple(arguments)))
            case "INST":
                arguments = tuple(self.pop_mark())
                self.push(self.call(_Global(argument.replace(" ", ".")), arguments))
            case "BUILD":  # nothing here has a state to set
                stack.pop()
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(set())
            case "DICT":
                items = self.pop_mark()
                self.push({})
                self.set_items(items)
            case "LIST":
                self.push(self.pop_mark())
            case "FROZENSET":
                self.push(frozenset(map(_key, self.pop_mark())))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "APPEND":
                self.append([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self.append(self.pop_mark())
            case "DUP":
                stack.append(stack[-1])
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                self.pop_mark()
            case "PROTO" | "FRAME":
                pass
            case _ if opcode in CONSTANTS:
                stack.append(argument)
            case _:
                raise CheckpointError(f"it uses the pickle opcode {opcode}, which torch.save never writes")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(map(_key, items))
        elif isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise CheckpointError("it appends to something that is not a list")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise CheckpointError("it sets items of something that is not a dict")
        target.update(zip(map(_key, items[::2]), items[1::2]))

    def call(self, function: Any, arguments: Any) -> Any:
        """What REDUCE and its kin give: a tensor or container for the few names known, else a placeholder."""
        name = function.name if isinstance(function, _Global) else type(function).__name__
        if not isinstance(arguments, tuple):
            raise CheckpointError(f"the arguments of {name[:80]} are not a tuple")
        if name == "torch._tensor._rebuild_from_type_v2":  # (function, type, arguments, state)
            return self.call(arguments[0], arguments[2])
        if name in PARAMETERS and arguments and isinstance(arguments[0], Tensor):
            return arguments[0]
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return self.tensor(*arguments[:4], dtype=None, metadata=arguments[6:])
        if name == "torch._utils._rebuild_tensor_v3":
            return self.tensor(*arguments[:4], dtype=DTYPES[arguments[6].name], metadata=arguments[7:])
        if name in MAPPINGS:  # of nothing, of pairs, of a dict; a defaultdict's factory is dropped
            items = self.copy(arguments[0]) if arguments and isinstance(arguments[0], (list, dict)) else []
            if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in items):
                raise CheckpointError(f"the items of {name} are not pairs")
            return {_key(key): value for key, value in items}
        if name in SEQUENCES:
            return SEQUENCES[name](map(_key, self.copy(*arguments)))
        return Inert(name)

    def copy(self, items: Any = ()) -> list[Any]:
        """The items, counted: an honest file names each once, so copies beyond its size are an amplification attack."""
        if not isinstance(items, (list, tuple, dict)):
            raise CheckpointError("it builds a container from something that is not one")
        self.copied += len(items)
        if self.copied > self.file_size:
            raise CheckpointError("it builds more items than it has bytes")
        return list(items.items() if isinstance(items, dict) else items)

    def persistent(self, identity: Any) -> Any:
        """A storage, for ("storage", type, key, location, numel[, view]); anything else is a placeholder."""
        if not isinstance(identity, tuple) or not 5 <= len(identity) <= 6 or identity[0] != "storage":
            return Inert("persistent object")
        _, storage_type, key, _, numel, *view = identity
        dtype = STORAGES[storage_type.name]
        if not isinstance(key, str) or not _is_size(numel):
            raise CheckpointError("the key or the length of a storage is not valid")
        nbytes = numel * dtype.itemsize
        values = self.load(key, nbytes)[:nbytes].view(dtype)
        if view and isinstance(view[0], tuple):  # (key, offset, length) in a root storage: torch < 0.4
            _, offset, length = view[0]
            if not _is_size(offset) or not _is_size(length) or offset + length > numel:
                raise CheckpointError(f"a view of storage {key[:40]!r} runs past its end")
            values = values[offset : offset + length]
        return _Storage(values)

    def tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None, metadata: tuple[Any, ...]
    ) -> Tensor | Inert:
        """The strided view of a storage, once it is known to lie inside; ``dtype`` None is the storage's own."""
        if any(metadata):  # lazily conjugated or negated
            return Inert("torch.Tensor")
        values = storage.values if dtype is None else storage.values.view(dtype)
        if not all(isinstance(part, (tuple, list)) for part in (size, stride)) or len(size) != len(stride):
            raise CheckpointError("the size or stride of a tensor is not valid")
        if len(size) > MAX_DIMS or not all(map(_is_size, (offset, *size, *stride))):
            raise CheckpointError("the size, stride or offset of a tensor is not valid")
        numel = math.prod(size)
        if numel == 0:
            return values.new_empty(size)
        if offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(values):
            raise CheckpointError(f"a tensor of size {tuple(size)} runs past the end of its storage")
        if numel * values.itemsize > self.file_size + EXPANSION_ALLOWANCE:
            raise CheckpointError(f"a tensor of size {tuple(size)} is far larger than the file")
        return values.as_strided(size, stride, values.storage_offset() + offset)
