"""Fixtures of these tests."""

from tests.helpers.quiet import quiet

__all__ = ["quiet"]
