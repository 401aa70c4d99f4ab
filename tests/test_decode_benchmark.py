"""benchmarks/decode.py and its tables and figures, with made-up times: no peer runs."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
KINDS = ("convolution", "attention", "norm")
MS = {"ours": 100.0, "ours nhwc": 80.0, "published compiled nhwc": 150.0, "diffusers compiled nhwc": 160.0,
      "diffusers nhwc": 200.0}  # fmt: skip


@pytest.fixture
def decode(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("decode")
    monkeypatch.setattr(module, "save_random", lambda *_, **__: None)
    monkeypatch.setattr(module, "environment", environment)
    for name in ("copy_bandwidth", "matmul_rate", "convolution_rate"):
        monkeypatch.setattr(module, name, lambda *_: 1e12)
    monkeypatch.setattr(module, "work", lambda *_: {kind: {"operations": 10**10, "elements": 10} for kind in KINDS})
    monkeypatch.setattr(module.movq_ext, "from_pretrained", lambda folder: SimpleNamespace(decoder=None))
    monkeypatch.setattr(module, "draw", lambda folder: "none")
    yield module
    for name in ("decode", "decode_plan", "peer_process", "peers", "plots", "published_decoder", "tables", "timing", "work"):
        sys.modules.pop(name, None)


class FakePeer:
    """Answers at once. `fail_in` is the case, by its number, in which the benchmark is interrupted."""

    cases = turns = None
    fail_in = None
    has_time = True

    def __init__(self, name, weights, expected, seconds, threads, **case):
        self.name, self.found, self.case = name, {"ms": []}, (weights.name, threads, *case.values())
        self.factor = (10.0 if case["dtype"] == "float32" else 5.0) * (case["size"] / 256) ** 2

    def receive(self, deadline):
        if self.case not in self.cases:
            self.cases.append(self.case)
        if self.fail_in == len(self.cases):
            raise KeyboardInterrupt
        if not self.has_time:
            self.found["failed"] = "no time"
            return
        call_ms = self.factor * MS.get(self.name, 250.0)
        self.found |= {"MB": MS.get(self.name, 300.0), "second call ms": call_ms, "kept MB": 0.0}

    def measure(self, deadline, warm_up):
        if "failed" not in self.found:
            self.turns.append((self.case, warm_up))
            self.found["ms"].append(self.found["second call ms"])

    def close(self):
        pass


def run(decode, monkeypatch, folder, *arguments, fail_in=None, has_time=True):
    monkeypatch.setattr(decode, "PeerProcess", FakePeer)
    monkeypatch.setattr(FakePeer, "cases", [])
    monkeypatch.setattr(FakePeer, "turns", [])
    monkeypatch.setattr(FakePeer, "fail_in", fail_in)
    monkeypatch.setattr(FakePeer, "has_time", has_time)
    monkeypatch.setattr(sys, "argv", ["decode.py", "--out", str(folder), *arguments])
    decode.main()


def report_of(folder):
    return json.loads((folder / "decode.json").read_text())


def measured(decode, folder, plan="cpu"):
    """Return the numbers of the plan's cases that the report has, in the report's order."""
    numbers = {tuple(measurement.case): number for number, measurement in enumerate(decode.PLANS[plan], start=1)}
    rows = report_of(folder)["rows"]
    return list(dict.fromkeys(numbers[tuple(row[key] for key in decode.CASE)] for row in rows))


def test_the_plan_measures_every_case_in_its_order(decode, monkeypatch, tmp_path):
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--rounds", "2")
    report = report_of(tmp_path)
    cases = list(dict.fromkeys(tuple(row[key] for key in decode.CASE) for row in report["rows"]))
    assert cases == [tuple(measurement.case) for measurement in decode.PLANS["cpu"]]
    assert {row["rounds"] for row in report["rows"] if row["size"] < 2048} == {2}
    shipped = [(row["dtype"], row["decoder"]) for row in report["rows"] if row["model"] == "shipped" and row["threads"] == 2]
    peers = ["ours", "published compiled nhwc", "published nhwc"]
    expected = [("float32", peer) for peer in peers] + [("bfloat16", peer) for peer in ["ours", "ours nhwc", *peers[1:]]]
    assert shipped == expected
    name = "kandinsky, cpu, 2 threads, decode, float32, 256x256, batch 1, ours against the best peer"
    assert report[name] == "1.50x the speed, 67% of the memory"


def test_large_images_get_fewer_peers_and_rounds(decode, monkeypatch, tmp_path):
    run(decode, monkeypatch, tmp_path, "--plan", "cpu")
    found = {}
    for row in report_of(tmp_path)["rows"]:
        if (row["model"], row["dtype"], row["threads"], row["batch"]) == ("kandinsky", "float32", 2, 1):
            found.setdefault(row["size"], []).append(row["rounds"])
    assert found == {256: [5] * 5, 128: [5] * 4, 512: [3] * 4, 1024: [2] * 3, 2048: [1] * 2}
    assert {case[-2] for case, _ in FakePeer.turns} == {128, 256, 512, 1024}  # the call that measures the memory is timed


def test_turns_of_short_calls_start_with_an_untimed_one(decode, monkeypatch, tmp_path):
    """Of all peers, as soon as one of them is short: ours takes 1.0 s for 256x256 in float32, and they up to 2.5 s."""
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--rounds", "2")
    warm_ups = {}
    for case, warm_up in FakePeer.turns:
        warm_ups.setdefault(case[-3:-1], set()).add(warm_up)
    assert warm_ups["float32", 128] == warm_ups["float32", 256] == {True}
    assert warm_ups["float32", 512] == warm_ups["bfloat16", 512] == {False}


def test_an_interrupted_run_keeps_its_finished_cases(decode, monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(decode, monkeypatch, tmp_path, "--plan", "cpu", fail_in=3)
    assert {(row["size"], row["dtype"]) for row in report_of(tmp_path)["rows"]} == {(256, "float32"), (256, "bfloat16")}


def test_several_runs_fill_one_report(decode, monkeypatch, tmp_path):
    """Chosen cases, the cases that are left, and none: in one report, in the order of the plan."""
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "5", "2")
    assert measured(decode, tmp_path) == [2, 5]
    monkeypatch.setattr(decode, "environment", lambda device: {**environment(device), "date": "later", "commit": "later"})
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--resume")
    assert measured(decode, tmp_path) == list(range(1, len(decode.PLANS["cpu"]) + 1))
    assert len(FakePeer.cases) == len(decode.PLANS["cpu"]) - 2
    rows = report_of(tmp_path)["rows"]
    dates = [{row["date"] for row in rows if row["dtype"] == "float32" and row["size"] == size} for size in (512, 1024)]
    assert dates[1] == {"later"} != dates[0] and all(row["commit"] and row["rounds"] for row in rows)
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--resume")
    assert not FakePeer.cases and report_of(tmp_path)["rows"] == rows


def test_a_case_without_time_is_measured_again(decode, monkeypatch, tmp_path):
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1")
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1", "2", "--resume", has_time=False)
    assert report_of(tmp_path)["rows"][-1]["failed"] == "no time" and len(FakePeer.cases) == 1
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1", "2", "--resume")
    rows = report_of(tmp_path)["rows"]
    assert len(FakePeer.cases) == 1 and measured(decode, tmp_path) == [1, 2] and all(row["ms"] > 0 for row in rows)


def test_a_case_with_too_few_rounds_is_measured_again(decode, monkeypatch, tmp_path):
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1", "--rounds", "2")
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1", "--rounds", "3", "--resume")
    assert {row["rounds"] for row in report_of(tmp_path)["rows"]} == {3}


def test_runs_on_different_machines_do_not_mix(decode, monkeypatch, tmp_path):
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1")
    before = (tmp_path / "decode.json").read_text()
    monkeypatch.setattr(decode, "environment", lambda device: {**environment(device), "torch": "9.9"})
    with pytest.raises(SystemExit, match=r"environment and settings of the earlier run: expected torch .*, got 9\.9"):
        run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--resume")
    assert (tmp_path / "decode.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--quick",), r"expected rehearsal \(--quick\) False, got True"),
        (("--seconds", "2"), r"expected seconds of a turn \(--seconds\) 0\.5, got 2\.0"),
    ],
)
def test_runs_with_different_settings_do_not_mix(decode, monkeypatch, tmp_path, change, message):
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1")
    with pytest.raises(SystemExit, match=message):
        run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--resume", *change)
    assert not FakePeer.cases and measured(decode, tmp_path) == [1]


def test_a_report_of_an_older_version_is_refused(decode, monkeypatch, tmp_path):
    """Such as one with the date, commit and rounds in its head."""
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1")
    report = report_of(tmp_path)
    for row in report["rows"]:
        del row["date"], row["commit"]
    (tmp_path / "decode.json").write_text(json.dumps({"date": "today", "commit": "abc", "rounds": 3, **report}))
    with pytest.raises(SystemExit, match=r"cannot add to the older report .*decode\.json: expected the columns .*'commit'"):
        run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--resume")
    assert report_of(tmp_path)["date"] == "today"


def test_resume_without_an_earlier_report_measures_all(decode, monkeypatch, tmp_path):
    run(decode, monkeypatch, tmp_path / "new", "--plan", "cpu", "--cases", "1", "2", "--resume")
    assert measured(decode, tmp_path / "new") == [1, 2]


def test_resume_keeps_rows_of_other_peers(decode, monkeypatch, tmp_path):
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1")
    rows = report_of(tmp_path)["rows"]
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1", "--resume", "--peers", "ours tiled")
    *others, tiled = report_of(tmp_path)["rows"]
    assert others == rows and tiled["decoder"] == "ours tiled" and tiled["ms"] > 0


def test_a_row_with_fewer_rounds_replaces_nothing(decode, monkeypatch, tmp_path):
    """The report lacks one peer, and no time is left to measure the case again."""
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1", "--peers", "ours", "diffusers")
    rows = report_of(tmp_path)["rows"]
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1", "--resume", has_time=False)
    *found, compiled, _, _, _ = report_of(tmp_path)["rows"]
    assert found == rows and all(row["rounds"] == 5 for row in rows) and (compiled["ms"], compiled["failed"]) == ("-", "no time")
    failed = {**compiled, "failed": "out of memory"}
    assert decode.merged([failed], [compiled]) == decode.merged([compiled], [failed]) == [failed]


def test_a_failure_in_a_later_round_is_final(decode):
    """It keeps the time of the rounds before, and is not measured again."""
    results = {"ours": {"ms": [1.0] * 5}, "published": {"ms": [1.0, 3.0], "failed": "over 900 s"}}
    measurement = decode.PLANS["cpu"][0]._replace(peers=tuple(results))
    ours, published = rows = decode.rows_of(measurement.case, results, 1.0, {"date": "today", "commit": "abc"})
    assert (published["ms"], published["rounds"], published["failed"], ours["failed"]) == (2.0, 2, "over 900 s", "-")
    assert decode.is_finished(measurement, rows)


def test_an_interrupted_write_leaves_the_earlier_report(decode, monkeypatch, tmp_path):
    """Here the disk is full after half of the text."""
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "1")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    write_text = Path.write_text

    def write_half(path, text):
        write_text(path, text[: len(text) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="disk full"):
        run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--cases", "2", "--resume")
    assert {name: (tmp_path / name).read_text() for name in before} == before and set(before) == {"decode.json", "decode.md"}


def environment(device):
    return {"date": "today", "torch": "2.0", "movq_ext": {}, "device": "cpu", "commit": "abc", "processor": "one", "threads": 2}


@pytest.mark.parametrize("arguments", [("--plan", "cpu", "--cases", "0"), ("--plan", "cpu", "--cases", "99"), ("--cases", "1")])
def test_unknown_cases_are_refused(decode, monkeypatch, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit):
        run(decode, monkeypatch, tmp_path, *arguments)
    assert "--cases needs numbers of a plan's cases (cpu has 1 to 15), got" in capsys.readouterr().err


def test_a_missing_gpu_has_one_row(decode, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(decode, monkeypatch, tmp_path, "--device", "cuda", "cpu", "--peers", "ours", "published")
    run(decode, monkeypatch, tmp_path, "--device", "cuda", "cpu", "--peers", "ours", "published", "--resume")
    assert sorted(row["device"] for row in report_of(tmp_path)["rows"]) == ["cpu", "cpu", "cuda"]


def test_compile_only_writes_nothing(decode, monkeypatch, tmp_path):
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--compile-only")
    assert len(FakePeer.cases) == len(decode.PLANS["cpu"]) and not list(tmp_path.iterdir())
    assert not FakePeer.turns


def test_a_peer_that_has_no_time_keeps_its_rounds(decode, tmp_path):
    results = {"ours": {"ms": [1.0, 3.0], "failed": "no time"}, "published": {"ms": [], "failed": "no time"}}
    measurement = decode.PLANS["cpu"][0]._replace(peers=tuple(results))
    ours, published = decode.rows_of(measurement.case, results, 1.0, {"date": "today", "commit": "abc"})
    assert (ours["ms"], ours["rounds"], published["ms"], published["failed"]) == (2.0, 2, "-", "no time")
    assert not decode.is_finished(measurement, [ours, published])
    assert decode.is_finished(measurement._replace(rounds=2), [ours, {**published, "failed": "out of memory"}])


def test_tables_in_documents(decode, monkeypatch, tmp_path):
    tables = importlib.import_module("tables")
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--rounds", "2")
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- cases table -->\nold\n<!-- end of cases table -->\nafter\n")
    rows = report_of(tmp_path)["rows"]
    assert tables.put_tables(document, rows) == ["cases"]
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 256x256, float32, 2 threads | 1000 | published code, `torch.compile`: 1500 | 1.50x | 1.50x |" in text
    assert "| 8 images of 128x128, float32, 2 threads | 250 |" in text
    assert "| 256x256, bfloat16, 2 threads | 400 | published code, `torch.compile`: 750 | 1.88x | 1.88x |" in text  # ours nhwc
    assert tables.put_tables(document, rows) == ["cases"] and document.read_text() == text
    assert "| diffusers, eager | 2000 | 200 | 2.00x | 2.00x |" in tables.decode_table(rows)
    document.write_text("<!-- cases table -->\n")
    with pytest.raises(SystemExit, match="has no <!-- end of cases table -->"):
        tables.put_tables(document, rows)


def test_figures(decode, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    plots = importlib.import_module("plots")
    run(decode, monkeypatch, tmp_path, "--plan", "cpu", "--rounds", "1")
    assert plots.draw(tmp_path) == "comparison.png, cases.png, roofline.png"
    first, second, *_ = (measurement.case for measurement in decode.PLANS["cpu"])
    cases = plots.first_cases(dict.fromkeys(measurement.case for measurement in decode.PLANS["cpu"]))
    assert list(cases) == [first, second]


def test_a_peer_answers_every_line_with_a_turn(decode, monkeypatch, tmp_path, capsys):
    """Of one call, after an untimed one if the line says so."""
    peer_process, calls = importlib.import_module("peer_process"), []

    def decoded(z):
        calls.append(z.shape)
        return z

    monkeypatch.setattr(peer_process, "peer", lambda *_: (nn.Identity(), decoded))
    monkeypatch.setattr(peer_process, "peak_in_another_process", lambda: {"MB": 16.0})
    options = {"peer": "ours", "weights": "", "expected": tmp_path / "expected.pt", "device": "cpu", "dtype": "float32"}
    options |= {"mode": "decode", "size": 16, "batch": 1, "threads": torch.get_num_threads(), "seconds": 0.0}
    monkeypatch.setattr(sys, "argv", ["peer_process.py", *(f"--{name}={value}" for name, value in options.items())])
    counts = []
    monkeypatch.setattr(sys, "stdin", (counts.append(len(calls)) or line for line in ("cold\n", "warm\n", "cold\n")))
    with torch.no_grad():
        peer_process.main()
    # The published result, its check and the second call, and then 1, 2 and 1 calls.
    assert counts == [3, 4, 6] and len(calls) == 7
    ready, *turns = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["MB"] == 16 and ready["second call ms"] > 0 and all(turn["ms"] > 0 for turn in turns) and len(turns) == 3


BUFFERS = """
import os, sys
import peer_process
from torch import nn

def decoded(z):
    if "--peak" in sys.argv and "MALLOC_MMAP_THRESHOLD_" in os.environ:
        z.new_ones(6_000_000)  # 24 MB
    return z

peer_process.peer = lambda *_: (nn.Identity(), decoded)
peer_process.__file__ = __file__
peer_process.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_another_process_measures_the_memory(decode, tmp_path):
    """It returns freed memory at once, which would change the times of this one."""
    (tmp_path / "program.py").write_text(BUFFERS)
    options = {"peer": "ours", "weights": "", "expected": tmp_path / "expected.pt", "device": "cpu", "dtype": "float32"}
    options |= {"mode": "decode", "size": 16, "batch": 1, "threads": 1, "seconds": 0.0}
    command = [sys.executable, tmp_path / "program.py", *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    assert 23 < json.loads(done.stdout)["MB"] < 26


WAITING = """
import json, os, sys, time
import peer_process

if "--peak" in sys.argv:
    os.write(2, json.dumps({"pid": os.getpid()}).encode() + b"\\n")
    time.sleep(60)
peer_process.__file__ = __file__
os.dup2(1, 2)  # the other process says its number
peer_process.peak_in_another_process()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="by prctl")
def test_the_process_that_measures_the_memory_ends_with_its_peer(decode, monkeypatch, tmp_path):
    """Nothing goes on computing beside the next peers."""
    peer_process, program = importlib.import_module("peer_process"), tmp_path / "program.py"
    program.write_text(WAITING)
    monkeypatch.setattr(peer_process, "__file__", str(program))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    process = peer_process.PeerProcess("ours", tmp_path, tmp_path, 1.0, 1)
    process.receive(time.monotonic() + 30)
    child = process.found["pid"]
    os.kill(child, 0)  # it runs
    process._process.kill()
    end = time.monotonic() + 10
    while time.monotonic() < end and is_running(child):
        time.sleep(0.01)
    assert not is_running(child)
    process.close()


@pytest.mark.parametrize("status, failed", [(1, "the memory was not measured"), (-9, "out of memory")])
def test_a_failure_of_the_process_that_measures_the_memory(decode, monkeypatch, status, failed):
    """The report says so."""
    peer_process = importlib.import_module("peer_process")
    monkeypatch.setattr(peer_process.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=status))
    assert peer_process.peak_in_another_process() == {"failed": failed}


def is_running(pid):
    """False for a process that has ended, also before its parent has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_commit_is_marked_if_files_other_than_results_had_changes(decode, monkeypatch, tmp_path):
    """A second run finds the results of the first."""
    timing, results = importlib.import_module("timing"), tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for file in (results / "decode.json", tmp_path / "code.py"):
        file.write_text("before")
    git = ("git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-C", tmp_path)
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "first")):
        subprocess.run((*git, *command), check=True)
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "benchmarks" / "timing.py"))
    (results / "decode.json").write_text("after")
    commit = timing.environment(torch.device("cpu"))["commit"]
    (tmp_path / "code.py").write_text("after")
    assert commit and timing.environment(torch.device("cpu"))["commit"] == f"{commit}+"


def test_the_peers_of_a_gpu_are_prepared_at_once(decode, monkeypatch, tmp_path):
    """After the first, which writes the expected result: the others take seconds to start and to compile, which costs a lease."""
    started, receive, init = [], FakePeer.receive, FakePeer.__init__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        FakePeer, "__init__", lambda self, name, *args, **case: (started.append(name), init(self, name, *args, **case))[1]
    )
    monkeypatch.setattr(FakePeer, "receive", lambda self, deadline: (started.append("answer"), receive(self, deadline))[1])
    run(decode, monkeypatch, tmp_path, "--plan", "gpu", "--cases", "1")
    first, *others = decode.PLANS["gpu"][0].peers
    assert started == [first, "answer", *others, *["answer"] * len(others)]
    rows = {row["decoder"]: row for row in report_of(tmp_path)["rows"]}
    assert set(rows) == {first, *others} and all(row["rounds"] == 5 for row in rows.values())


def test_a_graph_is_another_way_to_run_ours(decode):
    tables = importlib.import_module("tables")
    case = dict(zip(tables.CASE, ("cuda", "kandinsky", 1, "decode", "bfloat16", 512, 1), strict=True))
    names = {"ours nhwc": 4.0, "ours nhwc graph": 2.0, "ours tiled": 1.0, "published": 8.0, "published compiled nhwc graph": 6.0}
    rows = [{**case, "decoder": name, "ms": ms, "MB": 10.0, "kept MB": 0.0} for name, ms in names.items()]
    lines = tables.decode_table(rows)
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| movq_ext, CUDA graph",
        "| movq_ext",
        "| published code, `torch.compile`, CUDA graph",
        "| published code, eager",
    ]
    assert lines[3].split(" | ")[3] == "2.00x" and lines[4].split(" | ")[3] == "3.00x"


def test_the_gpu_plan_names_decoders_that_exist(decode):
    words = {"nhwc", "compiled", "graph"}
    for measurement in decode.PLANS["gpu"]:
        assert len(set(measurement.peers)) == len(measurement.peers)
        for kind, *how in map(str.split, measurement.peers):
            assert kind in decode.KINDS and words.issuperset(how)
            assert "graph" not in how or measurement.case.mode == "decode"


def test_the_results_of_a_gpu_have_tables_of_their_own(decode, tmp_path):
    tables = importlib.import_module("tables")
    case = dict(zip(tables.CASE, ("cuda", "kandinsky", 1, "train", "bfloat16", 512, 1), strict=True))
    rows = [
        {**case, "decoder": name, "ms": ms, "MB": 10.0, "kept MB": 0.0} for name, ms in (("ours", 2.084), ("published", 109.4))
    ]
    document = tmp_path / "document.md"
    text = "<!-- cases table -->\n<!-- end of cases table -->\n<!-- gpu cases table -->\n<!-- end of gpu cases table -->\n"
    document.write_text(text)
    assert tables.put_tables(document, rows) == ["gpu cases"]
    assert (
        "| training step, 512x512, bfloat16, GPU | 2.08 | published code, eager: 109 | 52.50x | 1.00x |" in document.read_text()
    )
    assert document.read_text().startswith(text.partition("<!-- gpu")[0])
