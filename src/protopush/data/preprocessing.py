"""What a backbone wants its images to look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from protopush.errors import InputError, listing

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes a tensor: resize to ``size``, scale to 0..1, subtract ``mean``, divide by ``std``.

    Args:
        mean: one number a channel, in units of 0..1 pixels. Default: ImageNet's.
        std: one number a channel, above 0, in units of 0..1 pixels. Default: ImageNet's.
        size: (height, width) in pixels.
        interpolation: one of ``INTERPOLATIONS``.

    Raises:
        InputError: a value outside of these.

    Example:
        >>> Preprocessing(size=(256, 320)).to_dict()["size"]
        [256, 320]
        >>> Preprocessing.from_dict({"interpolation": "bilinear"}).interpolation
        'bilinear'
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size: tuple[int, int] = (224, 224)
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                f"mean {self.mean} and std {self.std} do not fit RGB images; expected three numbers each and std "
                "above 0; give them in units of 0..1 pixels"
            )
        if len(self.size) != 2 or min(self.size) < 1:
            raise InputError(
                f"size {self.size} is no image size; expected (height, width) in pixels; give two integers"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"unknown interpolation {self.interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}; choose one"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them (lists, not tuples); :meth:`from_dict` reads them back."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "size": list(self.size),
            "interpolation": self.interpolation,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read what :meth:`to_dict` wrote; fields left out keep their defaults.

        Raises:
            InputError: a key that is no field, or a value that does not fit.
        """
        known = [field.name for field in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise InputError(
                f"unknown preprocessing keys: {listing(unknown)}; expected {', '.join(known)}; remove or correct them"
            )
        try:
            readers: dict[str, Callable[[Any], Any]] = {
                "mean": _floats,
                "std": _floats,
                "size": _whole,
                "interpolation": str,
            }
            return cls(**{key: readers[key](value) for key, value in values.items()})
        except InputError:
            raise
        except (TypeError, ValueError) as cause:
            raise InputError(
                f"preprocessing {dict(values)} cannot be read ({cause}); expected numbers in lists; correct the values"
            ) from cause


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _whole(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
