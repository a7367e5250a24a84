"""Makes of a script the text that runs: adds clauses and statements that print rows.

The lines of the script keep their numbers. Three clauses come after it: one prints that the script
runs, one prints each aggregation at every tick, and one does so at the end. A row is

    newline, 0x1e, TOKEN, blank, what it is, 0x1f and key, ..., 0x1f and value, 0x1e, newline

TOKEN is different in each run, so that no other output can be mistaken for a row.

Before clear() and trunc() the values that they remove are printed as final rows. On Sun's engine
this is exact, because all statements of a clause work on one snapshot. On Linux, events between the
snapshot and the removal are lost. So there, a clear() of an aggregation that only adds up is left
out, which changes no metric. A trunc() stays, because scripts use it to remove keys; the events in
the meantime are lost.

A trunc() that keeps some keys is left out on all systems, because it is not known which keys go on.
For minima, averages and the like, clear() is replaced by trunc(): after a clear(), Linux's DTrace
prints +-2^63 for some and aborts at others.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator

from dtrace_exporter.scripts.lexer import Token, closing, separated, tokens, written
from dtrace_exporter.scripts.reader import Script, ScriptError, Source

Conversions = tuple[tuple[str, ...], ...]
"""For each key of each aggregation the letter of printa()'s conversion."""

NUMBER, POINTER, STRING, STACK, SYMBOL, USER_SYMBOL = "dpSkaA"
"""The conversions that keys may have."""

LINUX, SUN = "linux", "sun"
"""The engines."""

ADDING = frozenset({"count", "sum", "quantize", "lquantize", "llquantize"})
"""The functions whose values add up: an aggregation that is never emptied has all of them."""

# The last setting of an option counts, also over those of included files, -x and -w. Other values
# of these options would delay the rows or change their format.
_OPTIONS = {"agghist": "unset", "aggpack": "unset", "aggzoom": "unset", "bufpolicy": "switch"}
_ALWAYS = "#pragma D option quiet\n#pragma D option destructive=unset\n"


def new_token() -> str:
    """Return a mark for the rows of one run that nobody can guess."""
    return f"t{secrets.token_hex(8)}"


def render(
    script: Script, conversions: Conversions, *, engine: str, interval: float, token: str
) -> str:
    """Return the text that runs.

    Args:
        script: the script.
        conversions: those of its keys.
        engine: LINUX or SUN.
        interval: the time between two ticks, in seconds.
        token: the mark of the rows, as new_token() returns it.

    Raises:
        ScriptError: a statement that empties an aggregation is in a place where no other statement
            can be put before it, or this engine cannot print a key.
    """
    if engine == LINUX:
        _refuse_user_symbols(script, conversions)
    text = _Text(script, conversions, engine, token)
    every = "".join(f"\t{row}\n" for row in text.rows())
    told = f"{{\n{every}\t{_printf(f'{token} tick %d', ', timestamp')}\n}}\n"
    begin = f"BEGIN\n{{\n\t{_printf(f'{token} ready')}\n}}\n"
    tick = f"tick-{round(interval * 1000)}ms"
    return f"{text.body()}\n\n{begin}{tick}\n{told}END\n{told}{_options(script)}"


def question(script: Script, conversions: Conversions) -> tuple[str, int]:
    """Return a text that compiles if the conversions of the keys are right.

    Returns:
        The text, and the number of the line that prints the first aggregation. The lines of the
        others follow.
    """
    text = _Text(script, conversions, SUN, new_token())
    before = f"{_blanked(script.text)}\n\nBEGIN {{\n"
    rows = "".join(f"{row}\n" for row in text.rows())
    return f"{before}{rows}}}\n{_options(script)}", before.count("\n") + 1


def counted(function: str, engine: str) -> bool:
    """Return whether a row has a second value, the number of values that were aggregated.

    Linux's printa() ignores the sign of the sum in avg(), so the average of negative values looks
    like any other (pfprint_average() in libdtrace's dt_printf.c). The number makes this visible.
    """
    return engine == LINUX and function == "avg"


def _refuse_user_symbols(script: Script, conversions: Conversions) -> None:
    """Refuse keys of symbols of processes, except umod(): dtrace(1) aborts when it prints them.

    They have 16 bytes, which pfprint_uaddr() in libdtrace's dt_printf.c does not expect.
    """
    for each, letters in zip(script.aggregations, conversions, strict=True):
        for key, letter in zip(each.keys, letters, strict=True):
            if letter == USER_SYMBOL and not key.startswith("umod"):
                found = f"{script.path}:{each.line}: the key {key}"
                raise ScriptError(f"{found}, expected umod() or ustack(1): Linux cannot print it")


def _printf(row: str, values: str = "") -> str:
    return f'printf("\\n\\036{row}\\036\\n"{values});'


def _options(script: Script) -> str:
    controls = (token.text for token in tokens(script.text) if token.kind == "control")
    said = " ".join((*controls, *script.flags))
    lines = [
        f"#pragma D option {name}={value}\n" for name, value in _OPTIONS.items() if name in said
    ]
    return "".join((*lines, _ALWAYS))


def _blanked(text: str) -> str:
    # For cpp(1) this would be a directive.
    return re.sub(r"\A#!.*", "", text)


class _Text:
    """A script, and the statements that print its aggregations."""

    def __init__(self, script: Script, conversions: Conversions, engine: str, token: str) -> None:
        self._script = script
        self._source = Source(script.path, script.text)
        self._conversions = conversions
        self._engine = engine
        self._token = token
        named = {f"@{each.name}": index for index, each in enumerate(script.aggregations)}
        # @_ is another name of the anonymous one.
        self._named = named | ({"@_": named["@"]} if "@" in named else {})
        self._normalized = {
            self._named[arguments[0][0].text] for _, _, arguments in self._calls("normalize")
        }

    def rows(self) -> Iterator[str]:
        """Yield the statements that print each aggregation."""
        for index in range(len(self._script.aggregations)):
            yield self._row("row", index)

    def body(self) -> str:
        """Return the script with final rows, and on Linux with counters for averages."""
        text = self._script.text
        for start, end, new in sorted([*self._emptied(), *self._counters()], reverse=True):
            lines = text.count("\n", start, end)
            text = text[:start] + new + "\n" * lines + text[end:]
        return _blanked(text)

    def _row(self, kind: str, index: int) -> str:
        name = f"@{self._script.aggregations[index].name}"
        keys = "".join(f"\\037%{letter}" for letter in self._conversions[index])
        values, names = "\\037%@d", name
        if self._counted(index):
            values, names = values * 2, f"{name}, {self._counter(index)}"
        raw = f"denormalize({name}); " if index in self._normalized else ""
        row = f"\\n\\036{self._token} {kind} {index}{keys}{values}\\036\\n"
        return f'{raw}printa("{row}", {names});'

    def _counted(self, index: int) -> bool:
        return counted(self._script.aggregations[index].function, self._engine)

    def _counter(self, index: int) -> str:
        return f"@{self._token}_{index}"

    def _calls(self, *names: str) -> Iterator[tuple[int, int, list[tuple[Token, ...]]]]:
        """Yield where calls of some functions with an aggregation begin and end."""
        given = self._source.tokens
        for index, token in enumerate(given[:-2]):
            if token.kind == "name" and token.text in names and given[index + 1].text == "(":
                end = closing(given, index + 1)
                arguments = separated(given[index + 2 : end])
                if arguments and written(arguments[0]) in self._named:
                    yield index, end, arguments

    def _emptied(self) -> Iterator[tuple[int, int, str]]:
        """Yield the replacement of each clear() and trunc(), with its begin and end."""
        given = self._source.tokens
        for at, end, arguments in self._calls("clear", "trunc"):
            self._must_begin_a_statement(at)
            index = self._named[arguments[0][0].text]
            adds = self._script.aggregations[index].function in ADDING
            if len(arguments) > 1:
                new = self._kept(index, arguments[1])
            elif given[at].text == "clear" and adds and self._engine == LINUX:
                new = ""
            else:
                action = "clear" if given[at].text == "clear" and adds else "trunc"
                names = [f"@{self._script.aggregations[index].name}"]
                if self._counted(index):
                    names.append(self._counter(index))
                calls = "; ".join(f"{action}({name})" for name in names)
                new = f"{self._row('final', index)} {calls}"
            yield given[at].start, given[end].end, new

    def _kept(self, index: int, number: tuple[Token, ...]) -> str:
        """Return a statement that uses the macros of a trunc() that is left out.

        DTrace refuses a script that does not use all of its arguments.
        """
        if not any(token.kind == "macro" for token in number):
            return ""
        return f"normalize(@{self._script.aggregations[index].name}, 1 + 0 * ({written(number)}))"

    def _counters(self) -> Iterator[tuple[int, int, str]]:
        """Yield the statements that count the values of averages, and where to insert them."""
        starts = {token.start: at for at, token in enumerate(self._source.tokens)}
        for each in self._source.assignments():
            index = self._named[f"@{each.name}"]
            if self._counted(index):
                self._must_begin_a_statement(starts[each.start])
                keys = f"[{', '.join(map(written, each.keys))}]" if each.keys else ""
                yield each.start, each.start, f"{self._counter(index)}{keys} = count(); "

    def _must_begin_a_statement(self, at: int) -> None:
        given = self._source.tokens
        if given[at - 1].text not in ("{", "}", ";"):
            found = f"{given[at].text} behind {given[at - 1].text}"
            raise self._source.error(given[at].start, found, "it behind { or ; or }")
