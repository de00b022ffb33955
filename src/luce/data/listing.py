"""Which files below a folder of classes count as images, and what is left out."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError

# Of the raster formats that Pillow reads. A fixed list: what counts must not depend on how Pillow was built.
_RASTER = (
    ".apng .avif .avifs .bmp .bw .dds .dib .gif .ico .im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx "
    ".mpo .msp .pbm .pcx .pfm .pgm .png .pnm .ppm .psd .qoi .ras .rgb .rgba .sgi .tga .tif .tiff .webp .xbm "
    ".xpm"
)
SUFFIXES = frozenset(_RASTER.split())
HIDDEN = frozenset(
    ["__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "desktop.ini", "thumbs.db"]
)

NO_IMAGE, HIDDEN_ENTRY = "files that are no images", "hidden files and folders"
BESIDE, BROKEN, LOOP = "images beside the class folders", "broken links", "links that lead back"
HARMLESS = HIDDEN_ENTRY, NO_IMAGE
PROBABLE_MISTAKES = BESIDE, BROKEN, LOOP

Place = tuple[int, int]
"""Device and inode of a folder."""


@dataclass
class Listing:
    """The images of a folder with a folder per class.

    Attributes:
        folder: The folder.
        files: For each class, in alphabetical order, its images relative to ``folder``, sorted; also those in
            folders below that of the class. Names that differ only in the form of Unicode are one class.
        left_out: What was left out, by reason, relative to ``folder``.
        places: The identities of all folders that were read.
    """

    folder: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    places: set[Place] = field(default_factory=set)

    @property
    def classes(self) -> list[str]:
        """The class folders that hold images."""
        return [name for name, files in self.files.items() if files]

    @property
    def names(self) -> list[str]:
        """All images, by class."""
        return [name for files in self.files.values() for name in files]

    @property
    def nested(self) -> int:
        """Number of images in folders below a class folder."""
        return sum(name.count(os.sep) > 1 for name in self.names)


def list_images(folder: Path) -> Listing:
    """List the images in the class folders of ``folder``, following links; none if it does not exist.

    Raises:
        UserError: If a folder cannot be read.
    """
    listing = Listing(folder)
    if not os.path.isdir(folder):
        return listing
    images, below = _scan(listing, "", frozenset())
    listing.left_out[BESIDE] += images
    # macOS and Linux write accents in names in two forms.
    for label, name, above in sorted(
        (unicodedata.normalize("NFC", name), name, above) for name, above in below
    ):
        found, stack = listing.files.setdefault(label, []), [(name, above)]
        while stack:
            images, deeper = _scan(listing, *stack.pop())
            found += images
            stack += deeper
        found.sort()
    return listing


def _scan(
    listing: Listing, inside: str, above: frozenset[Place]
) -> tuple[list[str], list[tuple[str, frozenset[Place]]]]:
    """Return the images in one folder, and its folders with the identities of all folders above them."""
    images, folders, left_out = [], [], listing.left_out
    place = os.path.join(listing.folder, inside)
    try:
        status = os.stat(place)
        identity = status.st_dev, status.st_ino
        if identity in above:
            left_out[LOOP].append(inside)
            return [], []
        above |= {identity}
        listing.places.add(identity)
        with os.scandir(place) as entries:
            for entry in entries:
                name = os.path.join(inside, entry.name)
                if entry.name.startswith(".") or entry.name.lower() in HIDDEN:
                    left_out[HIDDEN_ENTRY].append(name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    left_out[BROKEN].append(name)
                elif entry.is_dir():
                    folders.append((name, above))
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():
                    images.append(name)
                else:
                    left_out[NO_IMAGE].append(name)
    except OSError as error:
        raise UserError(f"cannot read the folder {shown(place)} ({error.strerror})") from error
    return images, folders


def shown(path: str | Path) -> str:
    """Return a path as one printable line, also if it has line breaks or its bytes are not UTF-8."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def named(paths: list[str], most: int = 3) -> str:
    """Return the number of paths and the first ones in alphabetical order."""
    names = ", ".join(shown(path) for path in sorted(paths)[:most])
    return f"{len(paths):,} ({names}{', ...' if len(paths) > most else ''})"
