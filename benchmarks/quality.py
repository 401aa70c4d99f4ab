"""Reconstruction quality of a model on a folder of photographs, and how much of its codebook it uses.

python benchmarks/quality.py FOLDER [--model PATH] [--out RESULT.md]
"""

import argparse
from collections import Counter
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from movq_ext import __version__, from_pretrained
from movq_ext.demo import SMALL_MODEL_PATH, Quality
from movq_ext.io.codes import codebook_fingerprint, decode_image, encode_image
from movq_ext.io.image_files import find_images
from movq_ext.io.images import load_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=SMALL_MODEL_PATH)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = from_pretrained(args.model)
    rows, used = [], Counter()
    for file, _ in tqdm(find_images([args.folder]).files):
        original = load_image(file)
        codes = encode_image(model, original)
        used.update(codes.flatten().tolist())
        quality = Quality.compare(original, decode_image(model, codes, (original.height, original.width)))
        rows.append((file.stem, f"{original.width}x{original.height}", quality.psnr, quality.ssim))
    tokens = sum(used.values())
    probabilities = torch.tensor(list(used.values()), dtype=torch.float64) / tokens
    perplexity = float(torch.exp(-(probabilities * probabilities.log()).sum()))
    report = [
        f"# Quality of codebook {codebook_fingerprint(model)}, movq_ext {__version__}, torch {torch.__version__}",
        "",
        f"{len(rows)} photographs: **PSNR {fmean(row[2] for row in rows):.2f} dB, "
        f"SSIM {fmean(row[3] for row in rows):.4f}** (means).",
        f"These {tokens} latent cells use {len(used)} of {model.quantize.n_e} codes (perplexity {perplexity:.0f}).",
        "",
        "| photograph | size | PSNR (dB) | SSIM |",
        "|---|---|---:|---:|",
        *(f"| {name} | {size} | {psnr:.2f} | {ssim:.4f} |" for name, size, psnr, ssim in rows),
    ]
    text = "\n".join(report) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
