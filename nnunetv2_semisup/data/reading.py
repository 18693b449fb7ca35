"""What readers of image files raise, said to people."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator

from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from nnunetv2_semisup.errors import InputError

# Of nnU-Net's readers, SimpleITK, h5py, and of what they use; Pillow raises a SyntaxError for a broken PNG, and damaged
# headers ask for more memory than there is.
READ_ERRORS = (
    RuntimeError,
    ValueError,
    AssertionError,
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    EOFError,
    SyntaxError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
    WrapStructError,
)


@contextlib.contextmanager
def read_errors(tell: Callable[[Exception], str]) -> Iterator[None]:
    """What readers raise within for a file that they cannot use becomes an InputError with the text of ``tell``."""
    try:
        yield
    except InputError:
        raise
    except READ_ERRORS as error:
        raise InputError(tell(error)) from error


def last_line(error: Exception) -> str:
    """The last line of an error's text, which is where ITK says what happened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def damaged(file: object) -> Callable[[Exception], str]:
    """For :func:`read_errors`, where nothing better can be told than that a file is damaged."""
    return lambda error: f"{file}: damaged or incomplete ({last_line(error)}); copy or download it again"
