"""Run independent tasks on a CPU with one thread for each, instead of threads inside every operator.

An operator with several threads ends in a barrier: all of them wait for the slowest, and thousands of operators give thousands of
barriers. On a core that another process uses too, each barrier may wait for a time slice. Here a worker thread runs all operators
of a task alone, takes the next task when it is done, and waits for the others only at the end.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_workers() -> int:
    """Return how many threads `run_in_threads` uses: the caller's ``torch.get_num_threads()``.

    1 means that it calls the function in the caller: within its own tasks, and where PyTorch observes or rewrites operators of
    the calling thread only (tracing, compilation, modes, function transforms, hooks of saved tensors, the profiler).
    """
    if _operators_are_observed() or not torch.backends.openmp.is_available():
        return 1
    thread = threading.current_thread()
    return thread.num_workers if isinstance(thread, Worker) else torch.get_num_threads()


def run_in_worker(function: Callable[[], Result]) -> Result:
    """Return ``function()``, computed in a thread with single-threaded operators.

    Within the function, `run_in_threads` uses as many threads as it would in the caller: for programs in which it divides all
    large tasks. Each call has a thread of its own, so functions of several callers may wait for each other, as in a collective.
    Modes and errors are as for `run_in_threads`.
    """
    workers = num_workers()
    if workers < 2 or isinstance(threading.current_thread(), Worker):
        return function()
    with _pool.borrow_worker() as worker:
        if worker is None:
            return function()
        (result,) = _run(Run(lambda _: function(), [None], nested_workers=workers), 1, worker.runs)
    return cast(Result, result)


def run_in_threads(function: Callable[[Item], Result], items: Sequence[Item], max_workers: int | None = None) -> list[Result]:
    """Return ``[function(item) for item in items]``, computed by threads with single-threaded operators.

    There are `num_workers` threads, and at most max_workers. They take the items in order. With one worker or one item, the
    caller computes everything. Gradient mode, inference mode, autocast and context variables are those of the caller.

    The first error, in the order of the items, is raised after all threads have stopped. Items after it may not have started.
    """
    workers = min(num_workers(), len(items), len(items) if max_workers is None else max_workers)
    if workers > 1:
        others = workers - isinstance(threading.current_thread(), Worker)
        if _pool.has_workers(others):
            return _run(Run(function, items, nested_workers=1), others, _pool.runs)
    return [function(item) for item in items]


def _run(run: Run, workers: int, runs: SimpleQueue[Run]) -> list[Any]:
    """Return the results of a run. This many workers that serve the queue take part, and the caller if it is a worker."""
    thread = threading.current_thread()
    try:
        for _ in range(workers):
            runs.put(run)
        if isinstance(thread, Worker):
            thread.take_part(run)
        run.wait()
    finally:  # after a KeyboardInterrupt, workers may still write to the caller's tensors
        run.cancel()
        run.wait()
    return run.take_results()


class CancelledError(Exception):
    """The caller of `run_in_worker` was interrupted."""


class Run:
    """A call of `run_in_threads` or `run_in_worker`, in which workers take part.

    Args:
        function: computes an item.
        items: all items.
        nested_workers: how many threads `run_in_threads` uses within the function.
    """

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any], nested_workers: int) -> None:
        self._function: Any = function
        self._items = items
        self.nested_workers = nested_workers
        self._results: list[Any] = [None] * len(items)
        self._errors: dict[int, BaseException] = {}
        self._modes, self._context = ThreadModes(), contextvars.copy_context()
        self._next = self._running = 0  # the index of the next item, and how many items are being computed
        self._state = threading.Condition()
        self.is_cancelled = False
        self._caller = threading.current_thread()
        self._outer = self._caller.current_run if isinstance(self._caller, Worker) else None

    def work(self) -> None:
        """Compute items until all are taken or one has failed. Raises nothing. The caller has its modes and context already."""
        if threading.current_thread() is self._caller:
            self._compute()
            return
        try:
            self._context.copy().run(self._compute_in_modes)  # two threads cannot enter the same context
        except BaseException as error:
            self._errors[-1] = error  # of the modes, before any item
            self.cancel()

    def _compute_in_modes(self) -> None:
        with self._modes.enter():
            self._compute()

    def _compute(self) -> None:
        while (index := self._take()) is not None:
            try:
                self._results[index] = self._function(self._items[index])
            except BaseException as error:
                self._errors[index] = error
                self.cancel()
            self._leave()

    def _take(self) -> int | None:
        with self._state:
            if self._outer is not None and self._outer.is_cancelled:
                self._cancel()
            if self._next == len(self._items):
                return None
            self._next, self._running = self._next + 1, self._running + 1
            return self._next - 1

    def _leave(self) -> None:
        with self._state:
            self._running -= 1
            self._state.notify_all()

    def cancel(self) -> None:
        """Start no more items."""
        with self._state:
            self._cancel()

    def _cancel(self) -> None:
        self.is_cancelled |= self._next < len(self._items) or self._running > 0
        self._next = len(self._items)
        self._state.notify_all()

    def wait(self) -> None:
        """Wait until all items have been taken and none is being computed."""
        with self._state:
            self._state.wait_for(lambda: self._next == len(self._items) and self._running == 0)

    def take_results(self) -> list[Any]:
        """Return the results or raise the first error. Keeps no reference to them: a late worker may still hold this run."""
        with self._state:
            results, errors = self._results, self._errors
            self._function, self._items, self._results, self._errors, self._next = None, (), [], {}, 0
        if errors:
            error = errors[min(errors)]
            try:
                raise error
            finally:
                del errors, error  # the error's traceback refers to this frame
        if self.is_cancelled:
            raise CancelledError
        return results


class ThreadModes:
    """The calling thread's modes, which other threads can enter."""

    def __init__(self) -> None:
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast = torch.is_autocast_enabled("cpu")
        self.autocast_dtype, self.autocast_cache = torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Context manager: have these modes in the current thread."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", self.autocast_dtype, cache_enabled=self.autocast_cache))
            yield


class Worker(threading.Thread):
    """A thread whose operators are single-threaded. It ends with the process.

    Args:
        runs: the runs that it takes part in, one after another.
        name: of the thread.
    """

    def __init__(self, runs: SimpleQueue[Run], name: str) -> None:
        super().__init__(name=f"movq_ext {name}", daemon=True)
        self.overwritten_default: SimpleQueue[int] = SimpleQueue()  # receives one number of threads
        self.current_run: Run | None = None
        self.runs = runs

    @property
    def num_workers(self) -> int:
        """How many threads `run_in_threads` uses in this one."""
        return self.current_run.nested_workers if self.current_run is not None else 1

    def run(self) -> None:
        default = torch.get_num_threads()  # PyTorch overwrites the number in a thread's first operator unless it was read before
        torch.set_num_threads(1)
        self.overwritten_default.put(default)
        while True:
            self.take_part(self.runs.get())

    def take_part(self, run: Run) -> None:
        """Compute items of a run. Its caller does so within an item of another."""
        outer, self.current_run = self.current_run, run
        try:
            run.work()
        finally:
            self.current_run = outer


class Pool:
    """The workers of this process: those that serve a queue together, and those of `run_in_worker` with a queue for each.

    ``torch.set_num_threads`` also sets the default of threads without a number of their own, and PyTorch has no call that sets
    one without the other. So the default is 1 for a moment while each worker starts, until another thread restores it. A thread
    whose first operator runs in that moment has one thread from then on, and a number that another thread sets in that moment
    is lost as the default. A program that starts threads during its first decode can call ``torch.get_num_threads`` and then
    ``torch.set_num_threads`` in each.
    """

    def __init__(self) -> None:
        self.runs: SimpleQueue[Run] = SimpleQueue()
        self._workers: list[Worker] = []
        self._idle: list[Worker] = []  # with queues of their own
        self._lock = threading.Lock()

    def has_workers(self, count: int) -> bool:
        """Return True if there are at least ``count`` workers, after starting those that are missing.

        False means that the system refused a thread, as it does while the interpreter exits.
        """
        with self._lock:
            while len(self._workers) < count:
                worker = _start_worker(self.runs, f"worker {len(self._workers)}")
                if worker is None:
                    return False
                self._workers.append(worker)
        return True

    @contextlib.contextmanager
    def borrow_worker(self) -> Iterator[Worker | None]:
        """Context manager: return a worker with a queue of its own, or None if the system refused a thread."""
        worker: Worker | None
        with self._lock:
            worker = self._idle.pop() if self._idle else _start_worker(SimpleQueue(), "decode")
        try:
            yield worker
        finally:
            if worker is not None:
                self._idle.append(worker)


def _start_worker(runs: SimpleQueue[Run], name: str) -> Worker | None:
    """Return a new worker, or None if the system refused a thread."""
    worker = Worker(runs, name)

    def start_and_restore_default() -> None:
        with contextlib.suppress(RuntimeError):
            worker.start()
            torch.set_num_threads(worker.overwritten_default.get())

    with contextlib.suppress(RuntimeError):  # in a thread of its own, since it must not set the caller's number
        starter = threading.Thread(target=start_and_restore_default)
        starter.start()
        starter.join()
    return worker if worker.ident is not None else None


def _operators_are_observed() -> bool:
    """Return True if a tracer, compiler, mode, transform, hook or profiler sees the operators of this thread only."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or not torch._C._is_torch_function_enabled()  # torch._C.DisableTorchFunctionSubclass
        or torch._C._autograd._top_saved_tensors_default_hooks(True)  # ignores that they are traced
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _reset_pool() -> None:
    """Start without workers in a forked process: it has only the thread that forked."""
    global _pool
    _pool = Pool()


_pool = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_pool)
