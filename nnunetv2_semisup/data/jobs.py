"""Run a function over many cases in several processes, and tell the progress."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from tqdm import tqdm

from nnunetv2_semisup.errors import InputError

LINE_EVERY = 10  # seconds between lines that tell the progress


def run_jobs(function: Callable, jobs: Sequence, processes: int, description: str) -> list:
    """Apply ``function`` to each job; the first error stops everything.

    Progress goes to stderr: a bar, or a line now and then where that is no terminal.

    Args:
        function: module-level function of one argument, picklable.
        jobs: its arguments, picklable.
        processes: 1 runs in this process, more in freshly started ones.
        description: what is told with the progress, e.g. "Reading images".

    Returns:
        results in the order of ``jobs``.
    """
    if processes < 1:
        raise InputError(f"-np {processes}: at least 1 process is needed")
    with _progress(len(jobs), description) as update:
        if min(processes, len(jobs)) <= 1:
            results = []
            for job in jobs:
                results.append(function(job))
                update()
            return results
        return _run_in_processes(function, jobs, min(processes, len(jobs)), update)


@contextlib.contextmanager
def _progress(total: int, description: str) -> Iterator[Callable[[], object]]:
    """A function to call after each case."""
    with tqdm(total=total, unit="case", desc=description, disable=None) as bar:
        if not bar.disable:
            yield bar.update
            return
        done, told = 0, time.monotonic()

        def update() -> None:
            nonlocal done, told
            done += 1
            if time.monotonic() - told >= LINE_EVERY:
                print(f"{description}: {done} of {total} cases", file=sys.stderr, flush=True)
                told = time.monotonic()

        yield update


def _run_in_processes(function: Callable, jobs: Sequence, processes: int, update: Callable[[], object]) -> list:
    try:
        with worker_pool(processes) as pool:
            futures = [submit(pool, function, job) for job in jobs]
            for future in as_completed(futures):
                future.result()
                update()
            return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise InputError(f"a worker process died, perhaps for lack of memory; try -np {processes // 2}") from error


@contextlib.contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of freshly started processes, none of which outlives the block, nor this process if that is killed."""
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    lifeline, our_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(lifeline,))
    try:
        yield pool
    finally:
        with _no_interruption():
            our_end.close()
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()  # also in the middle of a case: what it writes is not finished and nobody uses it
            pool.shutdown(cancel_futures=True)
            lifeline.close()


def submit(pool: ProcessPoolExecutor, function: Callable, job: object) -> Future:
    """``pool.submit``, which may start a worker; if an earlier one died meanwhile, always BrokenProcessPool."""
    try:
        return pool.submit(function, job)
    except OSError as error:
        if error.errno is not None:
            raise
        raise BrokenProcessPool("a worker died while another one was started") from error  # "handle is closed"


@contextlib.contextmanager
def _no_interruption() -> Iterator[None]:
    """Ignore Ctrl-C for a moment, where signals can be handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start_worker(lifeline: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    threading.Thread(target=_exit_with_parent, args=(lifeline,), daemon=True).start()


def _exit_with_parent(lifeline: Connection) -> None:
    """End this process when the other end of ``lifeline`` is closed, which ``kill -9`` of the parent does too."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(0)
