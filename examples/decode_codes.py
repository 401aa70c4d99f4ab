"""Decode a file of codes to PNG files, one for each image.

    movq-ext encode photos/ -o codes.safetensors
    python examples/decode_codes.py codes.safetensors decoded/

This is what `movq-ext decode` does for one small file. For many codes see bulk_decode.py.
"""

import argparse
from pathlib import Path

import torch

import movq_ext
from movq_ext.demo import SMALL_MODEL_PATH
from movq_ext.io.codes import CodeFile
from movq_ext.io.images import save_image, to_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", type=Path, help="file that `movq-ext encode` wrote")
    parser.add_argument("out", type=Path, help="folder for the images")
    parser.add_argument("--model", type=Path, default=SMALL_MODEL_PATH, help="weights; the shipped model by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model = movq_ext.from_pretrained(args.model, device=args.device)
    file = CodeFile.load(args.codes)
    with torch.inference_mode():  # the fast path: nothing records gradients
        for name, png in file.png_names().items():
            codes = file.codes[name].to(args.device)  # (h, w) indices, one for each 8x8 pixels
            image = model.decode_code(codes[None])[0]  # (3, 8 h, 8 w), values roughly in [-1, 1]
            height, width = file.sizes[name]  # the image was padded to whole cells
            path = args.out / png
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(to_image(image[:, :height, :width]), path)
            print(path)


if __name__ == "__main__":
    main()
