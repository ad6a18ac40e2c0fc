"""Manifests are rendered by kubectl, which has kustomize in it."""

import shutil
from pathlib import Path

import pytest

_NEEDS_KUBECTL = "test_manifests.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("kubectl"):
        return
    missing = pytest.mark.skip(reason="kubectl, which renders the manifests, is not on this machine")
    for item in items:
        if item.path == Path(__file__).with_name(_NEEDS_KUBECTL):
            item.add_marker(missing)
