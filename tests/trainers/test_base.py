"""The base trainer around a real (tiny) training in process: streams, log, saving, stopping, failing."""

import csv
import json
import os
import shutil
import signal
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LABELS, full_disk, make_batch, make_dataset
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_semisup import files
from nnunetv2_semisup.data.volumes import labelled_volumes
from nnunetv2_semisup.errors import InputError, TrainingFailed
from nnunetv2_semisup.trainers.base import MAX_OVERFLOWS_IN_A_ROW

NAME = "nnUNetTrainerMeanTeacher"
SHORT = {"num_epochs": 3, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}


def rows(trainer) -> list[dict]:
    with open(Path(trainer.output_folder, "semisup_log.csv"), encoding="utf-8") as f:
        return list(csv.DictReader(f))


def continued(dataset, **settings):
    """A trainer as ``nnUNetv2_train --c`` makes it."""
    trainer = dataset.trainer(NAME, resume=True, **settings)
    maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    return trainer


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_whole_run_leaves_log_picture_settings_and_checkpoint(tiny, configuration):
    trainer = tiny.trainer(NAME, configuration, **SHORT)
    trainer.run_training()
    folder = Path(trainer.output_folder)
    names = {f.name for f in folder.iterdir()}
    assert {"semisup_log.csv", "semisup_progress.png", "semisup_settings.json", "checkpoint_final.pth"} <= names
    assert not [n for n in names if ".tmp" in n]
    table = rows(trainer)
    assert [int(r["epoch"]) for r in table] == [0, 1, 2]
    assert float(table[2]["progress"]) == pytest.approx(1.0)
    for column in ("loss_consistency", "loss_supervised", "loss_total", "weight_consistency", "gradient_norm"):
        assert all(np.isfinite(float(r[column])) for r in table), column
    assert 0 <= float(table[0]["share_teacher_student_agreement"]) <= 1
    [log] = folder.glob("training_log_*.txt")
    command = (
        f"nnUNetv2_predict -d {tiny.name} -c {configuration} -f all -tr {NAME} -p nnUNetPlans -device cpu -i IMAGES"
    )
    assert f"Next: {command}" in log.read_text() and "Finished: online Dice 0." in log.read_text()
    settings = json.loads((folder / "semisup_settings.json").read_text())
    assert settings["trainer"] == NAME and settings["num_epochs"] == 3 and settings["teacher_decay"] == 0.99
    saved = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert saved["semisup"]["settings"]["num_epochs"] == 3 and saved["trainer_name"] == NAME
    stock_keys = set(saved) - {"semisup"}
    assert {"network_weights", "optimizer_state", "init_args", "logging", "current_epoch"} <= stock_keys


def log_of(trainer) -> str:
    return "".join(file.read_text() for file in Path(trainer.output_folder).glob("training_log_*.txt"))


def test_a_run_that_used_no_unlabelled_image_says_so(tiny):
    settings = SHORT | {"num_epochs": 2, "start_dice": 1.0}
    trainer = tiny.trainer(NAME, **settings)
    trainer.run_training()
    told = log_of(trainer)
    assert "WARNING: the unlabelled images were NOT used, this is a model of stock nnU-Net" in told
    assert "organ ended at 0." in told and "-device cpu -i IMAGES" in told
    assert "The method's terms start" not in told


def test_a_resumed_run_says_from_where(tiny):
    trainer = tiny.trainer(NAME, **SHORT)
    trainer.num_epochs = 1
    trainer.run_training()
    assert "The method's terms start with the first step." in log_of(trainer)
    again = tiny.trainer(NAME, resume=True, **SHORT)
    again.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    assert "checkpoint_final.pth: 1 of 3 epochs are done, the method's terms have started." in log_of(again)


@pytest.mark.parametrize(("weight", "layout_changes"), [(0.2, True), (0.0, False)])
def test_weights_are_channels_last_on_a_cpu_unless_the_run_is_supervised(tiny, weight, layout_changes):
    trainer = tiny.trainer(NAME, consistency_weight=weight)
    trainer.initialize()
    kernels = [p for p in (*trainer.network.parameters(), *trainer.method.teacher.parameters()) if p.ndim == 5]
    assert any(not kernel.is_contiguous() for kernel in kernels) == layout_changes
    assert trainer.is_supervised != layout_changes


def test_labelled_stream_is_stock_and_unlabelled_stream_has_no_target(tiny):
    trainer = tiny.trainer(NAME, unlabeled_batch_size=3)
    trainer.initialize()
    trainer.unlabeled_cases = trainer._prepare_unlabeled_cases()
    augmenter, validation = trainer.get_dataloaders()
    assert type(augmenter.data_loader.loader.labelled) is nnUNetDataLoader is type(validation.data_loader.loader)
    batch = next(augmenter)
    assert set(batch) == {"data", "target", "keys", "unlabelled"} and set(batch["unlabelled"]) == {"data", "keys"}
    assert batch["data"].shape == (2, 1, 16, 16, 16) and batch["unlabelled"]["data"].shape == (3, 1, 16, 16, 16)
    assert set(batch["keys"]) <= set(tiny.labelled) and set(batch["unlabelled"]["keys"]) <= set(tiny.unlabelled)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_labelled_batches_equal_stocks(tiny, configuration):
    """The same random numbers give the same labelled batch as a stock trainer's loader."""
    batches = []
    stock = nnUNetTrainer(
        tiny.plans | {"continue_training": False}, configuration, "all", tiny.dataset_json, torch.device("cpu")
    )
    stock.initialize()
    ours = tiny.trainer(NAME, configuration)
    ours.initialize()
    ours.unlabeled_cases = ours._prepare_unlabeled_cases()
    for trainer in (stock, ours):
        augmenter, _ = trainer.get_dataloaders()
        np.random.seed(1)
        torch.manual_seed(1)
        batches.append(next(augmenter))
    expected, batch = batches
    assert torch.equal(batch["data"], expected["data"]) and list(batch["keys"]) == list(expected["keys"])
    assert all(torch.equal(a, b) for a, b in zip(batch["target"], expected["target"], strict=True))


def test_workers_share_one_budget_and_end(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = tiny.trainer(NAME, **SHORT | {"num_epochs": 1})
    trainer.run_training()
    assert trainer.dataloader_train.num_processes == 1
    assert not trainer.dataloader_train._processes and not trainer.dataloader_val._processes
    assert os.environ["nnUNet_n_proc_DA"] == "1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_repeats_the_epoch(tiny, number, monkeypatch):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    trainer = tiny.trainer(NAME, **SHORT)
    losses = trainer.method_class.losses
    steps = 0

    def losses_with_signal(self, *args):
        nonlocal steps
        steps += 1
        if steps == 4:  # the second step of epoch 1
            os.kill(os.getpid(), number)
        yield from losses(self, *args)

    monkeypatch.setattr(trainer.method_class, "losses", losses_with_signal)
    with pytest.raises(SystemExit) as stop:
        trainer.run_training()
    assert stop.value.code == 128 + number and steps == 4, "the step in flight was finished, no other begun"
    assert {n: signal.getsignal(n) for n in before} == before
    teacher = {k: v.clone() for k, v in trainer.method.state_dict().items()}

    resumed = continued(tiny, **SHORT)
    assert resumed.current_epoch == 1 and resumed.progress == pytest.approx(1 / 3)
    assert all(torch.equal(v, teacher[k]) for k, v in resumed.method.state_dict().items())
    resumed.run_training()
    assert [int(r["epoch"]) for r in rows(resumed)] == [0, 1, 2]
    assert {len(v) for v in resumed.logger.local_logger.get_checkpoint().values()} == {3}
    assert Path(resumed.output_folder, "checkpoint_final.pth").is_file()


def test_checkpoint_latest_counts_minutes(tiny, monkeypatch):
    def saved_epochs(minutes):
        trainer = tiny.trainer(NAME, save_every_minutes=minutes, **SHORT)
        epochs = []
        save = type(trainer).save_checkpoint

        def spy(self, filename):
            if isinstance(filename, str) and filename.endswith("checkpoint_latest.pth"):
                epochs.append(self.current_epoch)
            save(self, filename)

        with monkeypatch.context() as patch:
            patch.setattr(type(trainer), "save_checkpoint", spy)
            trainer.run_training()
        return epochs

    assert saved_epochs(0.0) == [0, 1]
    assert saved_epochs(1.0) == []  # minutes: the run takes seconds


def test_an_earlier_run_is_set_aside_but_not_by_resume(tiny):
    first = tiny.trainer(NAME, **SHORT | {"num_epochs": 1})
    first.run_training()
    folder = Path(first.output_folder)
    continued(tiny, **SHORT | {"num_epochs": 1}).run_training()
    assert not list(folder.glob("previous_*"))
    content = (folder / "checkpoint_final.pth").read_bytes()

    class Halt(Exception):
        pass

    second = tiny.trainer(NAME, **SHORT)
    second.on_train_epoch_start = lambda: (_ for _ in ()).throw(Halt)
    with pytest.raises(Halt):
        second.run_training()
    assert not list(folder.glob("checkpoint_*.pth"))
    (old,) = folder.glob("previous_*_checkpoint_final.pth")
    assert old.read_bytes() == content


def test_a_run_without_checkpoints_leaves_older_ones(tiny):
    first = tiny.trainer(NAME, **SHORT | {"num_epochs": 1})
    first.run_training()
    second = tiny.trainer(NAME, **SHORT | {"num_epochs": 1})
    second.disable_checkpointing = True
    second.run_training()
    assert Path(first.output_folder, "checkpoint_final.pth").is_file()


def test_wrong_input_touches_nothing(tiny, tmp_path):
    """An error in the unlabelled data of a fresh start leaves an earlier run's checkpoint in place."""
    first = tiny.trainer(NAME, **SHORT | {"num_epochs": 1})
    first.run_training()
    second = tiny.trainer(NAME, **SHORT)
    second._prepare_unlabeled_cases = lambda: (_ for _ in ()).throw(InputError("no images"))
    with pytest.raises(InputError):
        second.run_training()
    assert Path(first.output_folder, "checkpoint_final.pth").is_file()


def test_a_value_that_is_not_finite_stops_with_its_name(tiny):
    trainer = tiny.trainer(NAME, **SHORT)
    trainer.initialize()
    Path(trainer.output_folder, "checkpoint_latest.pth").write_bytes(b"as it was")
    before = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    batch = make_batch(trainer)
    batch["unlabelled"]["data"][0, 0, 0] = float("nan")
    with pytest.raises(TrainingFailed, match=r"loss_consistency.* epoch 0, step 0.*case0, case1.*ucase0, ucase1"):
        trainer.train_step(batch)
    assert all(torch.equal(v, before[k]) for k, v in trainer.network.state_dict().items())
    assert Path(trainer.output_folder, "checkpoint_failed.pth").is_file()
    assert Path(trainer.output_folder, "checkpoint_latest.pth").read_bytes() == b"as it was"


def test_overflow_under_mixed_precision_is_skipped_counted_and_fatal_after_20(tiny):
    trainer = tiny.trainer(NAME, **SHORT)
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    good, bad = make_batch(trainer), make_batch(trainer)
    bad["unlabelled"]["data"][0, 0, 0] = float("inf")
    trainer.train_step(good)
    network = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    teacher = {k: v.clone() for k, v in trainer.method.state_dict().items()}
    for _ in range(MAX_OVERFLOWS_IN_A_ROW - 1):
        trainer.train_step(bad)
    assert all(torch.equal(v, network[k]) for k, v in trainer.network.state_dict().items())
    assert all(torch.equal(v, teacher[k]) for k, v in trainer.method.state_dict().items())
    assert trainer.grad_scaler.get_scale() < 1024
    trainer.train_step(good)  # one good step forgets them
    row = trainer.training_log.end_epoch(0)
    assert row["overflows"] == pytest.approx(19 / 21) and np.isfinite(row["loss_consistency"])
    with pytest.raises(TrainingFailed):
        for _ in range(MAX_OVERFLOWS_IN_A_ROW):
            trainer.train_step(bad)


def test_scaled_step_equals_unscaled_step(tiny):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        torch.manual_seed(0)
        trainer = tiny.trainer(NAME, **SHORT)
        trainer.initialize()
        trainer.grad_scaler = scaler
        torch.manual_seed(1)
        trainer.train_step(make_batch(trainer))
        results.append(trainer.network.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key])


@pytest.mark.parametrize(
    ("semisup", "message"),
    [
        ({"nnUNetTrainerMeanTeacher": {"teacher_deacy": 0.9}}, "nnUNetPlans.json.*unknown setting 'teacher_deacy'"),
        ({"nnUNetTrainerMeanTeacher": {"teacher_decay": "0.9"}}, "wrong type"),
        (
            {"nnUNetTrainerMeanTeachr": {}},
            "unknown trainer 'nnUNetTrainerMeanTeachr'.*did you mean nnUNetTrainerMeanTeacher",
        ),
        ({"nnUNetTrainerMeanTeacher_5epochs": {}}, "unknown trainer.*did you mean"),
        (["x"], "expected trainer names"),
    ],
)
def test_settings_of_the_plans_are_checked_before_anything_is_written(tiny, semisup, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        tiny.trainer(NAME, plans=tiny.plans | {"semisup": semisup})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_checkpoints_of_others_are_refused(tiny, tmp_path):
    stock = nnUNetTrainer(
        tiny.plans | {"continue_training": False}, "3d_fullres", "all", tiny.dataset_json, torch.device("cpu")
    )
    stock.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    stock.save_checkpoint(str(file))
    trainer = tiny.trainer(NAME)
    with pytest.raises(
        InputError, match=r"checkpoint_latest.pth is a checkpoint of nnUNetTrainer,.*-pretrained_weights"
    ):
        trainer.load_checkpoint(str(file))
    ours = tiny.trainer(NAME)
    ours.initialize()
    ours.save_checkpoint(str(file))
    content = torch.load(file, weights_only=False)
    content["semisup"]["trainer"] = "nnUNetTrainerOther"
    torch.save(content, file)
    with pytest.raises(InputError, match="checkpoint of nnUNetTrainerOther"):
        tiny.trainer(NAME).load_checkpoint(str(file))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="checkpoint_latest.pth cannot be read"):
        tiny.trainer(NAME).load_checkpoint(str(file))


def changed_checkpoint(tiny, file, change):
    trainer = tiny.trainer(NAME)
    trainer.initialize()
    trainer.save_checkpoint(str(file))
    content = torch.load(file, weights_only=False)
    torch.save(change(content), file)


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [1, 2], "is no checkpoint of nnU-Net"),
        (
            lambda content: content | {"semisup": None},
            "is a checkpoint of nnUNetTrainerMeanTeacher, .* cannot continue",
        ),
        (lambda content: content | {"semisup": {"trainer": NAME}}, "is damaged, it lacks settings, method, log"),
        (lambda content: {"semisup": content["semisup"]}, "is damaged, it lacks network_weights, optimizer_state"),
        (lambda content: content | {"current_epoch": -5}, "is of epoch -5, this training has 1000"),
        (lambda content: content | {"current_epoch": 10**9}, "is of epoch 1000000000"),
        (lambda content: content | {"current_epoch": "3"}, "is of epoch '3'"),
    ],
)
def test_checkpoints_of_another_form_are_refused_in_one_line(tiny, tmp_path, change, message):
    """Input: a checkpoint that is a list, whose part of ours is null or lacks keys, of epoch -5 or 1e9. Answer:
    one line that names the file and what is wrong.
    """
    file = tmp_path / "checkpoint_latest.pth"
    changed_checkpoint(tiny, file, change)
    with pytest.raises(InputError, match=f"checkpoint_latest.pth {message}") as caught:
        tiny.trainer(NAME).load_checkpoint(str(file))
    assert "\n" not in str(caught.value)


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.robustness
def test_a_checkpoint_that_would_run_code_is_refused(tiny, tmp_path):
    """Input: a checkpoint with a pickled call. Answer: it is refused, and nothing of it has run."""
    file, traces = tmp_path / "checkpoint_latest.pth", tmp_path / "traces"
    changed_checkpoint(tiny, file, lambda content: content | {"init_args": RunsCode(traces)})
    with pytest.raises(InputError, match="holds more than tensors and plain values .*open.* could run code"):
        tiny.trainer(NAME).load_checkpoint(str(file))
    assert not traces.exists()


@pytest.mark.robustness
@pytest.mark.parametrize("place", [0.3, 0.5, 0.8])
def test_a_flipped_bit_in_a_checkpoint_is_found(tiny, tmp_path, place):
    """Input: a checkpoint with one bit flipped in a tensor. Answer: it is refused, not loaded."""
    trainer = tiny.trainer(NAME)
    trainer.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as parts:
        tensors = [part for part in parts.infolist() if "/data/" in part.filename and part.file_size > 500]
    part = tensors[int(place * len(tensors))]
    content[part.header_offset + 200 + part.file_size // 2] ^= 16
    file.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read .*has changed since it was written"):
        tiny.trainer(NAME).load_checkpoint(str(file))


@pytest.mark.robustness
@pytest.mark.parametrize(
    "numpy_number", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.arange(3.0)]
)
def test_numbers_of_numpy_are_plain_values(tiny, tmp_path, numpy_number):
    """Input: a checkpoint whose log holds numbers of numpy, as nnU-Net's does. Answer: it is loaded."""
    file = tmp_path / "checkpoint_latest.pth"
    changed_checkpoint(tiny, file, lambda content: content | {"more": [numpy_number]})
    trainer = tiny.trainer(NAME)
    trainer.load_checkpoint(str(file))
    assert trainer._resumed


@pytest.mark.robustness
def test_a_full_disk_keeps_the_older_checkpoint_and_names_the_file(tiny, tmp_path):
    """Input: a disk that fills up while a checkpoint is written. Answer: the older one is whole, one line names
    the file and the room left, no temporary file stays.
    """
    trainer = tiny.trainer(NAME)
    trainer.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    content = file.read_bytes()
    message = r"checkpoint_latest.pth cannot be written \(.* GB are free there\)"
    with full_disk(20_000), pytest.raises(InputError, match=message) as caught:
        trainer.save_checkpoint(str(file))
    assert "\n" not in str(caught.value) and file.read_bytes() == content
    assert [f.name for f in tmp_path.iterdir() if "checkpoint" in f.name] == [file.name]


@pytest.mark.robustness
def test_a_log_that_cannot_be_written_is_a_warning(tiny, monkeypatch):
    """Input: a log file that cannot be written. Answer: a warning; the checkpoint is written all the same."""
    trainer = tiny.trainer(NAME, **SHORT)
    lines = []

    def cannot(file, columns, rows):
        raise files.cannot_write(file, "No space left on device")

    monkeypatch.setattr(files, "write_csv", cannot)
    original = trainer.print_to_log_file
    trainer.print_to_log_file = lambda *args, **kwargs: (
        lines.append(" ".join(map(str, args))),
        original(*args, **kwargs),
    )
    trainer.run_training()
    assert [line for line in lines if "WARNING" in line and "semisup_log.csv cannot be written" in line]
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()


@pytest.mark.robustness
@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("stream", ["labelled", "unlabelled"])
def test_a_case_that_cannot_be_read_while_training_is_named_and_nothing_is_lost(
    datasets, use, tmp_path, monkeypatch, workers, stream
):
    """Input: a preprocessed file that breaks while training runs. Answer: the weights are saved, and the case
    is named.
    """
    dataset = replace(datasets("2 classes"), root=tmp_path / "copy")
    shutil.copytree(datasets("2 classes").root, dataset.root)
    use(dataset)
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    trainer = dataset.trainer(NAME, **SHORT | {"num_epochs": 50, "num_iterations_per_epoch": 3})
    end_epoch = trainer.on_epoch_end

    def break_files():
        end_epoch()
        folder = dataset.preprocessed / "nnUNetPlans_3d_fullres" if stream == "labelled" else dataset.folder
        for file in folder.glob("*.b2nd"):
            file.write_bytes(b"broken")

    trainer.on_epoch_end = break_files
    with pytest.raises(TrainingFailed, match=r"case (lab|unl)\d.* cannot be loaded .*Saved .*checkpoint_latest.pth"):
        trainer.run_training()
    saved = torch.load(Path(trainer.output_folder) / "checkpoint_latest.pth", weights_only=False)
    assert saved["current_epoch"] == trainer.current_epoch >= 1


@pytest.mark.robustness
def test_a_killed_loader_process_ends_training_saved(tiny, monkeypatch):
    """Input: kill -9 of a process that loads patches. Answer: the weights are saved, the message says what
    happened.
    """
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = tiny.trainer(NAME, **SHORT | {"num_epochs": 50, "num_iterations_per_epoch": 3})
    end_epoch = trainer.on_epoch_end

    def kill():
        end_epoch()
        for process in trainer.dataloader_train._processes:
            process.kill()

    trainer.on_epoch_end = kill
    with pytest.raises(TrainingFailed, match=r"that loads patches was killed.*Saved .*checkpoint_latest.pth"):
        trainer.run_training()


def test_an_interrupted_save_leaves_the_older_checkpoint(tiny, tmp_path, monkeypatch):
    trainer = tiny.trainer(NAME)
    trainer.initialize()
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    content = file.read_bytes()
    save = torch.save

    def dies(checkpoint, target):
        if isinstance(target, Path):
            Path(target).write_bytes(b"half")
            raise KeyboardInterrupt
        save(checkpoint, target)

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == content


@pytest.mark.parametrize("name", [NAME, "nnUNetTrainerSimCVD", "nnUNetTrainerACTION", "nnUNetTrainerACTIONPlusPlus"])
def test_pretrained_weights_reach_the_teacher(name, tiny, tmp_path):
    donor = tiny.trainer(NAME)
    donor.initialize()
    file = str(tmp_path / "weights.pth")
    donor.save_checkpoint(file)
    trainer = tiny.trainer(name, **SHORT | {"num_epochs": 4})
    maybe_load_checkpoint(trainer, False, False, file)
    trainer.on_train_start()
    trainer._stop.stop_listening()
    teacher, donor_weights = trainer.method.teacher.module.state_dict(), donor.network.state_dict()
    same = [k for k in donor_weights if ".seg_layers." not in k]
    assert same and all(torch.equal(teacher[k], donor_weights[k]) for k in same)
    assert all(torch.equal(teacher[k], v) for k, v in trainer.network.state_dict().items())


def test_two_runs_with_a_seed_are_equal(tiny):
    finals = []
    for _ in range(2):
        torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
        np.random.seed(None)
        trainer = tiny.trainer(NAME, deterministic_seed=3, **SHORT | {"num_epochs": 1})
        trainer.run_training()
        finals.append(trainer.network.state_dict())
    assert all(torch.equal(v, finals[1][k]) for k, v in finals[0].items())


def test_fewer_than_five_cases_get_folds(datasets, use, tmp_path):
    dataset = use(make_dataset(tmp_path / "few", LABELS["2 classes"], labelled=2, unlabelled=1))
    trainer = dataset.trainer(NAME, fold=0)
    trainer.initialize()
    train, validation = trainer.do_split()
    assert sorted([*train, *validation]) == ["lab0", "lab1"] and len(validation) == 1
    splits = json.loads((dataset.preprocessed / "splits_final.json").read_text())
    assert len(splits) == 2


@pytest.mark.robustness
def test_a_fold_that_names_cases_that_are_not_there(use, tmp_path):
    """Input: splits_final.json names a case that is not preprocessed. Answer: one line that names it, before
    training.
    """
    dataset = use(make_dataset(tmp_path / "data", LABELS["2 classes"]))
    folds = [{"train": ["lab0", "gone"], "val": ["lab1"]}, {"train": ["lab0"], "val": ["lab1"]}]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(folds))
    trainers = [dataset.trainer(NAME, fold=fold) for fold in (0, 1)]
    for trainer in trainers:
        trainer.initialize()
    with pytest.raises(InputError, match='splits_final.json: "train" of fold 0 names cases that are not there: gone'):
        trainers[0].do_split()
    assert trainers[1].do_split() == (["lab0"], ["lab1"])


@pytest.mark.robustness
@pytest.mark.parametrize(
    ("key", "value"), [("spacing", [0, 1, 1]), ("spacing", None), ("preprocessor_name", "Nothing")]
)
def test_damaged_plans_are_told_before_nnunet_looks_at_them(tiny, key, value):
    """Input: plans with a spacing of 0 or without, or an unknown preprocessor. Answer: one line, at the
    trainer's start.
    """
    plans = tiny.plans
    plans["configurations"]["3d_fullres"][key] = value
    with pytest.raises(InputError, match="plans nnUNetPlans: configuration 3d_fullres .*plan again"):
        tiny.trainer(NAME, plans=plans)


def test_a_fold_may_name_its_unlabelled_cases(use, tmp_path):
    dataset = use(make_dataset(tmp_path / "own", LABELS["2 classes"], labelled=2, unlabelled=3))
    split = [{"train": ["lab0"], "val": ["lab1"], "unlabeled": ["unl2"]}]
    (dataset.preprocessed / "splits_final.json").write_text(json.dumps(split))
    trainer = dataset.trainer(NAME, fold=0)
    trainer.initialize()
    assert trainer._prepare_unlabeled_cases() == ["unl2"]


def test_mixed_precision_keeps_no_cast_weights(tiny, monkeypatch):
    from nnunetv2_semisup.trainers import base

    asked = []
    monkeypatch.setattr(base, "autocast", lambda *args, **options: asked.append((args, options)))
    trainer = tiny.trainer(NAME)
    trainer.device = torch.device("cuda")
    trainer._autocast()
    assert asked == [(("cuda",), {"cache_enabled": False})]


@pytest.mark.parametrize("name", [NAME, "nnUNetTrainerCrossMatch"])
def test_compiled_run_keeps_stock_keys(name, tiny, monkeypatch):
    """As with a GPU: the network is not wrapped, taps and plain call run compiled, Dice is compiled by nnU-Net."""
    from nnunetv2_semisup.network import taps

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend="aot_eager"))
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
    taps._compiled.cache_clear()
    trainer = tiny.trainer(name)
    trainer.initialize()
    assert type(trainer.network).__name__ == "PlainConvUNet"
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: False)
    plain = tiny.trainer(name)
    plain.initialize()
    assert list(trainer.network.state_dict()) == list(plain.network.state_dict())
    plain.load_state = plain.network.load_state_dict(trainer.network.state_dict())
    for t in (trainer, plain):
        t.method.reset(t.network)
        torch.manual_seed(2)
        t.train_step(make_batch(t))
    for key, value in plain.network.state_dict().items():
        torch.testing.assert_close(trainer.network.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    taps._compiled.cache_clear()


def with_dice(trainer, monkeypatch, dice):
    """Let nnU-Net's log have these online Dice values, one list an epoch."""
    log = trainer.on_validation_epoch_end

    def logged(outputs):
        log(outputs)
        trainer.logger.local_logger.my_fantastic_logging["dice_per_class_or_region"][-1] = dice[trainer.current_epoch]

    monkeypatch.setattr(trainer, "on_validation_epoch_end", logged)


def test_terms_start_when_the_dice_has_passed_and_the_teacher_is_the_student_then(tiny, monkeypatch):
    trainer = tiny.trainer(NAME, **SHORT | {"num_epochs": 4}, start_dice=0.5, ramp_share=0.5)
    with_dice(trainer, monkeypatch, [[0.1], [0.6], [0.2], [0.2]])
    at_start = []
    reset = trainer.method_class.reset

    def noted(method, network):
        reset(method, network)
        at_start.append((trainer.current_epoch, {k: v.clone() for k, v in network.state_dict().items()}))

    monkeypatch.setattr(trainer.method_class, "reset", noted)
    trainer.run_training()
    table = rows(trainer)
    assert [row["loss_consistency"] != "" for row in table] == [False, False, True, True]
    assert [float(row["ramp"]) for row in table] == pytest.approx([0, 0, 1, 1])
    assert [epoch for epoch, _ in at_start] == [0, 1], "once before the run, once at the start"
    assert any(not torch.equal(v, at_start[0][1][k]) for k, v in at_start[1][1].items())
    saved = torch.load(Path(trainer.output_folder, "checkpoint_final.pth"), weights_only=False)
    assert saved["semisup"]["start"]["step"] == 4
    assert float(table[2]["weight_consistency"]) < trainer.settings.consistency_weight, "ramped"


def test_resume_starts_neither_twice_nor_never(tiny, monkeypatch):
    settings = SHORT | {"num_epochs": 3, "start_dice": 0.5, "save_every_minutes": 0}
    trainer = tiny.trainer(NAME, **settings)
    with_dice(trainer, monkeypatch, [[0.6], [0.1], [0.1]])
    step = trainer.train_step

    def killed(batch):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    resumed = continued(tiny, **settings)
    resets = []
    monkeypatch.setattr(resumed.method, "reset", lambda network: resets.append(1))
    assert resumed.current_epoch == 1 and resumed.progress == 0
    with_dice(resumed, monkeypatch, [[0.6], [0.1], [0.1]])
    resumed.run_training()
    assert not resets
    assert [row["loss_consistency"] != "" for row in rows(resumed)] == [False, True, True]


def test_a_class_that_vanishes_from_the_pseudo_labels_counts_less(tiny, monkeypatch):
    trainer = tiny.trainer(NAME, **SHORT)
    trainer.initialize()
    monkeypatch.setattr(
        trainer.method,
        "note_pseudo_labels",
        lambda decided: trainer.method.diagnostics.update(share_volume_1=torch.tensor(1e-4)),
    )
    trainer.run_training()
    train, _ = trainer.get_tr_and_val_datasets()
    (labelled,) = labelled_volumes(train, trainer.label_manager, trainer.configuration_manager.patch_size)
    assert 0.03 < labelled < 0.15, "a ball of radius 5 in patches of 16"
    assert trainer.method.head_weights.tolist() == pytest.approx([1e-4 / (0.5 * labelled)] * 2, rel=1e-4)
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert log.count("WARNING: organ vanishes from the pseudo-labels") == 1


def test_what_a_method_declares_unsupported_is_refused_by_name_before_any_work(datasets, use, monkeypatch):
    trainer = use(datasets("regions")).trainer(NAME)
    reason = classmethod(lambda cls, task, settings: "no regions yet: train labels" if task.has_regions else None)
    monkeypatch.setattr(trainer.method_class, "unsupported", reason)
    with pytest.raises(NotImplementedError, match=f"{NAME}: no regions yet: train labels"):
        trainer.initialize()
    other = use(datasets("2 classes")).trainer(NAME)
    other.initialize()
