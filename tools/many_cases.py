"""How bookkeeping grows with the number of unlabelled cases: list and start, tidy up, and what workers hold.

    python tools/many_cases.py --cases 2000 20000

Makes a data set of tiny cases in a temporary folder: a few are preprocessed by nnU-Net, the rest are links to them, so
that only the bookkeeping is measured. Prints a row per number of cases.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]


def timed(function, *arguments, **options):
    start = perf_counter()
    result = function(*arguments, **options)
    return perf_counter() - start, result


def resident_mib(pid: int | None = None) -> float:
    """Resident memory of a process, MiB (Linux)."""
    text = Path(f"/proc/{pid or 'self'}/statm").read_text(encoding="ascii")
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def multiply(dataset, count: int) -> None:
    """Fill imagesUn and the preprocessed folder with links to the first case, and write their manifest."""
    from nnunetv2_semisup.data import preprocess

    quiet = {"log": lambda line: None}
    preprocess.preprocess_unlabeled(dataset.name, "nnUNetPlans", "3d_fullres", 1, **quiet)
    for number in range(count - len(dataset.unlabelled)):
        os.link(dataset.images("unl0")[0], dataset.raw / "imagesUn" / f"more{number:05d}_0000.nii.gz")
        for suffix in preprocess.SUFFIXES:
            os.link(dataset.folder / f"unl0{suffix}", dataset.folder / f"more{number:05d}{suffix}")
    task = preprocess._read_task(dataset.name, "nnUNetPlans", "3d_fullres")
    facts = preprocess._survey(task).facts
    sizes = preprocess._sizes(dataset.folder, "unl0")
    recorded = {case: {"images": images, "sizes": sizes, "axes": "LPS"} for case, images in facts.items()}
    preprocess._write_manifest(task, recorded)


def measure(count: int) -> str:
    """One row of the table."""
    from helpers import LABELS, make_dataset

    from nnunetv2_semisup.data import preprocess

    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), LABELS["2 classes"])
        os.environ.update(dataset.variables(dataset.root / "results"))
        multiply(dataset, count)
        arguments = (dataset.name, "nnUNetPlans", "3d_fullres")
        start, cases = timed(preprocess.preprocess_unlabeled, *arguments, 1, log=lambda line: None)
        assert len(cases) == count
        trainer = dataset.trainer("nnUNetTrainerMeanTeacher", num_epochs=1, num_iterations_per_epoch=20)
        trainer.print_to_log_file = lambda *args, **options: None
        begin, _ = timed(trainer.on_train_start)
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        steps = [timed(lambda: trainer.train_step(next(trainer.dataloader_train)))[0] for _ in range(20)]
        workers = [resident_mib(process.pid) for process in trainer.dataloader_train._processes]
        gc.collect()
        parent = resident_mib()
        trainer._stop.stop_listening()
        from nnunetv2_semisup.training.streams import end_augmenters

        end_augmenters(trainer.dataloader_train, trainer.dataloader_val)
        for image in sorted((dataset.raw / "imagesUn").glob("more*"))[: count // 2]:
            image.unlink()
        tidy, _ = timed(preprocess.preprocess_unlabeled, *arguments, 1, log=lambda line: None)
    median = sorted(steps)[len(steps) // 2]
    seconds, rest = (start, begin, tidy), (1000 * median, parent, max(workers))
    return f"| {' | '.join([str(count), *(f'{n:.2f}' for n in seconds), *(f'{n:.0f}' for n in rest)])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[20, 2000, 20000])
    args = parser.parse_args()
    os.environ["nnUNet_n_proc_DA"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    print("| cases | list, s | start training, s | remove half, s | step, ms | parent, MiB | a worker, MiB |")
    print("|---|---|---|---|---|---|---|")
    for count in args.cases:
        print(measure(count), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
