"""What the compiler makes of SpatialNorm's output pass: how many instructions a multiprocessor issues per 16 bytes of f."""

import machine_code
import pytest

pytestmark = pytest.mark.skipif(machine_code.NVCC is None, reason="needs nvcc")
SOURCE = machine_code.ROOT / "csrc/kernels/spatial_norm_forward.cu"
# Instructions per 16 bytes with zq and SiLU. `first`: a unit that loads its cell from zq; `other`: further units of the cell.
# `first square` and `other square`: the same where a unit has 2x2 pixels, in NHWC; `small cells`: a cell of 2x2 pixels in NCHW.
LIMITS = {
    "16 bits": {"first": 103, "other": 77, "first square": 88, "other square": 73, "small cells": 87, "same grid": 110},
    "float32": {"first": 52, "other": 40, "first square": 45, "other square": 35, "small cells": 41, "same grid": 50},
}
CELLS, EVEN_CELLS, SAME_GRID, COLUMN_PAIRS, SMALL_CELLS = (f"ResizeE{i}E" for i in range(5))


@pytest.fixture(scope="module")
def cubin(tmp_path_factory):
    return machine_code.compile_cubin(SOURCE, 90, tmp_path_factory.mktemp("cubin"))


@pytest.fixture(scope="module")
def kernels(cubin):
    return machine_code.read_kernels(cubin)


@pytest.fixture(scope="module")
def loops(cubin):
    """Return the loops of the output pass's kernels with accesses of 16 bytes, by kernel, the shortest first."""
    found = machine_code.read_loops(cubin, 90)
    wide = {name: sorted(code, key=len) for name, code in found.items() if "8modulateI" in name and "Li1E" not in name}
    assert len(wide) == 3 * 2 * 4  # dtypes, layouts, ways to resize
    return wide


def limits(name):
    return LIMITS["float32" if "modulateIf" in name else "16 bits"]


def without(outer, inner):
    """Return the instructions of a loop without those of the loop inside."""
    start = next(i for i in range(len(outer)) if outer[i : i + len(inner)] == inner)
    return outer[:start] + outer[start + len(inner) :]


def test_rows_of_a_cell_take_few_instructions(loops):
    """A cell of 2 rows takes `first`, one of 4 rows the mean of both."""
    for name, (inner, outer) in ((name, code) for name, code in loops.items() if EVEN_CELLS in name):
        first = without(outer, inner)
        assert inner.count("STG") == first.count("STG") == 2
        assert len(inner) / 2 <= limits(name)["other"], f"{name}: {len(inner) / 2}"
        assert len(first) / 2 <= limits(name)["first"], f"{name}: {len(first) / 2}"
        assert len(outer) / 4 <= 90, f"{name}: {len(outer) / 4}"


def test_cells_of_two_by_two_pixels_take_few_instructions(loops):
    """In NHWC a square that loads its cell, and further squares of a larger cell. In NCHW a unit is a cell."""
    for name, (inner, outer) in ((name, code) for name, code in loops.items() if COLUMN_PAIRS in name):
        first = without(outer, inner)
        assert inner.count("STG") == first.count("STG") == 4
        assert len(first) / 4 <= limits(name)["first square"] <= 90, f"{name}: {len(first) / 4}"
        assert len(inner) / 4 <= limits(name)["other square"], f"{name}: {len(inner) / 4}"
    for name, (loop,) in ((name, code) for name, code in loops.items() if SMALL_CELLS in name):
        assert loop.count("STG") == 2
        assert len(loop) / 2 <= limits(name)["small cells"] <= 90, f"{name}: {len(loop) / 2}"


def test_dependent_kernels_wait_before_they_use_what_others_write(kernels):
    """`merge_statistics` loads its first parameters before it waits. The last kernel of a chain lets no other start early."""
    dependent = {name: code for name, code in kernels.items() if "8modulateI" in name or "merge_statistics" in name}
    assert len(dependent) == 33
    for name, code in dependent.items():
        early = code[: code.index("ACQBULK")]
        assert code.count("ACQBULK") == 1 and "STG" not in early and "EXIT" not in early, name
        assert ("LDG" in early) == ("merge_statistics" in name), name
        assert ("PREEXIT" in code) == ("merge_statistics" in name), name
    for name in kernels.keys() - dependent.keys():
        assert "ACQBULK" not in kernels[name], name
        assert ("PREEXIT" in kernels[name]) == ("_statisticsI" in name), name


def test_rows_with_their_own_zq_take_few_instructions(loops):
    for name, (loop,) in ((name, code) for name, code in loops.items() if SAME_GRID in name):
        assert loop.count("STG") == 2
        assert len(loop) / 2 <= limits(name)["same grid"], f"{name}: {len(loop) / 2}"


def test_all_loads_of_a_unit_are_requested_before_one_is_used(loops):
    """Arithmetic waits for f. A load of zq that followed it would add its latency to that of f."""
    for name, code in loops.items():
        if CELLS in name:
            continue
        units = code if len(code) == 1 else [code[0], without(code[1], code[0])]
        for unit in units:
            last_load = len(unit) - 1 - unit[::-1].index("LDG")
            assert last_load < min(unit.index("FFMA"), unit.index("MUFU")), name


def test_no_loop_spills(loops):
    for name, code in loops.items():
        assert not any({"LDL", "STL"} & set(loop) for loop in code), name
