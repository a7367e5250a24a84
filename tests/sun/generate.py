"""Code of an expression: Python code for the simulator, and the counts of the real code.

The kernel runs an expression as an object (DIFO) of instructions for a machine with eight
registers, with tables of its integers, strings and variables. Here instructions are only counted.
A program's size, its registers and the places of faults follow from the counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sun.c_types import Type
from sun.expressions import (
    FUNCTIONS,
    MASK,
    Checker,
    Node,
    Variable,
    is_integer,
    is_pointer,
    is_scalar,
    is_signed,
    is_string,
)
from sun.rules import Rules, System
from sun.syntax import ProgramError

LAST_REGISTER = 7
_CONTEXT = {
    "curthread": "c.thread",
    "cpu": "c.cpu",
    "epid": "c.epid",
    "execname": "c.execname",
    "id": "c.probe.id",
    "pid": "c.pid",
    "probefunc": "c.probe.function.encode()",
    "probemod": "c.probe.module.encode()",
    "probename": "c.probe.name.encode()",
    "probeprov": "c.probe.provider.encode()",
    "timestamp": "c.time",
    "walltimestamp": "c.wall_time",
}
_SIGN = 1 << 63
_COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")


@dataclass(slots=True)
class Difo:
    """A compiled expression.

    Args:
        type: the type of its value.
        code: Python code with one parameter ``c``.
        instructions: the number of instructions.
        integers: the size of its table of integers.
        strings: its table of strings, which includes the variables' names.
        variables: the number of variables that it names.
        register: the highest register that it uses.
        keys: for each dynamic variable that it stores, its number of keys and the size of
            by-reference data.
        is_constant: whether the compiler itself adds it, without strings.
    """

    type: Type
    code: str
    instructions: int = 0
    integers: int = 0
    strings: list[str] = field(default_factory=list)
    variables: int = 0
    register: int = 0
    keys: list[tuple[int, int]] = field(default_factory=list)
    is_constant: bool = False


class Generator:
    """Generates code for typed expressions.

    Args:
        checker: the checker that typed them.
        rules: the rules of the engine.
        system: the system that will run the program.
        string_size: the size of a string in a variable.
    """

    def __init__(self, checker: Checker, rules: Rules, system: System, string_size: int) -> None:
        self._checker = checker
        self._rules = rules
        self._old = system.old_compiler
        self._string_size = string_size
        self._start()

    def _start(self) -> None:
        self._line = 0
        self._taken: set[int] = {0}
        self._count = 0
        self._highest = 0
        self._integers: set[int] = set()
        self._addresses = 0
        self._strings: list[str] = []
        self._variables: dict[tuple[str, str], None] = {}
        self._keys: list[tuple[int, int]] = []

    def difo(self, node: Node) -> Difo:
        """Compile an expression.

        Raises:
            ProgramError: it needs more registers than there are.
        """
        self._start()
        self._line = node.line
        code = self._value(node)
        self._count += 1
        names = [name for _, name in self._variables]
        return Difo(
            node.type,
            code,
            self._count,
            len(self._integers) + self._addresses,
            list(dict.fromkeys([*self._strings, *names])),
            len(self._variables),
            self._highest,
            self._keys,
        )

    # The machine

    def _take(self) -> int:
        last = LAST_REGISTER + self._old if self._rules.registers_limited else 64
        register = next((n for n in range(1, last + 1) if n not in self._taken), None)
        if register is None:
            line = 0 if self._old else self._line
            raise ProgramError("Insufficient registers to generate code", line)
        self._taken.add(register)
        self._highest = max(self._highest, register)
        return register

    def _free(self, register: int) -> None:
        self._taken.discard(register)

    def _integer(self, value: int) -> None:
        self._count += 1
        self._integers.add(value)

    def _use(self, variable: Variable) -> None:
        self._variables[variable.scope, variable.name] = None

    def _scratch(self, instructions: int, *integers: int) -> None:
        """Count instructions that need one more register, and integers that are put into it."""
        register = self._take()
        for value in integers:
            self._integer(value)
        self._count += instructions
        self._free(register)

    # Expressions

    def _value(self, node: Node, address: bool = False) -> str:
        """Return the code of a value, or of its address."""
        match node.op:
            case "constant":
                node.register = self._take()
                self._integer(node.value)
                return str(node.value)
            case "string":
                node.register = self._take()
                self._count += 1
                self._strings.append(node.text)
                return repr(node.text.encode())
            case "variable":
                return self._variable(node, address)
            case "call":
                return self._call(node)
            case "member":
                return self._member(node, address)
            case "deref":
                code = self._value(node.kids[0])
                node.register = node.kids[0].register
                return code if address or node.type.by_reference else self._load(node.type, code)
            case "address":
                code = self._value(node.kids[0], address=True)
                node.register = node.kids[0].register
                return code
            case "cast":
                code = self._value(node.kids[0])
                node.register = node.kids[0].register
                return self._converted(node.kids[0].type, node.type, code)
            case "stringof" | "pos":
                code = self._value(node.kids[0])
                node.register = node.kids[0].register
                return code
            case "neg" | "~":
                code = self._value(node.kids[0])
                node.register = node.kids[0].register
                self._count += 1
                return f"({'-' if node.op == 'neg' else '~'}{code} & {MASK})"
            case "!":
                code = self._value(node.kids[0])
                node.register = node.kids[0].register
                self._count += 4
                self._integer(1)
                return f"(0 if {code} else 1)"
            case "&&" | "||" | "^^" | ",":
                return self._logical(node)
            case "?:":
                return self._conditional(node)
            case "=":
                code = self._value(node.kids[1])
                node.register = node.kids[1].register
                return self._store(node, node.kids[0], code)
            case "++x" | "--x" | "x++" | "x--":
                return self._step(node)
        if node.op in _COMPARISONS:
            return self._comparison(node)
        code = self._arithmetic(node, node.op.removesuffix("="))
        return self._store(node, node.kids[0], code) if node.op.endswith("=") else code

    def _load(self, type_: Type, code: str) -> str:
        size = type_.byte_size()
        if size not in {1, 2, 4, 8}:
            raise ProgramError(f"internal error -- cg cannot load size {size} when passed by value")
        offset = 4 * self._count
        self._count += 1
        return f"{'s' if is_signed(type_) else 'u'}{size}({code}, {offset})"

    def _variable(self, node: Node, address: bool) -> str:
        variable = node.variable
        assert variable
        if variable.scope == "inline":
            assert variable.value
            assert variable.type
            code = self._value(variable.value)
            node.register = variable.value.register
            return self._converted(variable.value.type, variable.type, code)
        if variable.scope == "symbol":
            node.register = self._take()
            self._count += 1
            self._addresses += 1
            known = address or node.type.by_reference
            return str(variable.slot) if known else self._load(node.type, str(variable.slot))
        self._use(variable)
        keys = self._arguments(variable.keys, node.kids) if variable.keys is not None else ""
        node.register = self._take()
        self._count += 1
        if variable.name == "cpu" and variable.scope == "built-in":
            # A translator turns it into curthread->t_cpu->cpu_id.
            self._integers |= {-1, -2}
            self._count += 6
        if variable.scope == "built-in":
            argument = variable.name.startswith("arg")
            return f"c.args[{variable.name[3:]}]" if argument else _CONTEXT[variable.name]
        if variable.scope == "this":
            return f"c.this[{variable.slot}]"
        if variable.scope == "global" and variable.keys is None:
            return f"globals_[{variable.slot}]"
        return f"dynamic.get({self._key(variable, keys)}, 0)"

    def _key(self, variable: Variable, keys: str) -> str:
        thread = "c.thread, " if variable.scope == "self" else ""
        return f"({variable.scope == 'self'}, {variable.slot}, {thread}{keys})"

    def _arguments(self, types: list[Type], nodes: list[Node]) -> str:
        """Return the code of keys or arguments; all are computed before the first is pushed."""
        codes = [self._value(node) for node in nodes]
        self._count += 1
        for at, (type_, node) in enumerate(zip(types, nodes, strict=True)):
            codes[at] = self._converted(node.type, type_, codes[at])
            if is_string(node.type):
                codes[at] = f"text({codes[at]})"
            self._count += 1
            if self._old or is_string(node.type):
                size = self._string_size if is_string(node.type) else node.type.byte_size()
                self._scratch(0, size)
            self._free(node.register)
        return ", ".join(codes) + ("," if len(codes) == 1 else "")

    def _call(self, node: Node) -> str:
        types = [self._checker.prototype(name) for name in FUNCTIONS[node.text].arguments]
        arguments = self._arguments(types, node.kids).rstrip(",")
        node.register = self._take()
        offset = 4 * self._count
        self._count += 1
        return f"{node.text}(c, {offset}, {arguments})"

    def _member(self, node: Node, address: bool) -> str:
        left = node.kids[0]
        code = self._value(left, address=node.text == ".")
        if node.value:
            self._scratch(1, node.value)
            code = f"({code} + {node.value} & {MASK})"
        node.register = left.register
        return code if address or node.type.by_reference else self._load(node.type, code)

    def _converted(self, source: Type, target: Type, code: str) -> str:
        """Return the code of a cast, which does nothing unless bits are removed or added."""
        if not is_scalar(target) or not (is_scalar(source) or is_pointer(source)):
            return code
        have, want = source.byte_size() if is_scalar(source) else 8, target.byte_size()
        changes_sign = is_signed(source) != is_signed(target)
        if self._old and self._rules.old_casts:
            if want >= have and not changes_sign:
                return code
            self._scratch(2, 64 - 8 * min(have, want))
            return _narrowed(code, 8 * min(have, want), is_signed(target))
        if (want == have and changes_sign) or (want > have and not is_signed(source)):
            return code
        if want > have:
            if is_signed(target) or want == 8:
                self._scratch(2, 64 - 8 * have)
                return _narrowed(code, 8 * have, is_sign=True)
            self._scratch(3, 64 - 8 * have, 8 * (want - have), 64 - 8 * want)
            return _narrowed(_narrowed(code, 8 * have, is_sign=True), 8 * want, is_sign=False)
        if want == 8:
            self._scratch(0)
            return code
        self._scratch(2, 64 - 8 * want)
        return _narrowed(code, 8 * want, is_signed(target))

    def _scaled(self, type_: Type, code: str) -> str:
        """Return the code that converts a number of elements to a number of bytes."""
        size = 1 if is_string(type_) else type_.base.target.byte_size()
        if size == 1:
            if self._old and self._rules.registers_leak:
                # The register is never used, so the kernel does not see it.
                highest = self._highest
                self._take()
                self._highest = highest
            return code
        self._scratch(1, size)
        return f"({code} * {size} & {MASK})"

    def _arithmetic(self, node: Node, op: str) -> str:
        left, right = node.kids
        pointers = [is_pointer(kid.type) and op in {"+", "-"} for kid in node.kids]
        one = self._value(left)
        if pointers[1] and not pointers[0]:
            one = self._scaled(right.type, one)
        other = self._value(right)
        if pointers[0] and not pointers[1]:
            other = self._scaled(left.type, other)
        offset = 4 * self._count
        self._count += 1
        self._free(right.register)
        node.register = left.register
        if all(pointers):
            size = right.type.base.target.byte_size()
            self._scaled(right.type, one)
            return f"(({one} - {other} & {MASK}) // {size})"
        has_sign = is_signed(node.type)
        match op:
            case "&" | "|" | "^":
                return f"({one} {op} {other})"
            case "<<":
                return f"({one} << ({other} & 63) & {MASK})"
            case ">>":
                shifted = f"signed({one})" if has_sign else one
                return f"({shifted} >> ({other} & 63) & {MASK})"
            case "/" | "%":
                name = ("divide" if op == "/" else "rest") + ("_signed" if has_sign else "")
                return f"{name}({one}, {other}, {offset})"
        return f"({one} {op} {other} & {MASK})"

    def _comparison(self, node: Node) -> str:
        left, right = node.kids
        one, other = self._value(left), self._value(right)
        self._free(right.register)
        node.register = left.register
        self._count += 4
        self._integer(1)
        if is_string(left.type) or is_string(right.type):
            return f"(1 if compare({one}, {other}) {node.op} 0 else 0)"
        integers = is_integer(left.type) and is_integer(right.type)
        if integers and is_signed(self._checker.promoted(left.type, right.type)):
            one, other = f"({one} ^ {_SIGN})", f"({other} ^ {_SIGN})"
        return f"(1 if {one} {node.op} {other} else 0)"

    def _logical(self, node: Node) -> str:
        left, right = node.kids
        one = self._value(left)
        if node.op != "^^":
            self._free(left.register)
        self._count += 2 if node.op in {"&&", "||"} else 0
        other = self._value(right)
        node.register = right.register
        if node.op == ",":
            return f"({one}, {other})[1]"
        if node.op == "^^":
            self._free(left.register)
            self._count += 12
            return f"(1 if bool({one}) != bool({other}) else 0)"
        self._count += 4
        self._integer(1)
        word = "and" if node.op == "&&" else "or"
        if not self._rules.lazy:
            one, other = f"(lambda a, b: a {word} b)({one}, {other})", "1"
            word = "and"
        return f"(1 if {one} {word} {other} else 0)"

    def _conditional(self, node: Node) -> str:
        test, yes, no = node.kids
        condition = self._value(test)
        self._free(test.register)
        self._count += 2
        one = self._value(yes)
        self._free(yes.register)
        self._count += 2
        other = self._value(no)
        node.register = no.register
        if not self._rules.lazy:
            return f"(lambda a, b, c: b if a else c)({condition}, {one}, {other})"
        return f"({one} if {condition} else {other})"

    def _store(self, node: Node, target: Node, code: str) -> str:
        variable = target.variable
        if variable is None:
            place = self._value(target, address=True)
            self._free(target.register)
            offset = 4 * self._count
            self._count += 1
            return f"poke(c, {offset}, {code}, {place}, {node.type.byte_size()})"
        self._use(variable)
        if is_string(target.type):
            code = f"stored({code})"
        keys = self._arguments(variable.keys, target.kids) if variable.keys is not None else ""
        self._count += 1
        if variable.scope == "this":
            return f"put(c.this, {variable.slot}, {code})"
        if variable.scope == "global" and variable.keys is None:
            return f"put(globals_, {variable.slot}, {code})"
        count = 1 + len(target.kids) + (variable.scope == "self")
        texts = sum(is_string(kid.type) for kid in target.kids) + is_string(target.type)
        self._keys.append((count, texts * self._string_size + 8 * (not is_string(target.type))))
        return f"keep({code}, {self._key(variable, keys)})"

    def _step(self, node: Node) -> str:
        target = node.kids[0]
        size = target.type.base.target.byte_size() if target.type.base.kind == "pointer" else 1
        sign = node.op.strip("x")[0]
        old = self._value(target)
        node.register = target.register
        self._scratch(1, size)
        if target.variable and target.variable.keys is not None:
            # The keys still exist for the store, which need not push them again.
            before, taken = self._count, set(self._taken)
            new = self._store(node, target, f"({old} {sign} {size} & {MASK})")
            self._count, self._taken = before + 1, taken
        else:
            new = self._store(node, target, f"({old} {sign} {size} & {MASK})")
        back = "-" if sign == "+" else "+"
        return new if node.op.endswith("x") else f"({new} {back} {size} & {MASK})"


def _narrowed(code: str, bits: int, is_sign: bool) -> str:
    if bits == 64:
        return code
    mask = (1 << bits) - 1
    if not is_sign:
        return f"({code} & {mask})"
    top = 1 << (bits - 1)
    return f"((({code} & {mask}) ^ {top}) - {top} & {MASK})"
