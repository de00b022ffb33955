"""``luce export``: a finished student as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import UserError

NAMES = {"onnx": "student.onnx", "packed": "student.packed.safetensors"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the student of a finished run to one file.

      onnx    from raw inputs to logits, normalisation included, for any number of rows. The logits are
              compared with PyTorch's before the file is kept. Needs: pip install 'luce[export]'
      packed  safetensors with one bit per binary weight and one scale per filter, and a description of the
              network; luce.runs.export.read_packed reads it

    Attributes:
        run: A finished run.
        format: The format of the file.
        out: The file; RUN/student.onnx or RUN/student.packed.safetensors if not given.
        trusted: Let the run folder name code of others, such as python: networks.
    """

    run: Path
    format: Literal["onnx", "packed"] = "onnx"
    out: Path | None = None
    trusted: bool = False

    def __post_init__(self) -> None:
        suffix = Path(NAMES[self.format]).suffix
        if self.file.suffix != suffix:
            raise UserError(f"expected a file that ends in {suffix} as `out`, got {self.file}")

    @property
    def file(self) -> Path:
        """The file to write."""
        return self.out or self.run / NAMES[self.format]


def main(options: Options, _: str) -> None:
    """Write the file, and print its size and that of the network."""
    from .. import files
    from ..models.binary import size_in_bits
    from ..runs.export import write_onnx, write_packed
    from ..training import checkpoint

    student, description = checkpoint.load_student(options.run, trusted=options.trusted)
    files.make_folder(options.file.parent)
    if options.format == "onnx":
        difference = write_onnx(options.file, student, description)
        print(f"checked: the logits of onnxruntime and of PyTorch differ by at most {difference:.2g}")
    else:
        write_packed(options.file, student, description)
    size = size_in_bits(student.body)
    print(
        f"network: {size['bits']:,} bits ({size['binary_weights']:,} binary weights, "
        f"{size['scales']:,} scales, {size['other']:,} other numbers); "
        f"with full-precision weights {size['full_precision_bits']:,}"
    )
    print(f"file: {options.file} ({options.file.stat().st_size:,} bytes)")
