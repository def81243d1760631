"""What mkdocs does for docs/ beyond its configuration: README's measured tables, and the pictures beside them.

A line ``<!-- table: NAME -->`` of a page (or ``accuracy``, ``ptq``, ``deployed``) becomes what README.md has between
this line and ``<!-- end -->``; ``<!-- command: NAME -->`` becomes the block that follows this line there. So a number
stands in a results file, and nobody types it a second time. Pictures are read from benchmarks/results, as they are
named from the root of the pages.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LITERAL = re.compile(r"::\n\n((?:[ ]{4}.*\n|\n)*[ ]{4}.*)(?=\n|$)")
_DOCTEST = re.compile(r"^(?:>>> .*\n?)(?:.+\n?)*", re.M)
MARKER = re.compile(r"^<!-- ((?:table|accuracy|ptq|deployed|command): \S+) -->$", re.M)


def tables(readme: str) -> dict[str, str]:
    """README's tables and commands by the text of their markers.

    >>> tables("<!-- table: a-cpu -->\\n| x |\\n<!-- end -->")
    {'table: a-cpu': '| x |\\n'}
    """
    found = dict(re.findall(r"<!-- ((?:table|accuracy|ptq|deployed): \S+) -->\n(.*?)<!-- end -->", readme, re.S))
    return found | dict(re.findall(r"<!-- (command: \S+) -->\n(```.*?\n```\n)", readme, re.S))


def with_tables(text: str, readme: str) -> str:
    """A page with the tables that it asks for.

    Raises:
        ValueError: README has none of that name.
    """
    known = tables(readme)

    def fill(found: re.Match[str]) -> str:
        name = found.group(1)
        if not known.get(name):
            raise ValueError(f"README.md has no table {name!r}; it has {', '.join(known)}")
        return known[name]

    return MARKER.sub(fill, text)


def as_markdown(text: str) -> str:
    """A docstring whose literal blocks and doctests Markdown shows as code.

    >>> print(as_markdown("Half::\\n\\n    y = x / 2\\n\\n>>> 4 / 2\\n2.0"))
    Half:
    <BLANKLINE>
    ```text
    y = x / 2
    ```
    <BLANKLINE>
    ```pycon
    >>> 4 / 2
    2.0
    ```
    """
    text = inspect.cleandoc(text)
    text = _LITERAL.sub(lambda found: f":\n\n```text\n{inspect.cleandoc(found.group(1))}\n```", text)
    text = re.sub(r"^:\n\n(?=```text)", "", text, flags=re.M)
    return _DOCTEST.sub(lambda found: f"```pycon\n{found.group().rstrip()}\n```", text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page."""
    return with_tables(markdown, (ROOT / "README.md").read_text())


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this with the files of the site."""
    from mkdocs.structure.files import File

    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files
