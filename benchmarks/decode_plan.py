"""What decode.py measures: its cases, the decoders compared in each, and their rounds."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """What the decoders compute; see the keys of tables.CASE."""

    device: str
    model: str
    threads: int
    mode: str
    dtype: str
    size: int
    batch: int


class Measurement(NamedTuple):
    """A case, the decoders that take turns, and their rounds."""

    case: Case
    peers: tuple[str, ...]
    rounds: int


PEERS = ("ours", "published compiled nhwc", "diffusers compiled nhwc", "diffusers nhwc")
COMPILED = ("ours", "published compiled nhwc", "diffusers compiled nhwc")
GPU_EAGER = ("ours nhwc", "published", "published nhwc", "diffusers", "diffusers nhwc")
GPU_PEERS = (*GPU_EAGER, "ours nhwc graph", "published compiled nhwc", "published compiled nhwc graph", "diffusers compiled nhwc")


def cpu(
    dtype: str = "float32",
    size: int = 256,
    batch: int = 1,
    threads: int = 2,
    model: str = "kandinsky",
    peers: tuple[str, ...] = PEERS,
    rounds: int = 5,
) -> Measurement:
    if dtype == "bfloat16":  # ours is faster with weights in channels_last; in float32 the layout makes no difference
        peers = ("ours", "ours nhwc", *peers[1:])
    if model == "shipped":
        peers = readable_shipped(peers)
    return Measurement(Case("cpu", model, threads, "decode", dtype, size, batch), peers, rounds)


def gpu(
    dtype: str = "bfloat16",
    size: int = 512,
    batch: int = 1,
    mode: str = "decode",
    peers: tuple[str, ...] = GPU_PEERS,
    rounds: int = 5,
) -> Measurement:
    return Measurement(Case("cuda", "kandinsky", 1, mode, dtype, size, batch), peers, rounds)


def readable_shipped(peers: tuple[str, ...]) -> tuple[str, ...]:
    """Return peers that read the shipped weights: diffusers cannot, and the published code takes its place."""
    return tuple(dict.fromkeys(name.replace("diffusers", "published") for name in peers))


# The most important first. Large images get few rounds and decoders, so that no case should take 20 minutes on two cores.
PLANS = {
    "cpu": (
        cpu(peers=(*PEERS, "published nhwc")),
        cpu("bfloat16"),
        cpu(size=128),
        cpu(model="shipped"),
        cpu(size=512, rounds=3),
        cpu(size=128, batch=8, rounds=3),
        cpu(threads=1, rounds=3),
        cpu("bfloat16", size=512, rounds=3),
        cpu("bfloat16", size=128),
        cpu("bfloat16", model="shipped"),
        cpu("bfloat16", threads=1, rounds=3),
        cpu(model="shipped", threads=1),
        cpu(size=1024, peers=COMPILED, rounds=2),
        cpu("bfloat16", size=1024, peers=COMPILED, rounds=2),
        cpu(size=2048, peers=("ours", "diffusers compiled nhwc"), rounds=1),
    ),
    "gpu": (
        gpu(),
        gpu(size=1024),
        gpu(size=256),
        gpu(mode="train", peers=GPU_EAGER),
        gpu("float32"),
        gpu(batch=8, peers=GPU_EAGER),
        gpu(size=2048, peers=GPU_EAGER, rounds=3),
        gpu(mode="train", size=256, peers=GPU_EAGER),
    ),
}
