"""The console scripts: arguments only. Wrong input is answered with one line and exit code 2."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
from pathlib import Path

from nnunetv2_semisup import files
from nnunetv2_semisup.errors import InputError


def command(function):
    """Turn an InputError, or a file that cannot be read or written, into one line on stderr and exit code 2."""

    @functools.wraps(function)
    def run(arguments: list[str] | None = None) -> int:
        try:
            return function(arguments) or 0
        except (InputError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run


@command
def trainers(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_semisup_trainers",
        description="The semi-supervised trainers and their settings. --folder is for places where Python's start-up "
        "lines do not run (pip install --target, locked-down sites): "
        "export nnUNet_extTrainer=$(nnUNetv2_semisup_trainers --folder)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="all trainers: cost, memory, when to use them")
    mode.add_argument("--settings", metavar="TRAINER", help="its settings: default, range, unit, source")
    mode.add_argument("--folder", action="store_true", help="the folder that nnU-Net has to know")
    mode.add_argument("--check", action="store_true", help="resolve every trainer through nnU-Net's own finder")
    parser.add_argument("-d", metavar="ID", help="with --settings: show what the plans of this data set say, too")
    parser.add_argument("-p", metavar="PLANS", help="plans of -d (default: nnUNetPlans)")
    args = parser.parse_args(arguments)
    if (args.d or args.p) and not (args.d and args.settings):
        raise InputError("-d ID and -p PLANS belong to --settings TRAINER, and -p needs -d")
    from nnunetv2_semisup import discovery

    width = min(shutil.get_terminal_size().columns, 120)
    if args.folder:
        print(discovery.ext_trainers_folder())
    elif args.check:
        found = discovery.check()
        for name, file in found.items():
            print(f"{name}  {file}")
        print(f"nnU-Net finds all {len(found)} trainers.")
    elif args.list:
        print(discovery.overview(width))
    elif args.settings:
        plans_name = (args.p or "nnUNetPlans").removesuffix(".json")
        plans_file = None if args.d is None else files.find_preprocessed(args.d) / f"{plans_name}.json"
        print(discovery.settings_overview(args.settings, plans_file, width))
    else:
        parser.print_help()


@command
def plans(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_semisup_plans",
        description="Derive a plans file: settings of a semi-supervised trainer, or 2d and 3d_fullres in another size. "
        "Then: nnUNetv2_train ... -p NAME, where the spacing has changed after nnUNetv2_preprocess -plans_name NAME.",
    )
    _dataset_argument(parser)
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans to start from (default: %(default)s)")
    parser.add_argument("-o", required=True, metavar="NAME", help="name of the new plans")
    parser.add_argument(
        "--preset",
        metavar="cpu|small",
        help="small: features 8 16 32 64 and batch 2 (3d) or 12 (2d); cpu: these features, batch 2 or 8, 3 times "
        "the spacing and a small patch, for 2 cores. The following options beat it",
    )
    add = parser.add_argument
    add("--features", type=int, nargs="*", metavar="N", help="channels of each stage, the last one repeats")
    add("--batch_size", type=int, metavar="N", help="labelled patches per step")
    add("--patch_size", type=int, nargs="*", metavar="N", help="voxels, 2 or 3 axes ordered as in the plans")
    add("--coarsen", type=float, metavar="F", help="spacing F times coarser on the axes within 2 times the finest")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="TRAINER.KEY=VALUE",
        help="settings, e.g. nnUNetTrainerCrossMatch.conf_tau=0.9. Settings that plans of the new name have already "
        "are kept",
    )
    add("--unset", action="extend", nargs="+", default=[], metavar="TRAINER.KEY", help="remove settings")
    args = parser.parse_args(arguments)
    from nnunetv2_semisup import plans as plans_module

    folder = files.find_preprocessed(args.d)
    batch_size = None if args.batch_size is None else {2: args.batch_size, 3: args.batch_size}
    size = plans_module.Size(args.features, batch_size, args.patch_size, args.coarsen)
    before = plans_module.settings_in(folder, args.p, args.o)
    file = plans_module.derive(folder, args.p, args.o, args.preset, args.set, size, args.unset)
    changes = plans_module.changed_settings(before, plans_module.settings_in(folder, args.p, args.o))
    number = files.dataset_id(folder.name)
    print("\n".join([f"Wrote {file}", *(f"  {change}" for change in changes)]))
    _write_missing_splits(folder)
    new = files.read_object(file, "derive the plans again", "configurations")
    coarser = (size.with_preset(args.preset).coarsen or 1) > 1
    if coarser and (warning := plans_module.small_images(new)):
        print(warning)
    ready = [] if coarser else plans_module.preprocessed_configurations(folder, new)
    first, *others = ready or sorted(new["configurations"], key="3d_fullres".__ne__)  # stable: that one first
    choice = f" (or {', '.join(others)})" if others else ""
    train = f"nnUNetv2_train {number} {first} FOLD -p {new['plans_name']} -tr TRAINER"
    if ready:
        also = f", or with {', '.join(others)}" if others else ""
        print(f"Next: {train}{also}: the data is preprocessed already")
    else:
        print(f"Next: nnUNetv2_preprocess -d {number} -plans_name {new['plans_name']} -c {first}{choice}, then {train}")


@command
def preprocess(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_semisup_preprocess",
        description="Preprocess the images of imagesUn with plans made from the labelled cases. Only what is missing "
        "or stale is done. Training does this by itself on one GPU; with several GPUs run it first.",
    )
    _dataset_argument(parser)
    parser.add_argument("-c", nargs="+", default=["3d_fullres"], metavar="CONFIGURATION", help="default: 3d_fullres")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans (default: %(default)s)")
    parser.add_argument("-np", type=int, default=None, metavar="N", help="processes (default: nnUNet_def_n_proc or 8)")
    args = parser.parse_args(arguments)
    if args.np is not None and args.np < 1:
        raise InputError(f"-np {args.np}: at least one process is needed")
    folder = files.find_preprocessed(args.d)
    from nnunetv2.configuration import default_num_processes

    from nnunetv2_semisup.data import preprocess as preprocess_module

    for configuration in args.c:
        cases = preprocess_module.preprocess_unlabeled(
            folder.name, args.p, configuration, args.np or default_num_processes
        )
        print(f"{configuration}: {len(cases)} unlabelled cases are ready")
    _write_missing_splits(folder)


@command
def hide_labels(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_semisup_hide_labels",
        description="Make a semi-supervised dataset from a labelled one in nnUNet_raw: some cases keep their labels, "
        "the rest go to imagesUn. Files are linked where the file system allows; hidden_labels.json tells the choice.",
    )
    _dataset_argument(parser)
    parser.add_argument("-o", type=int, required=True, metavar="ID", help="id of the new dataset, not in use yet")
    parser.add_argument(
        "--labeled",
        required=True,
        metavar="N|FILE",
        help="number of patients that keep their labels, or a file with one case or patient per line",
    )
    parser.add_argument("--name", default=None, help="DatasetXXX_NAME (default: the name of the labelled dataset)")
    parser.add_argument(
        "--patient_pattern",
        default=None,
        metavar="REGEX",
        help="what in a case's name is the patient, e.g. 'patient[0-9]+' (default: as dataset.json says, else every "
        "case is a patient)",
    )
    parser.add_argument("--stratified", action="store_true", help="spread the choice over small and large foregrounds")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice (default: %(default)s)")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="check and report, write nothing")
    parser.add_argument("-np", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    args = parser.parse_args(arguments)
    from nnunetv2_semisup.datasets import hide_labels as hide_labels_module

    choice = (args.labeled, args.name, args.patient_pattern, args.stratified, args.seed)
    print(hide_labels_module.hide_labels(args.d, args.o, *choice, args.dry_run, args.np))


@command
def add_unlabeled(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_semisup_add_unlabeled",
        description="Bring NIfTI, NRRD, MetaImage files or DICOM series into imagesUn of a dataset: checks channels, "
        "spacing and orientation against the labelled images, leaves out images that are there already and test "
        "images, and names all images that cannot serve.",
    )
    _dataset_argument(parser)
    parser.add_argument("folder", metavar="FOLDER", help="images, in any depth")
    parser.add_argument("--reorient", action="store_true", help="turn axes to those of the labelled images (lossless)")
    parser.add_argument(
        "--allow_test_images",
        action="store_true",
        help="bring in images of imagesTs and imagesVal, too; your test result will be too good: training sees the "
        "test images (default: they are left out)",
    )
    parser.add_argument(
        "--skip_refused",
        action="store_true",
        help="leave out images that cannot serve, e.g. damaged ones, and bring in the others (default: bring in none)",
    )
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="check only")
    parser.add_argument(
        "--previews",
        type=int,
        default=0,
        metavar="N",
        help="pictures of N new cases in previews_unlabeled/ (default: 0)",
    )
    parser.add_argument("-np", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    args = parser.parse_args(arguments)
    from nnunetv2_semisup.datasets import add_unlabeled as add_unlabeled_module

    options = (args.reorient, args.dry_run, args.previews, args.np, args.allow_test_images, args.skip_refused)
    print(add_unlabeled_module.add_unlabeled(args.d, Path(args.folder), *options))


@command
def selftrain(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_semisup_selftrain",
        description="Self-training with stock nnU-Net: train on the labelled cases, predict imagesUn, make a new data "
        "set with the predictions as labels, train again. The same command goes on where it was interrupted.",
    )
    _dataset_argument(parser)
    parser.add_argument(
        "-o", type=int, required=True, metavar="ID", help="id of the first round's data set; later rounds: ID+1, ..."
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of pseudo-labelling (default: %(default)s)")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    parser.add_argument("-f", nargs="+", default=["all"], metavar="FOLD", help="all, or numbers (default: all)")
    parser.add_argument("-tr", default="nnUNetTrainer", metavar="TRAINER", help="stock trainer (default: %(default)s)")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans (default: %(default)s)")
    parser.add_argument(
        "--drop",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the unlabelled cases to leave out, those whose predictions by different folds differ most; with "
        "one fold or all: by different rounds, from round 2 on (default: %(default)s)",
    )
    parser.add_argument(
        "--min_confidence",
        type=float,
        metavar="P",
        help="voxels of less confidence get the ignore label (default: none)",
    )
    parser.add_argument("-device", choices=["cuda", "cpu", "mps"], default="cuda", help="default: %(default)s")
    parser.add_argument("-np", type=int, default=None, metavar="N", help="processes (default: nnUNet_def_n_proc or 8)")
    args = parser.parse_args(arguments)
    if args.np is not None and args.np < 1:
        raise InputError(f"-np {args.np}: at least one process is needed")
    from nnunetv2.configuration import default_num_processes

    from nnunetv2_semisup.selftrain import run as selftrain_module

    rounds = (args.d, args.o, args.rounds)
    options = selftrain_module.Options(*rounds, args.c, tuple(args.f), args.tr, args.p, args.drop, args.min_confidence)
    print(selftrain_module.self_train(options, args.device, args.np or default_num_processes))


@command
def export(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_semisup_export",
        description="A trained model as a zip file or folder that plain nnU-Net installs and predicts with, without "
        "this package.",
    )
    _dataset_argument(parser)
    parser.add_argument("-tr", required=True, metavar="TRAINER", help="as it was trained, with its number of epochs")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans (default: %(default)s)")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    parser.add_argument("-f", nargs="+", default=["all"], metavar="FOLD", help="all, or numbers (default: all)")
    parser.add_argument(
        "-o", required=True, type=Path, metavar="OUTPUT", help="a name that ends with .zip, or a folder"
    )
    parser.add_argument(
        "--weights",
        choices=["as_trained", "student", "teacher"],
        default="as_trained",
        help="default: those that the training itself predicts with",
    )
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", metavar="NAME", help="checkpoint (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    from nnunetv2_semisup import export as export_module

    print(export_module.export(args.d, args.tr, args.p, args.c, args.f, args.o, args.weights, args.chk))


@command
def evaluate(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_semisup_evaluate",
        usage="%(prog)s -ref FOLDER -pred FOLDER -djfile FILE -o FOLDER [-np N] [--largest_component]\n"
        "       %(prog)s --compare BASELINE OTHER [OTHER ...]",
        description="Compare a folder of predictions with a folder of references: Dice, Jaccard, 95% Hausdorff and "
        "average surface distance per case and label, in voxels as published tables have them and in mm. Writes "
        "cases.csv and summary.json and prints a table. With --compare: two or more such evaluations, case by case.",
    )
    needed = [
        parser.add_argument("-ref", metavar="FOLDER", help="label files, e.g. labelsTs"),
        parser.add_argument("-pred", metavar="FOLDER", help="predictions, named as the label files"),
        parser.add_argument("-djfile", metavar="FILE", help="dataset.json: labels, regions, ignore label"),
        parser.add_argument("-o", metavar="FOLDER", help="where cases.csv and summary.json go"),
    ]
    parser.add_argument("-np", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument(
        "--largest_component",
        action="store_true",
        help="a second set of rows: only the largest component of each predicted label",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar=("BASELINE", "OTHER"),
        help="folders that -o wrote for the same cases: Dice, its difference to the first folder with a 95%% interval, "
        "and in how many cases it is better. Goes alone",
    )
    args = parser.parse_args(arguments)
    given = [a.option_strings[0] for a in needed if getattr(args, a.dest) is not None]
    if args.compare is not None:
        if given or args.largest_component:
            raise InputError(f"--compare reads what was evaluated: leave {(given or ['--largest_component'])[0]} out")
        from nnunetv2_semisup.evaluation import comparison

        print(comparison.compare_folders(args.compare))
        return
    if missing := [a.option_strings[0] for a in needed if a.option_strings[0] not in given]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    from nnunetv2_semisup.evaluation import folder as folder_module
    from nnunetv2_semisup.evaluation import summary

    cases, statistics = Path(args.o) / "cases.csv", Path(args.o) / "summary.json"
    wrote = "Replaced the earlier" if cases.exists() else "Wrote"
    rows = folder_module.evaluate_folder(
        Path(args.ref), Path(args.pred), Path(args.djfile), Path(args.o), args.np, args.largest_component
    )
    print(summary.table(summary.summarize(rows)))
    print(f"{wrote} {cases} and {statistics}")


@command
def demo(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_semisup_demo",
        description="The whole way: plan, preprocess, train stock nnU-Net and one of our trainers, predict, compare. "
        "On data it makes itself, 8 minutes on 2 idle CPU cores with the installation and more on busy ones, or on a "
        "task of the Medical Segmentation Decathlon. "
        "Uses a GPU when there is one.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="a task as it is downloaded, e.g. Task04_Hippocampus: 4 cases keep their labels, a quarter, 60 at most, "
        "are for testing, the rest is unlabelled (default: data that the demo makes)",
    )
    parser.add_argument("-o", default="nnunetv2_semisup_demo", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("-tr", default="nnUNetTrainerPasteMatch", metavar="TRAINER", help="default: %(default)s")
    parser.add_argument(
        "--epochs", type=int, default=None, metavar="N", help="length of both trainings (default: 5; 20 with --data)"
    )
    parser.add_argument("-device", choices=["cuda", "cpu", "mps"], default=None, help="default: a GPU if there is one")
    args = parser.parse_args(arguments)
    if args.epochs is not None and args.epochs < 1:
        raise InputError(f"--epochs {args.epochs}: at least one epoch is needed")
    from nnunetv2_semisup.demo import run as demo_module

    demo_module.run(Path(args.o), args.tr, args.epochs, args.device, args.data)


@command
def benchmark(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_semisup_benchmark",
        description="Train, predict imagesTs and evaluate a grid of runs, from a YAML file or from -d, -tr, --epochs. "
        "The same command again goes on where it was stopped; started twice, it shares the work.",
    )
    parser.add_argument(
        "grid", nargs="?", type=Path, metavar="GRID.yaml", help="a list of blocks, see docs/benchmark.md"
    )
    parser.add_argument("-d", nargs="+", metavar="ID", help="data sets, one per labelled budget")
    parser.add_argument("-tr", nargs="+", metavar="TRAINER", help="trainers without epoch suffix")
    parser.add_argument("--epochs", nargs="+", type=int, metavar="N", help="length of all trainings")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    parser.add_argument("-c", nargs="+", default=["3d_fullres"], metavar="CONFIGURATION", help="default: 3d_fullres")
    parser.add_argument("-p", nargs="+", default=["nnUNetPlans"], metavar="PLANS", help="default: nnUNetPlans")
    parser.add_argument("-f", nargs="+", default=["all"], metavar="FOLD", help="default: all")
    parser.add_argument(
        "--inference", nargs="+", default=["nnunet"], metavar="KIND", help="nnunet, literature, or both"
    )
    parser.add_argument("-o", type=Path, metavar="WORK", help="work folder (default: benchmark, beside nnUNet_results)")
    parser.add_argument("-device", choices=["cuda", "cpu", "mps"], default="cuda", help="default: %(default)s")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a training (default: all cores)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="tables and pictures (default: WORK/results)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print the runs and an estimate of the time")
    mode.add_argument("--report", action="store_true", help="make tables and pictures, run nothing")
    mode.add_argument("--speed", action="store_true", help="step time and memory of every trainer over the stock step")
    mode.add_argument(
        "--counted", action="store_true", help="the same, counted for the plans: needs no GPU and no data"
    )
    mode.add_argument(
        "--slurm", nargs="*", metavar="KEY=VALUE", help="submit the runs, e.g. slurm_partition=gpu timeout_min=600"
    )
    args = parser.parse_args(arguments)
    from nnunetv2_semisup.benchmark import command as benchmark_command

    return benchmark_command.run(args)


def _dataset_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, metavar="ID", help="dataset id or name, e.g. 508 or Dataset508_LA")


def _write_missing_splits(folder: Path) -> None:
    """Folds for fewer than 5 labelled cases, where stock nnU-Net cannot make any (our trainers do it themselves)."""
    from nnunetv2_semisup.data import folders, splits

    raw = Path(os.environ.get("nnUNet_raw", ""), folder.name)
    if (raw / "imagesTr").is_dir():
        dataset_json = files.read_object(folder / "dataset.json", "run nnUNetv2_plan_and_preprocess again")
        written = splits.ensure_splits(folder, folders.labelled_identifiers(raw, dataset_json))
        if written:
            print(f"Fewer than 5 labelled cases: wrote leave-one-out folds to {written}")
