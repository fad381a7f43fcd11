"""Data sets that come as one file or package: MedMNIST's arrays, taken out once as PNG files, and elpv-dataset."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from protopush.data.files import default_cache_dir
from protopush.data.manifest import SPLITS, Catalog, Sample, numbering
from protopush.errors import InputError, listing

logger = logging.getLogger("protopush.data")

AT_ONCE = 512  # images in memory: MedMNIST+ has files of many gigabytes

BLOCK = 60
# Every fifth block, counted from the second: validation; from the third: test. Both hold cells of both crystals, sound
# and defective modules: nine blocks each.
FOLDS = {1: "val", 2: "test"}

_ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right",
    "pancreas", "spleen",
)  # fmt: skip

# The published class names of the 2D data sets with one label an image (medmnist.INFO).
CLASSES: dict[str, tuple[str, ...]] = {
    "pathmnist": (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
        "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
    ),
    "dermamnist": (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
        "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions",
    ),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "breastmnist": ("malignant", "normal, benign"),
    "bloodmnist": (
        "basophil", "eosinophil", "erythroblast",
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte", "neutrophil",
        "platelet",
    ),
    "tissuemnist": (
        "Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
        "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments", "Thick Ascending Limb",
    ),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}  # fmt: skip


def medmnist(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """A 2D data set of MedMNIST (Yang et al., Sci. Data 10:41, 2023) of any size: ``dermamnist_224.npz``.

    The file holds ``{train,val,test}_images``, uint8 (N, H, W) or (N, H, W, 3), and ``..._labels``, (N, 1). Prototypes
    stand for files, so the images are taken out once, as PNG files in a folder named after the file and its content:
    beside it where that can be written, else in the cache. Class names are the published ones where the file's name is,
    otherwise the numbers.

    Raises:
        InputError: no such file or no .npz, 3D, several labels an image, or the PNG files can't be written.
    """
    file = Path(path)
    if not path or not file.is_file():
        raise InputError(f"no such file: {file if path else '(none given)'}; expected a MedMNIST .npz")
    labels, key = _labels_and_key(file)
    published = CLASSES.get(re.sub(r"(_[ce])?(_\d+)?$", "", file.stem.lower(), count=1), ())
    highest = max(int(values.max(initial=0)) for values in labels.values())
    own = published if highest < len(published) else tuple(str(number) for number in range(highest + 1))
    number = numbering(own, own if classes is None else classes, file)
    root = _extracted(file, key, {split: len(values) for split, values in labels.items()})
    samples = []
    for split, values in labels.items():
        for index, label in enumerate(values.tolist()):
            name = f"{split}/{index:06d}.png"
            samples.append(Sample(root / name, name, number[own[label]], split))
    return Catalog(tuple(samples), tuple(number), root)


def _labels_and_key(file: Path) -> tuple[dict[str, NDArray[Any]], str]:
    """The labels (N,) of each split, and a key of the file's content."""
    try:
        with zipfile.ZipFile(file) as archive:
            # The zip's directory has a checksum of each array: many gigabytes needn't be read to know them again.
            content = sorted((entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist())
        names = {name for name, _, _ in content}
        found = [split for split in SPLITS if {f"{split}_images.npy", f"{split}_labels.npy"} <= names]
        with np.load(file, allow_pickle=False) as arrays:
            labels = {split: arrays[f"{split}_labels"] for split in found}
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise InputError(f"not a whole .npz file: {file} ({error}); fetch it again") from error
    if "train" not in found:
        raise InputError(f"{file} has no train_images and train_labels; it has: {listing(sorted(names))}")
    for split, values in labels.items():
        if values.size != len(values):
            raise InputError(
                f"{file}: {split}_labels has shape {values.shape}, several labels an image; expected (N, 1)"
            )
    labels = {split: values.flatten().astype(np.int64) for split, values in labels.items()}
    return labels, hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def _extracted(file: Path, key: str, counts: dict[str, int]) -> Path:
    """The folder with the PNG files; made where it isn't there, and only whole ones have this name."""
    name = f"{file.stem}-{key}"
    places = [file.parent.absolute(), default_cache_dir() / "medmnist"]
    for place in places:
        if (place / name).is_dir():
            return place / name
    place = places[0] if os.access(places[0], os.W_OK) else places[1]
    logger.info("taking %d images out of %s, once, into %s", sum(counts.values()), file, place / name)
    stage = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=place))
        stage.chmod(0o755)  # mkdtemp's folders are for one user alone
        for split, count in counts.items():
            _extract(file, split, count, stage / split)
        if not (place / name).is_dir():  # another process may have been faster
            stage.rename(place / name)
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        if not (place / name).is_dir():
            raise InputError(f"cannot take the images of {file} out into {place} ({error}); make room") from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
    return place / name


def _extract(file: Path, split: str, count: int, folder: Path) -> None:
    """Write a split's images as PNG files, a few hundred in memory at a time."""

    def save(item: tuple[int, NDArray[Any]]) -> None:
        Image.fromarray(item[1]).save(folder / f"{item[0]:06d}.png", compress_level=1)

    folder.mkdir()
    pictures = enumerate(_pictures(file, split, count))
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(pictures, AT_ONCE)):
            list(pool.map(save, batch))


def _pictures(file: Path, split: str, count: int) -> Iterator[NDArray[Any]]:
    """The ``count`` images one after the other, without the array as a whole; arrays of another kind are refused."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{split}_images.npy") as stream:
        version = npy.read_magic(stream)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, kind = read_header(stream)
        if len(shape) != 3 and not (len(shape) == 4 and shape[3] == 3):
            what = "3D pictures" if len(shape) > 3 else "no pictures"
            raise InputError(f"{file}: {split}_images has shape {shape}, {what}; expected (N, H, W) or (N, H, W, 3)")
        if kind != np.uint8 or by_columns:
            order = " in Fortran order" if by_columns else ""
            raise InputError(f"{file}: {split}_images has type {kind}{order}; expected uint8 in C order")
        if shape[0] != count:
            raise InputError(f"{file}: {shape[0]} {split}_images but {count} {split}_labels")
        for _ in range(count):
            data = stream.read(math.prod(shape[1:]))
            if len(data) < math.prod(shape[1:]):
                raise EOFError("the array ends too early")
            yield np.frombuffer(data, dtype=np.uint8).reshape(shape[1:])


def elpv(path: str = "", classes: Sequence[str] | None = None) -> Catalog:
    """Solar cells in electroluminescence (Buerhop-Lutz et al. 2018): functional against defective, of both crystals.

    Only the sure labels are taken (defect probability 0 or 1). The files are ordered by solar module, so cells are
    held out in contiguous blocks of 60: never at random, which would put one module in two splits.

    Raises:
        InputError: neither a path nor the package ``elpv-dataset`` is there.
    """
    root = Path(path)
    if not path:
        spec = find_spec("elpv_dataset")
        if spec is None or spec.origin is None:
            raise InputError(
                "the package elpv-dataset is not installed; pip install 'protopush[demo]', or give --data.path"
            )
        root = Path(spec.origin).parent / "data"
    table = root / "labels.csv"
    if not table.is_file():
        raise InputError(f"no such file: {table}; expected the elpv data folder (pip install 'protopush[demo]')")
    names = tuple(classes) if classes is not None else ("functional", "defective")
    rows = [line.split() for line in table.read_text().splitlines()]
    samples = tuple(
        Sample(root / name, name, int(float(defect)), FOLDS.get(index // BLOCK % 5, "train"), f"block {index // BLOCK}")
        for index, (name, defect, _) in enumerate(rows)
        if float(defect) in (0.0, 1.0)
    )
    return Catalog(samples, names, root)
