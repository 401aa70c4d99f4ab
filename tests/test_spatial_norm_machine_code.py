"""What the compiler makes of SpatialNorm's output pass: how many instructions a multiprocessor issues per 16 bytes of f."""

import machine_code
import pytest

pytestmark = pytest.mark.skipif(machine_code.NVCC is None, reason="needs nvcc")
SOURCE = machine_code.ROOT / "csrc/kernels/spatial_norm_forward.cu"
# Instructions per 16 bytes with zq and SiLU. `first`: two rows that load their cell from zq; `other`: further rows of the cell.
LIMITS = {"16 bits": {"first": 103, "other": 77, "same grid": 121}, "float32": {"first": 52, "other": 40, "same grid": 56}}
CELLS, EVEN_CELLS, SAME_GRID = ("ResizeE0E", "ResizeE1E", "ResizeE2E")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cubin")


@pytest.fixture(scope="module")
def loops(folder):
    """Return the loops of the output pass's kernels with accesses of 16 bytes, by kernel, the shortest first."""
    found = machine_code.compile_loops(SOURCE, 90, folder)
    wide = {name: sorted(code, key=len) for name, code in found.items() if "8modulateI" in name and "Li1E" not in name}
    assert len(wide) == 3 * 2 * 3  # dtypes, layouts, ways to resize
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


def test_rows_with_their_own_zq_take_few_instructions(loops):
    for name, (loop,) in ((name, code) for name, code in loops.items() if SAME_GRID in name):
        assert loop.count("STG") == 2
        assert len(loop) / 2 <= limits(name)["same grid"], f"{name}: {len(loop) / 2}"


def test_all_loads_of_a_unit_are_requested_before_one_is_used(loops):
    """Arithmetic waits for f. A load of zq that followed it would add its latency to that of f."""
    for name, code in loops.items():
        if CELLS in name:
            continue
        units = [code[0]] if SAME_GRID in name else [code[0], without(code[1], code[0])]
        for unit in units:
            last_load = len(unit) - 1 - unit[::-1].index("LDG")
            assert last_load < min(unit.index("FFMA"), unit.index("MUFU")), name


def test_no_loop_spills(loops):
    for name, code in loops.items():
        assert not any({"LDL", "STL"} & set(loop) for loop in code), name


def test_the_cluster_kernel_does_not_spill(loops, folder):
    """It keeps 8 accesses in registers, and its loops are unrolled: all of its instructions count."""
    kernels = machine_code.read_kernels(folder / f"{SOURCE.stem}.90.cubin")
    clusters = {name: code for name, code in kernels.items() if "15norm_in_clusterI" in name}
    assert len(clusters) == 3 * 2 * 2  # dtypes, layouts, ways to resize
    for name, code in clusters.items():
        assert code.count("LDG") >= 8 and not {"LDL", "STL"} & set(code), name
