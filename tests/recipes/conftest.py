"""Shared by the tests of this folder."""

from fresh_accelerate import fresh_accelerate  # noqa: F401
