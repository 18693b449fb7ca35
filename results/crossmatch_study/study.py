"""Look at one training run while it learns: how right are the pseudo-labels, and how large is each gradient part?

    python study.py --name paper_weights --set w_s1=1 w_s2=1 w_kd=2

trains on the first 4 labelled cases of LA-8 and validates on its other 4. Labels of unlabelled cases are read only for
the curves; no training sees them. Writes NAME.csv (one row per probe) and NAME.json (validation Dice, settings) beside
this file; a finished NAME is not run again. Needs Dataset508_LA (8 labelled) and Dataset580_LA (80 labelled, for the
truth), both preprocessed with the CPU preset's plans `cpu`.

Convolutions run in bfloat16 (losses in float32), which halves the time on a CPU that has it, as nnU-Net's float16 does
on a GPU; the stock trainer, which offers no such switch, runs in float32.
"""

import argparse
import csv
import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunetv2_semisup import discovery
from nnunetv2_semisup.data import folders, loader
from nnunetv2_semisup.losses.pseudo_label import pseudo_label
from nnunetv2_semisup.network import taps
from nnunetv2_semisup.settings import as_json, parse_value

HERE = Path(__file__).parent
LABELLED, TRUTH, PLANS, CONFIGURATION = "Dataset508_LA", "Dataset580_LA", "cpu", "3d_fullres"
PARTS = ("supervised", "image", "teacher", "decoder")


def build_trainer(trainer_name: str, epochs: int, overrides: dict):
    """The trainer with 4 cases for training and 4 for validation."""
    base = Path(nnUNet_preprocessed, LABELLED)
    plans = load_json(str(base / f"{PLANS}.json")) | {"continue_training": False}
    plans["semisup"] = {trainer_name: overrides} if overrides else {}
    name = f"{trainer_name}_{epochs}epochs"
    trainers = __import__("nnunetv2_semisup.trainers", fromlist=[name])
    if trainer_name == "nnUNetTrainer":
        import nnunetv2

        folder = os.path.join(nnunetv2.__path__[0], "training", "nnUNetTrainer")
        trainer_class = recursive_find_python_class(folder, name, "nnunetv2.training.nnUNetTrainer")
    else:
        trainer_class = getattr(trainers, name)
    trainer = trainer_class(plans, CONFIGURATION, 0, load_json(str(base / "dataset.json")), torch.device("cpu"))
    cases = sorted(file.name.removesuffix("_seg.b2nd") for file in (base / "cpu_3d_fullres").glob("*_seg.b2nd"))
    order = [line for line in _published_order() if line in cases]
    trainer.do_split = lambda: (order[:4], order[4:])
    return trainer


def _published_order() -> list[str]:
    file = HERE.parents[1] / "dataset_conversion" / "splits" / "la_train.txt"
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def fixed_patches(number: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniformly random patches (N, 1, X, Y, Z) of as many unlabelled cases, and their hidden labels."""
    base = Path(nnUNet_preprocessed, LABELLED)
    images = loader.UnlabeledDataset(folders.unlabeled_folder(base, "cpu_3d_fullres"))
    truth = nnUNetDatasetBlosc2(str(Path(nnUNet_preprocessed, TRUTH, "cpu_3d_fullres")))
    patch = load_json(str(base / f"{PLANS}.json"))["configurations"][CONFIGURATION]["patch_size"]
    random = np.random.default_rng(0)
    data, labels = [], []
    for case in sorted(images.identifiers)[:number]:
        image, label = images.load_case(case)[0], truth.load_case(case)[1]
        assert image.shape == label.shape, case
        sides = list(zip(image.shape[1:], patch, strict=True))
        starts = [random.integers(0, max(0, size - side) + 1) for size, side in sides]
        window = (slice(None), *(slice(start, start + side) for start, side in zip(starts, patch, strict=True)))
        pad = [(0, 0)] + [(0, max(0, side - size)) for size, side in sides]
        data.append(torch.from_numpy(np.pad(np.asarray(image[window]), pad)))
        labels.append(torch.from_numpy(np.pad(np.asarray(label[window]), pad)))
    return torch.stack(data), torch.stack(labels) > 0


@torch.no_grad()
def pseudo_label_quality(network, images: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Dice of the pseudo-labels over all patches together; the share of confident voxels, and how many are wrong."""
    labels = [pseudo_label(taps.logits(network, part), regions=False) for part in images.split(4)]
    found, confidence = (torch.cat(parts) for parts in zip(*labels, strict=True))
    found, wrong = found > 0, (found > 0) != truth
    row = {"pseudo_dice": _dice(found, truth), "share_foreground": found.float().mean().item()}
    for threshold in (0.52, 0.85, 0.95):
        keep = confidence >= threshold
        row[f"share_confident_{threshold}"] = keep.float().mean().item()
        row[f"share_wrong_of_confident_{threshold}"] = (wrong & keep).sum().item() / max(1, keep.sum().item())
        row[f"pseudo_dice_confident_{threshold}"] = _dice(found & keep, truth & keep)
    return row


def _dice(a: torch.Tensor, b: torch.Tensor) -> float:
    return (2 * (a & b).sum() / max(1, a.sum() + b.sum())).item()


def gradient_parts(trainer, batches: list[dict]) -> dict[str, float]:
    """Norm of each part's weighted gradient, and its cosine with the supervised one; means over batches."""
    network, rows = trainer.bare_network, []
    parameters = list(network.parameters())
    for batch in batches:
        parts = {}
        groups = trainer.method.losses(network, batch, batch["unlabelled"], trainer.progress)
        while True:
            with trainer._autocast():
                group = next(groups, None)
            if group is None:
                break
            for name, (weight, value) in group.items():
                if not value.requires_grad:
                    continue
                grads = torch.autograd.grad(weight * value, parameters, retain_graph=True, allow_unused=True)
                pairs = zip(grads, parameters, strict=True)
                vector = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
                part = name.split("_")[0]
                parts[part] = parts.get(part, 0) + vector
        parts["unsupervised"] = sum(vector for name, vector in parts.items() if name != "supervised")
        supervised = parts["supervised"]
        row = {f"gradient_{name}": vector.norm().item() for name, vector in parts.items() if torch.is_tensor(vector)}
        for name, vector in parts.items():
            if name != "supervised" and torch.is_tensor(vector):
                row[f"cosine_{name}"] = torch.cosine_similarity(vector, supervised, 0).item()
        rows.append(row)
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("-tr", default="nnUNetTrainerCrossMatch")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    if (HERE / f"{args.name}.json").exists():
        print(f"{args.name} is done")
        return
    discovery.ext_trainers_folder()
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    overrides = {key: parse_value(value) for key, value in (item.split("=", 1) for item in args.set)}
    trainer = build_trainer(args.tr, args.epochs, overrides)
    trainer.initialize()
    if args.tr != "nnUNetTrainer":
        in_float32 = trainer.loss
        trainer.loss = lambda output, target: in_float32([scale.float() for scale in output], target)
        trainer._autocast = lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    network = trainer.network
    images, truth = fixed_patches()
    steps = trainer.num_epochs * trainer.num_iterations_per_epoch
    probes = sorted({0, 25, 50, 100, *range(125, steps, 125)})
    rows, batches, done = [], [], 0
    plain_step, start = trainer.train_step, time.time()

    def probe() -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            row = {"step": done, **pseudo_label_quality(network, images, truth)}
            if args.tr != "nnUNetTrainer" and batches:
                row |= gradient_parts(trainer, batches)
        rows.append(row | {"seconds": round(time.time() - start)})
        print(rows[-1], flush=True)

    def train_step(batch: dict) -> dict:
        nonlocal done
        if len(batches) < 2:
            batches.append(batch)  # the first two batches serve every probe
        if done in probes:
            probe()
        done += 1
        return plain_step(batch)

    trainer.train_step = train_step
    trainer.run_training()
    probe()
    trainer.perform_actual_validation(False)
    summary = load_json(os.path.join(trainer.output_folder, "validation", "summary.json"))
    results = summary["metric_per_case"]
    cases = {Path(result["reference_file"]).name.split(".")[0]: result["metrics"]["1"]["Dice"] for result in results}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    keys = list({key: None for row in rows for key in row})
    with open(HERE / f"{args.name}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    record = {
        "trainer": args.tr,
        "steps": steps,
        "seed": args.seed,
        "validation_dice": float(np.mean(list(cases.values()))),
        "validation_dice_per_case": cases,
        "pseudo_dice": rows[-1]["pseudo_dice"],
        "settings": as_json(trainer.settings) if args.tr != "nnUNetTrainer" else {},
        "changed": overrides,
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
    }
    (HERE / f"{args.name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
