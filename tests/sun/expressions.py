"""Expressions with their types: the typing rules of Sun's compiler, not those of C.

No operation widens small integers. The type of the greater rank wins; the rank is the number of
bits, and unsigned counts for more. Constants are folded as soon as they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sun.c_types import Type, Types, compatible, pointer
from sun.rules import Rules, System
from sun.syntax import ASSIGNMENTS, ProgramError, Tree, TypeName, UndefinedError

MASK = (1 << 64) - 1


@dataclass(eq=False, slots=True)
class Variable:
    """A name that an expression can use.

    Args:
        name: the name without its scope.
        scope: global, self, this, built-in, inline or symbol.
        type: None until something is assigned.
        keys: the types of an associative array's keys.
        slot: the number within its scope; for a symbol the address.
        value: the value of an inline.
    """

    name: str
    scope: str
    type: Type | None = None
    keys: list[Type] | None = None
    slot: int = 0
    value: Node | None = None


@dataclass(eq=False, slots=True)
class Node:
    """A typed expression; see syntax.Tree for ``op``, which can also be variable or constant.

    While code is generated, ``register`` is the register of the value.
    """

    op: str
    line: int
    type: Type
    kids: list[Node] = field(default_factory=list)
    value: int = 0
    text: str = ""
    variable: Variable | None = None
    is_lvalue: bool = False
    is_writable: bool = False
    register: int = 0

    @property
    def is_constant(self) -> bool:
        """Whether the expression is a number that is known now."""
        return self.op == "constant"


@dataclass(frozen=True, slots=True)
class Function:
    """A subroutine: its first version of D, its result type, and its arguments' types."""

    version: tuple[int, int]
    returns: str
    arguments: tuple[str, ...]


FUNCTIONS = {
    "alloca": Function((1, 0), "void *", ("size_t",)),
    "bcopy": Function((1, 0), "void", ("void *", "void *", "size_t")),
    "strlen": Function((1, 0), "size_t", ("char *",)),
    "htonl": Function((1, 3), "uint32_t", ("uint32_t",)),
    "htonll": Function((1, 3), "uint64_t", ("uint64_t",)),
    "htons": Function((1, 3), "uint16_t", ("uint16_t",)),
    "ntohl": Function((1, 3), "uint32_t", ("uint32_t",)),
    "ntohll": Function((1, 3), "uint64_t", ("uint64_t",)),
    "ntohs": Function((1, 3), "uint16_t", ("uint16_t",)),
    "inet_ntoa": Function((1, 5), "string", ("ipaddr_t *",)),
    "inet_ntoa6": Function((1, 5), "string", ("in6_addr_t *",)),
}
_OF_ADDRESSES = ("inet_ntoa", "inet_ntoa6")
BUILT_IN = {
    **{f"arg{n}": "int64_t" for n in range(10)},
    "cpu": "processorid_t",
    "curthread": "kthread_t *",
    "epid": "uint_t",
    "execname": "string",
    "id": "uint_t",
    "pid": "pid_t",
    "probefunc": "string",
    "probemod": "string",
    "probename": "string",
    "probeprov": "string",
    "timestamp": "uint64_t",
    "walltimestamp": "int64_t",
}
ACTIONS = ("printf", "printa", "trunc", "clear", "exit")
AGGREGATING = ("count", "sum", "min", "max", "avg")
_COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")


def is_integer(type_: Type) -> bool:
    """Tell whether a type is an integer or an enum."""
    return type_.base.kind in {"int", "enum"}


def is_scalar(type_: Type) -> bool:
    """Tell whether a value of the type can be true or false."""
    return type_.base.kind in {"int", "enum", "pointer"}


def is_pointer(type_: Type) -> bool:
    """Tell whether a type is a pointer, or an array, which acts as one."""
    return type_.base.kind in {"pointer", "array"}


def is_string(type_: Type) -> bool:
    """Tell whether a type is D's string."""
    return type_.base.kind == "string"


def is_char(type_: Type) -> bool:
    """Tell whether a type is plain char."""
    return type_.base.kind == "int" and type_.base.name == "char"


def is_text(type_: Type) -> bool:
    """Tell whether a type is a string, or chars that can become one."""
    return is_string(type_) or (is_pointer(type_) and is_char(type_.base.target))


def is_signed(type_: Type) -> bool:
    """Tell whether loads of a type extend a sign; an enum's do not."""
    return type_.base.kind == "int" and type_.base.signed


def _unassigned(variable: Variable, line: int) -> UndefinedError:
    scope = f"{variable.scope}->" if variable.scope in {"self", "this"} else ""
    message = f"{scope}{variable.name} has not yet been declared or assigned"
    return UndefinedError(message, line)


def _cast_constant(type_: Type, node: Node) -> int:
    """Return a constant cast to a type, as dt_cast() does: a smaller type loses the sign."""
    have, want = 8 * node.type.byte_size(), 8 * type_.byte_size()
    value = node.value & ((1 << min(have, want)) - 1)
    if have == want:
        return node.value
    if want > have and is_signed(node.type):
        value -= (value >> (have - 1)) << have
    return value & ((1 << want) - 1)


def signed(value: int) -> int:
    """Return a register's value as a signed number."""
    return value - ((value & 1 << 63) << 1)


class Checker:
    """Gives expressions their types, and variables the types of their first assignment.

    Args:
        types: the types that exist.
        symbols: the kernel's variables, by name.
        rules: the rules of the engine.
        system: the system that will run the program.
    """

    def __init__(
        self, types: Types, symbols: dict[str, Variable], rules: Rules, system: System
    ) -> None:
        self.types = types
        self._symbols = symbols
        self._rules = rules
        self._system = system
        self._int = types.get("int")
        self.scopes: dict[str, dict[str, Variable]] = {"global": {}, "self": {}, "this": {}}
        for name, type_ in BUILT_IN.items():
            self.scopes["global"][name] = Variable(name, "built-in", self.prototype(type_))
        null = Node("constant", 0, types.get("long"))
        self.scopes["global"]["NULL"] = Variable("NULL", "inline", null.type, value=null)

    def prototype(self, name: str) -> Type:
        """Return a type by its name in the prototypes of this module."""
        of = self.types.get(name.rstrip(" *"))
        return pointer(of) if name.endswith("*") else of

    def named(self, name: TypeName, line: int) -> Type:
        """Return the type that a program names.

        Raises:
            ProgramError: there is no type with that name.
        """
        found = self.types.find(name.name)
        if found is None and name.name.startswith(("struct ", "union ")) and name.stars:
            found = Type("forward", name.name.partition(" ")[2])
        if found is None:
            raise ProgramError(f"syntax error, unknown type name {name.name}", line)
        for _ in range(name.stars):
            found = self.types.pointer_to(found)
        return found

    def declare(
        self, line: int, name: str, scope: str, type_: Type, keys: list[Type] | None
    ) -> None:
        """Create a variable from its declaration."""
        if name in self.scopes[scope]:
            before = self.scopes[scope][name]
            if before.scope == "built-in":
                raise ProgramError(f"built-in identifier redeclared: {name}", line)
            message = f"identifier redeclared: {name}\n\t current: scalar {type_}"
            raise ProgramError(f"{message}\n\tprevious: scalar {before.type}", line)
        self._new(name, scope, type_, keys)

    def check(self, tree: Tree, reads: bool = True) -> Node:
        """Type an expression.

        Args:
            tree: the expression as it was read.
            reads: whether its value is needed, or only its place.

        Raises:
            ProgramError: the expression is invalid.
        """
        match tree.op:
            case "number":
                return self._number(tree)
            case "string":
                return Node("string", tree.line, self.types.string, text=tree.text)
            case "name":
                return self._name(tree)
            case "aggregation":
                raise ProgramError(f"{tree.text} may not be used in an expression", tree.line)
            case "call":
                return self._call(tree)
            case "->" | ".":
                return self._member(tree, reads)
            case "index":
                return self._index(tree)
            case "cast":
                return self._cast(tree)
            case "sizeof":
                return self._sizeof(tree)
            case "?:":
                return self._conditional(tree)
            case "," | "^^" | "&&" | "||":
                return self._logical(tree)
            case "++x" | "--x" | "x++" | "x--":
                return self._step(tree)
        if tree.op in ASSIGNMENTS:
            return self._assignment(tree)
        return self._unary(tree) if len(tree.kids) == 1 else self._binary(tree)

    # Operands

    def _number(self, tree: Tree) -> Node:
        suffix = tree.text[len(tree.text.rstrip("uUlL")) :].lower()
        step = 2 if suffix.startswith("u") or not tree.text.startswith("0") else 1
        first = suffix.count("u") + 2 * suffix.count("l")
        names = ("int", "unsigned int", "long", "unsigned long", "long long", "unsigned long long")
        for name in names[first::step]:
            type_ = self.types.get(name)
            if tree.value < 1 << (8 * type_.size - type_.signed):
                return Node("constant", tree.line, type_, value=tree.value)
        if tree.value > MASK:
            message = f"constant {tree.text} results in integer overflow"
            raise ProgramError(message, tree.line)
        message = f"integer constant {tree.value:#x} cannot be represented in any built-in"
        message += " integral type"
        raise ProgramError(message, tree.line)

    def _name(self, tree: Tree) -> Node:
        if "`" in tree.text:
            return self._symbol(tree)
        variable = self.scopes["global"].get(tree.text)
        if variable is None:
            raise UndefinedError(f"failed to resolve {tree.text}: Unknown variable name", tree.line)
        return self._use(variable, tree.line)

    def _symbol(self, tree: Tree) -> Node:
        module, _, name = tree.text.rpartition("`")
        symbol = self._symbols.get(name)
        if symbol is None:
            raise UndefinedError(
                f"failed to resolve {module}`{name}: Unknown symbol name", tree.line
            )
        if symbol.type is None:
            message = f"no symbolic type information is available for {module}`{name}"
            raise ProgramError(f"{message}: Unknown type name", tree.line)
        return Node("variable", tree.line, symbol.type, variable=symbol, is_lvalue=True)

    def _use(self, variable: Variable, line: int) -> Node:
        if variable.scope == "inline":
            assert variable.value
            if variable.value.is_constant:
                value = variable.value
                return Node("constant", line, value.type, value=value.value)
        if variable.keys is not None:
            raise ProgramError(
                f"associative array '{variable.name}' may not be referenced as scalar", line
            )
        writable = variable.scope in {"global", "self", "this"}
        return Node(
            *("variable", line, variable.type or self.types.void),
            variable=variable,
            is_lvalue=True,
            is_writable=writable,
        )

    def _scoped(self, tree: Tree) -> Variable | None:
        """Return the variable of ``self->x`` or ``this->x``, which is created if necessary."""
        if (
            tree.op != "->"
            or tree.kids[0].op != "name"
            or tree.kids[0].text not in {"self", "this"}
        ):
            return None
        scope = tree.kids[0].text
        return self.scopes[scope].get(tree.text) or self._new(tree.text, scope, None, None)

    def _new(self, name: str, scope: str, type_: Type | None, keys: list[Type] | None) -> Variable:
        slot = sum(v.scope == scope for v in self.scopes[scope].values())
        variable = Variable(name, scope, type_, keys, slot)
        self.scopes[scope][name] = variable
        return variable

    def _member(self, tree: Tree, reads: bool) -> Node:
        if variable := self._scoped(tree):
            if reads and variable.type is None:
                raise _unassigned(variable, tree.line)
            return self._use(variable, tree.line)
        left = self.check(tree.kids[0])
        whole = left.type.base
        if tree.op == "->":
            if whole.kind != "pointer":
                raise ProgramError("operator -> must be applied to a pointer", tree.line)
            whole = whole.target.base
        whole = self.types.whole(whole).base
        if whole.kind == "forward":
            message = f"operator {tree.op} cannot be applied to a forward declaration"
            raise ProgramError(f"{message}: no {whole} definition is available", tree.line)
        if whole.kind not in {"struct", "union"}:
            to = "pointer to type" if tree.op == "->" else "type"
            must = "a struct or union pointer" if tree.op == "->" else "a struct or union"
            message = (
                f'operator {tree.op} cannot be applied to {to} "{whole}"; must be applied to {must}'
            )
            raise ProgramError(message, tree.line)
        member = whole.member(tree.text)
        if member is None:
            raise ProgramError(f"{tree.text} is not a member of {whole}", tree.line)
        if member.bits:
            raise ProgramError(f"bit-fields are not simulated: {tree.text}", tree.line)
        lvalue = (tree.op == "->" or left.is_lvalue) and member.type.base.kind != "array"
        return Node(
            *("member", tree.line, member.type, [left], member.offset, tree.op),
            is_lvalue=lvalue,
            is_writable=left.is_writable,
        )

    def _index(self, tree: Tree) -> Node:
        array, *keys = tree.kids
        variable = self._scoped(array)
        if array.op == "name" and "`" not in array.text:
            variable = self.scopes["global"].get(array.text) or self._new(
                array.text, "global", None, []
            )
        if variable and variable.scope == "this" and variable.type is None:
            message = f"local variables may not be used as associative arrays: {variable.name}"
            raise ProgramError(message, tree.line)
        if variable and (variable.keys is not None or variable.type is None):
            return self._element(variable, [self.check(key) for key in keys], tree.line)
        if len(keys) != 1:
            raise ProgramError("cannot access it as an associative array", tree.line)
        sum_ = self._sum(Tree("+", tree.line), self.check(array), self.check(keys[0]))
        return self._dereference(sum_, tree.line)

    def _element(self, variable: Variable, keys: list[Node], line: int) -> Node:
        if not variable.keys:
            variable.keys = [key.type for key in keys]
        self.match(f"{variable.name}[ ]", "key", variable.keys, keys, line)
        return Node(
            *("variable", line, variable.type or self.types.void, keys),
            variable=variable,
            is_lvalue=True,
            is_writable=True,
        )

    def match(
        self, name: str, what: str, types: Sequence[Type], nodes: list[Node], line: int
    ) -> None:
        """Compare arguments or keys with the expected types.

        Raises:
            ProgramError: there are too few, too many, or of other types.
        """
        if len(types) != len(nodes):
            count = f"{len(nodes)} {'key' if what == 'key' else 'arg'}{'s' * (len(nodes) != 1)}"
            message = f"{name} prototype mismatch: {count} passed, {len(types)} expected"
            raise ProgramError(message, line)
        for number, (type_, node) in enumerate(zip(types, nodes, strict=True), 1):
            if not self.fits(type_, node):
                message = f"{name} {what} #{number} is incompatible with prototype:\n\tprototype: "
                raise ProgramError(f"{message}{type_}\n\t{what:>9}: {node.type}", line)

    def _call(self, tree: Tree) -> Node:
        function = FUNCTIONS.get(tree.text)
        new = self._rules.versions_differ and function and function.version > self._system.version
        if function is None or new:
            if tree.text in ACTIONS or tree.text in AGGREGATING:
                kind = "aggregating function " if tree.text in AGGREGATING else ""
                if kind and self._system.old_compiler:
                    message = "expression cannot evaluate to result of dynamic type"
                    raise ProgramError(message, tree.line)
                message = f"{kind}{tree.text}( ) may not be called from a D expression"
                raise ProgramError(f"{message} (D program context required)", tree.line)
            raise ProgramError(f"undefined function name: {tree.text}", tree.line)
        arguments = [self.check(kid) for kid in tree.kids]
        names = function.arguments
        if tree.text in _OF_ADDRESSES:
            names = (self._system.addresses[_OF_ADDRESSES.index(tree.text)],)
        types = [self.prototype(name) for name in names]
        self.match(f"{tree.text}( )", "argument", types, arguments, tree.line)
        return Node("call", tree.line, self.prototype(function.returns), arguments, text=tree.text)

    # Operators

    def _unary(self, tree: Tree) -> Node:
        node = self.check(tree.kids[0])
        if node.is_constant and tree.op in {"neg", "pos", "~", "!"}:
            value = {
                "neg": -node.value,
                "pos": node.value,
                "~": ~node.value,
                "!": int(not node.value),
            }
            wide = is_signed(node.type) and self._rules.constants_signed
            bits = 64 if wide or tree.op != "neg" else 8 * node.type.byte_size()
            new = value[tree.op] & ((1 << bits) - 1)
            return Node("constant", tree.line, node.type, value=new)
        if tree.op == "deref":
            return self._dereference(node, tree.line)
        if tree.op == "address":
            if node.variable and node.variable.scope != "symbol":
                raise ProgramError("cannot take address of dynamic variable", tree.line)
            if not node.is_lvalue and node.type.base.kind != "array":
                raise ProgramError("unacceptable operand for unary & operator", tree.line)
            return Node("address", tree.line, pointer(node.type), [node])
        if tree.op == "stringof":
            if not is_scalar(node.type) and not is_text(node.type):
                message = f"cannot apply stringof to a value of type {node.type}"
                raise ProgramError(message, tree.line)
            return Node("stringof", tree.line, self.types.string, [node])
        wanted, fits = ("scalar", is_scalar) if tree.op == "!" else ("integral", is_integer)
        if not fits(node.type):
            sign = {"neg": "-", "pos": "+"}.get(tree.op, tree.op)
            message = f"operator {sign} requires an operand of {wanted} type"
            raise ProgramError(message, tree.line)
        return Node(tree.op, tree.line, self._int if tree.op == "!" else node.type, [node])

    def _dereference(self, node: Node, line: int) -> Node:
        if not is_pointer(node.type):
            raise ProgramError("cannot dereference non-pointer type", line)
        target = self.types.whole(node.type.base.target)
        if target.base.kind in {"void", "function"}:
            raise ProgramError(f"cannot dereference pointer to {target.base.kind}", line)
        writable = node.is_writable or (node.op == "+" and node.kids[0].is_writable)
        lvalue = target.base.kind != "array"
        return Node("deref", line, target, [node], is_lvalue=lvalue, is_writable=writable)

    def _binary(self, tree: Tree) -> Node:
        left = self.check(tree.kids[0])
        right = self._enumerator(left, tree.kids[1]) or self.check(tree.kids[1])
        if tree.op in {"/", "%"} and right.is_constant and right.value == 0:
            raise ProgramError("expression contains division by zero", tree.line)
        if left.is_constant and right.is_constant:
            return self._fold(tree, left, right)
        if tree.op in {"+", "-"}:
            return self._sum(tree, left, right)
        if tree.op in _COMPARISONS:
            texts = is_text(left.type) and is_text(right.type)
            if not (
                compatible(left.type, right.type)
                or (is_integer(left.type) and is_integer(right.type))
                or (texts and (is_string(left.type) or is_string(right.type)))
                or self._pointers_fit(left, right)
            ):
                raise self._incompatible(tree, left, right)
            return Node(tree.op, tree.line, self._int, [left, right])
        if not is_integer(left.type) or not is_integer(right.type):
            kind = "arithmetic" if tree.op in {"*", "/"} else "integral"
            message = f"operator {tree.op} requires operands of {kind} type"
            raise ProgramError(message, tree.line)
        return Node(tree.op, tree.line, self._result(tree.op, left, right), [left, right])

    def _enumerator(self, left: Node, right: Tree) -> Node | None:
        """Return the value of the right side if that is a name of the left side's enum."""
        values = left.type.base.values
        if right.op != "name" or right.text not in values or right.text in self.scopes["global"]:
            return None
        return Node("constant", right.line, left.type, value=values[right.text] & MASK)

    def _result(self, op: str, left: Node, right: Node) -> Type:
        if op in {"<<", ">>"}:
            if self._rules.shifts_narrow:
                return left.type
            return self.promoted(left.type, self._int)
        return self.promoted(left.type, right.type)

    def promoted(self, left: Type, right: Type) -> Type:
        """Return the type of an operation on two integers."""
        types = [self._int if type_.base.kind == "enum" else type_ for type_ in (left, right)]
        if not self._rules.small_types_stay:
            types.append(self._int)
        return max(types, key=lambda type_: 8 * type_.byte_size() + (not type_.base.signed))

    def _fold(self, tree: Tree, left: Node, right: Node) -> Node:
        one, other = left.value, right.value
        type_ = self.promoted(left.type, right.type)
        if is_signed(type_):
            low, high = signed(one), signed(other)
        else:
            low, high = one, other
        match tree.op:
            case "+" | "-" | "*" | "&" | "|" | "^":
                value = {
                    "+": one + other,
                    "-": one - other,
                    "*": one * other,
                    "&": one & other,
                    "|": one | other,
                    "^": one ^ other,
                }[tree.op]
            case "/" | "%":
                quotient = abs(low) // abs(high) * (-1 if (low < 0) != (high < 0) else 1)
                value = quotient if tree.op == "/" else low - quotient * high
            case "<<":
                value = one << (other & 63)
                type_ = left.type
            case ">>":
                unsigned = self._rules.shifts_folded_unsigned or not is_signed(left.type)
                value = (one if unsigned else signed(one)) >> (other & 63)
                type_ = left.type
            case _:
                value = {
                    "==": one == other,
                    "!=": one != other,
                    "<": low < high,
                    "<=": low <= high,
                    ">": low > high,
                    ">=": low >= high,
                }[tree.op]
                type_ = self._int
        return Node("constant", tree.line, type_, value=value & MASK)

    def _sum(self, tree: Tree, left: Node, right: Node) -> Node:
        known = [
            is_string(node.type)
            or (
                is_pointer(node.type)
                and node.type.base.target.base.kind not in {"void", "function"}
            )
            for node in (left, right)
        ]
        integers = [is_integer(node.type) for node in (left, right)]
        if all(integers):
            type_ = self.promoted(left.type, right.type)
        elif known[0] and integers[1]:
            type_ = left.type
        elif integers[0] and known[1] and tree.op == "+":
            type_ = right.type
        elif all(known) and tree.op == "-" and self._pointers_fit(left, right):
            type_ = self.types.get("ptrdiff_t")
        else:
            raise self._incompatible(tree, left, right)
        return Node(tree.op, tree.line, type_, [left, right])

    def _logical(self, tree: Tree) -> Node:
        left, right = self.check(tree.kids[0]), self.check(tree.kids[1])
        if tree.op == ",":
            return Node(",", tree.line, right.type, [left, right])
        if left.is_constant and right.is_constant:
            one, other = bool(left.value), bool(right.value)
            value = {"&&": one and other, "||": one or other, "^^": one != other}[tree.op]
            return Node("constant", tree.line, self._int, value=int(value))
        if not is_scalar(left.type) or not is_scalar(right.type):
            message = f"operator {tree.op} requires operands of scalar type"
            raise ProgramError(message, tree.line)
        return Node(tree.op, tree.line, self._int, [left, right])

    def _conditional(self, tree: Tree) -> Node:
        test = self.check(tree.kids[0])
        if test.is_constant:
            return self.check(tree.kids[1 if test.value else 2])
        yes, no = self.check(tree.kids[1]), self.check(tree.kids[2])
        if not is_scalar(test.type):
            raise ProgramError("operator ?: expression must be of scalar type", tree.line)
        if compatible(yes.type, no.type):
            type_ = yes.type
        elif is_integer(yes.type) and is_integer(no.type):
            type_ = self.promoted(yes.type, no.type)
        elif is_text(yes.type) and is_text(no.type) and (is_string(yes.type) or is_string(no.type)):
            type_ = self.types.string
        elif self._pointers_fit(yes, no):
            # The more specific of the two types, by the rule of dt_node_is_ptrcompat().
            vague = is_integer(no.type) or no.type.base.target.base.kind == "void"
            type_ = yes.type if vague else no.type
        else:
            raise ProgramError("operator ?: operands must have compatible types", tree.line)
        return Node("?:", tree.line, type_, [test, yes, no])

    def _cast(self, tree: Tree) -> Node:
        assert tree.type
        type_ = self.named(tree.type, tree.line)
        node = self.check(tree.kids[0])
        if node.is_constant and is_integer(type_) and not self._system.old_compiler:
            return Node("constant", tree.line, type_, value=_cast_constant(type_, node))
        if node.is_constant and is_integer(type_):
            bits = 8 * min(type_.byte_size(), node.type.byte_size())
            value = node.value
            if type_.byte_size() < node.type.byte_size() or is_signed(type_) != is_signed(
                node.type
            ):
                value &= (1 << bits) - 1
                if is_signed(type_):
                    value -= (value >> (bits - 1)) << bits
            return Node("constant", tree.line, type_, value=value & MASK)
        if not (
            compatible(type_, node.type)
            or (is_scalar(type_) and is_scalar(node.type))
            or type_.base.kind == "void"
            or (type_.base.kind == "pointer" and is_pointer(node.type))
            or (is_string(type_) and (is_scalar(node.type) or is_text(node.type)))
        ):
            message = f'invalid cast expression: "{node.type}" to "{type_}"'
            raise ProgramError(message, tree.line)
        # What a cast pointer points to can be assigned to.
        writable = type_.base.kind == "pointer" and not self._system.old_compiler
        return Node("cast", tree.line, type_, [node], is_writable=writable)

    def _sizeof(self, tree: Tree) -> Node:
        if tree.type:
            size = self.named(tree.type, tree.line).byte_size()
        elif tree.kids[0].op == "string":
            size = len(tree.kids[0].text) + 1
        else:
            size = self.check(tree.kids[0]).type.byte_size()
        if size == 0:
            raise ProgramError("cannot apply sizeof to an operand of unknown size", tree.line)
        return Node("constant", tree.line, self.types.get("size_t"), value=size)

    def _place(self, tree: Tree) -> Node:
        """Type the left side of an assignment, which may be a new variable."""
        if tree.op == "aggregation":
            raise ProgramError(f"{tree.text} may not be used in an expression", tree.line)
        if tree.op == "name" and "`" not in tree.text and tree.text not in self.scopes["global"]:
            self._new(tree.text, "global", None, None)
        return self.check(tree, reads=False)

    def _step(self, tree: Tree) -> Node:
        node = self._place(tree.kids[0])
        if node.variable and node.variable.type is None:
            node.variable.type = node.type = self.types.get("int64_t")
        sign = tree.op.strip("x")
        if not is_scalar(node.type):
            raise ProgramError(f"operator {sign} requires operand of scalar type", tree.line)
        self._modifiable(sign, node, tree.line)
        return Node(tree.op, tree.line, node.type, [node])

    def _modifiable(self, sign: str, node: Node, line: int) -> None:
        if not node.is_lvalue:
            raise ProgramError(f"operator {sign} requires modifiable lvalue as an operand", line)
        if not node.is_writable:
            raise ProgramError(f"operator {sign} can only be applied to a writable variable", line)

    def _assignment(self, tree: Tree) -> Node:
        left = self._place(tree.kids[0])
        if tree.op == "=" and left.variable and left.variable.type is None:
            self._valueless(tree)
        right = self.check(tree.kids[1])
        if tree.op != "=":
            return self._assigning_operation(tree, left, right)
        if left.variable and left.variable.type is None:
            left.variable.type = left.type = right.type
        if not is_string(left.type) and left.type.base.kind in {"array", "function"}:
            message = f'operator = may not be applied to operand of type "{left.type}"'
            raise ProgramError(message, tree.line)
        emptied = is_string(left.type) and right.is_constant and right.value == 0
        if not self.fits(left.type, right) and not emptied:
            raise self._incompatible(tree, left, right)
        cut = self._rules.constants_cut and not self._system.old_compiler
        if cut and right.is_constant and is_integer(left.type):
            right.value = _cast_constant(left.type, right)
        if left.type.by_reference and not is_string(left.type):
            raise ProgramError(f"copies of a {left.type} are not simulated", tree.line)
        self._modifiable("=", left, tree.line)
        return Node("=", tree.line, left.type, [left, right])

    def _valueless(self, tree: Tree) -> None:
        """Refuse to create a variable from something without a value."""
        right = tree.kids[1]
        types = None
        if right.op == "aggregation":
            types = '"scalar" = "aggregation"'
        elif right.op == "call" and right.text in ACTIONS:
            types = '"void" = "void"'
        if types:
            raise ProgramError(f"operands have incompatible types: {types}", tree.line)

    def _assigning_operation(self, tree: Tree, left: Node, right: Node) -> Node:
        op = tree.op[:-1]
        if op in {"/", "%"} and right.is_constant and right.value == 0:
            raise ProgramError("expression contains division by zero", tree.line)
        if left.variable and left.variable.type is None:
            raise _unassigned(left.variable, tree.line)
        if not is_integer(left.type) or not is_integer(right.type):
            if op not in {"+", "-"}:
                message = f"operator {tree.op} requires operands of integral type"
                raise ProgramError(message, tree.line)
            self._sum(Tree(op, tree.line), left, right)
        self._modifiable(tree.op, left, tree.line)
        return Node(tree.op, tree.line, left.type, [left, right])

    # Assignability

    def fits(self, type_: Type, node: Node) -> bool:
        """Tell whether a value can be assigned to something with a type."""
        if is_integer(type_) and is_integer(node.type):
            return True
        if is_text(type_) and is_text(node.type):
            return True
        if type_.base.kind in {"struct", "union", "function"}:
            return compatible(type_, node.type)
        return self._pointers_fit(Node("place", node.line, type_), node)

    def _pointers_fit(self, left: Node, right: Node) -> bool:
        types = []
        for node in (left, right):
            if is_integer(node.type):
                if not node.is_constant or node.value != 0:
                    return False
            elif is_pointer(node.type):
                types.append(self.types.whole(node.type.base.target))
            else:
                return False
        if len(types) < 2:
            return len(types) == 1
        return any(t.base.kind == "void" for t in types) or compatible(*types)

    def _incompatible(self, tree: Tree, left: Node, right: Node) -> ProgramError:
        message = f'operands have incompatible types: "{left.type}" {tree.op} "{right.type}"'
        return ProgramError(message, tree.line)
