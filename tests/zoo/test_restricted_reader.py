"""The restricted reader: everything torch.save writes comes back, nothing in a file runs, damage is one clean error."""

import argparse
import collections
import functools
import io
import os
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import textwrap
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.restricted_reader import CheckpointError, Inert, read_pickled

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128),
]
WEIGHT = torch.arange(12.0).reshape(3, 4)


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def archive(path, pickled, storages=(), compression=zipfile.ZIP_STORED):
    """A zip of torch.save's layout around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/byteorder", "little")
        file.writestr("x/version", "3\n")
        for key, data in enumerate(storages):
            file.writestr(f"x/data/{key}", data)
    return path


def tensor_pickle(numel=4, offset=0, size=(4,), stride=(1,), key="0", storage="FloatStorage"):
    """The pickle {"weight": tensor}, with any claims about its storage."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(torch, storage), key, "cpu", numel) if value is marker else None

    class Tensor:
        def __reduce__(self):
            arguments = (marker, offset, size, stride, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    marker, stream = object(), io.BytesIO()
    Pickler(stream, protocol=2).dump({"weight": Tensor()})
    return stream.getvalue()


class Calls:
    """Pickled, an object whose construction calls ``function`` with ``arguments``."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


class WithState:
    """A class of this module that would leave a mark if its state were set."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        pathlib.Path(state["path"]).touch()


# --- what published files hold -----------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, zipped, dtype):
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).mul(10).to(dtype)
    read = read_pickled(save({"weight": tensor, "empty": tensor[:0], "scalar": tensor[0, 0]}, tmp_path / "x", zipped))
    assert read["weight"].dtype == dtype
    assert torch.equal(read["weight"], tensor)
    assert torch.equal(read["scalar"], tensor[0, 0])
    assert read["empty"].shape == (0, 5)


def test_new_dtypes_and_untyped_storages(tmp_path):
    content = {"fp8": torch.ones(3).to(torch.float8_e4m3fn), "u16": torch.tensor([1, 60000], dtype=torch.uint16)}
    read = read_pickled(save(content, tmp_path / "x"))
    assert read["fp8"].dtype == torch.float8_e4m3fn
    assert read["fp8"].float().tolist() == [1, 1, 1]
    assert read["u16"].tolist() == [1, 60000]


@FORMATS
def test_strides_offsets_and_sharing(tmp_path, zipped):
    base = torch.arange(100.0)
    content = {"base": base, "view": base[10:50].view(4, 10).t(), "expanded": base[7:8].expand(5, 3)}
    read = read_pickled(save(content, tmp_path / "x", zipped))
    assert torch.equal(read["view"], content["view"])
    assert read["view"].stride() == (1, 10)
    assert read["expanded"].tolist() == [[7.0] * 3] * 5
    read["base"][10] = -1
    assert read["view"][0, 0] == -1


@FORMATS
def test_writing_to_what_was_read_does_not_write_the_file(tmp_path, zipped):
    path = save({"weight": WEIGHT}, tmp_path / "x", zipped)
    before = path.read_bytes()
    read_pickled(path)["weight"].fill_(9)
    assert path.read_bytes() == before


@FORMATS
def test_a_training_checkpoint_with_everything(tmp_path, zipped):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-3, output=pathlib.Path("out")),
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "max_accuracy": np.float64(84.4),
        "history": np.arange(5),
        "meta": collections.defaultdict(list, {"epoch": [1, 2]}),
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict(a=1),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [None, True, -5, 2**100, 1.5, "é", (1, (2,)), {1, 2}, frozenset([3])],
        "keys": {(1, 2): 3, 4: 5},
    }
    read = read_pickled(save(content, tmp_path / "x", zipped))
    for key, tensor in model.state_dict().items():
        assert torch.equal(read["model"][key], tensor), key
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(read["optimizer"]["state"][index]["exp_avg"], state["exp_avg"])
    assert read["scaler"] == content["scaler"]
    assert read["meta"] == {"epoch": [1, 2]}
    assert read["counter"] == {"a": 2, "b": 1}
    assert read["ordered"] == {"a": 1}
    assert read["size"] == (1, 2)
    assert read["parameter"].tolist() == [1, 1]
    assert read["plain"] == content["plain"]
    assert read["keys"][4] == 5
    assert read["args"].name == "argparse.Namespace"
    assert [type(read[key]) for key in ("args", "max_accuracy", "history", "device")] == [Inert] * 4


def test_an_unknown_mapping_keeps_its_items_and_an_unknown_list_is_inert(tmp_path):
    class Config(dict):
        pass

    class Names(list):
        pass

    Config.__qualname__, Names.__qualname__ = "Config", "Names"
    globals().update(Config=Config, Names=Names)
    read = read_pickled(save({"config": Config(depth=3), "names": Names("ab"), "w": WEIGHT}, tmp_path / "x"))
    assert read["config"]["depth"] == 3
    assert isinstance(read["names"], Inert)
    assert torch.equal(read["w"], WEIGHT)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    path = tmp_path / "x"
    torch.save({"w": WEIGHT, "set": {1}, "text": "a" * 300, "bytes": bytearray(b"x")}, path, pickle_protocol=protocol)
    read = read_pickled(path)
    assert torch.equal(read["w"], WEIGHT)
    assert read["set"] == {1}
    assert read["text"] == "a" * 300


def legacy(path, view=("8", 2, 4), keys=("7",), count=6):
    """A file of torch < 0.4: one tensor on a view (key, offset, length) of the storage "7" of six elements."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "7", "cpu", 6, view) if value is marker else None

    marker, stream = object(), io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {}):
        pickle.dump(value, stream, protocol=2)
    Pickler(stream, protocol=2).dump({"w": Calls(torch._utils._rebuild_tensor, marker, 1, (3,), (1,))})
    pickle.dump(list(keys), stream, protocol=2)
    path.write_bytes(stream.getvalue() + struct.pack("<q6f", count, *range(6)))
    return path


def test_storage_views_of_the_oldest_files(tmp_path):
    assert read_pickled(legacy(tmp_path / "x"))["w"].tolist() == [3, 4, 5]
    assert torch.load(tmp_path / "x", weights_only=False)["w"].tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"view": ("8", 4, 4)}, "a view of storage '7' runs past its end"),
        ({"view": ("8", -1, 4)}, "a view of storage '7' runs past its end"),
        ({"view": ("8", 2, 3)}, r"a tensor of size \(3,\) runs past the end"),
        ({"keys": ()}, "its list of storages is not the one"),
        ({"keys": ("7", "8")}, "its list of storages is not the one"),
        ({"keys": (7,)}, "its list of storages is not the one"),
        ({"count": 5}, "has 5 elements, which do not fill 24 bytes"),
        ({"count": 0}, "has 0 elements"),
        ({"count": -6}, "has -6 elements"),
    ],
    ids=str,
)
def test_old_files_that_contradict_themselves(tmp_path, claims, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_pickled(legacy(tmp_path / "x", **claims))


def test_lazily_conjugated_tensors_are_not_misread(tmp_path):
    read = read_pickled(save({"w": torch.ones(2, dtype=torch.complex64).conj(), "v": WEIGHT}, tmp_path / "x"))
    assert isinstance(read["w"], Inert)
    assert torch.equal(read["v"], WEIGHT)


# --- what hostile files hold -------------------------------------------------------------------------------------


def hostile_objects(marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    module = f"{marker.stem}_module"
    return {
        "os.system": Calls(os.system, f"touch {marker}"),
        "subprocess": Calls(subprocess.Popen, ["touch", str(marker)]),
        "eval": Calls(eval, touch),
        "exec": Calls(exec, touch),
        "open": Calls(open, str(marker), "w"),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "import": Calls(__import__, module),
        "torch.load": Calls(torch.load, str(marker)),
        "torch.hub": Calls(torch.hub.load, str(marker)),
        "partial": Calls(functools.partial, os.system, f"touch {marker}"),
        "nested": Calls(list, Calls(map, os.system, [f"touch {marker}"])),
        "as ordered dict": Calls(collections.OrderedDict, Calls(map, os.system, [f"touch {marker}"])),
        "as factory": Calls(collections.defaultdict, Calls(os.system, f"touch {marker}")),
        "setstate": Calls(WithState, "x", state={"path": str(marker)}),
        "torch rebuild": Calls(torch._tensor._rebuild_from_type_v2, os.system, str, (f"touch {marker}",), {}),
        "parameter": Calls(torch._utils._rebuild_parameter, Calls(os.system, f"touch {marker}"), True, None),
    }


@FORMATS
@pytest.mark.parametrize("name", hostile_objects(pathlib.Path("x")))
def test_nothing_runs_and_the_tensors_beside_it_load(tmp_path, zipped, name):
    marker = tmp_path / "marker"
    hostile = hostile_objects(marker)[name]
    path = save(
        {"before": WEIGHT, "hostile": hostile, "deep": [{"x": (hostile,)}], "after": WEIGHT + 1}, tmp_path / "x", zipped
    )
    if name in ("os.system", "eval", "open"):  # these tests would be worth nothing if the file were harmless
        torch.load(path, weights_only=False)
        assert marker.exists()
        marker.unlink()
    read = read_pickled(path)
    assert not marker.exists()
    assert torch.equal(read["before"], WEIGHT)
    assert torch.equal(read["after"], WEIGHT + 1)


@pytest.mark.parametrize(
    "code",
    [
        b"cposix\nsystem\nX\x05\x00\x00\x00touch\x85R.",
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nX\x02\x00\x00\x00os\x85RX\x06\x00\x00\x00systemtR.",
        b"ctorch._utils\nsys.modules\n.",
        b"ctorch\n_utils.sys.modules\n.",
        b"\x80\x04\x8c\x0ctorch._utils\x8c\x0bsys.modules\x93.",
        b"(iposix\nsystem\n.",
        b"(S'touch'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'touch'\no.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__)sb.",  # BUILD on a trusted function
        b"ccollections\nOrderedDict\n)R}X\x0c\x00\x00\x00__setstate__cposix\nsystem\nsb}b.",
        b"cposix\nsystem\n)\x81}b.",
        b"cposix\nsystem\n)}\x92.",
    ],
)
def test_handwritten_programs_end_inert(tmp_path, code):
    read = read_pickled(
        archive(tmp_path / "x", b"\x80\x02}X\x04\x00\x00\x00evil" + code.removeprefix(b"\x80\x04")[:-1] + b"s.")
    )
    assert not callable(read["evil"])


def test_the_interpreter_sees_no_import_call_or_file_access(tmp_path):
    """The strongest proof: Python's own audit events, in a process of its own."""
    marker = tmp_path / "marker"
    (tmp_path / "marker_module.py").write_text(f"open({str(marker)!r}, 'w')")
    hostile = {name: value for name, value in hostile_objects(marker).items() if name != "setstate"}
    for zipped in (True, False):
        save({"hostile": hostile, "w": WEIGHT}, tmp_path / f"hostile{zipped}", zipped)
        save({"w": WEIGHT, "n": np.arange(3), "a": argparse.Namespace()}, tmp_path / f"benign{zipped}", zipped)
    program = textwrap.dedent("""
        import pathlib, sys
        from zoo.restricted_reader import read_pickled

        folder = pathlib.Path(sys.argv[1])
        sys.path.insert(0, sys.argv[1])
        events = []
        for name in ("benignTrue", "benignFalse"):
            read_pickled(folder / name)
        sys.addaudithook(lambda event, args: events.append((event, str(args[0]) if args else "")))
        for name in ("hostileTrue", "hostileFalse"):
            assert read_pickled(folder / name)["w"].sum() == 66
        seen = sorted(set(events))
        allowed = {"open", "mmap.__new__", "object.__getattr__", "object.__setattr__", "os.stat"}
        bad = [(e, a) for e, a in seen if e not in allowed or (e == "open" and "hostile" not in a)]
        assert any(e == "open" for e, _ in seen), "the hook saw nothing"
        assert not bad, bad
        assert "marker_module" not in sys.modules
    """)
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()


# --- claims that the file does not keep --------------------------------------------------------------------------


def test_the_builder_of_these_tests_builds_a_valid_file(tmp_path):
    path = archive(tmp_path / "x", tensor_pickle(), [struct.pack("<4f", 1, 2, 3, 4)])
    weight = read_pickled(path)["weight"]
    assert weight.tolist() == [1, 2, 3, 4]
    assert weight.data_ptr() % 16 == 0  # though other zip programs do not align
    assert torch.load(path, weights_only=True)["weight"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"numel": 2**40}, "claims 4398046511104 bytes and has 16"),
        ({"numel": 5}, "claims 20 bytes and has 16"),
        ({"numel": -1}, "the key or the length"),
        ({"numel": 2**70}, "the key or the length"),
        ({"size": (5,)}, "runs past the end"),
        ({"offset": 1}, "runs past the end"),
        ({"size": (2, 2), "stride": (3, 1)}, "runs past the end"),
        ({"size": (2, 2), "stride": (2**62, 2**62)}, "runs past the end"),
        ({"stride": (-1,)}, "not valid"),
        ({"offset": -1}, "not valid"),
        ({"size": (-4,)}, "not valid"),
        ({"size": (2.0,)}, "not valid"),
        ({"size": (4, 1)}, "not valid"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "not valid"),
        ({"size": (2**40,), "stride": (0,)}, "far larger than the file"),
        ({"size": (2**31, 2**31, 2**31), "stride": (0, 0, 0)}, "far larger than the file"),
        ({"key": "1"}, "'data/1' is missing"),
        ({"key": "../../etc/passwd"}, "is missing"),
        ({"key": 0}, "the key or the length"),
    ],
    ids=str,
)
def test_a_tensor_outside_its_storage_is_an_error(tmp_path, claims, reason):
    path = archive(tmp_path / "x", tensor_pickle(**claims), [struct.pack("<4f", 1, 2, 3, 4)])
    with pytest.raises(CheckpointError, match=reason):
        read_pickled(path)


def test_a_legacy_file_that_claims_more_than_it_has(tmp_path):
    path = save({"w": torch.zeros(1000)}, tmp_path / "x", zipped=False)
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickled(path)
    claim = data.replace(b"M\xe8\x03", b"J\x00\x00\x00\x7f", 1)  # the numel 1000 of the storage becomes 2 billion
    assert claim != data
    path.write_bytes(claim)
    with pytest.raises(CheckpointError, match="claim more bytes than the file has"):
        read_pickled(path)


def bombs():
    deep, long = 300_000, 100_000
    return {
        "lists": b"\x80\x02" + b"]" * deep + b"a" * (deep - 1) + b".",
        "tuples as a key": b"\x80\x02})" + b"\x85" * deep + b"K\x01s.",
        "tuples in a set": b"\x80\x04\x8f()" + b"\x85" * deep + b"\x90.",
        "reductions": b"\x80\x02" + b"cos\nsystem\n" * 1000 + b")" + b"R\x85" * 999 + b"R.",
        "rebuilt rebuilds": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x01)q\x02"
        + b"0(h\x01Nh\x02Ntq\x02" * 5000
        + b"R.",
        "colliding keys": b"\x80\x02}("
        + b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"N" for k in range(1, 100_000))
        + b"u.",
        "copies": b"\x80\x02(" + b"K\x01" * long + b"tq\x00" + b"0ctorch\nSize\nh\x00\x85R" * 1000 + b".",
        "marks": b"\x80\x02" + b"(" * deep + b".",
        "a long length": b"\x80\x02X\xff\xff\xff\x7fabc.",
        "a longer length": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        "a far memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "digits": b"\x80\x02I" + b"9" * 1_000_000 + b"\n.",
        "a cycle": b"\x80\x02]q\x00h\x00a.",
    }


@pytest.mark.parametrize("name", bombs())
@FORMATS
def test_bombs_end_soon_and_cleanly(tmp_path, name, zipped):
    program = bombs()[name]
    path = tmp_path / "x"
    if zipped:
        archive(path, program)
    else:
        header = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
        path.write_bytes(header + program + pickle.dumps([], protocol=2))
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_pickled(path)
        assert name != "copies"
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert name != "copies" or "more items than it has bytes" in str(error)
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


def test_a_compressed_bomb_is_not_inflated(tmp_path):
    path = archive(tmp_path / "x", b"\x80\x02" + b"N0" * 50_000_000 + b"N.", compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(CheckpointError, match="its records are compressed"):
        read_pickled(path)


# --- damage ------------------------------------------------------------------------------------------------------


def sound_files():
    content = {
        "model": {"a.weight": WEIGHT, "b": WEIGHT.t().bfloat16()},
        "args": argparse.Namespace(x=1),
        "n": np.ones(2),
    }
    files = []
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=zipped)
        files.append(stream.getvalue())
    return files


SOUND = sound_files()


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.integers(0, 1),
    edits=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8),
    cut=st.one_of(st.none(), st.integers(0, 5000)),
    inserted=st.tuples(st.integers(0, 5000), st.binary(max_size=8)),
)
def test_damaged_files_give_one_clean_error_or_tensors(tmp_path, which, edits, cut, inserted):
    data = bytearray(SOUND[which])
    for position, value in edits:
        data[position % len(data)] = value
    position, extra = inserted
    data[position % len(data) : position % len(data)] = extra
    (tmp_path / "x").write_bytes(data[:cut])
    try:
        read_pickled(tmp_path / "x")
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=st.binary(max_size=200))
def test_random_programs_give_one_clean_error_or_a_value(tmp_path, program):
    try:
        read_pickled(archive(tmp_path / "x", b"\x80\x02}(]" + program))
    except CheckpointError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "begins with"),
        (b"PK\x03\x04 and no more", "damaged"),
        (pickle.dumps({"a": 1}), "not one written by torch.save"),
        (b"\0" * 257 + b"ustar", "tar format"),
    ],
)
def test_files_of_other_kinds_say_what_they_are(tmp_path, data, reason):
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=reason):
        read_pickled(tmp_path / "x.pth")


def test_archives_of_other_kinds_say_what_they_are(tmp_path):
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as file:
        file.writestr("x/readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"without data\.pkl"):
        read_pickled(tmp_path / "plain.zip")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02N.")
        file.writestr("x/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_pickled(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02N.")
        file.writestr("x/byteorder", b"big")
    with pytest.raises(CheckpointError, match="little-endian"):
        read_pickled(tmp_path / "big.pt")
