"""A look at the headers of images, before any is decoded: their sizes, and how they become inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .images import Size, read_header, several_sizes
from .listing import named
from .transforms import described, short_side

MOST = 1000  # all images of a small set, a sample of a large one


@dataclass(frozen=True)
class Headers:
    """What the headers of a set's images say, or of an even sample of a large set.

    Attributes:
        sizes: Every size that occurs, width and height, with the name of one image that has it.
        frames: Names of images with more than one frame.
        looked_at: " of the N looked at" for a sample.
    """

    sizes: dict[Size, str]
    frames: list[str]
    looked_at: str

    @classmethod
    def read(cls, count: int, image: Callable[[int], tuple[Path | IO[bytes], str]]) -> Headers:
        """Read headers of ``count`` images; ``image`` returns the file of one and what messages call it.

        Raises:
            UserError: If one of them is damaged.
        """
        sizes: dict[Size, str] = {}
        frames = []
        chosen = range(0, count, max(1, math.ceil(count / MOST)))
        for index in chosen:
            file, name = image(index)
            size, more = read_header(file, name)
            sizes.setdefault(size, name)
            if more:
                frames.append(name)
        return cls(sizes, frames, "" if len(chosen) == count else f" of the {len(chosen):,} looked at")

    def only_size(self) -> Size:
        """Return the size of all images.

        Raises:
            UserError: If there are several; names two images.
        """
        if len(self.sizes) > 1:
            one, other, *_ = (f"{name} ({w} x {h})" for (w, h), name in self.sizes.items())
            raise several_sizes(one, other)
        return next(iter(self.sizes))

    def plan(self, image_size: int | None, random_crop: bool) -> list[str]:
        """State how images become inputs, and what a user may not expect of it."""
        if image_size is None:
            width, height = self.only_size()
            steps = [f"{width} x {height} as they are"]
        else:
            steps = [described(image_size, random_crop)]
            if small := [size for size in self.sizes if min(size) < image_size]:
                width, height = min(small, key=min)
                factor = short_side(image_size) / min(width, height)
                way = "; leave out `image_size` to keep images as they are" if len(self.sizes) == 1 else ""
                steps.append(
                    f"smaller images{self.looked_at} are enlarged, {width} x {height} by {factor:.3g}{way}"
                )
        if self.frames:
            steps.append(
                f"of animated images{self.looked_at} only the first frame counts: {named(self.frames)}"
            )
        return steps
