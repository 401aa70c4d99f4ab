"""What the compiler makes of the kernels that copy a map and add to it. They must wait for memory, not for instructions."""

import machine_code
import pytest

pytestmark = pytest.mark.skipif(machine_code.NVCC is None, reason="needs nvcc")
# Per access of 16 bytes, without and with statistics.
MAX_INSTRUCTIONS = {"epilogue": (66, 114), "upsampling_interleave": (40, 84)}
WIDE = {"f": 4, "6__half": 8, "13__nv_bfloat16": 8}


@pytest.mark.parametrize("target", [80, 90, 120])
@pytest.mark.parametrize("name", MAX_INSTRUCTIONS)
def test_loops_are_short_and_keep_two_loads_in_flight(name, target, tmp_path):
    source = machine_code.ROOT / f"csrc/kernels/{name}.cu"
    kernels = machine_code.compile_loops(source, target, tmp_path)
    wide = {k: loops for k, loops in kernels.items() if any(f"I{type_}Li{size}E" in k for type_, size in WIDE.items())}
    assert len(wide) == (12 if name == "epilogue" else 6)  # dtypes, statistics or none, the epilogue in both layouts
    for kernel, loops in wide.items():
        assert any("LDG" in loop for loop in loops), kernel
        for loop in loops:
            assert not {"LDL", "STL"} & set(loop), f"{kernel} spills"
            if "LDG" not in loop:  # the merge of the groups' statistics, once per block
                continue
            assert "I2F" not in loop, f"{kernel} divides integers in its loop"
            stores = loop.count("STG")
            maximum = MAX_INSTRUCTIONS[name]["Lb1EEEv" in kernel]
            assert len(loop) <= maximum * stores, f"{kernel}: {len(loop)} instructions for {stores} stores"
            accesses = "".join(instruction[0] for instruction in loop if instruction in ("LDG", "STG"))
            assert "LL" in 2 * accesses, f"{kernel} has one load in flight: {accesses}"  # a loop may begin anywhere
