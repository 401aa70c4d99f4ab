"""What the compiler makes of the kernels that fold weights: as many loads and stores as the source has accesses of 16 bytes."""

import machine_code
import pytest

pytestmark = pytest.mark.skipif(machine_code.NVCC is None, reason="needs nvcc")
ACCESSES = {"fold_to_transposed": (9, 16), "fold_to_windows": (9, 16), "unfold_transposed": (16, 9)}  # loads and stores
WIDE = ("IfLi4E", "I6__halfLi8E", "I13__nv_bfloat16Li8E")


@pytest.mark.parametrize("target", [80, 90])
def test_wide_accesses_are_not_split(target, tmp_path):
    kernels = machine_code.compile_kernels(machine_code.ROOT / "csrc/kernels/upsampling_fold.cu", target, tmp_path)
    wide = {name: code for name, code in kernels.items() if any(arguments in name for arguments in WIDE)}
    assert len(wide) == 18  # three kernels, three dtypes, two layouts of the weight
    for name, code in wide.items():
        accesses = next(expected for kernel, expected in ACCESSES.items() if kernel in name)
        assert (code.count("LDG"), code.count("STG")) == accesses, name
        assert not {"LDL", "STL"} & set(code), f"{name} spills"
