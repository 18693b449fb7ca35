"""Pseudo-labels against the hidden truth, epoch by epoch: trains, and predicts some unlabelled cases as it goes.

    python -m tools.watch_pseudo_labels DATASET -tr nnUNetTrainerPasteMatch -p small -c 2d --truth LABELS -o OUT
    python -m tools.watch_pseudo_labels --demo -tr nnUNetTrainerPasteMatch_10epochs -o OUT

The second line makes the demo's data, whose images may be shown. Nothing of the truth reaches the training. OUT gets
``pseudo_labels.csv`` (Dice of student and teacher, share of voxels that the method's thresholds keep and their
accuracy, by class, means over cases) and ``pseudo_labels.png``, which shows image data: mind its terms before you
pass it on.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import nn

from nnunetv2_semisup.benchmark import records
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.evaluation.metrics import compare_masks
from nnunetv2_semisup.files import read_json

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442")


@dataclass
class Case:
    """Image (C, Z, Y, X), truth (Z, Y, X), and per watched epoch the pseudo-label and which voxels are kept."""

    name: str
    image: np.ndarray
    properties: dict
    truth: np.ndarray
    watched: dict[int, tuple[np.ndarray, np.ndarray]]


def read_cases(dataset: str, truth: Path, count: int) -> list[Case]:
    """The first ``count`` unlabelled cases of which ``truth`` has the label."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    raw = Path(os.environ["nnUNet_raw"], dataset)
    dataset_json = read_json(raw / "dataset.json", "it belongs to nnU-Net's raw data")
    ending = dataset_json["file_ending"]
    names = sorted({f.name.removesuffix(ending)[:-5] for f in (raw / "imagesUn").glob(f"*_0000{ending}")})
    names = [name for name in names if (truth / f"{name}{ending}").is_file()][:count]
    if not names:
        raise InputError(f"{truth} has no label of a case in {raw / 'imagesUn'}: name the folder with hidden labels")
    channels = range(len(dataset_json["channel_names"]))
    cases = []
    for name in names:
        files = [str(raw / "imagesUn" / f"{name}_{c:04d}{ending}") for c in channels]
        reader = determine_reader_writer_from_dataset_json(dataset_json, files[0], verbose=False)()
        image, properties = reader.read_images(files)
        label, _ = reader.read_seg(str(truth / f"{name}{ending}"))
        cases.append(Case(name, image, properties, label[0], {}))
    return cases


class Watch:
    """Called at an epoch's end with the trainer; collects rows and what the picture shows."""

    def __init__(self, trainer, cases: list[Case]):
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        self.trainer, self.cases, self.rows = trainer, cases, []
        device = trainer.device
        self.predictor = nnUNetPredictor(use_mirroring=False, device=device, perform_everything_on_device=False)

    def note(self) -> None:
        trainer, epoch = self.trainer, self.trainer.current_epoch + 1
        student = trainer.bare_network
        begun = trainer.progress > 0  # until then the teacher is what it was at the beginning
        teacher = getattr(trainer.method, "teacher", None) if begun else None
        row: dict[str, float] = {"epoch": epoch}
        means: dict[str, list[float]] = {}
        for case in self.cases:
            label, confidence = self.predict(student, case)
            self.add(means, "student_dice", label, case.truth)
            if teacher is not None:
                label, confidence = self.predict(teacher.module, case)
                self.add(means, "teacher_dice", label, case.truth)
            settings = trainer.settings
            threshold = getattr(settings, "threshold", 0.0)
            background = getattr(settings, "background_threshold", threshold)
            kept = confidence >= np.where(label > 0, threshold, background)
            means.setdefault("share_kept", []).append(kept.mean())
            means.setdefault("accuracy_kept", []).append((label == case.truth)[kept].mean())
            foreground = (case.truth > 0) | (label > 0)
            means.setdefault("accuracy_kept_foreground", []).append((label == case.truth)[kept & foreground].mean())
            case.watched[epoch] = label, kept
        self.rows.append(row | {name: float(np.nanmean(values)) for name, values in means.items()})
        print({k: round(v, 4) for k, v in self.rows[-1].items()}, flush=True)

    def add(self, means: dict[str, list[float]], name: str, label: np.ndarray, truth: np.ndarray) -> None:
        for value in self.trainer.label_manager.foreground_labels:
            dice = compare_masks(label == value, truth == value, (1.0,) * truth.ndim)["dice"]
            means.setdefault(f"{name}_{value}", []).append(dice)

    def predict(self, network: nn.Module, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """Label and confidence, (Z, Y, X) on the image's own grid."""
        t = self.trainer
        network = copy.deepcopy(network).eval()
        network.decoder.deep_supervision = False
        axes, p = t.inference_allowed_mirroring_axes, self.predictor
        p.manual_initialization(network, t.plans_manager, t.configuration_manager, None, t.dataset_json, "", axes)
        p.list_of_parameters = [network.state_dict()]
        label, probabilities = p.predict_single_npy_array(
            case.image, case.properties, save_or_return_probabilities=True
        )
        return label, probabilities.max(0)


def draw(file: Path, cases: list[Case], epochs: list[int]) -> None:
    """A row per case: truth, then the pseudo-labels after some epochs; voxels that are not kept are pale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.3 * (1 + len(epochs)), 2.5 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, case in zip(figure.subplots(len(cases), 1 + len(epochs), squeeze=False), cases, strict=True):
        z = int((case.truth > 0).sum((1, 2)).argmax())
        image = case.image[0, z].astype(float)
        low, high = np.percentile(image, (1, 99))
        grey = np.repeat(np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None], 3, -1)
        layers = [("truth", case.truth[z], np.ones_like(image, bool))]
        layers += [(f"after epoch {e}", case.watched[e][0][z], case.watched[e][1][z]) for e in epochs]
        for axis, (title, label, kept) in zip(row, layers, strict=True):
            shown = grey.copy()
            for value in range(1, int(label.max()) + 1):
                colour = np.array(to_rgb(COLOURS[(value - 1) % len(COLOURS)]))
                for mask, opacity in ((kept, 0.7), (~kept, 0.25)):
                    where = (label == value) & mask
                    shown[where] = (1 - opacity) * shown[where] + opacity * colour
            axis.imshow(shown)
            for value in range(1, int(case.truth.max()) + 1):
                if (case.truth[z] == value).any():
                    axis.contour(case.truth[z] == value, [0.5], colors="white", linewidths=0.8)
            axis.set_title(title, fontsize="small")
            axis.set_axis_off()
    figure.suptitle(
        "white: truth's outline; filled: pseudo-label, pale where its confidence is too low", fontsize="small"
    )
    figure.savefig(file, dpi=110)


def make_demo(folder: Path) -> tuple[str, str, Path]:
    """The demo's data in ``folder``, planned and preprocessed, and the truth of its unlabelled cases.

    Returns:
        Name of the data set, name of the plans, folder of the hidden labels.
    """
    from nnunetv2_semisup.demo import data, run

    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / variable).mkdir()
        os.environ[variable] = str(folder / variable)
    raw, truth = folder / "nnUNet_raw" / run.DATASET, folder / "truth"
    run.make_dataset(raw)
    truth.mkdir()
    for file in (raw / "imagesUn").glob("*.nii.gz"):
        name = file.name.removesuffix("_0000.nii.gz")
        label = sitk.GetImageFromArray(data.make_case(int(name[2:]))[1])
        label.CopyInformation(sitk.ReadImage(str(file)))
        sitk.WriteImage(label, str(truth / f"{name}.nii.gz"))
    for command in (
        "nnUNetv2_plan_and_preprocess -d 990 -c 3d_fullres --no_pp -npfp 1",
        f"nnUNetv2_semisup_plans -d 990 -o {run.PLANS} --preset cpu",
        f"nnUNetv2_preprocess -d 990 -plans_name {run.PLANS} -c 3d_fullres -np 1",
    ):
        if "preprocess -d 990 -plans_name" in command:
            run.shrink_patch(folder / "nnUNet_preprocessed" / run.DATASET / f"{run.PLANS}.json")
        program, *arguments = command.split()
        subprocess.run([str(Path(sys.executable).parent / program), *arguments], check=True)
    return run.DATASET, run.PLANS, truth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", nargs="?", help="full name, e.g. Dataset704_Hippocampus, preprocessed")
    add("--demo", action="store_true", help="make and use the demo's data instead")
    add("-tr", default="nnUNetTrainerPasteMatch", help="with its number of epochs (default: %(default)s)")
    add("-p", default="nnUNetPlans")
    add("-c", default="3d_fullres")
    add("-device", default="cpu")
    add("--truth", type=Path, help="folder with the labels of unlabelled cases")
    add("--cases", type=int, default=4)
    add("--seed", type=int, default=0)
    add("-o", dest="output", type=Path, required=True)
    given = parser.parse_args()
    if given.demo:
        with tempfile.TemporaryDirectory() as folder:
            given.dataset, given.p, given.truth = make_demo(Path(folder))
            return watch_training(given)
    if given.dataset is None or given.truth is None:
        parser.error("give a data set and --truth, or --demo")
    return watch_training(given)


def watch_training(given: argparse.Namespace) -> int:
    """Train as the arguments say, and write the table and the picture."""
    from matplotlib import style
    from nnunetv2.run.run_training import get_trainer_from_args

    from nnunetv2_semisup.benchmark.worker import seed_everything

    seed_everything(given.seed)
    cases = read_cases(given.dataset, given.truth, given.cases)
    device = torch.device(given.device)
    trainer = get_trainer_from_args(given.dataset, given.c, "all", given.tr, given.p, device=device)
    trainer.disable_checkpointing = True
    trainer.initialize()
    watch = Watch(trainer, cases)
    end_epoch = trainer.on_epoch_end

    def on_epoch_end():
        watch.note()
        end_epoch()

    trainer.on_epoch_end = on_epoch_end
    trainer.run_training()
    given.output.mkdir(parents=True, exist_ok=True)
    records.write_csv(given.output / "pseudo_labels.csv", list(watch.rows[-1]), watch.rows)
    epochs = [row["epoch"] for row in watch.rows]
    chosen = sorted({epochs[round(q * (len(epochs) - 1))] for q in (0, 0.1, 0.25, 0.5, 1)})
    with style.context("default"):  # nnU-Net's plot leaves seaborn's settings
        draw(given.output / "pseudo_labels.png", cases[:3], chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
