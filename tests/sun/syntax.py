"""The text of a D program, parsed into a tree: the parts of D that this project's programs use.

Words of D that are not used here (translators, offsetof, macro variables and so on) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class ProgramError(Exception):
    """A program that dtrace(1) would not run.

    Args:
        message: the error, in dtrace(1)'s words.
        line: the line; 0 if dtrace(1) does not give it.
    """

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


class OptionError(ProgramError):
    """An option that does not exist, or that cannot have its value.

    Args:
        option: its name.
        value: the value that it should have.
        reason: the reason, in dtrace(1)'s words.
    """

    def __init__(self, option: str, value: str, reason: str) -> None:
        super().__init__(f"failed to set option '{option}' to '{value}': {reason}")
        self.option = option


class UndefinedError(ProgramError):
    """A name that has no meaning yet."""


class TypeName(NamedTuple):
    """A type as it is written: its name, and how many asterisks follow."""

    name: str
    stars: int


@dataclass(slots=True)
class Tree:
    """An expression.

    ``op`` is an operator, or the kind of another expression: number, string, name, aggregation,
    call, index, cast, sizeof, ?:. Unary operators are ``neg``, ``deref`` and so on, and steps are
    ``x++`` and ``++x``. ``text`` is a name, a string, or the suffix of a number.
    """

    op: str
    line: int
    kids: list[Tree] = field(default_factory=list)
    text: str = ""
    value: int = 0
    type: TypeName | None = None


@dataclass(slots=True)
class Declaration:
    """A variable's declaration: ``scope`` is global, self or this; only an array has ``keys``."""

    line: int
    scope: str
    type: TypeName
    name: str
    keys: list[TypeName] | None = None


@dataclass(slots=True)
class Inline:
    """An inline's definition."""

    line: int
    type: TypeName
    name: str
    value: Tree


@dataclass(slots=True)
class Clause:
    """A clause; ``probes`` has the line of each description."""

    probes: list[tuple[str, int]]
    predicate: Tree | None
    statements: list[Tree]


@dataclass(slots=True)
class Text:
    """A whole program."""

    options: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    parts: list[Declaration | Inline | Clause] = field(default_factory=list)


class Token(NamedTuple):
    """A token: its kind is number, string, name, aggregation, end or the operator itself."""

    kind: str
    text: str
    line: int


_SPACE = re.compile(r"(?:[\f\n\r\t\v ]+|\\\n)")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_CONTROL = re.compile(r"[\f\t\v ]*#[^\n]*")
_PRAGMA = re.compile(r"\s*#\s*pragma\s+D\s+option\s+(\w+)(?:=(\S+))?\s*$")
_PROBE = re.compile(r"[-$:a-zA-Z_.?*\\\[\]!][-$:0-9a-zA-Z_.`?*\\\[\]!]*")
_TOKEN = re.compile(
    r"""(?P<number>(?:0[xX][0-9a-fA-F]+|[0-9]+)[uU]?[lL]?[lL]?)
    |(?P<string>"(?:[^"\\\n]|\\.)*")
    |(?P<character>'(?:[^'\\\n]|\\.)+')
    |(?P<aggregation>@\w*)
    |(?P<name>[a-zA-Z_`][0-9a-zA-Z_`]*)
    |(?P<operator>\.\.\.|<<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\^\^|\|\||[-+*%&^|]=|[-+*%&|^~!<>=?:.,;(){}\[\]/])
    """,
    re.VERBOSE,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_PRECEDENCE = (
    ("||",),
    ("^^",),
    ("&&",),
    ("|",),
    ("^",),
    ("&",),
    ("==", "!="),
    ("<", "<=", ">", ">="),
    ("<<", ">>"),
    ("+", "-"),
    ("*", "/", "%"),
)
ASSIGNMENTS = ("=", "+=", "-=", "*=", "/=", "%=", "&=", "^=", "|=", "<<=", ">>=")
_UNARY = {"*": "deref", "&": "address", "-": "neg", "+": "pos", "!": "!", "~": "~"}
_ORDER = ("unsigned", "signed", "char", "short", "long", "int", "void", "string")
_TYPE_WORDS = frozenset([*_ORDER, "struct", "union", "enum", "const", "volatile"])
_REFUSED = frozenset(["translator", "provider", "xlate", "offsetof", "if", "else", "for", "while"])


def parse(text: str, is_type: Callable[[str], bool], comment_refused: bool) -> Text:
    """Parse a program.

    Args:
        text: the program.
        is_type: tells whether a name is that of a type.
        comment_refused: whether a comment after a predicate is an error, as for the old compiler.

    Raises:
        ProgramError: the text is not D, or uses parts of D that are not supported here.
    """
    return _Parser(text, is_type, comment_refused).program()


class _Parser:
    def __init__(self, text: str, is_type: Callable[[str], bool], comment_refused: bool) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._is_type = is_type
        self._comment_refused = comment_refused
        self._ahead: Token | None = None
        self._program = Text()
        self._variables: set[str] = set()

    def program(self) -> Text:
        """Parse the whole program."""
        while True:
            self._skip()
            if self._at == len(self._text):
                return self._program
            if self._at_declaration():
                self._declaration()
            else:
                self._clause()

    # Tokens

    def _skip(self) -> None:
        while True:
            line_start = self._text.rfind("\n", 0, self._at) + 1
            is_first = not self._text[line_start : self._at].strip()
            if is_first and (found := _CONTROL.match(self._text, self._at)):
                self._control(found[0])
            elif not (found := _SPACE.match(self._text, self._at)):
                if not self._text.startswith("/*", self._at):
                    return
                if not (found := _COMMENT.match(self._text, self._at)):
                    raise ProgramError("end-of-file encountered before matching */", self._line)
            self._line += found[0].count("\n")
            self._at = found.end()

    def _control(self, line: str) -> None:
        if line.lstrip().startswith("#!"):
            return
        if not (pragma := _PRAGMA.match(line)):
            raise ProgramError(f"invalid control directive: {line.strip()}", self._line)
        self._program.options[pragma[1]] = pragma[2] or ""
        self._program.lines[pragma[1]] = self._line

    def _peek(self) -> Token:
        if self._ahead is None:
            self._ahead = self._token()
        return self._ahead

    def _token(self) -> Token:
        self._skip()
        if self._at == len(self._text):
            return Token("end", "end of input", self._line)
        found = _TOKEN.match(self._text, self._at)
        if not found:
            raise ProgramError(f'syntax error near "{self._text[self._at]}"', self._line)
        kind, text = found.lastgroup or "", found[0]
        if text == "/" and self._text.startswith("/=", self._at):
            text = "/="
        self._at += len(text)
        if text == "/":
            text = self._slash()
        if kind == "operator":
            kind = text
        elif kind == "string":
            text = _unescape(text[1:-1])
        elif kind == "character":
            kind, text = "number", str(int.from_bytes(_unescape(text[1:-1]).encode(), "big"))
        return Token(kind, text, self._line)

    def _slash(self) -> str:
        """Distinguish a division from the end of a predicate by the next character."""
        following = self._text[self._at :].lstrip("\f\n\r\t\v ")[:1]
        closing = {"", ";", "{"} if self._comment_refused else {"", ";", "{", "/"}
        return "end of predicate" if following in closing else "/"

    def _next(self, *wanted: str) -> Token:
        token = self._peek()
        if wanted and token.kind not in wanted:
            raise _near(token)
        self._ahead = None
        return token

    def _accept(self, kind: str) -> bool:
        if self._peek().kind != kind:
            return False
        self._ahead = None
        return True

    # Declarations and clauses

    def _at_declaration(self) -> bool:
        found = _PROBE.match(self._text, self._at)
        word = found[0] if found else ""
        if ":" in word:
            return False
        name = word.partition("*")[0]
        return name in _TYPE_WORDS | {"inline", "self", "this"} | _REFUSED or self._is_type(name)

    def _declaration(self) -> None:
        line = self._line
        scope = "global"
        word = self._peek().text
        if word in _REFUSED:
            raise ProgramError(f"{word} is not simulated", line)
        if word in {"inline", "self", "this"}:
            scope = self._next().text
        base = self._type_words()
        while True:
            type_ = TypeName(base, self._stars())
            name = self._next("name").text
            self._variables.add(name)
            if scope == "inline":
                self._next("=")
                self._program.parts.append(Inline(line, type_, name, self._assignment()))
            else:
                keys = self._keys() if self._peek().kind == "[" else None
                self._program.parts.append(Declaration(line, scope, type_, name, keys))
            if not self._accept(","):
                break
        self._next(";")

    def _keys(self) -> list[TypeName]:
        self._next("[")
        if not self._at_type():
            raise ProgramError("arrays of a fixed size are not simulated", self._peek().line)
        keys = [TypeName(self._type_words(), self._stars())]
        while self._accept(","):
            keys.append(TypeName(self._type_words(), self._stars()))
        self._next("]")
        return keys

    def _type_words(self) -> str:
        words: list[str] = []
        while self._peek().kind == "name":
            word = self._peek().text
            if word in {"struct", "union", "enum"}:
                self._next()
                return f"{word} {self._next('name').text}"
            if word in {"const", "volatile"}:
                self._next()
            elif word in _TYPE_WORDS or (not words and self._is_type(word)):
                words.append(self._next().text)
                if words[-1] not in _TYPE_WORDS:
                    return words[-1]
            else:
                break
        if not words:
            raise ProgramError(f'syntax error near "{self._peek().text}"', self._peek().line)
        words.sort(key=_ORDER.index)
        if words in (["unsigned"], ["signed"]):
            words.append("int")
        if len(words) > 1 and words[-1] == "int" and words[-2] in {"short", "long"}:
            words.pop()
        if words[0] == "signed" and words[1:] != ["char"]:
            del words[0]
        return " ".join(words)

    def _stars(self) -> int:
        stars = 0
        while self._accept("*"):
            stars += 1
        return stars

    def _at_type(self) -> bool:
        token = self._peek()
        return token.kind == "name" and (
            token.text in _TYPE_WORDS
            or (self._is_type(token.text) and token.text not in self._variables)
        )

    def _clause(self) -> None:
        probes = []
        while True:
            self._skip()
            found = _PROBE.match(self._text, self._at)
            if not found:
                near = self._text[self._at : self._at + 1] or "end of input"
                raise ProgramError(f'syntax error near "{near}"', self._line)
            if found[0].count(":") > 3:
                what = "Overspecified probe description"
                raise ProgramError(f'invalid probe description "{found[0]}": {what}', self._line)
            probes.append((found[0], self._line))
            self._at = found.end()
            self._skip()
            if self._text[self._at : self._at + 1] != ",":
                break
            self._at += 1
        predicate = None
        if self._text[self._at : self._at + 1] == "/":
            self._at += 1
            predicate = self._expression()
            self._next("end of predicate")
        if self._peek().kind != "{":
            message = "expected predicate and/or actions following probe description"
            if predicate:
                message = "expected actions { } following probe description and predicate"
            raise ProgramError(message, probes[-1][1])
        self._next()
        statements = []
        while not self._accept("}"):
            if self._accept(";"):
                continue
            if self._peek().text in _REFUSED:
                raise ProgramError(f"{self._peek().text} is not simulated", self._peek().line)
            statements.append(self._expression())
            if self._peek().kind != "}":
                self._next(";")
        self._program.parts.append(Clause(probes, predicate, statements))

    # Expressions

    def _expression(self) -> Tree:
        tree = self._assignment()
        while self._peek().kind == ",":
            line = self._next().line
            tree = Tree(",", line, [tree, self._assignment()])
        return tree

    def _assignment(self) -> Tree:
        tree = self._conditional()
        if self._peek().kind in ASSIGNMENTS:
            token = self._next()
            return Tree(token.kind, token.line, [tree, self._assignment()])
        return tree

    def _conditional(self) -> Tree:
        tree = self._binary(0)
        if self._peek().kind != "?":
            return tree
        line = self._next().line
        yes = self._expression()
        self._next(":")
        return Tree("?:", line, [tree, yes, self._conditional()])

    def _binary(self, level: int) -> Tree:
        if level == len(_PRECEDENCE):
            return self._cast()
        tree = self._binary(level + 1)
        while self._peek().kind in _PRECEDENCE[level]:
            token = self._next()
            tree = Tree(token.kind, token.line, [tree, self._binary(level + 1)])
        return tree

    def _cast(self) -> Tree:
        if self._peek().kind == "(":
            line = self._next().line
            if not self._at_type():
                tree = self._expression()
                self._next(")")
                return self._postfix(tree)
            type_ = TypeName(self._type_words(), self._stars())
            self._next(")")
            return Tree("cast", line, [self._cast()], type=type_)
        return self._unary()

    def _unary(self) -> Tree:
        token = self._peek()
        if token.kind in _UNARY:
            self._next()
            return Tree(_UNARY[token.kind], token.line, [self._cast()])
        if token.kind in {"++", "--"}:
            self._next()
            return Tree(f"{token.kind}x", token.line, [self._unary()])
        if token.text == "sizeof" and token.kind == "name":
            self._next()
            return self._sizeof(token.line)
        if token.text == "stringof" and token.kind == "name":
            self._next()
            return Tree("stringof", token.line, [self._unary()])
        return self._postfix(self._primary())

    def _sizeof(self, line: int) -> Tree:
        if self._peek().kind != "(":
            return Tree("sizeof", line, [self._unary()])
        self._next()
        if self._at_type():
            type_ = TypeName(self._type_words(), self._stars())
            self._next(")")
            return Tree("sizeof", line, type=type_)
        tree = self._expression()
        self._next(")")
        return Tree("sizeof", line, [self._postfix(tree)])

    def _primary(self) -> Tree:
        token = self._next()
        if token.kind == "number":
            digits = token.text.rstrip("uUlL")
            octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xX"
            value = int(digits, 8 if octal else 0)
            return Tree("number", token.line, text=token.text, value=value)
        if token.kind == "(":
            tree = self._expression()
            self._next(")")
            return tree
        if token.kind not in {"string", "name", "aggregation"}:
            raise _near(token)
        return Tree(token.kind, token.line, text=token.text)

    def _postfix(self, tree: Tree) -> Tree:
        while True:
            token = self._peek()
            if token.kind in {"->", "."}:
                self._next()
                tree = Tree(token.kind, token.line, [tree], self._next("name").text)
            elif token.kind == "[":
                self._next()
                tree = Tree("index", token.line, [tree, *self._arguments("]")])
            elif token.kind == "(":
                self._next()
                if tree.op != "name":
                    message = "function designator is not of function type"
                    raise ProgramError(message, token.line)
                tree = Tree("call", tree.line, self._arguments(")"), tree.text)
            elif token.kind in {"++", "--"}:
                self._next()
                tree = Tree(f"x{token.kind}", token.line, [tree])
            else:
                return tree

    def _arguments(self, end: str) -> list[Tree]:
        if self._accept(end):
            return []
        arguments = [self._assignment()]
        while self._accept(","):
            arguments.append(self._assignment())
        self._next(end)
        return arguments


def _near(token: Token) -> ProgramError:
    what = token.text if token.kind == "end" else f'"{token.text}"'
    return ProgramError(f"syntax error near {what}", token.line)


def _unescape(text: str) -> str:
    def one(found: re.Match[str]) -> str:
        if found[1][0] == "x" and len(found[1]) > 1:
            return chr(int(found[1][1:], 16) & 0xFF)
        if found[1].isdigit():
            return chr(int(found[1], 8) & 0xFF)
        return _ESCAPES.get(found[1], found[1])

    return re.sub(r"\\(x[0-9a-fA-F]+|[0-7]{1,3}|.)", one, text)
