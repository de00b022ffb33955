"""What `luce.bench.gpu` found, to be read."""

from __future__ import annotations

from typing import Any


def page(found: dict[str, Any]) -> str:
    """Everything to read: the device, a line a case, what each goal came to, and how many were reached.

    A line says the milliseconds of ours, its share of the copy limit, the memory that it takes, and how many
    times as fast as the others it is.
    """
    rates, goals = found["rates"], found["verdicts"]
    lines = [
        f"{found['device']}, PyTorch {found['torch']}, Triton {found['triton']}, Luce {found['luce']}",
        f"copies {rates['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"matrices {rates['matrix_flops'] / 1e12:.0f} TFLOP/s",
        "",
        f"{'case':34}{'ms':>9}{'of copy':>9}{'MiB':>9}  times as fast as",
    ]
    for case in found["cases"]:
        times = case["milliseconds"]
        if "ours" not in times:
            lines.append(f"{case['case']:34}  failed: {case['failed'].get('ours')}")
            continue
        beside = [f"{name} {ms / times['ours']:.1f}" for name, ms in times.items() if name != "ours"]
        beside += [f"{name} -" for name in case["failed"]]
        figures = f"{times['ours']:9.3f}{case['copy_share']:9.2f}{_mebibytes(case['memory']['ours']):>9}"
        lines.append(f"{case['case']:34}{figures}  {', '.join(beside)}")
    if "heads" in found:
        heads = found["heads"]
        lines += ["", f"{'from hidden states':34}{'ms':>9}{'products':>9}{'MiB':>9}"]
        for name, ms in heads["milliseconds"].items():
            memory = _mebibytes(heads["memory"][name])
            lines.append(f"{name:34}{ms:9.2f}{ms / heads['products']:9.2f}{memory:>9}")
        lines += [f"{name:34}  failed: {why}" for name, why in heads["failed"].items()]
    lines += ["", *(f"{'reached' if goal['reached'] else 'MISSED ':8} {goal['goal']}" for goal in goals)]
    reached = sum(goal["reached"] for goal in goals)
    lines.append(f"{reached} of {len(goals)} goals reached on {found['device']}; tests {found['tests']}")
    return "\n".join(lines)


def _mebibytes(memory: int | None) -> str:
    return "-" if memory is None else f"{memory / 2**20:.0f}"
