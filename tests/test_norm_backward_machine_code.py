"""What the compiler makes of SpatialNorm's backward. Its passes wait for memory: they need loads in flight and short loops."""

import machine_code
import pytest

pytestmark = pytest.mark.skipif(machine_code.NVCC is None, reason="needs nvcc")
# By kernel and elements of an access: loads before the first use, and instructions of the loop for each access of 16 bytes of f.
# A multiprocessor issues 4 instructions per cycle, and gets 14.5 bytes per cycle from an H100's memory (3.35 TB/s for 132 of them
# at 1.755 GHz). So the 32 lanes of a warp wait 71 cycles for an access of f and one of dout, enough for 282 instructions, and 106
# cycles for three accesses in write_input_gradient, enough for 424. Loops hold the code with and without SiLU, and of
# write_input_gradient for every resize; a run takes about two thirds of it.
LOADS = {"sum_cell_per_thread": {8: 4, 4: 4}, "sum_cell_per_team": {8: 6, 4: 8}, "sum_cell_per_block": {8: 6, 4: 8},
         "sum_pixel_ranges": {8: 6, 4: 8}, "sum_bands": {8: 4, 4: 4}, "write_input_gradient": {8: 8, 4: 8}}  # fmt: skip
ACCESSES = {"write_input_gradient": 4}  # f, dout, zq_y and zq_b; the others load f and dout
MAX_INSTRUCTIONS = {"sum_cell_per_thread": {8: 230, 4: 115}, "sum_cell_per_team": {8: 215, 4: 110},
                    "sum_cell_per_block": {8: 290, 4: 140}, "sum_pixel_ranges": {8: 290, 4: 140}, "sum_bands": {8: 220, 4: 110},
                    "write_input_gradient": {8: 560, 4: 265}}  # fmt: skip
TYPES = {"f": 4, "6__half": 8, "13__nv_bfloat16": 8}


def main_loop(loops, size):
    """Return the innermost loop that loads, and takes an exponential and a reciprocal for each value of two accesses."""
    return min((loop for loop in loops if "LDG" in loop and loop.count("MUFU") >= 2 * 2 * size), key=len)


@pytest.fixture(scope="module", params=[80, 90])
def compiled(request, tmp_path_factory):
    """Return the target and the path of the kernels compiled for it."""
    source = machine_code.ROOT / "csrc/kernels/spatial_norm_backward.cu"
    return request.param, machine_code.compile_cubin(source, request.param, tmp_path_factory.mktemp("cubin"))


def test_loads_come_before_their_use_and_loops_are_short(compiled):
    target, cubin = compiled
    found = {}
    for mangled, loops in machine_code.read_loops(cubin, target).items():
        for name, loads in LOADS.items():
            size = next((size for type_, size in TYPES.items() if f"{name}I{type_}Li{size}E" in mangled), None)
            if size is None:
                continue
            loop = main_loop(loops, size)
            accesses = loads[size] // ACCESSES.get(name, 2)
            found[mangled] = f"{len(loop) / accesses:.0f} instructions for an access"
            before = loop[: loop.index("MUFU")].count("LDG")
            assert before >= loads[size], f"{mangled}: {before} loads before the first use"
            assert len(loop) <= MAX_INSTRUCTIONS[name][size] * accesses, f"{mangled}: {len(loop)} for {accesses} accesses"
            assert not {"LDL", "STL"} & set(loop), f"{mangled} spills"
            if name != "write_input_gradient":  # which converts positions of f to those of zq
                assert "I2F" not in loop, f"{mangled} divides integers in its loop"
    print(found)
    assert len(found) == 3 * (2 + 1 + 2 + 1 + 2)  # dtypes x kernels, of which two have both layouts


def test_dependent_kernels_wait_before_they_use_memory(compiled):
    """Later kernels wait for the previous one, and all but the last let the next one start. sm_80 has neither instruction."""
    target, cubin = compiled
    waiting, last = {"merge_sums", "sum_parameter_gradients", "write_input_gradient"}, "write_input_gradient"
    for mangled, code in machine_code.read_kernels(cubin).items():
        if target < 90:
            assert not {"ACQBULK", "PREEXIT"} & set(code), mangled
            continue
        assert ("PREEXIT" in code) == (last not in mangled), mangled
        assert code.count("ACQBULK") == any(name in mangled for name in waiting), mangled
        if "ACQBULK" in code:
            assert not {"LDG", "STG", "EXIT"} & set(code[: code.index("ACQBULK")]), mangled
