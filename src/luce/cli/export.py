"""``luce export``: a finished student for use elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

USAGE = "luce export RUN [--format onnx|packed] [--out FILE]"
DESCRIPTION = """Write the student of a finished run to one file.

  onnx    from raw inputs to logits, its normalisation included, for any number of rows; compared with PyTorch
          under onnxruntime before it gets its name. Needs: pip install 'luce[export]'
  packed  safetensors with one bit per binary weight and one scale per filter, and how to build the network;
          luce.runs.export.read_packed reads it back

Also told: the size of the network in bits."""
SUFFIXES = {"onnx": ".onnx", "packed": ".packed.safetensors"}


def main(words: Sequence[str]) -> None:
    from ._parser import Parser

    parser = Parser("export", usage=USAGE, description=DESCRIPTION)
    parser.add_argument("folder", metavar="RUN", type=Path, help="a finished run folder")
    parser.add_argument("--format", default="onnx", help="onnx, which it is, or packed")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="RUN/student.onnx or RUN/student.packed.safetensors"
    )
    if "--help" in words or "-h" in words:
        parser.print_help()
        return
    request = parser.parse_args(list(words))
    if request.format not in SUFFIXES:
        raise UserError(f"expected `--format` onnx or packed, got {request.format}")
    suffix = SUFFIXES[request.format]
    out: Path = request.out or request.folder / f"student{suffix}"
    if out.suffix != f".{suffix.rpartition('.')[2]}":
        raise UserError(f"expected a file that ends in .{suffix.rpartition('.')[2]} after `--out`, got {out}")

    from .. import files
    from ..models.binary import size_in_bits
    from ..runs.export import write_onnx, write_packed
    from ..training import checkpoint

    student, description = checkpoint.load_student(request.folder)
    files.make_folder(out.parent)
    if request.format == "onnx":
        difference = write_onnx(out, student, description)
        print(f"checked: logits of onnxruntime differ by at most {difference:.2g} from PyTorch's")
    else:
        write_packed(out, student, description)
    size = size_in_bits(student.body)
    print(
        f"network: {size['bits']:,} bits ({size['binary_weights']:,} binary weights, "
        f"{size['scales']:,} scales, {size['other']:,} other numbers); "
        f"with real weights {size['full_precision_bits']:,}"
    )
    print(f"file: {out} ({out.stat().st_size:,} bytes)")
