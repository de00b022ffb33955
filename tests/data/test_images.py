from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import luce
from luce import data
from luce.data import images
from luce.data.images import as_seen, read_header, read_image
from luce.errors import MissingExtra, UserError

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

# A 2 x 3 image whose six shades all differ, so that each turn and mirroring shows.
SHADES = np.array([[0, 40, 80], [120, 160, 200]], np.uint8)


def stored(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def seen(image, format="PNG", *, mode="RGB", **options):
    """The pixels, (H, W, 3) or (H, W), of an image that went through a file."""
    return np.asarray(read_image(stored(image, format, **options), "x", mode=mode)).astype(int)


def png(depth, colour_type, width, rows, *chunks):
    """A PNG file from its parts, for what Pillow does not write."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *(chunk(*part) for part in chunks), chunk(b"IDAT", pixels)]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))


def pixels(file):
    return np.asarray(read_image(file, "x")).tolist()


# Values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_is_scaled(format):
    # 257 is 65535 / 255: these are 0, 1, 100, 127.5 (to the even 128), 254 and 255 of 255.
    values = np.array([[0, 257, 25700], [32768, 65278, 65535]], np.uint16)
    image = Image.fromarray(values)
    options = {"irreversible": False} if format == "JPEG2000" else {}
    for mode in ("L", None):
        assert seen(image, format, mode=mode, **options).tolist() == [[0, 1, 100], [128, 254, 255]]
    assert seen(image, format, **options).shape == (2, 3, 3)


def test_16_bit_grey_of_the_other_byte_order():
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 25700, 65535))
    assert np.asarray(as_seen(image, "L")).tolist() == [[100, 255]]


def test_32_bit_integers_count_as_16_bit_ones():
    assert seen(Image.fromarray(np.array([[0, 25700, 65535]], np.int32)), "TIFF", mode="L").tolist() == [
        [0, 100, 255]
    ]


@pytest.mark.parametrize("low_high", [(-1, 5), (0, 65536)])
def test_32_bit_integers_outside_16_bits_are_refused(low_high):
    with pytest.raises(UserError, match=rf"from 0 to 65535 in mode I, got {low_high[0]} to {low_high[1]};"):
        seen(Image.fromarray(np.array([low_high], np.int32)), "TIFF")


def test_floats_in_0_1_are_scaled():
    image = Image.fromarray(np.array([[0, 0.2, 1]], np.float32))
    assert seen(image, "TIFF", mode="L").tolist() == [[0, 51, 255]]


@pytest.mark.parametrize(
    ("values", "got"),
    [([0, 200], "0 to 200"), ([-0.5, 1], "-0.5 to 1"), ([0, np.nan], "nan"), ([0, np.inf], "0 to inf")],
)
def test_other_floats_are_refused(values, got):
    with pytest.raises(UserError, match=f"cannot use the image x: expected values from 0 to 1 .*got {got}"):
        seen(Image.fromarray(np.array([values], np.float32)), "TIFF")


def test_white_may_be_0_and_12_bits_may_be_white():
    def tiff(bits, photometric, content):
        entries = [
            (256, 2),
            (257, 1),
            (258, bits),
            (259, 1),
            (262, photometric),
            (273, 8),
            (278, 1),
            (279, 4),
        ]
        directory = struct.pack("<H", len(entries)) + b"".join(
            struct.pack("<HHII", t, 4, 1, v) for t, v in entries
        )
        return io.BytesIO(
            struct.pack("<2sHI", b"II", 42, 12) + content.ljust(4, b"\0") + directory + bytes(4)
        )

    assert pixels(tiff(16, 0, struct.pack("<HH", 0, 65535))) == [[[255] * 3, [0] * 3]]
    assert pixels(tiff(16, 1, struct.pack("<HH", 0, 65535))) == [[[0] * 3, [255] * 3]]
    # Two values of 12 bits in three bytes: 4095 and 0.
    assert pixels(tiff(12, 1, b"\xff\xf0\x00")) == [[[255] * 3, [0] * 3]]


def test_16_bits_with_small_values_are_noticed_once(caplog):
    images._say_dark.cache_clear()
    for high in (0, 256, 255, 200):
        seen(Image.fromarray(np.array([[0, high]], np.uint16)))
    (line,) = caplog.messages
    assert "no value above 255" in line


def test_1_bit():
    image = Image.fromarray(np.array([[False, True]]))
    assert seen(image, mode=None).tolist() == [[0, 255]]
    assert seen(image).tolist() == [[[0] * 3, [255] * 3]]


def test_colour_as_grey_and_grey_as_colour():
    assert seen(Image.fromarray(SHADES)).tolist() == np.stack([SHADES] * 3, -1).tolist()
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B.
    assert seen(Image.new("RGB", (1, 1), (100, 200, 50)), mode="L").tolist() == [[153]]
    assert seen(Image.new("RGB", (1, 1), (100, 200, 50)), mode=None).tolist() == [[[100, 200, 50]]]


# Transparency -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "red", "green"), [(0, 255, 255), (255, 200, 0), (51, 244, 204)])
def test_white_is_behind_an_alpha_channel(alpha, red, green):
    # For alpha 0.2: 0.2 * 200 + 0.8 * 255 = 244 and 0.8 * 255 = 204.
    np.testing.assert_allclose(
        seen(Image.new("RGBA", (1, 1), (200, 0, 0, alpha)))[0, 0], [red, green, green], atol=1
    )
    np.testing.assert_allclose(seen(Image.new("LA", (1, 1), (200, alpha)))[0, 0], red, atol=1)
    np.testing.assert_allclose(seen(Image.new("LA", (1, 1), (200, alpha)), mode="L")[0, 0], red, atol=1)
    np.testing.assert_allclose(seen(Image.new("LA", (1, 1), (0, alpha)), mode=None)[0, 0], green, atol=1)
    palette = Image.new("PA", (1, 1), (7, alpha))
    palette.putpalette([200, 0, 0] * 8)
    np.testing.assert_allclose(np.asarray(as_seen(palette)).astype(int)[0, 0], [red, green, green], atol=1)


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "TIFF"])
def test_what_is_behind_full_transparency_does_not_come_back(format):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    noise[..., 3] = 0
    assert (seen(Image.fromarray(noise), format) == 255).all()


def palette_image():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 0])  # keeps the indices: mode becomes P
    assert image.mode == "P"
    return image


def test_transparency_of_a_palette():
    assert seen(palette_image()).tolist() == [[[10, 20, 30], [200, 0, 0], [0, 0, 0]]]
    assert seen(palette_image(), transparency=0)[0].tolist() == [[255] * 3, [200, 0, 0], [0, 0, 0]]
    assert seen(palette_image(), "GIF", transparency=2)[0, 2].tolist() == [255] * 3
    half = seen(palette_image(), transparency=bytes([255, 51, 0]))[0]
    np.testing.assert_allclose(half, [[10, 20, 30], [244, 204, 204], [255] * 3], atol=1)


def test_a_transparent_colour():
    colours = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    assert seen(colours, transparency=(1, 2, 3)).tolist() == [[[255] * 3, [1, 2, 4]]]
    assert seen(Image.fromarray(SHADES), transparency=80, mode="L").tolist() == [
        [0, 40, 255],
        [120, 160, 200],
    ]
    bits = Image.fromarray(np.array([[False, True]]))
    assert seen(bits, transparency=0, mode="L").tolist() == [[255, 255]]
    deep = Image.fromarray(np.array([[257, 258, 514]], np.uint16))
    assert seen(deep, transparency=257, mode="L").tolist() == [[255, 1, 2]]


def test_a_transparent_colour_of_few_or_many_bits():
    clear = (b"tRNS", struct.pack(">H", 1))
    # Two bits: 0, 1, 2, 3 are 0, 85, 170, 255; four bits: 1 and 2 are 17 and 34.
    assert [p[0] for p in pixels(png(2, 0, 4, [bytes([0b00011011])], clear))[0]] == [0, 255, 170, 255]
    assert [p[0] for p in pixels(png(4, 0, 2, [bytes([0x12])], clear))[0]] == [255, 34]
    deep = struct.pack(">6H", 0x0164, 0x0200, 0xFF00, 0, 0, 0xFF00)
    key = (b"tRNS", struct.pack(">3H", 0x0164, 0x0200, 0xFF00))
    assert pixels(png(16, 2, 2, [deep], key)) == [[[255] * 3, [0, 0, 255]]]


def test_16_bits_and_alpha():
    row = struct.pack(">4H", 0x6400, 0xFFFF, 0x6400, 0)
    assert pixels(png(16, 4, 2, [row])) == [[[100] * 3, [255] * 3]]


# Colour spaces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk(format):
    for ink, colour in (
        ((0, 0, 0, 0), [255] * 3),
        ((0, 255, 255, 0), [255, 0, 0]),
        ((0, 0, 0, 255), [0] * 3),
    ):
        np.testing.assert_allclose(seen(Image.new("CMYK", (8, 8), ink), format)[4, 4], colour, atol=2)


def test_ycbcr_and_hsv():
    # JFIF: R = Y + 1.402 (Cr - 128), G = Y - 0.714 (Cr - 128), B = Y + 1.772 (Cb - 128) - ...
    image = Image.new("YCbCr", (1, 1), (100, 128, 178))
    np.testing.assert_allclose(np.asarray(as_seen(image)).astype(int)[0, 0], [170, 64, 100], atol=1)
    np.testing.assert_allclose(
        np.asarray(as_seen(Image.new("HSV", (1, 1), (85, 255, 255))))[0, 0], [0, 255, 0], atol=2
    )


WHITE = {"1": 1, "L": 255, "I": 65535, "F": 1.0, "I;16": 65535, "I;16L": 65535, "I;16B": 65535}
WHITE |= {
    "LA": (255, 255),
    "La": (255, 255),
    "CMYK": (0, 0, 0, 0),
    "YCbCr": (255, 128, 128),
}
WHITE |= {"RGB": (255, 255, 255), "HSV": (0, 0, 255), "LAB": (255, 128, 128), "RGBX": (255, 255, 255, 0)}
WHITE |= {"RGBA": (255, 255, 255, 255), "RGBa": (255, 255, 255, 255)}


@pytest.mark.parametrize("mode", WHITE)
def test_every_mode_of_pillow(mode):
    image = Image.new(mode, (1, 1), WHITE[mode])
    assert min(as_seen(image).getpixel((0, 0))) >= 254  # LAB's arithmetic is that of a colour library
    assert as_seen(image, "L").getpixel((0, 0)) >= 254


def test_no_mode_is_forgotten():
    # Palettes have their own tests; I;16N is one of the two byte orders.
    assert {*Image.MODES} <= {*WHITE, "P", "PA", "I;16N"}


def test_lab():
    # L* from 0 to 100 is 0 .. 255, a* and b* are signed. sRGB's red in CIE Lab with the white point D50 is
    # (54.29, 80.81, 69.89); L* 50 without colour is 119 in sRGB.
    for lab, colour in (
        ((255, 0, 0), [255] * 3),
        ((0, 0, 0), [0] * 3),
        ((128, 0, 0), [119] * 3),
        ((138, 81, 70), [255, 0, 0]),
    ):
        image = Image.frombytes("LAB", (1, 1), bytes(lab))
        np.testing.assert_allclose(seen(image, "TIFF")[0, 0], colour, atol=6)


def test_profiles_are_ignored():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert seen(Image.new("RGB", (1, 1), (1, 2, 3)), icc_profile=profile).tolist() == [[[1, 2, 3]]]


# Turns ------------------------------------------------------------------------------------------------------

# What a camera stored of the upright image SHADES. EXIF says where the stored first row and first column lie:
# for 6, for one, the row at the right and the column at the top.
STORED = {
    1: SHADES,
    2: SHADES[:, ::-1],
    3: SHADES[::-1, ::-1],
    4: SHADES[::-1],
    5: SHADES.T,
    6: SHADES.T[::-1],
    7: SHADES.T[::-1, ::-1],
    8: SHADES.T[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(format, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    blocks = np.kron(STORED[orientation], np.ones((16, 16), np.uint8))
    options = {"quality": 100} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    file = stored(Image.fromarray(blocks), format, exif=tags, **options)
    assert read_header(file, "x") == ((48, 32), False)
    file.seek(0)
    shown = np.asarray(read_image(file, "x", mode="L")).astype(int)
    np.testing.assert_allclose(shown[8::16, 8::16], SHADES, atol=2)


def test_16_bits_are_turned_too():
    tags = Image.Exif()
    tags[0x0112] = 6
    values = np.ascontiguousarray(STORED[6]).astype(np.uint16) * 257
    assert seen(Image.fromarray(values), exif=tags, mode="L").tolist() == SHADES.tolist()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x"])
def test_damaged_exif_is_ignored(exif):
    np.testing.assert_allclose(seen(Image.new("L", (2, 2), 77), "JPEG", exif=exif), 77)


def test_an_orientation_that_does_not_exist_is_ignored():
    tags = Image.Exif()
    tags[0x0112] = 9
    assert seen(Image.fromarray(SHADES), exif=tags, mode="L").tolist() == SHADES.tolist()


# Frames, damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((0, 0, 0), (255, 255, 255))]
    file = stored(frames[0], format, save_all=True, append_images=frames[1:])
    assert read_header(file, "x") == ((8, 8), True)
    file.seek(0)
    assert np.asarray(read_image(file, "x")).max() == 0
    assert read_header(stored(frames[0], format), "x") == ((8, 8), False)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000", "TGA"])
def test_half_a_file_is_refused(format):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = stored(Image.fromarray(noise), format).getvalue()
    with pytest.raises(UserError, match=r"cannot read the image a/b \(.*\); replace or delete it"):
        read_image(io.BytesIO(whole[: len(whole) // 2]), "a/b")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("content", [b"", b"rubbish", b"<html></html>", b"\x89PNG\r\n\x1a\n", EPS])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(UserError, match="cannot read the image x"):
        read_image(io.BytesIO(content), "x")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the image here \(No such file or directory\)"):
        read_image(tmp_path / "absent.png", "here")
    with pytest.raises(UserError, match=r"\(Is a directory\)"):
        read_image(Path(tmp_path), "here")


def test_an_image_that_would_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(UserError, match=r"cannot read the image x \(.*exceeds limit .*\); store it smaller"):
        read_image(stored(Image.new("L", (3, 3))), "x")


def test_pillow_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # as if not installed
    with pytest.raises(MissingExtra, match=r"pip install 'luce\[vision\]'"):
        read_image(io.BytesIO(b""), "x")


# Arrays -----------------------------------------------------------------------------------------------------


def warnings_of(inputs, caplog):
    data.from_datasets(TensorDataset(inputs, torch.arange(len(inputs)) % 2))
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_last_are_noticed(channels, caplog):
    line, other = warnings_of(torch.rand(8, 5, 6, channels), caplog)
    assert line.replace("train part", "test part") == other
    assert (
        f"the train part of `datasets`: inputs of shape (5, 6, {channels}) look like images with the" in line
    )


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (torch.rand(8, 3, 5, 5) * 255, r"values from .* to 2.*expects \[0, 1\]: divide bytes by 255"),
        (torch.rand(8, 1, 5, 5) - 0.5, r"values from -0.* to 0"),
        (torch.full((8, 3, 5, 5), 255), r"images of torch.int64 with values from 255 to 255 are not scaled"),
        (torch.ones(8, 3, 5, 5, dtype=torch.uint16), r"images of torch.uint16 with values from 1 to 1"),
        (torch.ones(8, 3, 5, 5, dtype=torch.bool), r"images of torch.bool with values from 1 to 1"),
        (torch.ones(8, 3, 5, 5, dtype=torch.uint8), "no value above 1 and become nearly black"),
    ],
    ids=["0 to 255", "negative", "integers", "16 bits", "bool", "bits"],
)
def test_values_outside_0_1_are_noticed(inputs, text, caplog):
    line, _ = warnings_of(inputs, caplog)
    assert re.search(text, line)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.rand(8, 3, 5, 5),
        torch.rand(8, 3, 5, 3),
        torch.randint(0, 256, (8, 3, 5, 5), dtype=torch.uint8),
        torch.zeros(8, 1, 5, 5, dtype=torch.uint8),
        torch.randn(8, 20),
        torch.randint(0, 1000, (8, 20)),
        torch.randn(8, 12, 5, 5),
    ],
    ids=["floats", "narrow", "bytes", "black", "features", "tokens", "maps"],
)
def test_other_arrays_pass(inputs, caplog):
    assert warnings_of(inputs, caplog) == []


def test_luce_distill_notices_too(caplog):
    class Photos(torch.utils.data.Dataset):
        targets = torch.arange(8) % 2

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return np.full((5, 6, 3), 255.0, np.float32), int(self.targets[index])

    def network():
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(90, 2))

    pairs = TensorDataset(torch.full((8, 3, 5, 6), 255.0), Photos.targets)
    luce.distill(network(), network(), Photos(), pairs, epochs=1, show_progress=False)
    assert "`train_data`: inputs of shape (5, 6, 3) look like images with the channels last" in caplog.text
    assert "`train_data`: images have values from 255 to 255" in caplog.text
    assert "`val_data`: images have values from 255 to 255" in caplog.text
