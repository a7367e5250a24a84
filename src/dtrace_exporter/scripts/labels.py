"""Finds labels for the keys of a script's aggregations, from the expressions in the script."""

from __future__ import annotations

from collections.abc import Sequence

from dtrace_exporter.scripts.lexer import Token, closing, separated

RESERVED = frozenset({"host", "le"})
"""Labels that scripts cannot have: ``host`` is for other hosts, ``le`` for histograms."""

Expression = Sequence[Token]

# Functions that return their argument in another form, and those that the value is named after.
_TRANSPARENT = {
    *("basename", "cleanpath", "copyinstr", "d_path", "ddi_pathname", "dirname", "htonl", "htonll"),
    *("htons", "inet_ntoa", "inet_ntoa6", "lltostr", "ntohl", "ntohll", "ntohs", "stringof"),
    *("strtok", "substr", "tolower", "toupper"),
}
_NAMING = {"func", "jstack", "mod", "stack", "sym", "ufunc", "umod", "ustack", "usym"}


def labels(assigned: Sequence[Sequence[Expression]]) -> tuple[str, ...]:
    """Name the keys of an aggregation.

    Args:
        assigned: the keys of each assignment to it; all have the same number of keys.

    Returns:
        A name for each key, all different and fit for Prometheus. It is the name that all
        assignments agree on, apart from literals such as "total". It is empty if a key is always
        the same literal.
    """
    names: list[str] = []
    for number, keys in enumerate(zip(*assigned, strict=True), 1):
        if all(map(_literal, keys)) and len({key[0].text for key in keys}) == 1:
            names.append("")
            continue
        told = {_name(key) for key in keys if not _literal(key)}
        name = told.pop().strip("_") if len(told) == 1 else ""
        if not name or name[0].isdecimal():
            name = f"key{number}"
        elif name in RESERVED or name in names:
            name = f"{name}_{number}"
        while name in names:
            name += "_"
        names.append(name)
    return tuple(names)


def _literal(expression: Expression) -> bool:
    return len(expression) == 1 and expression[0].kind in ("string", "number")


def _name(expression: Expression) -> str:
    """Return a name for an expression, or an empty string if there is none."""
    marks = [token.text for token in expression]
    if "?" in marks and ":" in marks:
        # In CONDITION ? A : B, the one that is not a literal.
        question, colon = marks.index("?"), len(marks) - 1 - marks[::-1].index(":")
        either = (expression[question + 1 : colon], expression[colon + 1 :])
        names = {_name(each) for each in either if not _literal(each)}
        return names.pop() if len(names) == 1 else ""
    return _operand_name(_operand(expression))


def _operand(expression: Expression) -> Expression:
    """Return an expression without casts, translations and dereferences at its beginning."""
    rest = [*expression]
    while rest:
        behind = closing(rest, 0) + 1
        if rest[0].text in ("*", "&"):
            del rest[0]
        elif rest[0].text == "xlate":
            marks = [token.text for token in rest]
            del rest[: marks.index(">") + 1 if ">" in marks else 1]
        elif rest[0].text == "(" and behind < len(rest) and _begins(rest[behind]):
            del rest[:behind]
        else:
            break
    return rest


def _begins(token: Token) -> bool:
    """Return whether a token begins an operand, so that brackets before it are a cast."""
    return token.kind in ("name", "macro") or token.text in ("(", "*", "&")


def _operand_name(operand: Expression) -> str:
    """Return the name of the last member, such as d in ``a[b].c->d``, or of an argument."""
    if not operand:
        return ""
    name, at = "", 1
    if operand[0].kind in ("name", "macro"):
        name = operand[0].text.lstrip("$").rpartition("`")[2]
    elif operand[0].text == "(":
        at = closing(operand, 0) + 1
        name = _name(operand[1 : at - 1])
    while name and at < len(operand):
        token, end = operand[at], closing(operand, at)
        if token.text in ("->", ".") and at + 1 < len(operand):
            end = at + 1
            name = operand[end].text
        elif token.text == "(" and at == 1 and name in _TRANSPARENT:
            name = _name(next(iter(separated(operand[2:end])), ()))
        elif token.text == "[":
            if name == "args" and end == at + 2:
                name += operand[at + 1].text
        elif not (token.text == "(" and at == 1 and name in _NAMING):
            return ""
        at = end + 1
    return name
