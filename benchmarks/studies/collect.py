"""Keep a finished comparison in benchmarks/results: its recipe, its table, and a gzipped line per run.

python -m benchmarks.studies.collect runs/fashion-mnist benchmarks/results/fashion-mnist
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from benchmarks.results import write_lines
from luce import reports
from luce.errors import UserError


def collect(folder: Path, out: Path) -> None:
    """Write ``comparison.yaml``, ``README.md`` and ``runs.jsonl.gz`` to `out`."""
    comparison = reports.read_comparison(folder)
    environments = [run.environment for run in comparison.finished()]
    commits = ", ".join(sorted({environment["commit"] for environment in environments}))
    dates = sorted({environment["started"][:10] for environment in environments})
    environment = environments[0]
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "comparison.yaml", out)
    text = [
        f"# {comparison.title}",
        comparison.question,
        *reports.verdict(reports.summarise(comparison)).values(),
        reports.markdown_table(comparison),
        f"`{comparison.command}`, commit {commits}, torch {environment['torch']}, "
        f"Python {environment['python']}, {environment['processor']}, {environment['threads']} threads, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}. A line per run is in `runs.jsonl.gz`.",
    ]
    (out / "README.md").write_text("\n\n".join(part.strip() for part in text) + "\n", encoding="utf-8")
    lines = []
    for path in sorted(folder.glob("**/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for moment in ("last", "best"):
            result[moment]["test"].pop("reliability")
        lines.append({"run": path.parent.relative_to(folder).as_posix(), **result})
    write_lines(out / "runs.jsonl.gz", lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        collect(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(str(error))
