"""Hostile images."""

import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

from attacks.cases import Cases
from movq_ext.io.images import load_image, to_tensor

IMAGES = [("png", "RGB"), ("png", "P"), ("png", "RGBA"), ("png", "I;16"), ("jpg", "RGB"), ("jpg", "CMYK"), ("gif", "P"),
          ("bmp", "RGB"), ("bmp", "P"), ("ppm", "RGB"), ("tif", "RGB"), ("tif", "F"), ("webp", "RGB")]  # fmt: skip


class ImageCases(Cases):
    kinds = ("damaged_file", "damaged_file", "png", "exif")

    def write_intact_files(self, folder):
        pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a picture"
        for suffix, mode in IMAGES:
            options = {"exif": exif} if suffix in ("png", "jpg", "tif", "webp") else {}
            image = Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11)) if mode == "I;16" else pixels.convert(mode)
            image.save(folder / f"{mode.replace(';', '')}.{suffix}", **options)
        pixels.save(folder / "packed.tif", compression="tiff_lzw")
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for suffix in ("png", "jpg", "tif"):
            pixels.save(folder / f"profile.{suffix}", icc_profile=profile)

    def reading(self, path):
        def read():
            image = load_image(path)
            assert image.mode == "RGB" and to_tensor(image).shape == (3, image.height, image.width)

        return read, OSError

    def exif(self, folder):
        """Intact pixels with random EXIF data, which must not refuse them."""
        tags = [0x0112, 0x8769, 0x8825, 0xA005, 0x014A, 0x0201, 0x0111, 0x011A, 0x02BC, 0x927C]
        counts, values, entries = [0, 1, 2, 9, 2**31], [6, 99, 2**32 - 1], self.random.randrange(1, 5)
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, entries)
        for _ in range(entries):
            tag, count, value = (self.random.choice(choices) for choices in (tags, counts, values))
            exif += struct.pack("<HHII", tag, self.random.randrange(15), count, value)
        exif += bytes(self.random.choice([0, 4]))
        path = folder / f"a.{self.random.choice(['png', 'jpg', 'webp'])}"
        Image.new("RGB", (7, 5)).save(path, exif=exif)

        def read():
            assert load_image(path).size in ((7, 5), (5, 7))

        return read, ()

    def png(self, folder):
        """A PNG with unusual chunks and correct checksums."""
        size = [self.random.choice([1, 2, 1000, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 0]) for _ in range(2)]
        depth, color = self.random.choice([1, 2, 4, 8, 16, 9]), self.random.choice([0, 2, 3, 4, 6, 5])
        header = struct.pack(">IIBBBBB", *size, depth, color, 0, 0, self.random.choice([0, 1, 7]))
        body = zlib.compress(bytes(self.random.choice([0, 10, 10**4, 10**7])))
        chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
        for _ in range(self.random.randrange(3)):
            kind = self.random.choice(
                [b"iCCP", b"zTXt", b"tEXt", b"iTXt", b"eXIf", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"gAMA", b"pHYs", b"IHDR"]
            )
            data = self.random.choice([
                b"", self.random.randbytes(20), b"name\0\0" + zlib.compress(bytes(10**8 // 2)),
                b"Exif\0\0II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + bytes(50),
            ])  # fmt: skip
            chunks.insert(self.random.randrange(1, len(chunks)), (kind, data))
        content = b"\x89PNG\r\n\x1a\n"
        for kind, data in chunks:
            content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        (folder / "a.png").write_bytes(content)
        return self.reading(folder / "a.png")
