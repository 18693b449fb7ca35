"""Run a function over many cases in several processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from nnunetv2_semisup.errors import InputError


def run_jobs(function: Callable, jobs: Sequence, processes: int, description: str | None = None) -> list:
    """Apply ``function`` to each job, with a progress bar; the first error stops everything.

    Args:
        function: module-level function of one argument, picklable.
        jobs: its arguments, picklable.
        processes: 1 runs in this process, more in freshly started ones.
        description: of the progress bar.

    Returns:
        results in the order of ``jobs``.
    """
    if processes < 1:
        raise InputError(f"-np {processes}: at least 1 process is needed")
    with tqdm(total=len(jobs), unit="case", desc=description, disable=None) as bar:
        if min(processes, len(jobs)) <= 1:
            results = []
            for job in jobs:
                results.append(function(job))
                bar.update()
            return results
        return _run_in_processes(function, jobs, min(processes, len(jobs)), bar)


def _run_in_processes(function: Callable, jobs: Sequence, processes: int, bar: tqdm) -> list:
    # Workers ignore Ctrl-C: this process stops them, and waits for them before the folder they write to is removed.
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
    try:
        futures = [pool.submit(function, job) for job in jobs]
        for future in as_completed(futures):
            future.result()
            bar.update()
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise InputError(f"a worker process died, perhaps for lack of memory; try -np {processes // 2}") from error
    finally:
        pool.shutdown(cancel_futures=True)
