"""Fixtures of the conversion tests."""

import pytest

from tests.checkpoint.samples import save_hf
from tests.data_fixtures import (
    tokenizer_files,  # noqa: F401
)
from tests.hf.folders import import_hf


@pytest.fixture
def hf_folder(tmp_path):
    save_hf(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def checkpoint(tmp_path, hf_folder):
    import_hf(hf_folder, tmp_path / "ckpt")
    return tmp_path / "ckpt"
