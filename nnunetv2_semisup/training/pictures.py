"""Pictures of a few fixed unlabelled patches: what the method takes for their label, and what the student predicts."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor, nn

from nnunetv2_semisup import files
from nnunetv2_semisup.colours import COLOURS
from nnunetv2_semisup.data.loader import UnlabeledDataset
from nnunetv2_semisup.losses.consistency import decide, probabilities
from nnunetv2_semisup.network import taps

FOLDER = "semisup_patches"  # in the fold's folder
SETTLED = 0.1  # share of the training after which a 3D patch is shown in the same slice for good
MOST_IN_LEGEND = 16
OPAQUE = 0.55  # of a mask's colour
PALE = 0.35  # of what is not kept, as a share of the opacity of what is


def is_due(epoch: int, num_epochs: int, pictures: int, terms_start: bool) -> bool:
    """Whether ``epoch`` (from 0) ends with a picture.

    Args:
        epoch: that ends.
        num_epochs: of the training.
        pictures: about how many are wanted of the whole training; 0 for none.
        terms_start: the method's terms start after this epoch.
    """
    if not pictures:
        return False
    return terms_start or epoch % math.ceil(num_epochs / pictures) == 0 or epoch == num_epochs - 1


def file_of(output_folder: str, epoch: int, num_epochs: int) -> Path:
    """Where the picture of ``epoch`` is; the names of a training sort in the order of its epochs."""
    digits = max(4, len(str(num_epochs - 1)))
    return Path(output_folder, FOLDER, f"epoch_{epoch:0{digits}d}.png")


def remove_from(output_folder: str, epoch: int) -> None:
    """Remove the pictures of ``epoch`` and later ones, which a resumed training draws again."""
    for file in Path(output_folder, FOLDER).glob("epoch_*.png"):
        number = re.fullmatch(r"epoch_(\d+)", file.stem)
        if number and int(number[1]) >= epoch:
            file.unlink()


class Patch(NamedTuple):
    """Of a preprocessed case.

    Attributes:
        image: (C, X, Y, Z) float32, in 2D (C, X, Y).
        first: slice of the case, along its first axis, with which the patch begins; below 0 where it is padded.
        slices: of the case.
    """

    image: Tensor
    first: int
    slices: int


def fixed_patches(dataset: UnlabeledDataset, patch_size: Sequence[int]) -> dict[str, Patch]:
    """The centre patches of the first, the middle and the last case by name, without augmentation.

    Args:
        dataset: preprocessed unlabelled cases, one at least.
        patch_size: 2 or 3 axes; with 2 it is cut from the middle slice.

    Returns:
        Case -> patch, padded with zeros where the image is smaller, as nnU-Net does.
    """
    cases = sorted(dataset.identifiers)
    size = (*[1] * (3 - len(patch_size)), *patch_size)
    patches = {}
    for case in dict.fromkeys(cases[i] for i in (0, len(cases) // 2, -1)):
        image, *_ = dataset.load_case(case)
        starts = [(n - p) // 2 for n, p in zip(image.shape[1:], size, strict=True)]
        box = [[start, start + p] for start, p in zip(starts, size, strict=True)]
        patch = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
        patches[case] = Patch(patch if len(patch_size) == 3 else patch[:, 0], starts[0], image.shape[1])
    return patches


@dataclass(frozen=True)
class Opinion:
    """What a network says of a patch.

    Attributes:
        masks: (foreground, X, Y, Z) bool, a class or region each; in 2D (foreground, X, Y).
        confidence: (X, Y, Z) in [0, 1]: probability of the decision; with regions that of the least certain head.
        kept: shaped as the masks, bool: confident enough; with regions each for itself.
    """

    masks: np.ndarray
    confidence: np.ndarray
    kept: np.ndarray

    def in_slice(self, z: int) -> Opinion:
        """Of one slice, (foreground, Y, Z) and (Y, Z)."""
        return Opinion(self.masks[:, z], self.confidence[z], self.kept[:, z])


@torch.no_grad()
def opinion(
    network: nn.Module,
    patch: Tensor,
    regions: bool,
    needed: tuple[float, float] | None = None,
    head_weights: Tensor | None = None,
) -> Opinion:
    """What ``network``, in evaluation mode, says of a patch.

    Args:
        network: on the patch's device.
        patch: (C, X, Y, Z), or (C, X, Y).
        regions: True for region-based training.
        needed: confidence from which foreground and background are kept; None: all is.
        head_weights: (heads,); what a head of weight 0 decides is not kept. None: all heads count.
    """
    # forward, not a call: a compiled network would be compiled once more, for a batch of one
    p = probabilities(taps.full_resolution(network.forward(patch[None])), regions)
    decided, (of_foreground, of_background) = decide(p, regions)[0], needed or (0.0, 0.0)
    if regions:
        masks, confidence = decided, torch.maximum(p, 1 - p)[0]
    else:
        masks, confidence = torch.stack([decided == c for c in range(1, p.shape[1])]), p.amax(1)
    kept = confidence >= torch.where(masks if regions else masks.any(0), of_foreground, of_background)
    if head_weights is not None:
        counts = head_weights > 0
        kept = kept & (counts.reshape(-1, *[1] * (kept.ndim - 1)) if regions else counts[decided])
    parts = masks, confidence.amin(0), kept.expand(masks.shape)
    return Opinion(*(part.cpu().numpy() for part in parts))


@contextlib.contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode in which it was."""
    modes = {module: module.training for network in networks for module in network.modules()}
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Row(NamedTuple):
    """Of a picture: name, image (Y, Z), pseudo-label and prediction of the slice that is shown."""

    name: str
    image: np.ndarray
    label: Opinion
    mine: Opinion


class PatchPictures:
    """A training's pictures.

    Attributes:
        slices: per case of a 3D training, the slice that is shown for good; part of the checkpoint.
    """

    def __init__(self, names: Sequence[str], regions: bool, patch_size: Sequence[int], spacing: Sequence[float]):
        """Arguments: names of the foreground classes or regions; whether they are regions; voxels and mm per axis."""
        self.names = names
        self.regions = regions
        self.patch_size = patch_size
        self.aspect = float(spacing[-2]) / float(spacing[-1])
        self.slices: dict[str, int] = {}

    def draw(
        self,
        file: Path,
        title: str,
        dataset: UnlabeledDataset,
        student: nn.Module,
        teacher: nn.Module,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        progress: float,
        needed: tuple[float, float] | None = None,
        head_weights: Tensor | None = None,
    ) -> None:
        """A row per patch: image, pseudo-label, its confidence, the student's prediction.

        Draws no random number and leaves both networks as they are.

        Args:
            file: PNG to write; its folder is made.
            title: one or several lines.
            dataset: the unlabelled cases.
            student: the network in training, not wrapped.
            teacher: the network whose decision is the pseudo-label; ``student`` where there is no other.
            device: of both.
            autocast: block in which the networks run.
            progress: share of the training that is done: a 3D patch is shown in the slice with most foreground, which
                stays the same once a tenth of the training is done and there is any.
            needed: confidence that a foreground and a background voxel of the pseudo-label need to count; voxels with
                less are drawn paler. None: all count.
            head_weights: see :func:`opinion`.
        """
        rows = []
        with evaluating(student, teacher):
            for case, (patch, first, slices) in fixed_patches(dataset, self.patch_size).items():
                with autocast():
                    label = opinion(teacher, patch.to(device), self.regions, needed, head_weights)
                    mine = label if teacher is student else opinion(student, patch.to(device), self.regions)
                image, z = patch[0].numpy(), 0
                if image.ndim == 3:
                    z = self._slice(case, label, range(max(0, -first), slices - first), progress)
                    image, label, mine = image[z], label.in_slice(z), mine.in_slice(z)
                name = case if len(case) <= 24 else f"...{case[-21:]}"
                name += f"\nslice {first + z + 1} of {slices}" if slices > 1 else ""
                rows.append(Row(name, image, label, mine))
        file.parent.mkdir(exist_ok=True)
        self._draw(file, title, rows, "student's decision" if teacher is student else "teacher's decision", needed)

    def _slice(self, case: str, label: Opinion, inside: range, progress: float) -> int:
        """Of the patch, and ``inside`` the image."""
        if case in self.slices:
            return self.slices[case]
        foreground = label.masks.any(0).sum((1, 2))[inside.start : inside.stop]
        if not foreground.any():
            return inside.start + len(foreground) // 2
        z = inside.start + int(foreground.argmax())
        if progress >= SETTLED:
            self.slices[case] = z
        return z

    def _draw(self, file: Path, title: str, rows: list[Row], whose: str, needed: tuple[float, float] | None) -> None:
        from matplotlib import style
        from matplotlib.figure import Figure

        colours = self._colours()
        columns = ("image", f"pseudo-label\n({whose})", "its confidence", "prediction of the student")
        height = 2.3 * min(2.5, max(0.4, self.aspect * rows[0].image.shape[0] / rows[0].image.shape[1]))
        with style.context("default"):  # nnU-Net's plot leaves seaborn's settings
            figure = Figure(figsize=(10.6, 1.5 + (height + 0.15) * len(rows)), layout="constrained")
            axes = figure.subplots(len(rows), len(columns), squeeze=False)
            for line, (name, image, label, mine) in zip(axes, rows, strict=True):
                grey = _grey(image)
                line[0].imshow(grey, aspect=self.aspect)
                _show_masks(line[1], grey, label, colours, self.aspect)
                alpha = np.where(label.kept.any(0), 1.0, PALE)
                line[2].imshow(label.confidence, vmin=0, vmax=1, cmap="viridis", alpha=alpha, aspect=self.aspect)
                everything = replace(mine, kept=np.ones_like(mine.kept))
                _show_masks(line[3], grey, everything, colours, self.aspect)
                line[0].set_ylabel(name, fontsize="small")
                for axis in line:
                    axis.set_xticks([])
                    axis.set_yticks([])
            for axis, column in zip(axes[0], columns, strict=True):
                axis.set_title(column, fontsize="medium")
            _draw_bar(figure, axes[:, 2], needed)
            figure.legend(handles=self._entries(rows, colours), loc="outside lower center", ncols=8, fontsize="small")
            figure.suptitle(title, fontsize="medium")
            with files.whole_file(file) as temporary:
                figure.savefig(temporary, dpi=100, format="png")

    def _entries(self, rows: list[Row], colours: Sequence[tuple[float, float, float]]) -> list[Any]:
        """Of the legend: every class, or where they are many those that are seen."""
        from matplotlib.patches import Patch as Rectangle

        seen = np.any([opinion.masks.any((1, 2)) for row in rows for opinion in (row.label, row.mine)], 0)
        entries = zip(self.names, colours, seen, strict=True)
        few = len(self.names) <= MOST_IN_LEGEND
        return [Rectangle(color=colour, label=name) for name, colour, there in entries if few or there][:MOST_IN_LEGEND]

    def _colours(self) -> list[tuple[float, float, float]]:
        """RGB of each class; the last of our colours, black, would not be seen on an image."""
        import matplotlib
        from matplotlib.colors import to_rgb

        few = len(self.names) < len(COLOURS)
        known = COLOURS[:-1] if few else matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
        return [to_rgb(known[i % len(known)]) for i in range(len(self.names))]


def _grey(image: np.ndarray) -> np.ndarray:
    """(Y, Z) to (Y, Z, 3) in [0, 1]: from the 1st to the 99th percentile."""
    low, high = np.percentile(image, (1, 99))
    return np.repeat(np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None], 3, -1)


def _show_masks(axis: Any, grey: np.ndarray, opinion: Opinion, colours: Sequence[tuple], aspect: float) -> None:
    """Half-transparent masks over (Y, Z, 3), later ones over earlier ones, paler where they are not kept."""
    from matplotlib.patheffects import withStroke

    shown = grey.copy()
    for mask, kept, colour in zip(opinion.masks, opinion.kept, colours, strict=True):
        for part, opacity in ((mask & kept, OPAQUE), (mask & ~kept, PALE * OPAQUE)):
            shown[part] = (1 - opacity) * grey[part] + opacity * np.array(colour)
    axis.imshow(shown, aspect=aspect)
    if not opinion.masks.any():
        axis.text(
            *(0.5, 0.5, "background only"),
            transform=axis.transAxes,
            ha="center",
            va="center",
            color="white",
            fontsize="small",
            path_effects=[withStroke(linewidth=3, foreground="black")],
        )


def _draw_bar(figure: Any, axes: Any, needed: tuple[float, float] | None) -> None:
    """The colours of the confidence below its column, and the confidence that is needed."""
    bar = figure.colorbar(axes[0].images[0], ax=axes, location="bottom", fraction=0.03, pad=0.01, aspect=14)
    if needed is None:
        return
    for value in set(needed):
        bar.ax.axvline(value, color="red", linewidth=2)
    foreground, background = needed
    low = f"{foreground:.3g}" if foreground == background else f"{foreground:.3g} (background {background:.3g})"
    bar.set_label(f"paler: not learned from,\nbelow {low}", fontsize="small")
