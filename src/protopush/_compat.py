"""Cures of traps in other libraries, each only where the trap has shut.

torchvision is built for one torch. Beside another build of torch (the wheels of PyPI are CUDA builds, beside a CPU-only
torch) its C++ operators cannot be loaded, and ``import torchvision`` dies where it describes them:

    RuntimeError: operator torchvision::nms does not exist

timm, torchmetrics and lightning_fabric import torchvision and die with it, though neither they nor protopush ever call
these operators. After such a failure, and only then, :func:`ensure_torchvision` declares the operators that the import
missed, by name and without arguments, and imports torchvision again. All of it that is plain Python then works;
the operators themselves (``torchvision.ops.nms``) still say that they could not be loaded.

Why a cure and not an error: ``pip install protopush`` beside a CPU-only torch is the ordinary install of a laptop, and
nothing that protopush does is missing from it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch

from protopush.errors import InputError, first_line

# The declarations last as long as their Library objects.
_LIBRARIES: list[torch.library.Library] = []


@cache
def ensure_torchvision() -> None:
    """Import torchvision; where it was built for another torch, declare the operators that its import misses.

    Call it before importing timm, torchmetrics, lightning_fabric or transformers. An install that works is only
    imported; an absent torchvision is left to those who need it.

    Raises:
        InputError: torchvision does not fit torch in another way.

    Example:
        >>> ensure_torchvision()
        >>> import torchvision
    """
    _import_torchvision(frozenset())


def _import_torchvision(declared: frozenset[str]) -> None:
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        missing = re.match(r"operator torchvision::(\w+) does not exist", str(error))
        if missing is None or missing[1] in declared:
            raise InputError(
                f"torchvision {version('torchvision')} cannot be imported beside torch {torch.__version__} "
                f"({first_line(error)}); expected two of the same build; install both as "
                "https://pytorch.org/get-started says"
            ) from error
        _declare(missing[1])
        # Modules that were imported before the failure hold no reference to a whole torchvision: import them again.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _import_torchvision(declared | {missing[1]})


def _declare(operator: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"{operator}(...) -> ...")  # type: ignore[no-untyped-call]
    _LIBRARIES.append(library)


@cache
def ensure_policies() -> None:
    """Keep a bit where timm's augmentation policies would keep none.

    At its strongest level timm's posterize asks Pillow for 0 bits: a black picture up to Pillow 12, an error since 13.
    """
    ensure_torchvision()
    from timm.data import auto_augment as timm_policies

    bits_of: dict[str, Any] = timm_policies.LEVEL_TO_ARG
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        bits_of[name] = _at_least_one_bit(bits_of[name])


def _at_least_one_bit(bits_of: Callable[..., tuple[int]]) -> Callable[..., tuple[int]]:
    return lambda level, hparams: (max(1, bits_of(level, hparams)[0]),)
