"""Pages that hold their pictures, open offline and fit a phone."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 0 1rem 3rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: 0.9rem; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
img { display: block; width: 100%; max-width: 44rem; height: auto; }
.wide img { min-width: 44rem; max-width: none; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.7rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.kmer { font-family: ui-monospace, monospace; }
nav a { display: inline-block; margin-right: 1rem; }
.hint { display: none; color: #555; font-size: 0.9rem; }
@media (max-width: 47rem) { .hint { display: block; } th, td { padding: 0.2rem 0.35rem; } }
"""
_SPELLED = ("k-mer", "motif")  # columns of letters


def html_page(title: str, introduction: str, links: Mapping[str, str], sections: Iterable[str]) -> str:
    """A page of sections.

    Args:
        title: its heading.
        introduction: a paragraph below.
        links: names of sections by their `id`.
        sections: HTML.
    """
    shown = "".join(f'<a href="#{place}">{html_text(name)}</a>' for place, name in links.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html_text(title)}</h1>
<p>{html_text(introduction)}</p>
<p class="hint">Wide pictures and tables scroll sideways.</p>
<nav>{shown}</nav>
{"".join(sections)}
</body>
</html>
"""


def html_figure(path: Path, caption: str, is_wide: bool = True) -> str:
    """A picture (SVG) with its caption, held in the page.

    Args:
        path: of the picture.
        caption: below it, and what is read aloud.
        is_wide: whether it would be too small on a phone, and scrolls there.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{html_text(caption)}" src="data:image/svg+xml;base64,{data}">'
    words = f"<figcaption>{html_text(caption)}</figcaption>"
    return f"<figure>{_scrolled(image) if is_wide else image}{words}</figure>\n"


def html_table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers are written with four digits."""
    lines = ["<tr>" + "".join(f'<th scope="col">{html_text(heading)}</th>' for heading in headings) + "</tr>"]
    lines += ["<tr>" + "".join(map(_cell, headings, row)) + "</tr>" for row in rows]
    return _scrolled("<table>\n" + "\n".join(lines) + "\n</table>") + "\n"


def html_text(value: Any) -> str:
    """Any value as text of a page."""
    return html.escape(str(value))


def _scrolled(content: str) -> str:
    """Content that scrolls by itself where it is wider than the screen, by keyboard too."""
    return f'<div class="wide" tabindex="0">{content}</div>'


def _cell(heading: str, value: Any) -> str:
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    return f'<td class="kmer">{html_text(value)}</td>' if heading in _SPELLED else f"<td>{html_text(value)}</td>"
