"""The table of attention's fastest backends, measured: ``benchmarks/attention.py --tune`` writes it.

The package reads it from movq_ext/ops/attention_table.json, see movq_ext/ops/attention_backends.py. Only a backend whose results
are right is in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from movq_ext.ops.attention_backends import BACKENDS, VARIABLE, Problem, choose
from movq_ext.ops.paths import SELF_TESTS
from movq_ext.ops.self_test import self_test_failure

TABLE = Path(__file__).resolve().parents[1] / "movq_ext/ops/attention_table.json"
DTYPES = (torch.bfloat16, torch.float32)  # float16 takes bfloat16's rows
HEAD_SIZES = (512, 256, 128)
TOKENS = (256, 1024, 4096, 9216, 16384)
# A backend that takes SLOW times as long as the fastest is not measured for more tokens. With fewer, launches take the time.
SLOW, MIN_SLOW_TOKENS = 4, 4096


class Case(NamedTuple):
    shared_kv: bool
    dtype: torch.dtype
    head_size: int
    gradient: bool
    tokens: int


def cases() -> Iterator[Case]:
    """Yield what is measured, the largest heads first: a decoder's are 512."""
    for size in HEAD_SIZES:
        for dtype in DTYPES:
            for shared_kv in (True, False):
                for gradient in (False, True):
                    for tokens in TOKENS:
                        yield Case(shared_kv, dtype, size, gradient, tokens)


def candidates(case: Case, device: torch.device) -> Iterator[str]:
    """Yield the backends that take a case and pass the self test, each while MOVQ_EXT_ATTENTION names it."""
    before = os.environ.get(VARIABLE)
    try:
        for backend in BACKENDS:
            os.environ[VARIABLE] = backend
            problem = Problem(device.index, case.dtype, case.head_size, case.tokens, case.shared_kv, case.gradient)
            if choose(problem).is_fallback:
                continue
            if backend == "native" or self_test_failure(SELF_TESTS[backend], device, case.dtype, False) is None:
                yield backend
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def tune(
    measure: Callable[[Case], float | str], device: torch.device, may_continue: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """Yield a row for every case that at least two backends take. Slow backends are left out, see SLOW.

    Args:
        measure: returns the milliseconds of a case on the backend that MOVQ_EXT_ATTENTION names, or why there are none.
        may_continue: is asked before every case.
    """
    slow: set[tuple[Any, ...]] = set()
    for case in cases():
        if not may_continue():
            break
        kind = case._replace(tokens=0)
        results = {}
        for backend in candidates(case, device):
            results[backend] = f"over {SLOW} times slower with fewer tokens" if (kind, backend) in slow else measure(case)
        times = {backend: round(ms, 4) for backend, ms in results.items() if not isinstance(ms, str)}
        failures = {backend: reason for backend, reason in results.items() if isinstance(reason, str)}
        if times and len(results) > 1:
            if case.tokens >= MIN_SLOW_TOKENS:
                slow |= {(kind, backend) for backend, ms in times.items() if ms > SLOW * min(times.values())}
            row = {**case._asdict(), "dtype": str(case.dtype)[6:], "backend": min(times, key=times.__getitem__), "ms": times}
            yield {**row, "failed": failures} if failures else row


def write_table(rows: list[dict[str, Any]], capability: tuple[int, int], environment: dict[str, Any], path: Path = TABLE) -> None:
    """Replace the rows of a compute capability, and keep those of others."""
    table = json.loads(path.read_text())
    fields = ("date", "device", "driver", "torch", "commit")
    table["{}.{}".format(*capability)] = {**{field: environment.get(field) for field in fields}, "rows": rows}
    lines = []
    for name, device in sorted(table.items(), key=lambda item: float(item[0])):
        head = json.dumps({field: device[field] for field in fields})[1:-1]
        body = ",\n".join("  " + json.dumps(row) for row in device["rows"])
        lines.append(f'"{name}": {{{head}, "rows": [\n{body}\n]}}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
