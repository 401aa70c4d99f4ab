"""What the compiler makes of the kernels that copy a map and add to it. They must wait for memory, not for instructions."""

import machine_code
import pytest

pytestmark = pytest.mark.skipif(machine_code.NVCC is None, reason="needs nvcc")
MAX_INSTRUCTIONS = {"epilogue": 66, "upsampling_interleave": 40}  # per access of 16 bytes
WIDE = {"f": 4, "6__half": 8, "13__nv_bfloat16": 8}


@pytest.mark.parametrize("target", [80, 90, 120])
@pytest.mark.parametrize("name", MAX_INSTRUCTIONS)
def test_loops_are_short_and_keep_two_loads_in_flight(name, target, tmp_path):
    source = machine_code.ROOT / f"csrc/kernels/{name}.cu"
    kernels = machine_code.compile_loops(source, target, tmp_path)
    wide = {k: loops for k, loops in kernels.items() if any(f"I{type_}Li{size}E" in k for type_, size in WIDE.items())}
    assert len(wide) == (6 if name == "epilogue" else 3)  # three dtypes, the epilogue in both layouts
    for kernel, loops in wide.items():
        assert loops, kernel
        for loop in loops:
            assert "I2F" not in loop, f"{kernel} divides integers in its loop"
            assert not {"LDL", "STL"} & set(loop), f"{kernel} spills"
            stores = loop.count("STG")
            assert len(loop) <= MAX_INSTRUCTIONS[name] * stores, f"{kernel}: {len(loop)} instructions for {stores} stores"
            accesses = "".join(instruction[0] for instruction in loop if instruction in ("LDG", "STG"))
            assert "LL" in 2 * accesses, f"{kernel} has one load in flight: {accesses}"  # a loop may begin anywhere
