"""Fixtures of the conversion tests."""

from tests.data_fixtures import (
    tokenizer_files,  # noqa: F401
)
