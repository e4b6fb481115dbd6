"""images: folders of image files as data sets."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deepprob as dp
from deepprob.data import image_folder
from deepprob.errors import StorageError


def paint(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def grey_folder(folder: Path, count: int = 10, height: int = 4, width: int = 6) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width), np.uint8)
    for i, image in enumerate(pixels):
        paint(folder / f"{i:02d}.png", image)
    return pixels


def test_grey_images_keep_every_pixel_and_the_order_of_their_names(tmp_path: Path) -> None:
    pixels = grey_folder(tmp_path)
    data = dp.images(tmp_path)
    assert (data.name, data.task, data.num_classes) == (tmp_path.name, "images", None)
    assert [len(part) for part in (data.train, data.valid, data.test) if part] == [6, 2, 2]
    assert data.train.names == ("images",) and data.train["images"].dtype == torch.float32
    rows = [int(name[:2]) for part in ("train", "valid", "test") for name in data.extras[f"{part}_files"]]
    assert sorted(rows) == list(range(10))
    found = torch.cat([data.train["images"], data.valid["images"], data.test["images"]])  # type: ignore[index]
    assert np.allclose(found.numpy(), pixels[rows] / 255, atol=1e-7)


def test_the_seed_chooses_the_parts(tmp_path: Path) -> None:
    grey_folder(tmp_path)
    first, again, other = (dp.images(tmp_path, seed=seed).extras["test_files"] for seed in (0, 0, 1))
    assert first == again != other


def test_sub_folders_are_classes_with_equal_shares_in_each_part(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        grey_folder(tmp_path / name)
    data = dp.images(tmp_path)
    assert data.num_classes == 2 and data.extras["class_names"] == ["cat", "dog"]
    assert data.train["labels"].bincount().tolist() == [6, 6]
    assert [name.startswith("dog") for name in data.extras["test_files"]] == data.test["labels"].bool().tolist()


def test_sub_folders_named_as_parts_are_the_parts(tmp_path: Path) -> None:
    for part, names in {"train": ("a", "b"), "val": ("b",), "Test": ("a", "b")}.items():
        for name in names:
            grey_folder(tmp_path / part / name, count=2)
    data = dp.images(tmp_path)
    assert data.extras["class_names"] == ["a", "b"]
    assert data.train["labels"].tolist() == [0, 0, 1, 1]
    assert data.valid is not None and data.valid["labels"].tolist() == [1, 1]
    assert data.extras["test_files"][0] == os.path.join("a", "00.png")


def test_a_training_folder_needs_a_test_folder(tmp_path: Path) -> None:
    grey_folder(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"has a folder 'train' but no folder 'test'.*rows are split at random"):
        dp.images(tmp_path)


def test_parts_of_different_size_are_refused(tmp_path: Path) -> None:
    grey_folder(tmp_path / "train")
    grey_folder(tmp_path / "test", height=5)
    with pytest.raises(ValueError, match=r"parts of .* differ in the size of their images.*size=32"):
        dp.images(tmp_path)
    assert dp.images(tmp_path, size=3).test.shape == (3, 3)


def test_one_colored_image_makes_all_of_them_colored(tmp_path: Path) -> None:
    pixels = grey_folder(tmp_path, count=5)
    colored = np.zeros((4, 6, 3), np.uint8)
    colored[..., 2] = 255
    paint(tmp_path / "00.png", colored)
    found, _, _ = image_folder.read_images(tmp_path)
    assert found.shape == (3, 4, 6)
    assert found["images"][0].amax((1, 2)).tolist() == [0, 0, 1]
    assert np.allclose(found["images"][1].numpy(), pixels[1] / 255, atol=1e-7)  # all channels are the grey
    assert dp.images(tmp_path, color=False).shape == (4, 6)


@pytest.mark.parametrize(("mode", "shape"), [("1", (4, 6)), ("P", (3, 4, 6)), ("LA", (4, 6)), ("RGBA", (3, 4, 6))])
def test_every_mode_of_pixels_is_read(tmp_path: Path, mode: str, shape: tuple[int, ...]) -> None:
    for i in range(5):
        paint(tmp_path / f"{i}.png", np.full((4, 6), 255, np.uint8), mode)
    data = dp.images(tmp_path)
    assert data.shape == shape and bool((data.train["images"] == 1).all())


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    for i in range(5):
        paint(tmp_path / f"{i}.png", np.zeros((2, 2, 4), np.uint8))
    assert bool((dp.images(tmp_path).train["images"] == 1).all())


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    values = np.array([[0, 1], [40_000, 65_535]], np.uint16)
    for i in range(5):
        paint(tmp_path / f"{i}.png", values)
    assert np.allclose(dp.images(tmp_path).train["images"][0].numpy(), values / 65_535, atol=1e-8)


def test_images_are_cropped_around_their_center(tmp_path: Path) -> None:
    stripes = np.zeros((4, 12), np.uint8)
    stripes[:, 4:8] = 255
    for i in range(5):
        paint(tmp_path / f"{i}.png", stripes[:, i % 2 : 12 - i % 2])
    data = dp.images(tmp_path, size=4)
    assert data.shape == (4, 4) and bool((data.train["images"] == 1).all())
    assert dp.images(tmp_path, size=(2, 6)).shape == (2, 6)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    for i in range(5):
        image = Image.fromarray(np.zeros((4, 6), np.uint8))
        turned = image.getexif()
        turned[0x0112] = 6
        image.save(tmp_path / f"{i}.jpg", exif=turned)
    assert dp.images(tmp_path).shape == (6, 4)


def test_other_files_are_skipped_and_counted(tmp_path: Path) -> None:
    grey_folder(tmp_path)
    (tmp_path / ".thumbnail.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("about")
    (tmp_path / "table.csv").write_text("1")
    with pytest.warns(UserWarning, match=r"skipped 1 hidden file and 2 files of other types, such as 'notes\.txt'\."):
        data = dp.images(tmp_path)
    assert len(data.train) == 6


def test_unequal_sizes_name_two_files_and_the_remedy(tmp_path: Path) -> None:
    grey_folder(tmp_path)
    paint(tmp_path / "99.png", np.zeros((8, 3), np.uint8))
    message = r"00\.png has 4 x 6 pixels, 99\.png has 8 x 3 \(height x width\)\. .*: size=3"
    with pytest.raises(ValueError, match=message):
        dp.images(tmp_path)


@pytest.mark.parametrize("cut", [10, 200])
def test_a_damaged_file_is_named(tmp_path: Path, cut: int) -> None:
    grey_folder(tmp_path, height=30, width=30)
    file = tmp_path / "05.png"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(StorageError, match=r"05\.png cannot be read as an image: .*Replace the file, or remove it"):
        dp.images(tmp_path)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    paint(tmp_path / "0.tif", np.zeros((3, 3), np.float32))
    with pytest.raises(StorageError, match="its pixels are floats of unknown range; save it with 8 or 16 bits"):
        image_folder.read_images(tmp_path)


def test_too_many_pixels_for_memory_are_refused(tmp_path: Path) -> None:
    grey_folder(tmp_path)
    with pytest.raises(ValueError, match=r"10 images of 6000 x 6000 numbers, 1\.3 GiB as floats, more than 1 GiB"):
        dp.images(tmp_path, size=6000)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "size must be a whole number of at least 1; got 0"),
        ((1, 2, 3), r"size must be one number, or height and width; got \(1, 2, 3\)\. For example: size=\(28, 28\)"),
    ],
)
def test_wrong_sizes(tmp_path: Path, size: object, message: str) -> None:
    grey_folder(tmp_path)
    with pytest.raises(ValueError, match=message):
        dp.images(tmp_path, size=size)  # type: ignore[arg-type]


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no images\. Give a folder of PNG or JPEG files\."):
        dp.images(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"has no images; skipped 1 file of other types, such as 'a\.txt'\. Give"):
        dp.images(tmp_path)


def test_too_few_images(tmp_path: Path) -> None:
    grey_folder(tmp_path, count=2)
    with pytest.raises(ValueError, match=r"has 2 images, too few for train, valid and test parts\. Give at least 5"):
        dp.images(tmp_path)


def test_images_without_a_class_among_classes(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "a", tmp_path / "b"):
        grey_folder(folder)
    with pytest.raises(ValueError, match=r"others without a class, such as '00\.png'\. Move them into a sub-folder"):
        dp.images(tmp_path)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    grey_folder(tmp_path / "faces")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*face'\. Did you mean '.*faces'\?"):
        dp.images(tmp_path / "face")
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*zzz'\. Check the path\."):
        dp.images(tmp_path / "zzz")
    with pytest.raises(NotADirectoryError, match=r"00\.png' is a file; expected a folder\. Pass the folder '.*faces'"):
        dp.images(tmp_path / "faces" / "00.png")


def test_a_path_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(PermissionError, match="cannot be read: permission denied"):
        dp.images(tmp_path)


def test_files_of_images_are_closed(tmp_path: Path) -> None:
    grey_folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        dp.images(tmp_path)
