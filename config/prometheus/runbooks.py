"""Write the runbooks as a console that Prometheus serves: ``python config/prometheus/runbooks.py``.

It is docs/runbooks.md as HTML, with the anchors that the alerts' runbook_url names. A link to
another page of the documentation becomes that page's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "docs/runbooks.md"
TARGET = HERE / "consoles/dtrace-exporter-runbooks.html"

_HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Runbooks of dtrace-exporter</title>
<style>
body { max-width: 50rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; }
th, td { padding: .25rem .5rem; border: 1px solid; text-align: start; vertical-align: top; }
code { overflow-wrap: anywhere; }
:target { text-decoration: underline; }
</style>
</head>
<body>
"""
_SPAN = re.compile(r"`(?P<code>[^`]+)`|\*\*(?P<bold>.+?)\*\*|\[(?P<text>[^]]+)\]\((?P<to>[^)]+)\)")


def render(markdown: str) -> str:
    """Return the console that is made of the text of the runbooks."""
    blocks = (html for block in markdown.strip().split("\n\n") for html in _block(block))
    # A console is a template, in which two braces begin something.
    body = "\n".join(blocks).replace("{{", "{<!-- -->{")
    return f"{_HEAD}{body}\n</body>\n</html>\n"


def _block(block: str) -> Iterator[str]:
    """Yield the elements of what stands between two empty lines."""
    if heading := re.fullmatch(r"(#+) (.+)", block):
        level = len(heading[1])
        anchor = re.sub(r"[^\w\- ]", "", heading[2].lower()).replace(" ", "-")
        yield f'<h{level} id="{anchor}">{_spans(heading[2])}</h{level}>'
        return
    for kind, lines in groupby(_joined(block), _kind):
        if kind == "|":
            yield _table(list(lines))
        elif kind == "-":
            items = (f"<li>{_spans(line[2:])}</li>" for line in lines)
            yield "\n".join(["<ul>", *items, "</ul>"])
        else:
            yield f"<p>{_spans(' '.join(lines))}</p>"


def _kind(line: str) -> str:
    return line[0] if line.startswith(("|", "- ")) else ""


def _joined(block: str) -> list[str]:
    """Return the lines of a block, an item's together."""
    return re.sub(r"\n +", " ", block).splitlines()


def _table(lines: list[str]) -> str:
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    titles = (f"<th>{_spans(cell)}</th>" for cell in head)
    body = ["".join(f"<td>{_spans(cell)}</td>" for cell in row) for row in rows]
    lines = [f"<tr>{cells}</tr>" for cells in ("".join(titles), *body)]
    return "\n".join(["<table>", *lines, "</table>"])


def _spans(text: str) -> str:
    """Return a text with its code, bold words and links."""
    html, at = "", 0
    for found in _SPAN.finditer(text):
        html += escape(text[at : found.start()], quote=False)
        at = found.end()
        if found["code"]:
            html += f"<code>{escape(found['code'], quote=False)}</code>"
        elif found["bold"]:
            html += f"<strong>{_spans(found['bold'])}</strong>"
        elif found["to"].startswith("#"):
            html += f'<a href="{escape(found["to"])}">{_spans(found["text"])}</a>'
        else:
            page = (SOURCE.parent / found["to"].partition("#")[0]).resolve()
            name = page.relative_to(SOURCE.parents[1]).as_posix()
            html += f"{_spans(found['text'])} (<code>{name}</code>)"
    return html + escape(text[at:], quote=False)


if __name__ == "__main__":
    TARGET.write_text(render(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
