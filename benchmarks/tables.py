"""Tables of decode.py's results, written into documents between ``<!-- NAME table -->`` and ``<!-- end of NAME table -->``.

"decode" compares the decoders in the first case that was measured, "cases" compares ours with the fastest peer in every case.
The tables of a GPU's results are "gpu decode" and "gpu cases".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
CASE = ("device", "model", "threads", "mode", "dtype", "size", "batch")
HOW = {"": "eager", "compiled": "`torch.compile`", "frozen": "`torch.compile`, frozen", "graph": "CUDA graph",
       "compiled graph": "`torch.compile`, CUDA graph"}  # fmt: skip
SEPARATOR = "|" + "---|" * 5
KINDS = {"ours": "movq_ext", "published": "published code", "diffusers": "diffusers"}


def measured_cases(rows: Rows) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Group the measured rows by case, and keep those that `fastest` chooses."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if isinstance(row["ms"], float):
            cases.setdefault(tuple(row[key] for key in CASE), []).append(row)
    return {case: fastest(found) for case, found in cases.items()}


def fastest(rows: Rows) -> list[dict[str, Any]]:
    """Return every decoder in its fastest layout, for each way of running it in HOW; the fastest first."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        kind, how = split_name(row["decoder"])
        if how not in HOW:  # such as "ours tiled"
            continue
        if (kind, how) not in best or row["ms"] < best[kind, how]["ms"]:
            best[kind, how] = row
    return sorted(best.values(), key=lambda row: float(row["ms"]))


def split_name(decoder: str) -> tuple[str, str]:
    """Split a name of peers.py into the kind of decoder and the way it runs, without the layout."""
    kind, *how = decoder.split()
    return kind, " ".join(word for word in how if word != "nhwc")


def decoder_name(decoder: str) -> str:
    """Return what a document calls a decoder that `fastest` chooses, such as "diffusers, eager"."""
    kind, how = split_name(decoder)
    return KINDS[kind] if (kind, how) == ("ours", "") else f"{KINDS[kind]}, {HOW[how]}"


def is_ours(row: dict[str, Any]) -> bool:
    return split_name(row["decoder"])[0] == "ours"


def decode_table(rows: Rows) -> list[str]:
    """Return the lines of a table with time and memory of every decoder in the first case."""
    first = next(iter(measured_cases(rows).values()))
    ours = next(row for row in first if is_ours(row))
    lines = [
        "| Decoder | Milliseconds | MB beyond the weights | Ours is faster by | Ours takes less memory by |",
        "|" + "---|" * 5,
    ]
    for row in [ours, *(row for row in first if row is not ours)]:
        name = decoder_name(row["decoder"])
        ratios = ("", "") if row is ours else (times(row, ours, key) for key in ("ms", "MB"))
        lines.append(f"| {name} | {short(row['ms'])} | {row['MB']:.0f} | {' | '.join(ratios)} |")
    return lines


def cases_table(rows: Rows) -> list[str]:
    """Return the lines of a table that compares ours with the fastest peer in every case."""
    lines = ["| Case | Milliseconds | Fastest other decoder | Ours is faster by | Ours takes less memory by |", SEPARATOR]
    for case, found in compared_cases(rows).items():
        ours, peer = found
        name = f"{decoder_name(peer['decoder'])}: {short(peer['ms'])}"
        ratios = " | ".join(times(peer, ours, key) for key in ("ms", "MB"))
        lines.append(f"| {case_name(case)} | {short(ours['ms'])} | {name} | {ratios} |")
    return lines


def short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 30 else f"{ms:.3g}"


def times(peer: dict[str, Any], ours: dict[str, Any], key: str) -> str:
    """Return how many times as much as ours a peer takes, or "-" if ours is too little to measure."""
    return f"{peer[key] / ours[key]:.2f}x" if ours[key] > 0 else "-"


def compared_cases(rows: Rows) -> dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any]]]:
    """Return ours and the fastest peer, for every case with both."""
    found = {}
    for case, decoders in measured_cases(rows).items():
        ours = [row for row in decoders if is_ours(row)]
        peers = [row for row in decoders if not is_ours(row)]
        if ours and peers:
            found[case] = ours[0], peers[0]
    return found


def case_name(case: tuple[Any, ...]) -> str:
    """Return a short name of a case, such as "8 images of 128x128, float32, 1 thread"."""
    device, model, threads, mode, dtype, size, batch = case
    images = f"{size}x{size}" if batch == 1 else f"{batch} images of {size}x{size}"
    words = [images, dtype]
    if model == "shipped":
        words.insert(0, "shipped model")
    if mode == "train":
        words.insert(0, "training step")
    words.append("GPU" if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}")
    return ", ".join(words)


TABLES: dict[str, Callable[[Rows], list[str]]] = {"decode": decode_table, "cases": cases_table}


def put_tables(path: Path, rows: Rows) -> list[str]:
    """Write each table whose marks the document has between them. Returns the tables' names."""
    text, written = path.read_text(), []
    prefix = "gpu " if rows[0]["device"] == "cuda" else ""
    for kind, table in TABLES.items():
        name = prefix + kind
        marks = f"<!-- {name} table -->\n", f"<!-- end of {name} table -->\n"
        if marks[0] in text:
            before, _, rest = text.partition(marks[0])
            _, mark, after = rest.partition(marks[1])
            if not mark:
                raise SystemExit(f"{path} has no {marks[1].strip()}")
            text = f"{before}{marks[0]}\n" + "\n".join(table(rows)) + f"\n\n{mark}{after}"
            written.append(name)
    path.write_text(text)
    return written
