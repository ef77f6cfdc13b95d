"""Fixtures: a Hub on this machine."""

from hub_fixtures import base, demo_hf, hub, run  # noqa: F401
