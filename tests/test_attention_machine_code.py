"""What the compiler makes of attention's walk. One block runs per multiprocessor: no other hides instructions between a barrier
and the products after it."""

import machine_code
import pytest

pytestmark = pytest.mark.skipif(machine_code.NVCC is None, reason="needs nvcc")
MAX_INSTRUCTIONS = 25  # between a barrier and the first load of operands


def phases(instructions):
    """Return the instructions that follow each barrier, up to the next, of the phases that multiply."""
    text = " ".join(name or "-" for name in instructions)
    parts = [part.split() for part in text.split("BAR")[1:]]
    return [part for part in parts if "HMMA" in part and "LDSM" in part]


@pytest.mark.parametrize("file, target", [("forward", 80), ("forward", 90), ("backward", 80)])
def test_tensor_cores_start_soon_after_each_barrier(file, target, tmp_path):
    """Phases are the scores of each product, and the values. Copies are requested after the first products."""
    source = machine_code.ROOT / f"csrc/kernels/attention_{file}.cu"
    kernels = machine_code.compile_kernels(source, target, tmp_path)
    walks = {name: code for name, code in kernels.items() if "4walkI" in name}
    # Three dtypes and three head sizes; in forward also whole tiles, in 16-bit types and for two head sizes.
    assert len(walks) == (9 + 4 if file == "forward" else 9 * 4)
    for name, code in walks.items():
        products_end = len(code) - code[::-1].index("HMMA")  # what writes the results takes a logarithm, which converts too
        assert "I2F" not in code[:products_end], f"{name} divides integers"
        assert not {"LDL", "STL"} & set(code), f"{name} spills"
        multiplying = phases(code)
        assert len(multiplying) in (2, 3, 4), name
        for phase in multiplying:
            assert phase.index("LDSM") <= MAX_INSTRUCTIONS, f"{name}: {phase.index('LDSM')} instructions"
            whole_tiles = "Lb1E" in name  # requested during the scores
            assert "LDGSTS" in phase or whole_tiles, name
            assert "LDGSTS" not in phase[: phase.index("HMMA")], f"{name} requests a copy before its first products"
