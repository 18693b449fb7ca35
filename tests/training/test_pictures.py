"""Pictures of fixed unlabelled patches, and TensorBoard: what they show, and that training does not notice them."""

import csv
import shutil
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from helpers import full_disk, make_batch
from nnunetv2.run.run_training import maybe_load_checkpoint
from PIL import Image

from nnunetv2_semisup.data.loader import UnlabeledDataset
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.training.pictures import PatchPictures, evaluating, fixed_patches, is_due, opinion

NAME = "nnUNetTrainerMeanTeacher"
SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "pictures": 20}


def drawn(trainer) -> list[str]:
    return sorted(file.name for file in Path(trainer.output_folder, "semisup_patches").glob("*"))


def log_of(trainer) -> str:
    return "".join(f.read_text() for f in sorted(Path(trainer.output_folder).glob("training_log_*.txt")))


@pytest.fixture(autouse=True)
def without_nnunets_plot(monkeypatch):
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda *_: None)  # it takes most of the time


@pytest.mark.parametrize(
    ("epochs", "pictures", "expected"),
    [
        (5, 20, [0, 1, 2, 3, 4]),
        (20, 20, list(range(20))),
        (1000, 20, [*range(0, 1000, 50), 999]),
        (1000, 0, []),
        (1, 20, [0]),
        (30, 4, [0, 8, 16, 24, 29]),
    ],
)
def test_pictures_are_spread_over_the_training(epochs, pictures, expected):
    assert [e for e in range(epochs) if is_due(e, epochs, pictures, terms_start=False)] == expected


def test_the_epoch_of_the_start_has_a_picture_unless_there_are_none():
    assert is_due(7, 1000, 20, terms_start=True) and not is_due(7, 1000, 0, terms_start=True)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_patches_are_the_centres_of_three_cases_padded_with_zeros(tiny, configuration, tmp_path):
    trainer = tiny.trainer(NAME, configuration)
    trainer.initialize()
    trainer.unlabeled_cases = trainer._prepare_unlabeled_cases()
    dataset = trainer._unlabeled_dataset()
    size = trainer.configuration_manager.patch_size
    patches = fixed_patches(dataset, size)
    assert list(patches) == sorted(tiny.unlabelled)
    whole = dataset.load_case(tiny.unlabelled[0])[0][:]
    box = [slice((n - 16) // 2, (n - 16) // 2 + 16) for n in whole.shape[1:]]
    box[0] = box[0] if configuration == "3d_fullres" else (whole.shape[1] - 1) // 2
    expected = whole[0][tuple(box)]
    image, first, slices = patches[tiny.unlabelled[0]]
    assert torch.equal(image, torch.from_numpy(expected[None])) and slices == whole.shape[1]
    assert first == (box[0] if configuration == "2d" else box[0].start)
    larger = fixed_patches(dataset, [n + 20 for n in size])[tiny.unlabelled[0]]
    assert larger.image.shape == (1, *(n + 20 for n in size)) and not larger.image[0, 0].any()
    same = UnlabeledDataset(dataset.source_folder, tiny.unlabelled[:1])
    assert list(fixed_patches(same, size)) == [tiny.unlabelled[0]]


@pytest.mark.parametrize(
    ("kind", "configuration"),
    [("regions and ignore", "3d_fullres"), ("regions", "2d"), ("ignore", "2d"), ("4 classes", "3d_resenc")],
)
def test_a_training_leaves_pictures_whatever_its_labels(datasets, use, kind, configuration):
    trainer = use(datasets(kind)).trainer(NAME, configuration, **SHORT)
    trainer.run_training()
    assert drawn(trainer) == ["epoch_0000.png", "epoch_0001.png"]
    for name in drawn(trainer):
        with Image.open(Path(trainer.output_folder, "semisup_patches", name)) as image:
            assert image.width > 900 and image.height > 600 and len(set(image.convert("L").getdata())) > 50
    assert "incomplete" not in log_of(trainer)


def test_zero_pictures_are_none(tiny):
    trainer = tiny.trainer(NAME, **SHORT | {"pictures": 0})
    trainer.run_training()
    assert not Path(trainer.output_folder, "semisup_patches").exists()


def test_only_the_first_process_draws(tiny):
    trainer = tiny.trainer(NAME, **SHORT)
    trainer.local_rank = 1
    trainer.run_training()
    assert not Path(trainer.output_folder, "semisup_patches").exists()


@pytest.mark.parametrize(
    ("name", "configuration"), [("nnUNetTrainerPasteMatch", "3d_fullres"), ("nnUNetTrainerCPS", "2d")]
)
def test_training_is_bit_for_bit_the_same_without_pictures(tiny, name, configuration):
    runs = []
    for count in (0, 20):
        trainer = tiny.trainer(name, configuration, deterministic_seed=3, **SHORT | {"pictures": count})
        trainer.run_training()
        runs.append(trainer)
    without, with_pictures = runs
    assert len(drawn(with_pictures)) == 2
    for part in ("network", "method"):
        a, b = (getattr(trainer, part).state_dict() for trainer in runs)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert without.training_log.rows == with_pictures.training_log.rows


def test_batch_statistics_and_modes_stay_as_they_are():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2), torch.nn.Dropout(0.5))
    network[1].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    with evaluating(network):
        first, second = (
            opinion(network, torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1)), False) for _ in range(2)
        )
    assert np.array_equal(first.confidence, second.confidence), "no dropout"
    assert [module.training for module in network.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class Killed(BaseException):
    pass


def test_a_resumed_training_draws_the_same_patches_and_slices(tiny):
    settings = SHORT | {"num_epochs": 3, "deterministic_seed": 1, "save_every_minutes": 0.0}
    whole = tiny.trainer(NAME, **settings)
    whole.run_training()
    folder = Path(whole.output_folder, "semisup_patches")
    expected = {name: (folder / name).read_bytes() for name in drawn(whole)}
    assert len(expected) == 3 and whole._pictures.slices
    killed = tiny.trainer(NAME, **settings)
    start_epoch = killed.on_train_epoch_start

    def start_or_die():
        if killed.current_epoch == 2:
            raise Killed
        start_epoch()

    killed.on_train_epoch_start = start_or_die
    with pytest.raises(Killed):
        killed.run_training()
    assert drawn(killed) == ["epoch_0000.png", "epoch_0001.png"], "those of the earlier run are set aside"
    (earlier,) = folder.parent.glob("previous_*_semisup_patches")
    assert {file.name: file.read_bytes() for file in earlier.iterdir()} == expected
    (folder / "epoch_0002.png").write_bytes(b"of an epoch that is repeated")
    resumed = tiny.trainer(NAME, resume=True, **settings)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    resumed.on_train_start()
    assert drawn(resumed) == ["epoch_0000.png", "epoch_0001.png"]
    resumed = tiny.trainer(NAME, resume=True, **settings)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    resumed.run_training()
    assert {name: (folder / name).read_bytes() for name in drawn(resumed)} == expected
    assert len(list(folder.parent.glob("previous_*_semisup_patches"))) == 1


def test_what_goes_wrong_is_a_warning_and_the_training_ends_well(tiny, monkeypatch):
    def no_font(*_, **__):
        raise RuntimeError("cannot find a font\nat all")

    trainer = tiny.trainer(NAME, **SHORT)
    monkeypatch.setattr(PatchPictures, "_draw", no_font)
    trainer.run_training()
    assert Path(trainer.output_folder, "checkpoint_final.pth").is_file()
    log, told = log_of(trainer), "WARNING: log or pictures of epoch {} are incomplete: cannot find a font at all"
    assert log.count("WARNING") == 2 and told.format(0) in log and told.format(1) in log
    assert trainer.bare_network.training is False, "as nnU-Net's validation left it"


def test_a_picture_that_does_not_fit_on_the_disk_leaves_no_half_one(tiny):
    trainer = tiny.trainer(NAME, "2d")
    trainer.initialize()
    trainer.unlabeled_cases = trainer._prepare_unlabeled_cases()
    with full_disk(5_000), pytest.raises(InputError, match=r"epoch_0000.png cannot be written"):
        trainer._draw_patches("title")
    assert drawn(trainer) == []


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    saved = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))
    )
    return saved


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (NAME, lambda method, network: method.teacher.module),
        ("nnUNetTrainerCPS", lambda method, network: method.second),
        ("nnUNetTrainerUniMatch", lambda method, network: network),
    ],
)
def test_the_pseudo_label_is_the_teachers_once_the_method_has_started(tiny, figures, name, expected):
    trainer = tiny.trainer(name, "2d", start_dice=0.5)
    trainer.initialize()
    trainer.unlabeled_cases = trainer._prepare_unlabeled_cases()
    teacher = trainer.method.teacher_network(trainer.bare_network)
    assert teacher is expected(trainer.method, trainer.bare_network)
    assert teacher.state_dict().keys() == trainer.bare_network.state_dict().keys()
    with torch.no_grad():
        for parameter in teacher.decoder.seg_layers[-1].parameters():
            parameter.zero_()
        if teacher is not trainer.bare_network:
            trainer.bare_network.decoder.seg_layers[-1].bias[1] = 100.0
    trainer._draw_patches("title")
    trainer._start.start_at(0)
    trainer._draw_patches("title")
    (before, after) = ([axis.images[0].get_array() for axis in f.axes[:4]] for f in figures)
    titles = [f.axes[1].get_title() for f in figures]
    assert "student's" in titles[0] and np.array_equal(before[1], before[3])
    assert figures[0].axes[2].images[0].get_clim() == (0, 1)
    if name == "nnUNetTrainerUniMatch":
        assert "student's" in titles[1] and np.array_equal(after[1], after[3])
    else:
        assert "teacher's" in titles[1] and not np.array_equal(after[1], after[3])
        assert np.allclose(after[2], 0.5), "a network without an opinion is as certain as a coin"
    assert np.array_equal(before[0], after[0]), "the patch is the same"


def test_the_epoch_with_which_the_method_starts_has_a_picture(tiny, figures, monkeypatch):
    settings = {**SHORT, "num_epochs": 4, "pictures": 1, "start_dice": 0.5}
    trainer = tiny.trainer(NAME, "2d", **settings)
    log = trainer.on_validation_epoch_end

    def logged(outputs):
        log(outputs)
        dice = [0.1, 0.6, 0.2, 0.2][trainer.current_epoch]
        trainer.logger.get_value("dice_per_class_or_region", None)[-1] = [dice]

    monkeypatch.setattr(trainer, "on_validation_epoch_end", logged)
    trainer.run_training()
    assert drawn(trainer) == [f"epoch_000{epoch}.png" for epoch in (0, 1, 3)]
    titles = [f.get_suptitle() for f in figures if "after epoch" in f.get_suptitle()]
    first_lines = {title.split("\n")[0] for title in titles}
    assert first_lines == {f"{NAME}, {tiny.name}, 2d, fold all"}
    assert "after epoch 0 (the last is 3); the method has not started: steps are those of nnU-Net" in titles[0]
    assert "pseudo-labels are the prediction" in titles[0] and "pseudo-labels are the prediction" not in titles[1]
    assert "after epoch 1 (the last is 3); the method's terms have started, ramp" in titles[1]
    assert "after epoch 3 (the last); " in titles[2]


class Volumes:
    """Cases in memory, as the data set of unlabelled cases gives them."""

    def __init__(self, **cases):
        self.cases, self.identifiers = cases, list(cases)

    def load_case(self, case):
        return self.cases[case], None, None, {}


class Threshold(torch.nn.Module):
    """Foreground where the first channel is above a value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.cat([torch.full_like(x[:, :1], self.value), x[:, :1]], 1)


def test_a_3d_patch_is_shown_in_the_slice_with_most_foreground_which_then_stays(tmp_path, figures):
    volume = np.zeros((2, 8, 8, 8), np.float32)
    volume[0, 2, :3] = 5
    volume[0, 6] = 2
    volume[1] = 7  # another channel, not shown
    pictures_of = PatchPictures(["organ"], False, (8, 8, 8), (3.0, 1.0, 2.0))
    for value, progress in ((9, 0.5), (1, 0.0), (3, 0.5), (1, 0.9)):
        network = Threshold(value)
        arguments = (Volumes(case=volume), network, network, torch.device("cpu"), torch.no_grad, progress)
        pictures_of.draw(tmp_path / "p" / "a.png", "title", *arguments)
    shown = [f.axes[0].get_ylabel() for f in figures]
    assert shown == [f"case\nslice {n} of 8" for n in (5, 7, 3, 3)], "middle; most foreground; settled; still"
    assert pictures_of.slices == {"case": 2}
    assert np.array_equal(figures[2].axes[0].images[0].get_array()[..., 0] > 0.5, volume[0, 2] > 2.5)
    assert figures[0].axes[0].get_aspect() == 0.5, "mm of a row over mm of a column"
    for figure in (figures[0], figures[2]):
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["organ"]
    told = [[text.get_text() for axis in f.axes[:4] for text in axis.texts] for f in figures]
    assert told == [["background only"] * 2, [], [], []]


def test_slices_are_counted_in_the_case_and_are_none_of_the_padding(tmp_path, figures):
    volume = np.zeros((1, 4, 8, 8), np.float32)
    network = Threshold(-1)  # everything is foreground, what is padded too
    arguments = (network, network, torch.device("cpu"), torch.no_grad, 0.0)
    for patch_size, case in (((8, 8, 8), volume), ((8, 8), volume), ((8, 8), volume[:, :1]), ((2, 8, 8), volume)):
        pictures_of = PatchPictures(["organ"], False, patch_size, (1.0, 1.0, 1.0))
        pictures_of.draw(tmp_path / "p" / "a.png", "title", Volumes(case=case), *arguments)
    shown = [f.axes[0].get_ylabel() for f in figures]
    assert shown == ["case\nslice 1 of 4", "case\nslice 2 of 4", "case", "case\nslice 2 of 4"]


@pytest.mark.parametrize("kind", ["4 classes", "regions"])
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("nnUNetTrainerPasteMatch", "share_kept"),
        ("nnUNetTrainerUniMatch", "share_confident"),
        ("nnUNetTrainerCrossMatch", "share_confident_clean"),
    ],
)
def test_what_is_not_pale_is_what_the_method_keeps(datasets, use, kind, name, share):
    trainer = use(datasets(kind)).trainer(name, "2d")
    trainer.initialize()
    method, network, batch = trainer.method, trainer.bare_network, make_batch(trainer)
    with torch.no_grad():
        for parameter in network.decoder.seg_layers[-1].parameters():
            parameter.mul_(20)  # from unsure everywhere to some of everything
    method.reset(network)
    for _ in method.losses(network, batch, batch["unlabelled"], 0.0):
        pass
    teacher, needed = method.teacher_network(network), method.confidence_needed(0.0)
    regions = trainer.label_manager.has_regions
    kept = [opinion(teacher, patch, regions, needed).kept.mean() for patch in batch["unlabelled"]["data"]]
    assert 0.02 < np.mean(kept) < 0.98
    assert np.mean(kept) == pytest.approx(float(method.diagnostics[share]), abs=0.005)


def test_what_a_head_of_no_weight_decides_is_not_kept():
    class Decided(torch.nn.Module):
        """Class 0, 1 and 2 in turn, each with certainty."""

        def forward(self, x):
            return 50 * torch.nn.functional.one_hot(torch.arange(6) % 3).T.reshape(1, 3, 2, 3).float()

    patch = torch.zeros(1, 2, 3)
    decided = np.arange(6).reshape(2, 3) % 3
    for weights in ([0.0, 1.0, 0.0], [1.0, 0.5, 0.1]):
        kept = opinion(Decided(), patch, False, (0.5, 0.5), torch.tensor(weights)).kept
        assert (kept == (np.array(weights)[decided] > 0)).all()
    assert opinion(Decided(), patch, False, (0.5, 0.5)).kept.all()


def test_the_confidence_that_is_needed_is_marked_once_the_method_has_started(tiny, figures):
    for name in (NAME, "nnUNetTrainerPasteMatch"):
        trainer = tiny.trainer(name, "2d", start_dice=0.5)
        trainer.initialize()
        trainer.unlabeled_cases = trainer._prepare_unlabeled_cases()
        trainer._draw_patches("title")
        trainer._start.start_at(0)
        trainer._draw_patches("title")
    bars = [figure.axes[-1] for figure in figures]
    assert [bar.get_xlabel() for bar in bars[:3]] == [""] * 3, "no such threshold, or the method has not started"
    assert bars[3].get_xlabel() == "paler: not learned from,\nbelow 0.7 (background 0.95)"
    assert sorted(line.get_xdata()[0] for line in bars[3].lines) == [0.7, 0.95]
    assert np.all(figures[2].axes[2].images[0].get_alpha() == 1)
    confidence = figures[3].axes[2].images[0]
    pale, values = confidence.get_alpha() < 1, confidence.get_array()
    assert pale[values < 0.7].all() and pale.any() and not pale[values >= 0.95].any()


class Logger:
    """What nnU-Net's logger has where W&B is switched on."""

    def __init__(self):
        self.logged = []

    def log(self, key, value, step):
        self.logged.append((key, step, value))

    def update_config(self, config):
        pass


def test_loss_terms_reach_the_loggers_that_nnunet_knows(tiny):
    trainer = tiny.trainer(NAME, "2d", **SHORT)
    logger = Logger()
    trainer.logger.loggers.append(logger)
    trainer.run_training()
    terms = [entry for entry in logger.logged if entry[0] == "semisup/loss_consistency"]
    assert [(step, value) for _, step, value in terms] == [
        (row["epoch"], row["loss_consistency"]) for row in trainer.training_log.rows
    ]
    assert {"mean_fg_dice", "semisup/weight_consistency", "semisup/share_volume_1"} <= {
        key for key, *_ in logger.logged
    }


def events_of(trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(trainer.output_folder, "semisup_tensorboard")))
    events.Reload()
    return events


def test_tensorboard_gets_scalars_and_pictures_and_goes_on_after_a_resume(tiny):
    settings = SHORT | {"tensorboard": True, "save_every_minutes": 0.0}
    first = tiny.trainer(NAME, "2d", **settings)
    first.run_training()
    events = events_of(first)
    with open(Path(first.output_folder, "semisup_log.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for key in ("loss_consistency", "weight_consistency", "share_volume_1", "gradient_norm"):
        scalars = events.Scalars(f"semisup/{key}")
        assert [s.step for s in scalars] == [0, 1]
        assert [s.value for s in scalars] == pytest.approx([float(row[key]) for row in rows], rel=1e-4)
    assert {"mean_fg_dice", "train_losses", "val_losses", "lrs"} <= set(events.Tags()["scalars"])
    assert not [tag for tag in events.Tags()["scalars"] if "timestamp" in tag]
    pictures_there = events.Images("semisup/patches")
    assert [image.step for image in pictures_there] == [0, 1] and pictures_there[0].width > 900

    shutil.rmtree(first.output_folder)
    killed = tiny.trainer(NAME, "2d", **settings)
    end_step = killed.on_validation_epoch_start

    def die():
        if killed.current_epoch == 1:
            raise Killed
        end_step()

    killed.on_validation_epoch_start = die
    with pytest.raises(Killed):
        killed.run_training()
    assert [s.step for s in events_of(killed).Scalars("train_losses")] == [0, 1]
    resumed = tiny.trainer(NAME, "2d", resume=True, **settings)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    resumed.run_training()
    assert [s.step for s in events_of(resumed).Scalars("train_losses")] == [0, 1], "the repeated epoch is there once"
    again = tiny.trainer(NAME, "2d", **settings | {"num_epochs": 1})
    again.run_training()
    assert [s.step for s in events_of(again).Scalars("train_losses")] == [0], "a fresh start begins with nothing"


def test_tensorboard_that_is_missing_is_told_before_anything_is_done(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trainer = tiny.trainer(NAME, tensorboard=True, **SHORT)
    monkeypatch.setattr(trainer, "_prepare_unlabeled_cases", lambda: pytest.fail("too late"))
    with pytest.raises(InputError, match="pip install tensorboard") as caught:
        trainer.run_training()
    assert "\n" not in str(caught.value)
    tiny.trainer(NAME, **SHORT).on_train_start()


def test_tensorboard_that_cannot_write_warns_once(tiny, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    trainer = tiny.trainer(NAME, "2d", tensorboard=True, **SHORT)
    trainer.run_training()
    assert log_of(trainer).count("WARNING: TensorBoard gets nothing more") == 1
    assert len(drawn(trainer)) == 2
