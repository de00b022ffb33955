"""Write the pages of the losses from docstrings and from the catalogue of the tests.

    python docs/generate_losses.py FOLDER

writes ``index.md`` and a page for each family. `pages` returns the same texts by name, for a hook of mkdocs.
Formulas are between dollar signs, as pymdownx.arithmatex takes them.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the catalogue is part of the tests

import luce  # noqa: E402
from luce.losses import functional, modules  # noqa: E402
from tests.losses import catalogue, feature_cases  # noqa: E402

SECTIONS = ("Args", "Attributes", "Shape", "Returns", "Raises", "Example", "References")
LISTS = ("Args", "Attributes", "Raises")
SPELLED = {"iekd": "IE-KD", "crd": "CRD", "reviewkd": "ReviewKD", "simkd": "SimKD", "maps": "Feature maps"}
"""Families whose title is not the name of their file."""


@dataclass(frozen=True)
class Entry:
    """A loss: its function, its module, or both."""

    function: Any
    module: Any

    @property
    def explained(self) -> Any:
        """Whichever of the two holds formula and source."""
        return self.function or self.module

    @property
    def title(self) -> str:
        return (self.module or self.function).__name__

    @property
    def family(self) -> str:
        return self.explained.__module__.rsplit(".", 1)[1]


def entries() -> list[Entry]:
    """Every loss of `luce.__all__` once, by its family."""
    functions = {name: getattr(functional, name) for name in functional.__all__}
    found = []
    for name in modules.__all__:
        module = getattr(modules, name)
        match = re.match(r"Module of `luce\.(\w+)`", inspect.getdoc(module) or "")
        found.append(Entry(functions.pop(match[1]) if match else None, module))
    found += [Entry(function, None) for function in functions.values()]
    return sorted(found, key=lambda entry: (entry.family, entry.title.lower()))


def pages() -> dict[str, str]:
    """The text of each page by the name of its file."""
    families: dict[str, list[Entry]] = {}
    for entry in entries():
        families.setdefault(entry.family, []).append(entry)
    index = ["# Losses\n"]
    texts = {}
    for family, members in families.items():
        doc = family_doc(members[0])
        head = "| loss | function | source | |\n|---|---|---|---|"
        index.append(f"\n## [{title(family)}]({family}.md)\n\n{doc}\n\n{head}")
        index += [
            f"| [`{e.title}`]({family}.md#{e.title.lower()}) "
            f"| {f'`{e.function.__name__}`' if e.function else ''} | {source(e.explained)} "
            f"| {summary(e.explained)} |"
            for e in members
        ]
        texts[f"{family}.md"] = f"# {title(family)}\n\n{doc}\n\n" + "\n".join(map(section, members))
    return {"index.md": "\n".join(index) + "\n", **texts}


def title(family: str) -> str:
    return SPELLED.get(family, family.replace("_", " ").capitalize())


def family_doc(entry: Entry) -> str:
    family = importlib.import_module(entry.explained.__module__)
    return inline((inspect.getdoc(family) or "").split("\n\n")[0].replace("\n", " "))


def summary(thing: Any) -> str:
    return inline((inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")).replace("|", "\\|")


def source(thing: Any) -> str:
    """The papers that a docstring refers to: their numbers at arXiv, else where and when they appeared."""
    references = (inspect.getdoc(thing) or "").partition("References:")[2]
    if papers := dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", references)):
        return ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    venue = re.search(r"\b[A-Z]{3,} \d{4}\b", references)
    return venue[0] if venue else ""


def section(entry: Entry) -> str:
    parts = [f"## {entry.title}\n"]
    if entry.module is not None:
        parts.append(f"Module `luce.{entry.module.__name__}`" + signature(entry.module))
    if entry.function is not None:
        parts.append(f"Function `luce.{entry.function.__name__}`" + signature(entry.function))
    parts.append(markdown(inspect.getdoc(entry.explained) or ""))
    if entry.function is not None and entry.module is not None:
        beyond = (inspect.getdoc(entry.module) or "").partition("\n\n")[2]
        if beyond:
            parts.append(f"### As a module\n\n{markdown(beyond)}")
    parts.append("**Verified by**\n\n" + "\n".join(f"- {line}" for line in verification(entry)) + "\n")
    return "\n\n".join(parts)


def signature(thing: Any) -> str:
    parameters = inspect.signature(thing).parameters.values()
    names = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is not p.KEYWORD_ONLY
    ]
    options = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    ]
    if options:
        names += ["*", *options]
    text = f"{thing.__name__}(" + ", ".join(names) + ")"
    return "\n\n```python\n" + "\n".join(textwrap.wrap(text, 84, subsequent_indent="    ")) + "\n```"


def verification(entry: Entry) -> Iterator[str]:
    """The kinds of tests that hold this loss, as far as the catalogues know them."""
    known = {loss.module: loss for loss in catalogue.LOSSES}
    if entry.module in known:
        loss = known[entry.module]
        golden = f"{loss.golden.value:.6g}" + (
            f" with {', '.join(f'`{k}={v!r}`' for k, v in loss.golden.options.items())}"
            if loss.golden.options
            else ""
        )
        yield f"a value worked out by hand: {golden} for the catalogue's example"
        if loss.detached:
            yield "its gradient against the formula's, as a factor in it gets none by design"
        else:
            yield "`gradcheck` in float64, and gradients in float32 and 16 bits within an error budget"
        yield (
            f"the battery of all losses on logits, over {len(loss.options)} sets of options: masks, weights, "
            f"reductions, layouts, excluded classes, huge logits, `torch.compile`, module equals function"
        )
        claims = [
            *(["`shift_invariant`"] if loss.shift_invariant else []),
            *(["`zero_at_equality`"] if loss.zero_at_equality and not loss.couples_rows else []),
            *(["`micro_batches`"] if not loss.couples_rows else []),
            *(f"`{law}`" for law in loss.laws),
        ]
        if claims:
            yield f"the laws of [`luce check`](../conformance.md) for every loss, and {', '.join(claims)}"
        return
    cases = [case for case in feature_cases.CASES if case.module is entry.module]
    if cases:
        yield "values worked out by hand or by a second implementation in plain loops"
        yield "`gradcheck` in float64"
        yield (
            f"the battery of all losses on features, over {len(cases)} sets of options: dtypes, autocast, "
            "`torch.compile`, building, saving and resuming"
        )
        return
    yield "its own tests in `tests/losses`, among them values worked out by hand"


def markdown(doc: str) -> str:
    """A docstring in Google style with formulas of reStructuredText, as Markdown."""
    lines, out, name, body = doc.split("\n"), [], "", []

    def close() -> None:
        text = textwrap.dedent("\n".join(body)).strip("\n")
        if name == "Example":
            out.append(f"**Example**\n\n```python\n{text}\n```\n")
        elif name in LISTS:
            out.append(f"**{name}**\n\n{items(text)}\n")
        elif name:
            out.append(f"**{name}**\n\n{prose(text)}\n")
        else:
            out.append(prose(text) + "\n")

    for line in lines:
        heading = line.rstrip(":")
        if line == f"{heading}:" and heading in SECTIONS:
            close()
            name, body = heading, []
        elif line and not line.startswith(" ") and name:
            close()
            name, body = "", [line]
        else:
            body.append(line)
    close()
    return "\n".join(out).strip() + "\n"


def items(text: str) -> str:
    entries = re.split(r"\n(?=\S)", text)
    return "\n".join(
        re.sub(r"^([\w.]+): ", r"- `\1`: ", inline(" ".join(entry.split()))) for entry in entries if entry
    )


def prose(text: str) -> str:
    text = re.sub(
        r"^\.\. math:: *((?:.*)(?:\n+[ \t]+\S.*)*)",
        lambda m: "$$\n" + " ".join(m[1].split()) + "\n$$",
        text,
        flags=re.M,
    )
    blocks = re.split(r"(\$\$\n.*?\n\$\$|(?:^.*={4,}.*$[\s\S]*^.*={4,}.*$))", text, flags=re.M | re.S)
    return "".join(
        block if block.startswith("$$") else f"```text\n{block}\n```" if "====" in block else inline(block)
        for block in blocks
    )


def inline(text: str) -> str:
    text = re.sub(r":math:`([^`]+)`", lambda m: f"${m[1]}$", text)
    text = re.sub(r"\barXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("expected one folder: python docs/generate_losses.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
    print(f"{len(pages())} pages of the losses of Luce {luce.__version__} in {folder}")


if __name__ == "__main__":
    main()
