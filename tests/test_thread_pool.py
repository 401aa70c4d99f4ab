"""Independent tasks in threads with single-threaded operators."""

import contextvars
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from movq_ext.ops import thread_pool
from movq_ext.ops.thread_pool import num_workers, run_in_threads


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)


def in_new_thread(function):
    """Return the result of function in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(30)
    return results[0]


def where(_):
    """Return the thread and the number of threads of its operators."""
    return threading.get_ident(), torch.get_num_threads()


def where_together(threads):
    """Return `where` of twice as many items as threads, which all have to run at the same time."""
    together = threading.Barrier(threads)

    def wait_and_see(item):
        together.wait(30)
        return where(item)

    return run_in_threads(wait_and_see, range(2 * threads))


def test_results_are_in_the_order_of_the_items():
    def square(x):
        time.sleep(0.001 * (x % 3))
        return x * x

    assert run_in_threads(square, range(40)) == [x * x for x in range(40)]
    assert run_in_threads(square, []) == []


@pytest.mark.parametrize("threads", [2, 3])
def test_as_many_workers_as_the_caller_has_threads_each_with_one(threads):
    torch.set_num_threads(threads)
    seen = where_together(threads)
    assert len(set(seen)) == num_workers() == threads
    assert threading.get_ident() not in dict(seen)
    assert {count for _, count in seen} == {1}


def test_fewer_workers_after_more():
    torch.set_num_threads(4)
    where_together(4)
    torch.set_num_threads(2)
    running, most, lock = 0, 0, threading.Lock()

    def count(_):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    run_in_threads(count, range(12))
    assert most == 2


@pytest.mark.parametrize(("threads", "items"), [(1, 4), (2, 1)])
def test_one_thread_or_one_item_runs_in_the_caller(threads, items):
    torch.set_num_threads(threads)
    assert set(run_in_threads(where, range(items))) == {(threading.get_ident(), threads)}


def test_numbers_of_threads_elsewhere_are_unchanged(monkeypatch):
    """Also if the caller's number differs from the default of new threads."""
    monkeypatch.setattr(thread_pool, "_pool", thread_pool.Pool())
    torch.set_num_threads(3)

    def use_two():
        torch.get_num_threads()  # otherwise the first operator would overwrite the number
        torch.set_num_threads(2)
        in_new_thread(lambda: torch.set_num_threads(3))
        run_in_threads(where, range(4))
        return torch.get_num_threads()

    assert in_new_thread(use_two) == 2
    assert torch.get_num_threads() == in_new_thread(torch.get_num_threads) == 3


def test_a_slow_item_holds_up_no_other():
    done = []

    def work(item):
        time.sleep(0.3 if item == 0 else 0)
        done.append(item)

    run_in_threads(work, range(20))
    assert done == [*range(1, 20), 0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode, lambda: torch.inference_mode(False)])
def test_gradient_and_inference_mode_are_the_callers(mode):
    def modes(_=None):
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.ones(1).is_inference()

    with mode():
        expected = modes()
        assert run_in_threads(modes, range(4)) == [expected] * 4
    assert run_in_threads(modes, range(4)) == [(True, False, False)] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_callers(dtype):
    a = torch.ones(4, 4)

    def product(_):
        return (a @ a).dtype, torch.is_autocast_cache_enabled()

    with torch.autocast("cpu", dtype, cache_enabled=False):
        assert run_in_threads(product, range(4)) == [(dtype, False)] * 4
    assert run_in_threads(product, range(4)) == [(torch.float32, True)] * 4


def test_gradients_flow_through_threads():
    x = torch.arange(6.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(sum(run_in_threads(lambda i: x[i] ** 2, range(6))), x)
    torch.testing.assert_close(gradient, 2 * x.detach())


def observe_by(context):
    with context:
        return run_in_threads(where, range(2))


def observe_by_tracing(trace):
    seen = []
    trace(lambda x: seen.extend(run_in_threads(where, range(2))) or x + 1)(torch.ones(2))
    return seen


@pytest.mark.parametrize(
    "observe",
    [
        pytest.param(lambda: observe_by(FlopCounterMode(display=False)), id="dispatch mode"),
        pytest.param(lambda: observe_by(FakeTensorMode()), id="fake tensors"),
        pytest.param(lambda: observe_by(torch.device("cpu")), id="function mode"),
        pytest.param(lambda: observe_by(torch.profiler.profile()), id="profiler"),
        pytest.param(lambda: observe_by(torch._C.DisableTorchFunctionSubclass()), id="no subclasses"),
        pytest.param(lambda: observe_by(torch.autograd.graph.save_on_cpu()), id="hooks of saved tensors"),
        pytest.param(lambda: observe_by_tracing(make_fx), id="make_fx"),
        pytest.param(lambda: observe_by_tracing(torch.vmap), id="vmap"),
        pytest.param(lambda: observe_by_tracing(lambda f: torch.jit.trace(f, torch.ones(2), check_trace=False)), id="jit.trace"),
    ],
)
def test_runs_in_the_caller_where_pytorch_observes_its_operators(observe):
    assert set(observe()) == {(threading.get_ident(), 2)}


def test_compiles():
    def double(x):
        return torch.stack(run_in_threads(lambda part: part * 2, x.unbind()))

    x = torch.arange(6.0).view(3, 2)
    torch.testing.assert_close(torch.compile(double, backend="eager", fullgraph=True)(x), 2 * x)


def test_first_error_in_the_order_of_the_items_is_raised_after_all_threads_stopped():
    started, running, together = [], [], threading.Barrier(2)

    def work(item):
        started.append(item)
        running.append(item)
        together.wait(30)
        time.sleep(0.1 if item == 0 else 0)
        running.remove(item)
        if item < 2:
            raise ValueError(item)

    with pytest.raises(ValueError, match=r"^0$"):
        run_in_threads(work, range(10))
    assert sorted(started) == [0, 1] and not running
    assert run_in_threads(str, range(3)) == ["0", "1", "2"]


def test_exit_in_a_worker_reaches_the_caller():
    with pytest.raises(SystemExit):
        run_in_threads(lambda _: sys.exit(), range(2))
    assert run_in_threads(str, range(3)) == ["0", "1", "2"]


def test_interrupted_caller_waits_for_its_workers(monkeypatch):
    running, started, first = [], [], threading.Event()

    def work(item):
        started.append(item)
        running.append(item)
        first.set()
        time.sleep(0.1)
        running.remove(item)

    def interrupt(run):
        first.wait(30)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(thread_pool.Run, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_in_threads(work, range(50))
    assert not running and len(started) <= 4


def test_nested_calls_run_in_the_worker():
    def outer(item):
        return num_workers(), run_in_threads(lambda inner: (item, inner, threading.get_ident()), range(3)), threading.get_ident()

    for item, (workers, inner, thread) in enumerate(run_in_threads(outer, range(6))):
        assert workers == 1 and inner == [(item, i, thread) for i in range(3)]


def test_callers_in_several_threads():
    def call(caller, results):
        torch.set_num_threads(2)
        results[caller] = [run_in_threads(lambda item: (caller, item), range(5)) for _ in range(20)]

    results = {}
    callers = [threading.Thread(target=call, args=(i, results)) for i in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(60)
    assert results == {caller: [[(caller, item) for item in range(5)]] * 20 for caller in range(4)}


@pytest.mark.parametrize("fails", [False, True])
def test_workers_keep_no_reference(fails):
    class Item:
        pass

    items = [Item() for _ in range(4)]
    references = [weakref.ref(item) for item in items]

    def work(item):
        result = Item()
        references.append(weakref.ref(result))
        if fails:
            raise ValueError
        return result

    gc.disable()
    try:
        try:
            run_in_threads(work, items)
        except ValueError:
            pass
        items.clear()
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


def test_workers_are_reused_and_end_with_the_process():
    where_together(2)
    before = set(threading.enumerate())
    for _ in range(10):
        run_in_threads(where, range(2))
    assert set(threading.enumerate()) == before
    script = """
import atexit, torch
from movq_ext.ops.thread_pool import run_in_threads
torch.set_num_threads(2)
atexit.register(lambda: print(run_in_threads(str, range(3))))
print(run_in_threads(str, range(3)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.returncode) == ("['0', '1', '2']\n" * 2, 0), result.stderr


@pytest.mark.filterwarnings("error")  # for errors that end a thread
@pytest.mark.parametrize("refused", [threading.Thread, thread_pool.Worker])
def test_runs_in_the_caller_if_no_thread_starts(monkeypatch, refused):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(thread_pool, "_pool", thread_pool.Pool())
    monkeypatch.setattr(refused, "start", refuse)
    seen = run_in_threads(where, range(2))
    assert set(seen) == {(threading.get_ident(), 2)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_process_has_workers_of_its_own():
    where_together(2)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(write, b"%d" % len(set(where_together(2))))
        finally:
            os._exit(0)
    os.close(write)
    deadline = time.monotonic() + 30
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.01)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"2"


def test_a_worker_divides_its_tasks_between_as_many_threads_as_the_caller_has():
    torch.set_num_threads(3)

    def outer():
        return where(None), num_workers(), where_together(3), run_in_threads(lambda _: num_workers(), range(3))

    (thread, count), workers, seen, nested = thread_pool.run_in_worker(outer)
    assert (count, workers) == (1, 3)
    assert len(set(seen)) == 3 and (thread, 1) in seen and {count for _, count in seen} == {1}
    assert nested == [1, 1, 1]
    assert num_workers() == 3


def test_one_thread_needs_no_worker():
    torch.set_num_threads(1)
    assert thread_pool.run_in_worker(lambda: where(None)) == (threading.get_ident(), 1)


def test_an_error_in_a_nested_task_reaches_the_caller():
    def fail(item):
        raise ValueError(item)

    with pytest.raises(ValueError, match=r"^0$"):
        thread_pool.run_in_worker(lambda: run_in_threads(fail, range(4)))
    assert thread_pool.run_in_worker(lambda: run_in_threads(str, range(3))) == ["0", "1", "2"]


def test_more_callers_of_run_in_worker_than_workers():
    """Each worker computes its own tasks while the others are busy."""

    def call(caller, results):
        torch.get_num_threads()
        torch.set_num_threads(2)
        results[caller] = thread_pool.run_in_worker(lambda: [run_in_threads(str, range(5)) for _ in range(10)])

    results = {}
    callers = [threading.Thread(target=call, args=(i, results)) for i in range(5)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(60)
    assert list(results.values()) == [[["0", "1", "2", "3", "4"]] * 10] * 5


def test_an_interrupt_stops_nested_tasks(monkeypatch):
    started, first, wait, caller = [], threading.Event(), thread_pool.Run.wait, threading.current_thread()

    def work(item):
        started.append(item)
        first.set()
        time.sleep(0.02)

    def interrupt(run):
        if threading.current_thread() is caller:
            first.wait(30)
            monkeypatch.undo()
            raise KeyboardInterrupt
        wait(run)

    monkeypatch.setattr(thread_pool.Run, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        thread_pool.run_in_worker(lambda: [run_in_threads(work, range(100)) for _ in range(100)])
    count = len(started)
    assert count < 100
    time.sleep(0.1)
    assert len(started) == count


def test_an_error_in_the_callers_modes_reaches_the_caller():
    """The autocast of a worker warns about a dtype, and warnings are errors."""
    torch.set_autocast_enabled("cpu", True)
    dtype = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for run in (lambda: run_in_threads(where, range(3)), lambda: thread_pool.run_in_worker(lambda: None)):
                with pytest.raises(UserWarning, match="autocast"):
                    run()
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_dtype("cpu", dtype)
    assert run_in_threads(str, range(3)) == ["0", "1", "2"]
    assert len(set(where_together(2))) == 2  # no worker has ended


def test_callers_of_run_in_worker_may_wait_for_each_other():
    """As ranks in threads of one process do, in a collective."""
    together, done = threading.Barrier(4), []

    def call():
        torch.get_num_threads()
        torch.set_num_threads(2)
        done.append(thread_pool.run_in_worker(lambda: together.wait(20)))

    for _ in range(2):
        callers = [threading.Thread(target=call) for _ in range(4)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join(60)
    assert sorted(done) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_workers_of_whole_tasks_are_reused():
    threads = {thread_pool.run_in_worker(threading.get_ident) for _ in range(5)}
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_context_variables_are_the_callers():
    variable = contextvars.ContextVar("variable", default=0)
    token = variable.set(7)
    try:
        assert run_in_threads(lambda item: variable.get() + item, range(4)) == [7, 8, 9, 10]
        assert thread_pool.run_in_worker(lambda: run_in_threads(lambda _: variable.get(), range(3))) == [7, 7, 7]
        run_in_threads(variable.set, range(4))
        assert variable.get() == 7
    finally:
        variable.reset(token)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_workers_run_in_the_caller(count):
    assert set(run_in_threads(where, range(4), max_workers=count)) == {(threading.get_ident(), 2)}
