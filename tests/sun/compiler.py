"""A compiled D program: what each clause computes, records and aggregates at each probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sun.c_types import Type
from sun.expressions import (
    ACTIONS,
    AGGREGATING,
    Checker,
    Node,
    Variable,
    is_char,
    is_scalar,
    is_string,
)
from sun.generate import LAST_REGISTER, Difo, Generator
from sun.output import Format
from sun.rules import Rules, System
from sun.syntax import (
    Clause,
    Declaration,
    Inline,
    OptionError,
    ProgramError,
    Tree,
    UndefinedError,
    parse,
)

_PASSED = "{}( ) prototype mismatch: {} arg{} passed, {} expected"


@dataclass(eq=False, slots=True)
class Aggregation:
    """An aggregation: its function, and the types of its keys at its first use."""

    name: str
    function: str
    keys: list[Type]
    line: int


@dataclass(eq=False, slots=True)
class Action:
    """One step of a clause, as the kernel counts them.

    Args:
        kind: expression, record, key or aggregate.
        difo: the expression to evaluate; None for count().
        size: the number of recorded bytes.
        is_text: whether the bytes are a string.
        aggregation: the aggregation, for kind aggregate.
        record_size: its size in the aggregation buffer; limits.lay_out() finds it.
        mask: the bits of a number that are recorded.
        run: the compiled code; None for a constant that is never read.
    """

    kind: str
    difo: Difo | None
    size: int = 0
    is_text: bool = False
    aggregation: Aggregation | None = None
    record_size: int = 0
    mask: int = 0
    run: Callable[[Any], Any] | None = None


@dataclass(eq=False, slots=True)
class Statement:
    """What dtrace(1) does with a record.

    Args:
        kind: printf, printa, trunc, clear or exit.
        first: the index of its first value in the record.
        count: the number of its values.
        format: the format of printf and printa.
        aggregations: the aggregations of printa, trunc and clear.
    """

    kind: str
    first: int
    count: int
    format: Format | None = None
    aggregations: list[Aggregation] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Compiled:
    """A clause for one of its probes.

    Args:
        probe: the description of the probe.
        line: the line of the description.
        predicate: the predicate; None if there is none.
        actions: the actions, in order.
        statements: the statements, in order.
        test: the predicate's compiled code.
        source: the clause as it was read.
    """

    probe: str
    line: int
    predicate: Difo | None = None
    actions: list[Action] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    test: Callable[[Any], Any] | None = None
    source: Clause | None = None

    @property
    def difos(self) -> list[Difo]:
        """All compiled expressions of the clause."""
        found = [self.predicate, *(action.difo for action in self.actions)]
        return [difo for difo in found if difo]

    @property
    def aggregates(self) -> bool:
        """Whether the clause aggregates something."""
        return any(action.kind == "aggregate" for action in self.actions)


@dataclass(slots=True)
class Program:
    """A compiled program.

    Args:
        options: the options of its pragmas.
        clauses: the clauses, one for each probe.
        globals: for each plain global variable whether it is a string.
        locals: for each ``this->`` variable whether it is a string.
    """

    options: dict[str, str]
    clauses: list[Compiled] = field(default_factory=list)
    globals: list[bool] = field(default_factory=list)
    locals: list[bool] = field(default_factory=list)

    def new_globals(self) -> list[Any]:
        """Return the initial plain global variables: 0, or empty strings."""
        return [b"" if is_text else 0 for is_text in self.globals]

    def new_locals(self) -> list[Any]:
        """Return the initial ``this->`` variables."""
        return [b"" if is_text else 0 for is_text in self.locals]


class Compiler:
    """Compiles a program.

    Args:
        checker: has the types and symbols to use.
        rules: the rules of the engine.
        system: the system that will run the program.
    """

    def __init__(self, checker: Checker, rules: Rules, system: System) -> None:
        self._checker = checker
        self._rules = rules
        self._system = system
        self._aggregations: dict[str, Aggregation] = {}
        self._small_unsigned = system.old_compiler and rules.small_unsigned
        self._size = 0

    def compile(self, text: str, string_size: Callable[[dict[str, str]], int]) -> Program:
        """Compile a program.

        Args:
            text: the program.
            string_size: returns the size of strings by its options.

        Raises:
            ProgramError: it cannot be compiled.
        """
        rules, system = self._rules, self._system
        refused = rules.comment_refused and system.old_compiler
        tree = parse(text, lambda name: self._checker.types.find(name) is not None, refused)
        try:
            self._size = string_size(tree.options)
        except OptionError as error:
            error.line = tree.lines.get(error.option, 0)
            raise
        self._generator = Generator(self._checker, rules, system, self._size)
        program = Program(tree.options)
        for part in tree.parts:
            if isinstance(part, Declaration):
                self._declare(part)
            elif isinstance(part, Inline):
                self._inline(part)
            else:
                for probe, line in part.probes:
                    program.clauses.append(self._clause(part, probe, line))
        if not program.clauses:
            raise ProgramError("empty D program translation unit", 1)
        scopes = self._checker.scopes
        program.globals, program.locals = (_strings(scopes[n].values()) for n in ("global", "this"))
        return program

    def _declare(self, part: Declaration) -> None:
        checker = self._checker
        type_ = checker.named(part.type, part.line)
        keys = None if part.keys is None else [checker.named(key, part.line) for key in part.keys]
        if keys is not None and part.scope == "this":
            message = f"clause-local variable may not be declared as associative array: {part.name}"
            raise ProgramError(message, part.line)
        if not is_scalar(type_) and not is_string(type_):
            raise ProgramError(f"variables of type {type_} are not simulated", part.line)
        checker.declare(part.line, part.name, part.scope, type_, keys)

    def _inline(self, part: Inline) -> None:
        checker = self._checker
        type_ = checker.named(part.type, part.line)
        value = checker.check(part.value)
        if not checker.fits(type_, value):
            message = f"inline {part.name} definition uses incompatible types"
            raise ProgramError(f'{message}: "{type_}" = "{value.type}"', part.line)
        if part.name in checker.scopes["global"]:
            message = f"identifier redefined: {part.name}\n\t current: inline definition"
            before = checker.scopes["global"][part.name]
            kind = "inline" if before.scope == "inline" or part.name == "cpu" else before.type
            raise ProgramError(f"{message}\n\tprevious: scalar {kind}", part.line)
        checker.scopes["global"][part.name] = Variable(part.name, "inline", type_, value=value)

    # A clause.

    def _clause(self, part: Clause, probe: str, line: int) -> Compiled:
        """Compile a clause for one probe; its predicate may use variables of its actions."""
        compiled = Compiled(probe, line, source=part)
        try:
            self._statements(compiled, part)
            self._predicate(compiled, part)
        except UndefinedError:
            if part.predicate is None:
                raise
            compiled = Compiled(probe, line, source=part)
            self._predicate(compiled, part)
            self._statements(compiled, part)
        return compiled

    def _predicate(self, compiled: Compiled, part: Clause) -> None:
        if part.predicate is None:
            return
        node = self._checker.check(part.predicate)
        if not is_scalar(node.type):
            raise ProgramError("predicate result must be of scalar type", part.predicate.line)
        compiled.predicate = self._generator.difo(node)

    def _statements(self, compiled: Compiled, part: Clause) -> None:
        for tree in part.statements:
            if tree.op == "call" and tree.text in ACTIONS:
                self._action(compiled, tree)
            elif tree.op == "=" and _aggregation_of(tree.kids[0]):
                self._aggregate(compiled, tree)
            elif _aggregation_of(tree):
                name = _aggregation_of(tree)
                message = f"expression has null effect: {name}"
                if name not in self._aggregations:
                    message = f"failed to resolve {name}: Unknown variable name"
                raise ProgramError(message, tree.line)
            else:
                difo = self._generator.difo(self._checker.check(tree))
                difo.type = self._checker.types.void
                compiled.actions.append(Action("expression", difo))

    def _record(self, compiled: Compiled, difo: Difo, kind: str = "record") -> None:
        text = is_string(difo.type)
        chars = difo.type.base.kind == "array" and is_char(difo.type.base.target)
        size = self._size if text else difo.type.byte_size()
        if difo.is_constant:
            size = 8
        if difo.type.by_reference and not text and not chars:
            raise ProgramError(f"records of a {difo.type} are not simulated")
        text = text or chars
        compiled.actions.append(Action(kind, difo, size, text, mask=(1 << 8 * size) - 1))

    def _constant(self, instructions: int = 2) -> Difo:
        """Return an expression that the compiler adds, such as an aggregation's number."""
        integers = int(instructions > 1)
        return Difo(self._checker.types.get("int"), "", instructions, integers, is_constant=True)

    def _action(self, compiled: Compiled, tree: Tree) -> None:
        first = sum(action.kind == "record" for action in compiled.actions)
        arguments = list(tree.kids)
        statement = Statement(tree.text, first, 1)
        match tree.text:
            case "printf":
                if not arguments:
                    raise ProgramError(_PASSED.format("printf", 0, "s", 1), tree.line)
                if arguments[0].op != "string":
                    raise self._mismatch(tree, 1, arguments[0], "string constant")
                nodes = [self._checker.check(kid) for kid in arguments[1:]]
                types = [node.type for node in nodes]
                statement.format = Format(
                    *(
                        arguments[0].text,
                        "printf",
                        types,
                        None,
                        tree.line,
                        self._small_unsigned,
                        self._size,
                    )
                )
                statement.count = len(nodes)
                for node in nodes:
                    self._record(compiled, self._generator.difo(node))
                if not nodes:
                    self._record(compiled, self._constant(instructions=1))
            case "exit":
                node = self._argument(tree, arguments)
                difo = self._generator.difo(node)
                difo.type = self._checker.types.get("int")
                self._record(compiled, difo)
            case _:
                self._on_aggregation(compiled, statement, tree)
        compiled.statements.append(statement)

    def _mismatch(self, tree: Tree, number: int, argument: Tree, wanted: str) -> ProgramError:
        message = f"{tree.text}( ) argument #{number} is incompatible with prototype:"
        type_ = self._checker.check(argument).type
        message += f"\n\tprototype: {wanted}\n\t argument: {type_}"
        return ProgramError(message, tree.line)

    def _argument(self, tree: Tree, arguments: list[Tree]) -> Node:
        if len(arguments) != 1:
            count = len(arguments)
            raise ProgramError(_PASSED.format(tree.text, count, "s" * (count != 1), 1), tree.line)
        return self._checker.check(arguments[0])

    def _on_aggregation(self, compiled: Compiled, statement: Statement, tree: Tree) -> None:
        """Compile printa(), trunc() or clear()."""
        arguments = list(tree.kids)
        text = None
        if tree.text == "printa" and arguments and arguments[0].op == "string":
            text = arguments.pop(0).text
        keep = arguments.pop() if tree.text == "trunc" and len(arguments) == 2 else None
        if len(arguments) != 1 and not (text and arguments):
            message = f"{tree.text}( ) prototype mismatch: {len(tree.kids)} args passed"
            raise ProgramError(message, tree.line)
        for number, argument in enumerate(arguments, 1 + (text is not None)):
            if argument.op != "aggregation":
                raise self._mismatch(tree, number, argument, "aggregation")
            if argument.text not in self._aggregations:
                message = f"failed to resolve {argument.text}: Unknown variable name"
                raise ProgramError(message, tree.line)
            statement.aggregations.append(self._aggregations[argument.text])
            self._record(compiled, self._constant())
        statement.count = len(arguments)
        if text is not None:
            keys, function = statement.aggregations[0].keys, statement.aggregations[0].function
            value = self._checker.types.get("uint64_t" if function == "count" else "int64_t")
            statement.format = Format(
                *(text, "printa", keys, value, tree.line),
                *(self._small_unsigned, self._size),
            )
        if tree.text == "trunc":
            statement.count = 2
            nothing = self._constant()
            difo = self._generator.difo(self._checker.check(keep)) if keep else nothing
            self._record(compiled, difo)

    def _aggregate(self, compiled: Compiled, tree: Tree) -> None:
        place, call = tree.kids
        name = _aggregation_of(place)
        if call.op != "call" or call.text not in AGGREGATING:
            if call.op == "call" and call.text in {"quantize", "lquantize", "llquantize", "stddev"}:
                raise ProgramError(f"{call.text}( ) is not simulated", tree.line)
            message = f"{name} must be assigned the result of an aggregating function"
            raise ProgramError(message, tree.line)
        keys = [self._checker.check(kid) for kid in place.kids[1:]]
        values = [self._checker.check(kid) for kid in call.kids]
        wanted = int(call.text != "count")
        if len(values) != wanted:
            count = len(values)
            raise ProgramError(
                _PASSED.format(call.text, count, "s" * (count != 1), wanted), tree.line
            )
        if values and not is_scalar(values[0].type):
            raise ProgramError(f"{call.text}( ) argument #1 must be of scalar type", tree.line)
        aggregation = self._aggregations.get(name)
        if aggregation is None:
            types = [key.type for key in keys]
            aggregation = Aggregation(name, call.text, types, tree.line)
            self._aggregations[name] = aggregation
        elif aggregation.function != call.text:
            message = f"aggregation redefined: {name}\n\t current: {name} = {call.text}( )"
            previous = f"\n\tprevious: {name} = {aggregation.function}( ) : line {aggregation.line}"
            raise ProgramError(message + previous, tree.line)
        else:
            self._checker.match(f"{name}[ ]", "key", aggregation.keys, keys, tree.line)
        self._record(compiled, self._constant(), "key")
        for key in keys:
            self._record(compiled, self._generator.difo(key), "key")
        difo = self._generator.difo(values[0]) if values else None
        size = 16 if call.text == "avg" else 8
        compiled.actions.append(Action("aggregate", difo, size, aggregation=aggregation))


def _strings(variables: Iterable[Variable]) -> list[bool]:
    """Return for each slot of some variables whether it is a string's."""
    found = [v for v in variables if v.scope in {"global", "this"}]
    texts = {v.slot for v in found if v.type and is_string(v.type)}
    return [slot in texts for slot in range(1 + max((v.slot for v in found), default=0))]


def link(program: Program, namespace: dict[str, Any]) -> None:
    """Make Python functions of all expressions of a program.

    Args:
        program: its clauses get the functions.
        namespace: what the code calls.
    """
    lines = []
    for number, clause in enumerate(program.clauses):
        if clause.predicate:
            lines.append(f"def p{number}(c): return {clause.predicate.code}")
        for at, action in enumerate(clause.actions):
            if action.difo and not action.difo.is_constant:
                lines.append(f"def a{number}_{at}(c): return {action.difo.code}")
    exec(compile("\n".join(lines), "<D program>", "exec"), namespace)
    for number, clause in enumerate(program.clauses):
        clause.test = namespace.get(f"p{number}")
        for at, action in enumerate(clause.actions):
            action.run = namespace.get(f"a{number}_{at}")


def invalid(program: Program) -> bool:
    """Tell whether the kernel refuses a program because of a register that it does not have."""
    return any(difo.register > LAST_REGISTER for clause in program.clauses for difo in clause.difos)


def _aggregation_of(tree: Tree) -> str:
    """Return the name of the aggregation that a tree refers to, or an empty string."""
    if tree.op == "index" and tree.kids[0].op == "aggregation":
        return tree.kids[0].text
    return tree.text if tree.op == "aggregation" else ""
