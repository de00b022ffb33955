"""Let Griffe see the sections of docstrings, which Luce writes without blank lines between them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

SECTION = re.compile(r"(?<=\S)\n(?=(?:Args|Attributes|Example|Raises|References|Returns|Yields):\n)")


class Sections(Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)
