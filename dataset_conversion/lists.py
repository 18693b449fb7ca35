"""Which cases are labelled, unlabelled and for testing: published lists, the user's, or a seeded choice."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nnunetv2_semisup.datasets.images import packed
from nnunetv2_semisup.errors import InputError
from nnunetv2_semisup.files import listed

LISTS = Path(__file__).resolve().parent / "splits"


def read_list(path: Path) -> list[str]:
    """Read a case list: one ID per line; blank lines and lines starting with ``#`` are skipped.

    Raises:
        InputError: the file cannot be read or names a case twice.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the case list cannot be read ({error}); give a file of plain text") from error
    cases = [line for line in lines if line and not line.startswith("#")]
    twice = sorted({case for case in cases if cases.count(case) > 1})
    if twice:
        raise InputError(f"{path}: listed more than once: {', '.join(twice)}; name each case once")
    return cases


def is_number(choice: str) -> bool:
    """Whether an option gives a number of cases, not the file that names them."""
    return re.fullmatch(r"[+-]?\d+", choice) is not None


def choose_labelled(
    choice: str, train: Sequence[str], subset: int = 0, read: Callable[[Path], list[str]] = read_list
) -> list[str]:
    """The labelled cases, or patients.

    Args:
        choice: a number N (the first N of ``train``, as in the literature), "all", or a file naming cases of ``train``.
        train: IDs of all training cases, in published order.
        subset: K takes the entries K * N to K * N + N - 1, so that different K share no case; 0 without a number.
        read: reads the file.

    Returns:
        at least one ID; the rest of ``train`` is unlabelled.
    """
    if is_number(choice):
        number = int(choice)
        if not 1 <= number <= len(train):
            raise InputError(f"--labeled {choice}: the number of labelled cases must be 1 to {len(train)}")
        if not 0 <= subset < len(train) // number:
            raise InputError(
                f"--subset {subset}: {len(train)} training cases have {len(train) // number} disjoint subsets of "
                f"{number}; give 0 to {len(train) // number - 1}"
            )
        return list(train[subset * number : (subset + 1) * number])
    if subset:
        raise InputError(f"--subset {subset}: only a number of labelled cases has subsets; leave it out")
    if choice == "all":
        return list(train)
    labelled = read(Path(choice))
    if not labelled:
        raise InputError(f"--labeled {choice}: the list names no case, at least 1 is needed")
    unknown = sorted(set(labelled) - set(train))
    if unknown:
        raise InputError(f"--labeled {choice}: not in the list of training cases: {listed(unknown)}; correct it")
    return labelled


def choose_test(choice: str, cases: Sequence[str], seed: int, left: int = 1) -> tuple[list[str], list[str]]:
    """Divide the cases of a data set without published split.

    Args:
        choice: number of test cases, or a file naming them.
        cases: IDs of all cases with a label.
        seed: of the random order.
        left: number of cases that must be left for training.

    Returns:
        training cases in random order, so that the first N of them are a random choice and larger N contain smaller
        ones; test cases. Both depend on ``choice``, ``cases`` and ``seed`` only.
    """
    shuffled = sorted(cases)
    random.Random(seed).shuffle(shuffled)
    if is_number(choice):
        if not 0 <= int(choice) <= len(cases) - left:
            raise InputError(f"--test {choice}: the number of test cases must be 0 to {len(cases) - left}")
        test = shuffled[: int(choice)]
    else:
        test = read_list(Path(choice))
        unknown = sorted(set(test) - set(cases))
        if unknown:
            raise InputError(f"--test {choice}: no such cases: {', '.join(unknown)}")
    return [case for case in shuffled if case not in set(test)], sorted(test)


def require_present(source: Path, missing: Sequence[str], total: int, what: str, remedy: str) -> None:
    """Raise an InputError that names all missing cases, if any, and archives in which they may be."""
    if missing:
        raise InputError(
            f"--source {source}: {len(missing)} of {total} {what}: {', '.join(missing)}; {remedy}{packed(source)}"
        )
