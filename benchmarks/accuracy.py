"""Errors of a decode against float64: ours and every peer, in every dtype.

    python benchmarks/accuracy.py --out benchmarks/results/accuracy

The reference is the published decode in float64, of weights and latents already rounded to the dtype, so that this rounding does
not count as a decoder's error. "relative L2" is ``||x - reference|| / ||reference||``, "max" the largest ``|x - reference|``.
Both are means over the seeds (latents, or photographs). Under autocast, weights and latents are float32. On a CPU the large model
is not measured in float16, where the peers take minutes for a decode.

The rows "attention blocks" are errors of these blocks alone, for their inputs in a decode, over all blocks and seeds. Both run
our operators: "published order" projects keys and values, and "ours" may attend to the blocks' normalised input.

Ours is compared with the best peer: the one with the smallest error in that dtype, in its fastest layout (channels_last).
Compiled decoders are compared with each other. "of the best peer" is the geometric mean of the ratios of the errors. It may be at
most 1.05 plus two standard errors of that mean over the seeds, which is "allowed". The exit status is 1 if ours is worse
or fails anywhere; a decoder that fails gets a row with its error. Peers in NCHW are listed too. On a CPU their convolutions take
about twice as long and use shorter sums, which makes them more accurate in float32.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import torch
from peers import KINDS, load, peer, save_random
from timing import environment, write
from torch import Tensor

import movq_ext
from movq_ext.demo import PHOTOS, SMALL_MODEL_PATH
from movq_ext.io.codes import encode_image
from movq_ext.io.images import load_image
from movq_ext.model import layers

MARGIN = 1.05
VERDICT = "ours not worse than the best peer"
NO_TIME = "no time"
DTYPES = ("float32", "float16", "bfloat16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy"), help="folder for the results")
    parser.add_argument("--size", type=int, help="pixels of the random model's image; 128 on a CPU, 512 on a GPU")
    parser.add_argument("--seeds", type=int, default=3, help="number of latents, and of photographs")
    parser.add_argument("--compile", nargs="*", choices=DTYPES, help="dtypes to compile; float32 on a CPU, all on a GPU")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no decoder after this long")
    parser.add_argument("--report", action="store_true", help="exit with 0 even if ours is worse or fails")
    parser.add_argument("--quick", action="store_true", help="rehearse: a small decoder, and nothing compiled")
    options = parser.parse_args()
    device, start = torch.device(options.device), time.monotonic()
    gpu = device.type == "cuda"
    size = options.size or (64 if options.quick else 512 if gpu else 128)
    compiled = options.compile if options.compile is not None else () if options.quick else DTYPES if gpu else DTYPES[:1]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        save_random(folder, small=options.quick)
        generators = [torch.Generator().manual_seed(seed) for seed in range(options.seeds)]
        latents = [torch.randn(1, 4, size // 8, size // 8, generator=generator) for generator in generators]
        shipped = movq_ext.from_pretrained(SMALL_MODEL_PATH)
        photographs = [quantised_latents(shipped, photo) for photo in list(PHOTOS)[: options.seeds]]
        cases: list[tuple[str, Path, tuple[str, ...], list[Tensor]]]
        cases = [("Kandinsky 2.x, random weights", folder, KINDS, latents)]
        cases.append(("shipped, photographs", SMALL_MODEL_PATH, KINDS[:2], photographs))
        for title, folder, kinds, latents in cases:
            references: dict[str, list[Tensor]] = {}
            under_autocast = DTYPES[1:] if gpu else DTYPES[2:]
            plain = [dtype for dtype in DTYPES if dtype != "float16" or gpu or options.quick or kinds is not KINDS]
            for dtype, autocast in [(dtype, False) for dtype in plain] + [(dtype, True) for dtype in under_autocast]:
                held = "float32" if autocast else dtype
                if held not in references:
                    references[held] = [reference(folder, z, device, held) for z in latents]
                names = [*(f"{kind}{how}" for how in ("", " nhwc") for kind in kinds), "ours tiled"]
                if dtype in compiled and not autocast and kinds is KINDS:
                    names += [f"{kind} compiled" for kind in kinds]
                found: dict[str, list[tuple[float, float]] | str] = {}
                for name in names:
                    context: Any = torch.autocast(device.type, getattr(torch, dtype)) if autocast else nullcontext()
                    late = time.monotonic() - start > 60 * options.minutes
                    found[name] = NO_TIME if late else errors(name, folder, device, held, latents, references[held], context)
                    print(title, dtype, name, found[name], file=sys.stderr)
                rows += compare_with_peers({"model": title, "dtype": f"autocast {dtype}" if autocast else dtype}, found)
            for dtype in DTYPES:
                case = {"model": f"{title}: attention blocks", "dtype": dtype}
                rows += compare_with_peers(case, attention_errors(folder, latents, device, getattr(torch, dtype)))
    head = {**environment(device), "path": movq_ext.explain(torch.empty(0, device=device)), "seeds": options.seeds}
    head |= {"image": f"{size}x{size}, photographs 128x128", "TF32 in cuDNN": torch.backends.cudnn.allow_tf32 if gpu else "-"}
    worse = [f"{row['decoder']} ({row['model']}, {row['dtype']})" for row in rows if row[VERDICT] == "no"]
    head["ours is worse or fails in"] = ", ".join(worse) or "no case"
    head["peers that failed"] = failed_peers(rows)
    write(options.out, "accuracy", "Errors of a decode against float64", head, rows)
    print((options.out / "accuracy.md").read_text())
    return int(bool(worse) and not options.report)


def failed_peers(rows: list[dict[str, Any]]) -> str:
    failed = [row for row in rows if not row["decoder"].startswith("ours") and str(row["relative L2"]).startswith("failed")]
    return ", ".join(f"{row['decoder']} ({row['model']}, {row['dtype']})" for row in failed) or "none"


def quantised_latents(model: movq_ext.MOVQ, photo: str) -> Tensor:
    """Return the quantised latents of a 128x128 crop of a photograph."""
    codes = encode_image(model, load_image(PHOTOS[photo]).crop((64, 64, 192, 192)))[None]
    return model.quantize.get_codebook_entry(codes, (*codes.shape, model.quantize.e_dim))


def reference(folder: Path, z: Tensor, device: torch.device, dtype: str) -> Tensor:
    model, decode = load("published", folder, device, getattr(torch, dtype))
    model.double()
    return decode(z.to(device, getattr(torch, dtype)).double())


def errors(
    name: str,
    folder: Path,
    device: torch.device,
    dtype: str,
    latents: list[Tensor],
    references: list[Tensor],
    context: AbstractContextManager[Any],
) -> list[tuple[float, float]] | str:
    """Return the relative L2 error and the largest difference for each latent, or the reason for a failure."""
    torch._dynamo.reset()
    try:
        _, decode = peer(name, folder, device, getattr(torch, dtype))
        found = []
        for z, wanted in zip(latents, references, strict=True):
            with context:
                difference = decode(z.to(device, getattr(torch, dtype))).double() - wanted
            found.append((float(difference.norm() / wanted.norm()), float(difference.abs().max())))
        return found
    except Exception as error:  # a row says so, and the other decoders are measured
        return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:100]}"


def attention_errors(
    folder: Path, latents: list[Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, list[tuple[float, float]] | str]:
    """Return the errors of every attention block for every latent, in the published order of projections and in ours."""
    model, decode = load("ours", folder, device, torch.float32)
    calls: list[tuple[movq_ext.AttnBlock, Tensor, Tensor]] = []
    hooks = [
        block.register_forward_pre_hook(lambda block, args, kwargs: calls.append((block, *args, kwargs["zq"])), with_kwargs=True)
        for block in model.decoder.modules()
        if isinstance(block, movq_ext.AttnBlock)
    ]
    for z in latents:
        decode(z.to(device))
    for hook in hooks:
        hook.remove()
    model.to(dtype=dtype, memory_format=torch.channels_last)
    orders: dict[str, tuple[torch.dtype, ...]] = {"published order nhwc": (), "ours nhwc": layers.SHARED_KV_DTYPES}
    found: dict[str, list[tuple[float, float]] | str] = {}
    for name, dtypes in orders.items():
        results = []
        for block, *inputs in calls:
            x, zq = (tensor.to(dtype=dtype, memory_format=torch.channels_last) for tensor in inputs)
            wanted = copy.deepcopy(block).double()(x.double(), zq.double())
            with mock.patch.object(layers, "SHARED_KV_DTYPES", dtypes):
                difference = block(x, zq).double() - wanted
            results.append((float(difference.norm() / wanted.norm()), float(difference.abs().max())))
        found[name] = results
    return found


def compare_with_peers(case: dict[str, str], found: dict[str, list[tuple[float, float]] | str]) -> list[dict[str, Any]]:
    """Return a row for every decoder. Ours is compared with the most accurate peer of its kind."""
    rows = []
    for name, result in found.items():
        row: dict[str, Any] = {**case, "decoder": name, "relative L2": result}
        row |= dict.fromkeys(("max", "of the best peer", "allowed", VERDICT), "-")
        if isinstance(result, str):
            row[VERDICT] = "no" if name.startswith("ours") and result != NO_TIME else "-"
        else:
            row |= {"relative L2": fmean(error for error, _ in result), "max": fmean(largest for _, largest in result)}
            same_kind = [
                other
                for other in found
                if not other.startswith("ours") and ("compiled" if "compiled" in name else "nhwc") in other
            ]
            peers = [errors for errors in (found[other] for other in same_kind) if not isinstance(errors, str)]
            if name.startswith("ours") and peers:
                best = min(peers, key=lambda errors: fmean(error for error, _ in errors))
                ratios = [math.log(mine / theirs) for (mine, _), (theirs, _) in zip(result, best, strict=True)]
                noise = 2 * stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
                ratio, allowed = math.exp(fmean(ratios)), MARGIN * math.exp(noise)
                row |= {"of the best peer": ratio, "allowed": allowed}
                row[VERDICT] = "yes" if ratio <= allowed else "no"
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
