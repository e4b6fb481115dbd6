"""images: a folder of image files as a data set."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps  # comes with matplotlib

from deepprob.data.bundled import stratified
from deepprob.data.datasets import DataSet
from deepprob.data.parsers import Parts, image_split
from deepprob.data.paths import existing
from deepprob.data.split import Split
from deepprob.errors import StorageError, counted, shown, unknown, whole

MOST_BYTES = 1 << 30  # of the images as floats
_PARTS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val"),
    "test": ("test", "testing"),
}
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def images(
    folder: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    color: bool | None = None,
    seed: int = 0,
) -> DataSet:
    """Read a folder of image files as a data set of floats in [0, 1].

    Files come in the order of their paths. Sub-folders are classes, numbered in the order of their names, unless they
    are named ``train``, ``valid`` and ``test``: these are the parts. Otherwise the rows are split at random, 60, 20 and
    20 % of each class. Hidden files and files of other types are skipped with a warning that counts them. Photographs
    are turned upright as their metadata say, and transparent pixels are white.

    Args:
        folder: The folder.
        size: Height and width to which images are scaled and cropped around their center, or one number for both; None
            if all images have one size.
        color: Whether images have three channels; by default if any of them is colored.
        seed: Random seed of the parts.

    Returns:
        Images of shape ``(H, W)``, or ``(3, H, W)`` in color, and ``labels`` if there are two classes or more. The
        extras have ``class_names``, and the paths of the files in each part as ``train_files``, ``valid_files`` and
        ``test_files``.

    Raises:
        FileNotFoundError: If there is no such folder, or a part is missing.
        ValueError: If there are too few images, they differ in size, or they take more than 1 GiB as floats.
        StorageError: If an image is damaged.

    Examples:
        Sub-folders are classes, and images keep their pixels:

        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for value, kind in enumerate(("dark", "light")):
        ...     (folder / kind).mkdir()
        ...     for i in range(5):
        ...         Image.new("L", (4, 3), 255 * value).save(folder / kind / f"{i}.png")
        >>> data = images(folder)
        >>> data.train, data.extras["class_names"]
        (Split(6 rows: images (3, 4) float32, labels () int64), ['dark', 'light'])
        >>> bool((data.test["images"].mean((1, 2)) == data.test["labels"]).all())
        True
    """
    path = existing(folder, folder=True)
    here = {part.name.lower(): part for part in path.iterdir() if part.is_dir()}
    given = {part: here[name] for part, names in _PARTS.items() for name in names if name in here}
    if given.keys() >= {"train"} and here.keys() == {folder.name.lower() for folder in given.values()}:
        return _in_parts(path, given, size, color)
    rows, names, files = read_images(path, size=size, color=color)
    classes = rows["labels"].numpy() if "labels" in rows else np.zeros(len(rows))
    parts = stratified(classes, whole("seed", seed, least=0))
    if not all(map(len, parts)):
        raise ValueError(
            f"{path} has {counted(len(rows), 'image')}, too few for train, valid and test parts. Give at least 5."
        )
    extras: dict[str, Any] = {"class_names": names} if names else {}
    for part, index in zip(_PARTS, parts, strict=True):
        extras[f"{part}_files"] = [files[i] for i in index]
    train, valid, test = map(rows.rows, parts)
    return _data_set(path, Parts(train, valid, test, extras), at_random(path, seed))


def at_random(path: Path, seed: int) -> str:
    """The origin of rows that are split at random.

    Args:
        path: The file or folder.
        seed: Random seed of the parts.
    """
    return f"{path}, split at random (seed {seed})"


def _in_parts(path: Path, given: dict[str, Path], size: Any, color: bool | None) -> DataSet:
    """The data set of a folder with one sub-folder for each part."""
    if "test" not in given:
        raise FileNotFoundError(
            f"{path} has a folder {given['train'].name!r} but no folder 'test'. Add one, or pass the folder "
            f"{given['train']}, whose rows are split at random."
        )
    classes = sorted({name for part in given.values() for name in _classes(part)})
    if color is None:
        color = any(_is_colored(file) for part in given.values() for file in _listed(part)[0])
    parts, extras = {}, {"class_names": classes} if len(classes) > 1 else {}
    for part, place in given.items():
        parts[part], _, extras[f"{part}_files"] = read_images(place, size=size, color=color, classes=classes)
    sizes = {part: tuple(rows.shape) for part, rows in parts.items()}
    if len({*sizes.values()}) > 1:
        raise ValueError(f"the parts of {path} differ in the size of their images: {sizes}. Give one size: size=32")
    found = Parts(parts["train"], parts.get("valid"), parts["test"], extras)
    return _data_set(path, found, f"{path}, in the parts of its folders")


def _data_set(path: Path, parts: Parts, origin: str) -> DataSet:
    classes = parts.extras.get("class_names")
    return DataSet(path.resolve().name, "images", parts, len(classes) if classes else None, origin=origin)


def read_images(
    folder: Path,
    *,
    size: int | tuple[int, int] | None = None,
    color: bool | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Split, list[str], list[str]]:
    """All images of a folder as rows.

    Args:
        folder: The folder.
        size: See `images`.
        color: See `images`.
        classes: Names of the classes; None for those of the sub-folders.

    Returns:
        The rows, the names of the classes (none if there are fewer than two), and the path of every file.

    Raises:
        ValueError: See `images`.
        StorageError: If an image is damaged.
    """
    files, skipped = _listed(folder)
    if not files:
        raise ValueError(f"{folder} has no images{skipped and f'; {skipped}'}. Give a folder of PNG or JPEG files.")
    if skipped:
        warnings.warn(f"{folder}: {skipped}.", stacklevel=3)
    names = list(_classes(folder) if classes is None else classes)
    plan = _plan(folder, files, size, color)
    pixels = np.empty((len(files), *plan.shape), np.float32)
    for row, file in zip(pixels, files, strict=True):
        row[...] = plan.read(folder, file)
    data = torch.from_numpy(pixels)
    found = [str(file.relative_to(folder)) for file in files]
    if len(names) < 2:
        return Split({"images": data}), [], found
    owners = [file.relative_to(folder).parts[:-1] for file in files]
    loose = next((i for i, parents in enumerate(owners) if not parents), None)
    if loose is not None:
        raise ValueError(
            f"{folder} has images in sub-folders, which are classes, and others without a class, such as "
            f"{found[loose]!r}. Move them into a sub-folder, or all images into one folder."
        )
    for parent in sorted({parents[0] for parents in owners} - {*names}):
        raise unknown(f"class in {folder}", parent, names)
    numbers = np.array([names.index(parents[0]) for parents in owners])
    return image_split(data, numbers), names, found


def _classes(folder: Path) -> list[str]:
    """The sub-folders that hold images."""
    return sorted({file.relative_to(folder).parts[0] for file in _listed(folder)[0] if file.parent != folder})


def _listed(folder: Path) -> tuple[list[Path], str]:
    """The image files below a folder in the order of their paths, and a sentence on the files that were skipped."""
    known = Image.registered_extensions()
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hidden = [p for p in found if any(part.startswith((".", "__")) for part in p.relative_to(folder).parts)]
    others = [p for p in found if p not in {*hidden} and p.suffix.lower() not in known]
    kinds = [
        *([counted(len(hidden), "hidden file")] if hidden else []),
        *([f"{counted(len(others), 'file')} of other types, such as {others[0].name!r}"] if others else []),
    ]
    out = {*hidden, *others}
    return [path for path in found if path not in out], f"skipped {' and '.join(kinds)}" if kinds else ""


@dataclass(frozen=True)
class _Plan:
    """How images are read: to one shape, in grey or in color."""

    shape: tuple[int, ...]
    resize: bool

    def read(self, folder: Path, file: Path) -> np.ndarray:
        """The pixels of a file in [0, 1], in this shape."""
        try:
            with Image.open(file) as raw:
                image = _upright(raw, color=len(self.shape) == 3)
        except _DAMAGE as error:
            raise _damaged(folder, file, error) from error
        height, width = self.shape[-2:]
        if self.resize and image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(image, np.float32)
        if image.mode != "F":
            pixels = pixels / np.float32(255)
        pixels = pixels.clip(0, 1)
        return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels


def _plan(folder: Path, files: Sequence[Path], size: Any, color: bool | None) -> _Plan:
    """The shape of all images; read from their headers, so that an error comes before the pixels are read."""
    sizes = [_header(folder, file) for file in files]
    if color is None:
        color = any(colored for _, colored in sizes)
    if size is None:
        first, _ = sizes[0]
        for file, (other, _) in zip(files, sizes, strict=True):
            if other != first:
                raise ValueError(
                    f"images in {folder} differ in size: {files[0].relative_to(folder)} has {first[0]} x {first[1]} "
                    f"pixels, {file.relative_to(folder)} has {other[0]} x {other[1]} (height x width). Scale and crop "
                    f"them to one size: size={min(*first, *other)} (in the command: --size {min(*first, *other)})"
                )
        chosen = first
    else:
        chosen = _size(size)
    shape = ((3,) if color else ()) + chosen
    total = 4 * len(files) * int(np.prod(shape))
    if total > MOST_BYTES:
        raise ValueError(
            f"{folder} has {counted(len(files), 'image')} of {' x '.join(map(str, shape))} numbers, {total / 2**30:.1f}"
            " GiB as floats, more than 1 GiB. Give a smaller size=, or fit a torch DataLoader that reads the files."
        )
    return _Plan(shape, resize=size is not None)


def _size(size: Any) -> tuple[int, int]:
    if isinstance(size, tuple | list) and len(size) != 2:
        raise ValueError(f"size must be one number, or height and width; got {shown(size)}. For example: size=(28, 28)")
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return whole("size", height), whole("size", width)


def _header(folder: Path, file: Path) -> tuple[tuple[int, int], bool]:
    """Height, width and whether an image is colored."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # turned by 90 degrees
                width, height = height, width
            return (height, width), _colored(image)
    except _DAMAGE as error:
        raise _damaged(folder, file, error) from error


def _is_colored(file: Path) -> bool:
    return _header(file.parent, file)[1]


def _colored(image: Image.Image) -> bool:
    return image.mode not in ("1", "L", "LA", "La", "I", "F") and not image.mode.startswith("I;")


def _upright(raw: Image.Image, color: bool) -> Image.Image:
    """An image as its metadata turn it, in grey ("L", or "F" for more than 8 bits) or in color ("RGB")."""
    image = ImageOps.exif_transpose(raw)
    if image.mode == "I" or image.mode.startswith("I;"):  # 16 bits
        deep = np.asarray(image, np.float32) / np.float32(65535)
        return Image.fromarray(np.uint8(255 * deep)).convert("RGB") if color else Image.fromarray(deep)
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if color else "L")


def _damaged(folder: Path, file: Path, error: BaseException) -> StorageError:
    return StorageError(f"{file} cannot be read as an image: {error}. Replace the file, or remove it from {folder}.")
