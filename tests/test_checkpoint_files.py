import pytest
import torch

from movq_ext import CheckpointError
from movq_ext.io.checkpoint_files import read_tensors


@pytest.mark.parametrize("content", [
    {"x": torch.ones(2)}, {"state_dict": {"x": torch.ones(2)}, "optimizer": {"y": torch.zeros(1)}},
    {"weights": {"x": torch.ones(2)}, "epoch": 3}, {"x": torch.ones(2), "below": None},
], ids=["plain", "state_dict", "one below", "other entry"])  # fmt: skip
def test_read_tensors(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    if "below" in content:
        with pytest.raises(CheckpointError, match="expected only tensors, got other entries: below"):
            read_tensors(tmp_path / "a.pt")
    else:
        assert torch.equal(read_tensors(tmp_path / "a.pt")["x"], torch.ones(2))


@pytest.mark.parametrize("content", [{}, {"a": {"x": torch.zeros(1)}, "b": {"x": torch.zeros(1)}}], ids=["none", "two"])
def test_an_unclear_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"expected one dictionary of tensors or a state_dict, got {len(content)}"):
        read_tensors(tmp_path / "a.pt")
