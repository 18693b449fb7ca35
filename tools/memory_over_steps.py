"""Does a training's memory grow? Steps of a trainer on a tiny plan, resident memory at a tenth of them and at the end.

    python tools/memory_over_steps.py nnUNetTrainerMeanTeacher nnUNetTrainerCrossMatch --steps 1500

The data are made in a temporary folder. Exit code 1 if memory grew by more than 2 %.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def resident_mib() -> float:
    """Resident memory of this process, MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(dataset, name: str, steps: int) -> tuple[float, float]:
    """MiB after a tenth of the steps, and after all, loader included."""
    trainer = dataset.trainer(name, num_epochs=1, num_iterations_per_epoch=steps)
    trainer.print_to_log_file = lambda *arguments, **options: None
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    early = 0.0
    for step in range(steps):
        trainer.train_step(next(trainer.dataloader_train))
        if step == steps // 10:
            gc.collect()
            early = resident_mib()
    gc.collect()
    trainer._stop.stop_listening()
    return early, resident_mib()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainers", nargs="+")
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    os.environ["nnUNet_n_proc_DA"] = "0"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as folder:
        from helpers import LABELS, make_dataset

        dataset = make_dataset(Path(folder), LABELS["2 classes"])
        os.environ.update(dataset.variables(dataset.root / "results"))
        grew = False
        for name in args.trainers:
            early, late = growth(dataset, name, args.steps)
            print(
                f"{name}: {early:.0f} MiB after {args.steps // 10} steps, {late:.0f} MiB after {args.steps}", flush=True
            )
            grew |= late > 1.02 * early
    return int(grew)


if __name__ == "__main__":
    sys.exit(main())
