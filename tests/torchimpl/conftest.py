"""What generates code needs a C++ compiler; where there is none, those tests say so and are skipped."""

import shutil

import pytest

COMPILERS = ("c++", "g++", "clang++", "cl")


def pytest_collection_modifyitems(items):
    if any(map(shutil.which, COMPILERS)):
        return
    for item in items:
        if "torchimpl" in item.nodeid and "compiled" in item.name:
            item.add_marker(pytest.mark.skip(reason=f"torch.compile needs one of {', '.join(COMPILERS)} on the path"))
