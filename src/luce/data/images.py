"""Images as people see them, from files, bytes or Pillow images; and a look at arrays given as images."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from .. import log
from ..errors import UserError, import_optional, one_line
from .sources import InMemory, LazyImages, Source

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]

CHANNELS = (1, 3, 4)
LOOKED_AT = 10**7  # values of an array that are checked, in evenly spaced rows
FORMATS = "JPEG PNG TIFF GIF WEBP BMP PPM JPEG2000 AVIF DDS DIB ICO IM MSP PCX PSD QOI SGI SUN TGA XBM XPM"
"""Pillow's raster formats. EPS is not among them: Pillow would run Ghostscript, whatever a file's suffix."""


def read_image(
    file: Path | IO[bytes], name: str, *, mode: str | None = "RGB", size: Size | None = None
) -> Image.Image:
    """Read the first frame of an image file as a person sees it; see `as_seen`.

    Args:
        file: A path, or a file opened for bytes.
        name: What messages call it.
        mode: ``RGB``, ``L``, or None for ``L`` if the image is grey and ``RGB`` otherwise.
        size: Width and height that it must have; None accepts any.

    Raises:
        UserError: If the file is missing, damaged or too large, holds values that no rule scales, or has
            another size.
    """
    with _opened(file, name) as image:
        seen = as_seen(image, mode)
    if size is not None and seen.size != size:
        raise several_sizes(f"{name} ({seen.width} x {seen.height})", f"others ({size[0]} x {size[1]})")
    return seen


def several_sizes(one: str, other: str) -> UserError:
    """Return the error for images of several sizes; names two of them."""
    return UserError(
        "expected images of one size, or the option `image_size` to scale and crop them, such as 224, "
        f"got {one} and {other}"
    )


def read_header(file: Path | IO[bytes], name: str) -> tuple[Size, bool]:
    """Return width and height as a person sees them, and whether the file has further frames.

    Pixels are not decoded.

    Raises:
        UserError: If the file is missing or its header is damaged.
    """
    with _opened(file, name) as image:
        # An MPO file is a photograph with previews of itself.
        frames = getattr(image, "is_animated", False) and image.format != "MPO"
        # Pillow reports a TIFF's size after the turn.
        turned = image.format != "TIFF" and _orientation(image) >= 5
        width, height = image.size
        return (height, width) if turned else (width, height), frames


@contextmanager
def _opened(file: Path | IO[bytes], name: str) -> Iterator[Image.Image]:
    image_module: Any = import_optional("PIL.Image", "vision")
    try:
        image_module.init()
        formats = [name for name in FORMATS.split() if name in image_module.OPEN]  # not every build has all
        with image_module.open(file, formats=formats) as image:
            yield image
    except UserError as error:
        raise UserError(f"cannot use the image {name}: {error}") from error
    except image_module.DecompressionBombError as error:
        raise UserError(f"cannot read the image {name} ({one_line(error)}); store it smaller") from error
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        reason = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, image_module.UnidentifiedImageError):
            reason = "its content is no image that Pillow knows"
        raise UserError(f"cannot read the image {name} ({reason}); replace or delete it") from error


def as_seen(image: Image.Image, mode: str | None = "RGB") -> Image.Image:
    """Convert an image to what a person sees, with 8 bits per channel.

    - Grey with 16 bits is divided by 257, so that 65535 becomes 255; so are 32-bit integers, which must lie
      in 0 .. 65535. Floating values must lie in [0, 1] and are multiplied by 255.
    - Transparency, in an alpha channel, a palette or one colour, shows white behind the image.
    - The turn or mirroring that EXIF or XMP metadata states is carried out.
    - CMYK, YCbCr, HSV and LAB become RGB. Colour profiles are ignored.

    Args:
        image: Any Pillow image; of several frames, the current one.
        mode: ``RGB``, ``L``, or None for ``L`` if the image is grey and ``RGB`` otherwise.

    Raises:
        UserError: If its values are outside the ranges above, or not numbers.

    Example:
        >>> from PIL import Image
        >>> as_seen(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    from PIL import Image

    _scale_transparent_colour(image)
    image.load()
    numeric = image.mode in ("I", "F") or image.mode.startswith("I;")
    mode = mode or ("L" if numeric or image.mode in ("1", "L", "LA", "La") else "RGB")
    orientation = _orientation(image)
    if numeric:
        image = _eight_bits(image)
    elif image.mode == "LAB":
        image = _from_lab(image)
    if orientation != 1:
        image = image.transpose(_transpositions()[orientation])
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # Pillow converts it to nothing else
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _scale_transparent_colour(image: Image.Image) -> None:
    """Scale a PNG's transparent colour as Pillow scales its pixels, but not the colour, to 8 bits."""
    colour = image.info.get("transparency")
    if colour is None or image.format != "PNG" or not getattr(image, "tile", None):
        return
    layout = image.tile[0][3]  # type: ignore[attr-defined]
    if layout in ("L;2", "L;4"):
        image.info["transparency"] = colour * 255 // (2 ** int(layout[2]) - 1)
    elif layout == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _eight_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    tags = getattr(image, "tag_v2", {})  # a TIFF's
    top = 1 if image.mode == "F" else 4095 if tags.get(258) == (12,) else 65535
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # also if one is NaN
        raise UserError(
            f"expected values from 0 to {top} in mode {image.mode}, got {low:g} to {high:g}; "
            "scale them as they should be seen and store 8 bits per channel"
        )
    if 0 < high < 256 and top == 65535:
        _say_dark()
    if tags.get(262) == 0:  # 0 is white
        values = top - values
    shades = np.rint(values * (255 / top)).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):
        shades[np.asarray(image) == image.info["transparency"]] = 255
    return Image.fromarray(shades)


@functools.cache  # once, not for every image
def _say_dark() -> None:
    log.warning(
        "a 16-bit image has no value above 255 and becomes nearly black, as 65535 is white; "
        "if its values are meant for 0 .. 255, store the images with 8 bits"
    )


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    seen = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert seen is not None  # only with inPlace
    return seen


def _orientation(image: Image.Image) -> int:
    from PIL import Image

    try:
        # The method of the base class: the one of PNG decodes all pixels.
        value = Image.Image.getexif(image).get(0x0112, 1)
    except Exception:  # viewers show photographs with damaged metadata upright
        return 1
    return value if value in _transpositions() else 1


def _transpositions() -> dict[int, Image.Transpose]:
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }


def check_arrays(source: Source, name: str) -> None:
    """Warn of inputs that look like images but have the channels last, or values outside [0, 1].

    Looks at evenly spaced rows in memory, otherwise at the first row. Changes nothing.
    """
    if isinstance(source, LazyImages):
        return
    inputs = source.inputs if isinstance(source, InMemory) else source.plain.read(0).unsqueeze(0)
    if inputs.ndim != 4 or not inputs.numel() or inputs.is_complex():
        return
    last = inputs.shape[3] in CHANNELS and inputs.shape[1] not in CHANNELS
    if last:
        log.warning(
            f"{name}: inputs of shape {tuple(inputs.shape[1:])} look like images with the channels last; "
            "Luce takes the first dimension for the channels: use `inputs.permute(0, 3, 1, 2)`"
        )
    elif inputs.shape[1] not in CHANNELS:
        return
    rows = inputs[:: 1 + inputs.numel() // LOOKED_AT]
    rows = rows.float() if inputs.is_floating_point() else rows.long()  # some dtypes have no minimum
    low, high = rows.min().item(), rows.max().item()
    if inputs.is_floating_point():
        if low < -1e-3 or high > 1 + 1e-3:
            log.warning(
                f"{name}: images have values from {low:.4g} to {high:.4g}, Luce expects [0, 1]: divide bytes "
                "by 255, or store them as uint8; leave other scaling to the network"
            )
    elif inputs.dtype != torch.uint8:
        log.warning(
            f"{name}: images of {inputs.dtype} with values from {low} to {high} are not scaled to [0, 1], as "
            "only uint8 is: use `inputs.to(torch.uint8)` for 0 .. 255, otherwise divide"
        )
    elif high == 1:
        log.warning(
            f"{name}: uint8 images have no value above 1 and become nearly black, as 255 is white: "
            "multiply by 255"
        )
