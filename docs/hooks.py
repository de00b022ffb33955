"""Extend MkDocs: mount files of the repository, write the API pages, render what docstrings hold."""

from __future__ import annotations

import ast
import itertools
import posixpath
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
import generate_losses

ROOT = Path(__file__).resolve().parents[1]
MOUNTED = [
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/**/*.md",
    "benchmarks/**/*.png",
    "recipes/*",
    "examples/*.py",
]
"""Files outside docs/ that the site shows under the paths they have in the repository."""
FAMILIES = {f"losses/{name}": content for name, content in generate_losses.pages().items()}
TABLES = FAMILIES.pop("losses/index.md").removeprefix("# Losses\n")


def on_config(config: Any) -> Any:
    config.markdown_extensions.append(Docstrings())
    sections = {name: pages for section in config.nav for name, pages in section.items()}
    sections["Losses"] += sorted(FAMILIES)
    sections["API"] += sorted(name for name in api_pages() if name not in sections["API"])
    results = sorted(ROOT.glob("benchmarks/results/*/README.md"))
    sections["Benchmarks"] += [path.relative_to(ROOT).as_posix() for path in results]
    return config


def on_files(files: Any, config: Any) -> Any:
    for pattern in MOUNTED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for name, content in {**api_pages(), **FAMILIES}.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links that hold in the repository into links that hold on the site."""
    here = page.file.src_uri
    source = here if (ROOT / here).exists() else f"docs/{here}"

    def rewrite(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        on_site = target.removeprefix("docs/")
        on_site = {"README.md": "index.md"}.get(on_site, on_site)
        if files.get_file_from_path(on_site) is None:
            if (ROOT / target).exists():
                return text  # part of the source tree alone, such as tests/losses
            return match[0]
        return f"[{text}]({posixpath.relpath(on_site, posixpath.dirname(here) or '.')}{anchor})"

    if here == "losses/index.md":
        markdown += f"\n{TABLES}"
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", rewrite, markdown)


def api_pages() -> dict[str, str]:
    """Return the pages of the public subpackages: those with an ``__all__``, each with all names in it."""
    pages, rows, shown = {}, [], set()
    for path in sorted(ROOT.glob("src/luce/*/__init__.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if isinstance(node.value, ast.List)
        ]
        if names:
            room = path.parent.name
            members = "".join(f"        - {name}\n" for name in names[0] if name not in shown)
            shown |= {
                name for name in names[0] if name.isupper()
            }  # constants that rooms import from each other
            options = "      show_root_heading: false\n      heading_level: 2\n      members:\n"
            content = f"# luce.{room}\n\n::: luce.{room}\n    options:\n{options}{members}"
            pages[f"api/{room}.md"] = content
            summary = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
            rows.append(f"| [`luce.{room}`]({room}.md) | {summary} |")
    pages["api/index.md"] = "\n".join(["# API", "", "| module | |", "|---|---|", *rows, ""])
    return pages


class Docstrings(Extension):
    """The reStructuredText of docstrings: formulas become MathML, which browsers show without a script."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.preprocessors.register(Blocks(md), "luce-blocks", 27)  # after fenced code, before raw HTML
        md.inlinePatterns.register(Formula(r":math:`([^`]+)`", md), "luce-math", 195)  # before code
        md.inlinePatterns.register(Formula(r"\$([^$]+)\$", md), "luce-dollar", 185)  # after code
        md.inlinePatterns.register(Role(r":(?:func|class|meth|mod|attr):`~?([^`]+)`", md), "luce-role", 195)


class Blocks(Preprocessor):
    """Display formulas (``.. math::`` and the indented lines below it) and doctests, outside of fences."""

    def run(self, lines: list[str]) -> list[str]:
        result: list[str] = []
        rest = iter(lines)
        fenced = False
        for line in rest:
            fenced ^= line.lstrip().startswith("```")
            if not fenced and line.startswith(".. math::"):
                formula = [line.removeprefix(".. math::")]
                for line in rest:
                    if line and not line[0].isspace():
                        break
                    formula.append(line)
                else:
                    line = ""
                result += ["", self.md.htmlStash.store(mathml(" ".join(formula), "block")), "", line]
            elif not fenced and line == "$$":
                formula = itertools.takewhile(lambda line: line != "$$", rest)
                result += ["", self.md.htmlStash.store(mathml(" ".join(formula), "block")), ""]
            elif not fenced and line.startswith(">>> "):
                result += ["```pycon", line]
                for line in rest:
                    if not line.strip():
                        break
                    result.append(line)
                result += ["```", ""]
            else:
                result.append(line)
        return result


class Formula(InlineProcessor):
    def handleMatch(self, match: re.Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]  # noqa: N802
        return self.md.htmlStash.store(mathml(match[1])), match.start(0), match.end(0)


class Role(InlineProcessor):
    """Sphinx's cross-references, shown as the names they hold."""

    def handleMatch(self, match: re.Match[str], data: str) -> tuple[Any, int, int]:  # type: ignore[override]  # noqa: N802
        code = ElementTree.Element("code")
        code.text = match[1]
        return code, match.start(0), match.end(0)


def mathml(formula: str, display: str = "inline") -> str:
    return str(convert(" ".join(formula.split()), display=display))
