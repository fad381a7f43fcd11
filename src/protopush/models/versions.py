"""Versions of the libraries that a run depends on: recorded when it is saved, named where it can't be reopened."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from protopush import __version__

# What builds the model and names its weights, and what decodes and resizes the images.
PACKAGES = ("torch", "timm", "transformers", "pillow")


def current_versions() -> dict[str, str]:
    """Version of protopush and of each of :data:`PACKAGES` that is installed.

    Example:
        >>> list(current_versions())[:2]
        ['protopush', 'torch']
    """
    found = {"protopush": __version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def recorded_versions(config: Mapping[str, Any]) -> dict[str, str]:
    """Versions that a run's ``config.json`` names; of runs from before versions were recorded, protopush's alone.

    Example:
        >>> recorded_versions({"protopush": "0.1.0"})
        {'protopush': '0.1.0'}
    """
    return dict(config.get("versions") or {"protopush": str(config.get("protopush", "of unknown version"))})


def version_change(recorded: Mapping[str, str]) -> str:
    """What differs between the versions that saved something and those that read it; empty where nothing does.

    Args:
        recorded: package to version.

    Example:
        >>> version_change(current_versions())
        ''
        >>> version_change({"timm": "0.0.1"})  # doctest: +ELLIPSIS
        'saved with timm 0.0.1, read with timm ...; pip install timm==0.0.1 reads it as it was saved'
    """
    here = current_versions()
    other = {name: saved for name, saved in recorded.items() if _release(here.get(name, "")) != _release(saved)}
    if not other:
        return ""
    saved = ", ".join(f"{name} {release}" for name, release in other.items())
    read = ", ".join(f"{name} {here[name]}" if name in here else f"no {name}" for name in other)
    pins = " ".join(f"{name}=={_release(release)}" for name, release in other.items())
    return f"saved with {saved}, read with {read}; pip install {pins} reads it as it was saved"


def _release(version: str) -> str:
    """A version without the name of its build: 2.13.0+cpu is 2.13.0, and only that can be installed by its name."""
    return version.partition("+")[0]
