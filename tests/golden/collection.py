"""Arrays of single operators as original implementations computed them, file by file.

A file is kept beside this one, or lies in the larger collection at shared/golden beside the repository, of which the
files here are copies; a test that needs one that is in neither place is skipped.
"""

from pathlib import Path

import numpy as np
import pytest

COPIES = Path(__file__).parent
WHOLE = Path(__file__).parents[3] / "shared" / "golden"


class Arrays(dict[str, np.ndarray]):
    """The arrays of one file. `left` names those that nobody has asked for."""

    def __init__(self, arrays):
        # Numbers that float32 holds exactly are kept as such.
        super().__init__({k: a.astype(np.float64) if a.dtype == np.float32 else a for k, a in arrays.items()})
        self.taken = set()

    def __getitem__(self, name):
        self.taken.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        if name not in self:
            return default
        return self[name]

    @property
    def left(self):
        return self.keys() - self.taken


def load(folder, name):
    """The arrays of one file, floating ones as float64."""
    for place in (COPIES, WHOLE):
        path = place / folder / f"{name}.npz"
        if path.exists():
            return Arrays(np.load(path))
    pytest.skip(f"{folder}/{name}.npz is not kept in tests/golden, and there is no shared/golden beside the repository")


def collected(folder):
    """The names of all files of a folder of the collection."""
    if not (WHOLE / folder).is_dir():
        pytest.skip(f"no shared/golden/{folder} beside the repository: what it holds besides the copies is not known")
    return {path.stem for path in (WHOLE / folder).glob("*.npz")}


def differing_copies(folder):
    """The copies of a folder that do not hold, name by name, the numbers of the collection's file."""
    wrong = []
    for name in sorted(collected(folder) & {path.stem for path in (COPIES / folder).glob("*.npz")}):
        copy, whole = (np.load(place / folder / f"{name}.npz") for place in (COPIES, WHOLE))
        same = set(copy.files) == set(whole.files)
        if not same or not all(np.array_equal(copy[key], whole[key]) for key in whole.files):
            wrong.append(name)
    return wrong
