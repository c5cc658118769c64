"""Adapters for third-party programs."""
