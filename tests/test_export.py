"""Exported decoders: their results, the arguments they accept, and files that cannot be written or loaded."""

import json
import subprocess
import sys
import zipfile

import pytest
import torch
from models import MODEL, latents, make_decoder
from tolerances import assert_close
from torch import nn

import movq_ext
from movq_ext import MOVQ, ExportError, export_decoder, load_exported
from movq_ext.cli import main
from movq_ext.model import layers, norms
from movq_ext.ops import cuda
from movq_ext.ops.extension import extension_available

SMALL = dict(ch_mult=(1, 1), num_res_blocks=0, attn_resolutions=[])  # compiling takes most of these tests' time

# Runs a file in a process that cannot import movq_ext.
STANDALONE = """
import importlib.abc, sys, torch, torch._inductor

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "movq_ext":
            raise ImportError("movq_ext must not be imported here")

sys.meta_path.insert(0, Refuse())
try:
    import movq_ext
    sys.exit("movq_ext was imported")
except ImportError:
    pass
package, inputs, outputs = sys.argv[1:]
program = torch._inductor.aoti_load_package(package)
torch.save([program(*args) for args in torch.load(inputs)], outputs)
"""


@pytest.fixture(autouse=True)
def inductor_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))


def run_standalone(package, calls, folder):
    torch.save(calls, folder / "inputs.pt")
    command = [sys.executable, "-P", "-c", STANDALONE, package, folder / "inputs.pt", folder / "outputs.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "outputs.pt")


def test_any_size_in_a_process_without_movq_ext(tmp_path):
    decoder = make_decoder(**SMALL)
    path = export_decoder(decoder, tmp_path / "decoder.pt2", height=(1, 16), width=(1, 16), batch=(1, 4))
    assert [file.name for file in tmp_path.glob("*.p*")] == ["decoder.pt2"]
    calls = [latents(grid, batch) for grid, batch in [((4, 6), 2), ((3, 5), 1), ((8, 8), 4), ((16, 2), 1), ((1, 9), 3)]]
    outputs = run_standalone(path, calls, tmp_path)
    program = load_exported(path)
    for args, out in zip(calls, outputs, strict=True):
        with torch.no_grad():
            expected = decoder(*args)
        assert_close(out, expected.double(), slack=10)
        assert torch.equal(program(*args), out)
    assert b"_FOLDED_CONST_" in read_all(path)  # upsampling's folded weights, computed once on loading
    strided = [x.to(memory_format=torch.channels_last) for x in calls[0]]
    assert torch.equal(program(*strided), outputs[0]) and not program(strided[0].requires_grad_(), strided[1]).requires_grad

    z, zq = latents((4, 6))
    for error, message, args in [
        (TypeError, "expected z and zq, got 1 arguments", (z,)),
        (TypeError, "zq must be a tensor of torch.float32, got list", (z, [1.0])),
        (TypeError, "z must be a tensor of torch.float32, got torch.float64", (z.double(), zq)),
        (ValueError, "z must be on cpu, got meta", (z.to("meta"), zq)),
        (ValueError, r"z must have shape \(1 to 4, 4, 1 to 16, 1 to 16\), got \(2, 3, 4, 6\)", (z[:, :3], zq)),
        (ValueError, r"z must have shape .*, got \(5, 4, 4, 6\)", latents((4, 6), 5)),
        (ValueError, r"z must have shape .*, got \(2, 4, 17, 6\)", latents((17, 6))),
        (ValueError, r"zq must have shape .*, got \(5, 4, 6\)", (z, zq[0])),
        (ValueError, "z and zq must have the same batch, height and width", (z, zq[:1])),
        (ValueError, "z and zq must have the same batch, height and width", (z, zq[:, :, :3])),
    ]:
        with pytest.raises(error, match=message):
            program(*args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_one_size(tmp_path, dtype):
    decoder = make_decoder(**SMALL)
    path = export_decoder(decoder, str(tmp_path / "decoder.pt2"), height=4, width=6, batch=2, dtype=dtype)
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    program = load_exported(path)
    assert (program.batch, program.height, program.width, program.dtype) == ((2, 2), (4, 4), (6, 6), dtype)
    out = program(*latents(dtype=dtype))
    assert out.dtype == dtype
    with torch.no_grad():
        assert_close(out, decoder.double()(*latents(dtype=torch.float64)), slack=4)
    with pytest.raises(ValueError, match=r"z must have shape \(2, 4, 4, 6\), got \(1, 4, 4, 6\)"):
        program(*latents(batch=1, dtype=dtype))


def test_exporting_an_autoencoder_from_the_command_line(tmp_path, capsys):
    torch.manual_seed(0)
    model = MOVQ(**MODEL).eval()
    movq_ext.save_pretrained(model, tmp_path / "model")
    path = tmp_path / "out.pt2"
    command = ["export", "-o", str(path), "--model", str(tmp_path / "model"), "--device", "cpu"]
    command += ["--size", "8:16", "--width", "12"]
    assert main(command) == 0
    assert f"written  {path}" in capsys.readouterr().out
    program = load_exported(path)
    assert (program.inputs, program.batch, program.height, program.width) == ({"quant": 4}, (1, 1), (4, 8), (6, 6))
    quant = torch.randn(1, 4, 7, 6)
    with torch.no_grad():
        assert_close(program(quant), model.decode(quant).double(), slack=10)
    for change, message in [
        (["--size", "9"], "size must be a multiple of the model's 2 pixels"),
        (["-o", "x.pt"], "path must end in .pt2"),
    ]:
        assert main([*command, *change]) == 2
        assert message in capsys.readouterr().err


def test_hooks_are_compiled_and_the_model_stays_in_training(tmp_path):
    decoder = make_decoder(**SMALL, dropout=0.9).train()
    decoder.up[1].upsample.conv.register_forward_hook(lambda module, args, out: out * 2)
    program = load_exported(export_decoder(decoder, tmp_path / "decoder.pt2", height=4, width=6))
    assert decoder.training and isinstance(decoder.up[1].upsample, movq_ext.Upsample)
    with torch.no_grad():
        assert_close(program(*latents(batch=1)), decoder.eval()(*latents(batch=1)).double(), slack=10)


BAD = {
    "model": (TypeError, "model must be a MOVQDecoder or a MOVQ, got Identity", dict(model=nn.Identity())),
    "suffix": (ValueError, "path must end in .pt2, got '.*decoder.so'", dict(path="decoder.so")),
    "folder": (FileNotFoundError, "path must be in an existing folder, got '.*missing'", dict(path="missing/decoder.pt2")),
    "unwritable": (OSError, "cannot write to /proc/self: ", dict(path="/proc/self/decoder.pt2")),
    "zero": (ValueError, "height must be positive, with minimum <= maximum, got 0", dict(height=0)),
    "order": (ValueError, r"batch must be positive, with .*, got \(3, 2\)", dict(batch=(3, 2))),
    "three": (TypeError, r"width must be an integer or \(minimum, maximum\), got \(1, 2, 3\)", dict(width=(1, 2, 3))),
    "float": (TypeError, "height must be an integer or .*, got 2.5", dict(height=2.5)),
    "dtype": (TypeError, "dtype must be floating point, got torch.int8", dict(dtype=torch.int8)),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_arguments(tmp_path, case):
    error, message, change = BAD[case]
    arguments = {"model": make_decoder(**SMALL), "path": "decoder.pt2", **change}
    model, path = arguments.pop("model"), arguments.pop("path")
    with pytest.raises(error, match=message):
        export_decoder(model, tmp_path / path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler(tmp_path):
    """In a new process, because torch caches the compiler it found."""
    script = f"""
import movq_ext
movq_ext.export_decoder(movq_ext.MOVQ(**{MODEL!r}), {str(tmp_path / "decoder.pt2")!r})
"""
    env = {"CXX": str(tmp_path / "no-compiler"), "PATH": "/nowhere", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert "ExportError: a C++ compiler is needed to export a decoder (set CXX, or install g++)" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failed_compilation_keeps_the_old_file(tmp_path):
    path = tmp_path / "decoder.pt2"
    path.write_bytes(b"old")
    decoder = make_decoder(**SMALL)
    data_dependent = lambda module, args: bool(args[0].sum() > 0) and None
    decoder.up[1].upsample.register_forward_pre_hook(data_dependent)  # torch.export cannot trace it
    with pytest.raises(ExportError, match="PyTorch could not compile the decoder for cpu"):
        export_decoder(decoder, path)
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["decoder.pt2"]


def test_files_that_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*missing.pt2"):
        load_exported(tmp_path / "missing.pt2")
    (tmp_path / "noise.pt2").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"noise.pt2 cannot be loaded"):
        load_exported(tmp_path / "noise.pt2")
    linear = torch.export.export(nn.ReLU(), (torch.ones(3),))
    torch._inductor.aoti_compile_and_package(linear, package_path=str(tmp_path / "other.pt2"))
    with pytest.raises(ValueError, match=r"other.pt2 was not written by export_decoder"):
        load_exported(tmp_path / "other.pt2")


METADATA = {"version": "0.1.0", "channels": {"z": 4, "zq": 5}, "batch": [1, 2], "height": [4, 4], "width": [2, 8],
            "dtype": "float32", "device": "cpu"}  # fmt: skip


class Package:
    """Stands for a loaded file: compiling one takes a minute."""

    def __init__(self, metadata):
        self.metadata = metadata

    def get_metadata(self):
        return {"movq_ext.decoder": self.metadata}


def load_with_metadata(folder, monkeypatch, text):
    with zipfile.ZipFile(folder / "a.pt2", "w") as archive:
        archive.writestr("version", "1")
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path, device_index: Package(text))
    return load_exported(folder / "a.pt2")


def test_metadata_of_this_version(tmp_path, monkeypatch):
    program = load_with_metadata(tmp_path, monkeypatch, json.dumps(METADATA))
    assert (program.inputs, program.batch, program.dtype) == ({"z": 4, "zq": 5}, (1, 2), torch.float32)


INVALID = [None, 0, "x", [], [1], {"z": 0}, {"a": 1}, "nn", "int8", [2, 1], [0, 1], [1.5, 2]]


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", "{}",
    *(json.dumps({**METADATA, field: value}) for field in ("channels", "batch", "width", "dtype", "device") for value in INVALID),
    *(json.dumps({name: METADATA[name] for name in METADATA if name != field}) for field in ("channels", "height", "dtype")),
])  # fmt: skip
def test_invalid_metadata_are_an_error(tmp_path, monkeypatch, text):
    with pytest.raises(ValueError, match=r"a.pt2 has metadata that this version of movq_ext cannot read: \w+"):
        load_with_metadata(tmp_path, monkeypatch, text)


def test_a_file_that_is_no_package_of_torch(tmp_path):
    """A text, an archive of other things, a truncated archive, and a folder."""
    with zipfile.ZipFile(tmp_path / "archive.pt2", "w") as archive:
        archive.writestr("readme", "x" * 1000)
    (tmp_path / "cut.pt2").write_bytes((tmp_path / "archive.pt2").read_bytes()[:500])
    (tmp_path / "empty.pt2").touch()
    for name in ("archive.pt2", "cut.pt2", "empty.pt2"):
        with pytest.raises(ValueError, match=rf"{name} cannot be loaded"):
            load_exported(tmp_path / name)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(OSError, match="expected a regular file, got a folder"):
        load_exported(tmp_path / "folder.pt2")


@pytest.mark.skipif(not extension_available(), reason="needs the compiled extension")
def test_the_file_calls_our_operators(tmp_path, monkeypatch):
    """As on a GPU: this CPU decoder is patched to call them, and their CPU implementations run."""

    def attention(*maps):
        q, k, v = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in maps)
        return cuda.attention(q, k, v, q.shape[3] ** -0.5).squeeze(1).transpose(1, 2).unflatten(2, maps[0].shape[2:])

    decoder = make_decoder(**SMALL)
    monkeypatch.setattr(norms, "fused_spatial_norm", cuda.spatial_norm)
    monkeypatch.setattr(layers, "spatial_attention", attention)
    path = export_decoder(decoder, tmp_path / "decoder.pt2", height=(2, 8), width=(2, 8))
    monkeypatch.undo()
    for name in ("spatial_norm_forward", "attention_forward"):
        assert f"movq_ext::{name}".encode() in read_all(path)
    for grid in ((4, 6), (2, 8)):
        with torch.no_grad():
            assert_close(load_exported(path)(*latents(grid, 1)), decoder(*latents(grid, 1)).double(), slack=10)


def read_all(path):
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(tmp_path, dtype):
    decoder = make_decoder(**SMALL).cuda()
    path = export_decoder(decoder, tmp_path / "decoder.pt2", height=(2, 16), width=(2, 16), batch=(1, 4), dtype=dtype)
    program = load_exported(path)
    expected = decoder.cpu().double()
    for grid, batch in [((4, 6), 2), ((16, 8), 1)]:
        out = program(*latents(grid, batch, dtype, device="cuda"))
        with torch.no_grad():
            assert_close(out.cpu(), expected(*latents(grid, batch, torch.float64)), slack=100 if dtype == torch.float32 else 10)
    if extension_available():  # in 16 bits, keys and values are one tensor
        operator = b"attention_forward" if dtype == torch.float32 else b"shared_kv_attention_forward"
        assert b"movq_ext::" + operator in read_all(path)
