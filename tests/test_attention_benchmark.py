"""benchmarks/attention.py: the table that --tune writes, with made-up times, and the counts of a training step."""

import json
import sys
from pathlib import Path

import pytest
import torch
from operators import needs_gpu  # noqa: F401  (imports the kernels' cases before the benchmark's modules)
from spies import saved_for_backward

from movq_ext import AttnBlock
from movq_ext.ops import attention_backends, cuda, native
from movq_ext.ops.attention_backends import Problem, choose, requested_backend

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import attention
    import attention_order
    import attention_tune

    yield type("Modules", (), {"attention": attention, "order": attention_order, "tune": attention_tune})
    for name in ("attention", "attention_order", "attention_tune", "timing"):
        sys.modules.pop(name, None)


ENVIRONMENT = {"date": "2026-01-02", "device": "NVIDIA X100", "driver": "1.2", "torch": "2.14", "commit": "abc", "movq_ext": {}}


def made_up(case):
    """Hopper is fastest with many tokens, cublas in backward, native never; tile runs out of memory in float32."""
    backend = requested_backend()
    if backend == "tile" and case.dtype == torch.float32:
        return "out of memory"
    return {"hopper": 4000 / case.tokens, "tile": 2, "cublas": 1 if case.gradient else 3, "native": 9}[backend]


def test_the_written_table_decides(benchmark, machine, tmp_path):
    machine.become((9, 0))
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"8.0": {**ENVIRONMENT, "rows": []}}))
    rows = list(benchmark.tune.tune(made_up, torch.device("cpu"), lambda: True))
    benchmark.tune.write_table(rows, (9, 0), ENVIRONMENT, path)
    table = json.loads(path.read_text())
    assert list(table) == ["8.0", "9.0"]
    assert {key: table["9.0"][key] for key in ENVIRONMENT if key != "movq_ext"} == {
        key: value for key, value in ENVIRONMENT.items() if key != "movq_ext"
    }
    machine.measure(table)
    for tokens, backend in ((1024, "tile"), (4096, "hopper"), (16384, "hopper")):
        assert choose(Problem(0, torch.bfloat16, 512, tokens, True, False)).backend == backend
    assert choose(Problem(0, torch.bfloat16, 512, 1024, True, True)).backend == "cublas"
    assert choose(Problem(0, torch.bfloat16, 512, 16384, False, False)).backend == "tile"  # hopper needs shared_kv
    (row,) = [r for r in table["9.0"]["rows"] if Problem(0, torch.float32, 512, 256, False, True)[1:6] == key_of(r)]
    assert row["backend"] == "cublas" and row["ms"] == {"cublas": 1, "native": 9} and row["failed"] == {"tile": "out of memory"}


def key_of(row):
    return getattr(torch, row["dtype"]), row["head_size"], row["tokens"], row["shared_kv"], row["gradient"]


def test_a_backend_that_fails_the_self_test_is_not_measured(benchmark, machine):
    machine.become((8, 0))
    machine.kernels.plant_error_of("attention_forward", lambda result: result.add_(1))
    case = benchmark.tune.Case(True, torch.bfloat16, 512, False, 1024)
    assert list(benchmark.tune.candidates(case, torch.device("cpu"))) == ["cublas", "native"]
    assert requested_backend() is None


def test_a_backend_runs_only_where_it_can(benchmark, machine):
    """Without the kernels, the operator for Hopper would run the others."""
    case, device = benchmark.tune.Case(True, torch.bfloat16, 512, False, 1024), torch.device("cpu")
    machine.become((8, 0))
    assert not benchmark.attention.runs("hopper", case, device) and benchmark.attention.runs("tile", case, device)


def test_a_slow_backend_is_not_measured_for_more_tokens(benchmark, machine):
    """Slow backends would use up a short lease. Here native takes more than 4 times as long as the fastest."""
    machine.become((9, 0))
    measured = []

    def measure(case):
        measured.append((requested_backend(), case))
        return made_up(case)

    rows = list(benchmark.tune.tune(measure, torch.device("cpu"), lambda: True))
    of_native = {
        case.tokens for backend, case in measured if (backend, case[:4]) == ("native", (True, torch.bfloat16, 512, False))
    }
    assert of_native == {256, 1024, 4096}
    assert {row["tokens"] for row in rows} == set(benchmark.tune.TOKENS)
    (row,) = [r for r in rows if key_of(r) == (torch.bfloat16, 512, 9216, True, False)]
    assert row["failed"] == {"native": "over 4 times slower with fewer tokens"}


def test_tuning_stops_when_the_time_is_over(benchmark, machine):
    answers = iter([True, True, False])
    assert len(list(benchmark.tune.tune(made_up, torch.device("cpu"), lambda: next(answers)))) == 2


def test_a_table_keeps_the_cases_before_an_interruption(benchmark, machine, monkeypatch, tmp_path):
    """A lease may end before the last case."""
    machine.become((9, 0))
    path = tmp_path / "table.json"
    path.write_text("{}")
    left = iter(range(9))

    def measure(attention, inputs, dout, backward, seconds):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return {"ms": 1.0, "MB": 1.0}

    monkeypatch.setattr(benchmark.attention, "measure", measure)
    monkeypatch.setattr(benchmark.attention, "environment", lambda device: ENVIRONMENT)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(benchmark.attention, "draw", lambda count, *_: [torch.zeros(1)] * count)
    monkeypatch.setattr(benchmark.attention, "write_table", lambda *args: benchmark.tune.write_table(*args, path))
    with pytest.raises(KeyboardInterrupt):
        benchmark.attention.write_tuned_table(torch.device("cuda", 0), 1)
    assert [row["tokens"] for row in json.loads(path.read_text())["9.0"]["rows"]] == [256, 1024]


def test_tuning_needs_a_gpu(benchmark):
    with pytest.raises(SystemExit, match="--tune measures GPU backends, but there is no GPU here"):
        benchmark.attention.write_tuned_table(torch.device("cpu"), 1)


def test_the_table_is_the_package_s(benchmark):
    assert benchmark.tune.TABLE.parts[-3:] == attention_backends.MEASURED.parts[-3:]


def test_a_wrong_gradient_is_not_timed(benchmark):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.1 * grad

    inputs = benchmark.attention.draw(3, 1, 20, 16, torch.float32, torch.device("cpu"))
    dout = inputs[0]
    inputs = [x.clone().requires_grad_() for x in inputs]
    right = benchmark.attention.baddbmm
    for backward in (False, True):
        assert "ms" in benchmark.attention.measure(right, inputs, dout, backward)
    wrong = lambda q, k, v: right(Wrong.apply(q), k, v)
    assert "ms" in benchmark.attention.measure(wrong, inputs, dout, False)
    assert benchmark.attention.measure(wrong, inputs, dout, True).startswith("wrong: 1.0e-01")


@pytest.mark.parametrize("name", ["baddbmm N^2", "cublas", "cublas kv"])
def test_peers_compute_attention(benchmark, name):
    q, k, v = benchmark.attention.draw(3, 2, 30, 16, torch.float32, torch.device("cpu"))
    peer = benchmark.attention.peers(True)[name]
    expected = benchmark.attention.formula(q, k, k if name.endswith("kv") else v)
    torch.testing.assert_close(peer(q, k, v), expected)
    torch.testing.assert_close(peer(q.requires_grad_(), k, v), expected)


@pytest.mark.parametrize("absorbed", [False, True])
def test_both_orders_keep_five_maps_for_backward(benchmark, monkeypatch, absorbed):
    """With an operator that returns its result as a GPU's does; the native path of a CPU keeps a copy of it."""
    monkeypatch.setattr(native, "attention", lambda q, k, v, scale: cuda.attention(q, k, v, scale or 0.2, "cublas"))
    monkeypatch.setattr(native, "shared_kv_attention", lambda q, kv, scale: cuda.shared_kv_attention(q, kv, scale, "cublas"))
    block, x = AttnBlock(32), torch.randn(1, 32, 16, 16).to(memory_format=torch.channels_last)
    n = block.norm(x).detach()
    block.norm.forward = lambda x, zq: x
    with benchmark.order.order(absorbed, torch.float32), saved_for_backward() as saved:
        block(n)
    storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in saved if x.numel() >= n.numel())}
    assert sum(storages.values()) == 5 * n.untyped_storage().nbytes()
