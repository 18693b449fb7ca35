"""Wheel and editable installs register the trainers by themselves; ours and nnU-Net's commands find them.

The environments see the outer packages through a path line, so nothing is downloaded. ``nnUNet_extTrainer`` is removed
from the environment first: it is inherited, and a broken start-up line would pass unnoticed.
"""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CLEAN = {k: v for k, v in os.environ.items() if k not in ("nnUNet_extTrainer", "PYTHONPATH")}


def run(*arguments, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(a) for a in arguments], env=CLEAN, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def environment(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = next((folder / "env" / "lib").glob("python*")) / "site-packages"
    # z...: read after our own start-up files, as packages that merely lie there
    (site / "zzz_outer.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation", "-q"]
    if request.param == "wheel":
        built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, REPOSITORY)
        assert built.returncode == 0, built.stderr
        (target,) = folder.glob("*.whl")
    else:
        pip.append("-e")
        target = REPOSITORY
    installed = run(*pip, target)
    assert installed.returncode == 0, installed.stderr
    return python


def test_registers_itself(environment, tmp_path):
    shown = run(environment, "-c", "import os; print(os.environ['nnUNet_extTrainer'])", cwd=tmp_path)
    printed = run(environment.parent / "nnUNetv2_semisup_trainers", "--folder", cwd=tmp_path)
    assert shown.stdout == printed.stdout != ""
    assert Path(printed.stdout.strip(), "nnunetv2_semisup_trainers.py").is_file()


def test_check_and_nnunets_own_finder(environment, tmp_path):
    check = run(environment.parent / "nnUNetv2_semisup_trainers", "--check", cwd=tmp_path)
    assert check.returncode == 0 and "nnUNetTrainerMeanTeacher" in check.stdout, check.stderr
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "print(find('nnUNetTrainerMeanTeacher_7epochs'))\n"
        "find('nnUNetTrainerMeanTeachers_7epochs')\n"
    )
    found = run(environment, "-c", code, cwd=tmp_path)
    assert "nnUNetTrainerMeanTeacher_7epochs" in found.stdout
    assert "Did you mean nnUNetTrainerMeanTeacher_7epochs?" in found.stderr and found.returncode != 0


def test_another_environment_that_inherits_the_variable_is_not_disturbed(environment, tmp_path):
    """Without our package the module offers nothing, and a start-up line left behind is silent."""
    code = (
        "import sys; sys.modules['nnunetv2_semisup'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import nnunetv2_semisup_trainers as module; print([n for n in dir(module) if n.startswith('nnUNet')])"
    )
    folder = run(environment.parent / "nnUNetv2_semisup_trainers", "--folder", cwd=tmp_path).stdout.strip()
    assert run(environment, "-c", code, folder, cwd=tmp_path).stdout.strip() == "[]"
    line = (REPOSITORY / "nnunetv2_semisup" / "ext_trainers" / "nnunetv2_semisup.pth").read_text()
    left_behind = run(sys.executable, "-I", "-S", "-c", line, cwd=tmp_path)
    assert (left_behind.returncode, left_behind.stderr) == (0, "")


def test_starting_python_stays_cheap(environment, tmp_path):
    """The start-up line imports neither torch nor numpy nor nnunetv2."""
    modules = ("torch", "numpy", "nnunetv2", "nnunetv2_semisup.discovery")
    code = f"import sys; print([m for m in {modules} if m in sys.modules])"
    assert run(environment, "-c", code, cwd=tmp_path).stdout.strip() == "['nnunetv2_semisup.discovery']"
