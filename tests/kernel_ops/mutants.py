"""Every way to break a source file in one place: what `mutate` tries.

Kinds of mutants: a comparison moved by one or turned round; an arithmetic operator for another; a constant one up, one
down, or zero; a mask that lets everything through; two arguments of a kind, such as strides, for each other; a dtype
narrower, or a conversion left out; a condition negated; the two sides of `tl.where` exchanged; the first or last trip
of a loop left out; a minus left out.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEFT_ALONE = {
    "raise": "the text of an error; the condition that leads to it is mutated",
    "annotation, docstring, import, decorator": "says something to readers, tools or a compiler",
    "num_warps, num_stages, eviction_policy": "only a compiler reads them: how fast a kernel is, not what it computes",
    "tile_for, *_tile, FEWEST_ROWS, ROWS_IN_CACHE, SLAB, BLOCK, COLUMNS, MANY, FEW, constants of gpu/*.py": (
        "tiles: any give the same result, but for the order of sums"
    ),
    "constants in tl.arange": "no kernel compiles with others, as they have to be powers of two",
    "arguments of add, mul, addcmul_, vecdot, gcd, min, max exchanged": "they commute",
    "strict of zip": "raises where lengths differ, and they do not",
}
"""What is not mutated: it could not change a result, or not but break the kernel at once."""

_COMPILED = {"num_warps", "num_stages", "eviction_policy"}
_TILES = {"tile_for", "up_columns_tile", "input_rows_tile", "FEWEST_ROWS", "ROWS_IN_CACHE", "SLAB", "BLOCK", "COLUMNS"}
_TILES |= {"MANY", "FEW"}

_COMPARISONS: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}
_ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
_NARROWER = {"float32": "float16", "int64": "int32", "uint32": "int32", "uint8": "int8", "bool": "int8"}
_CONVERSIONS = {"to", "float", "bool", "long", "contiguous"}
_COMMUTATIVE = {"add", "mul", "addcmul_", "vecdot", "gcd", "min", "max", "minimum", "maximum"}
_KERNEL_KINDS = {"p", "o", "m", "b", "stride"}
"""What the names of a kernel begin with: pointers, offsets, masks, values of a block, strides."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change to one file."""

    file: Path
    line: int
    column: int
    kind: str
    before: str
    after: str
    span: tuple[int, int]
    """Where it is put, in bytes of the file."""
    text: str
    """What is put there: `after`, as long in lines as what was there."""
    runs_in: range | None
    """The lines of its statement, up to the body where it has one. None: it runs when the file is imported."""

    def applied_to(self, source: bytes) -> bytes:
        """Returns the broken file."""
        start, end = self.span
        return source[:start] + self.text.encode() + source[end:]


Change = tuple[str, Any, Any, str]
"""Its kind, the first and the last node replaced, and by what."""


def mutants(file: Path, source: bytes) -> list[Mutant]:
    """Returns every mutant of a file, in the order of its lines."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(source)
    found: dict[tuple[Any, ...], Mutant] = {}
    for runs_in, (kind, first, last, after) in _changes(tree, None, "gpu" in file.parts):
        start = starts[first.lineno - 1] + first.col_offset
        end = starts[last.end_lineno - 1] + last.end_col_offset
        before = " ".join(source[start:end].decode().split())
        breaks = "\n" * (last.end_lineno - first.lineno)
        # In parentheses, an expression neither binds otherwise than what it replaces nor minds the line breaks.
        bare = kind == "swap" or isinstance(first, ast.stmt)
        text = after + breaks if bare else f"({breaks}{after})"
        if after != before:
            mutant = Mutant(file, first.lineno, first.col_offset + 1, kind, before, after, (start, end), text, runs_in)
            found.setdefault((start, end, after), mutant)
    return sorted(found.values(), key=lambda mutant: mutant.span)


def _changes(node: ast.AST, runs_in: range | None, gpu: bool) -> Iterator[tuple[range | None, Change]]:
    """Yields the changes to a node and to all in it, each with the lines of its statement."""
    inside = runs_in is not None
    if isinstance(node, ast.stmt) and inside:
        body = getattr(node, "body", None)
        runs_in = range(node.lineno, body[0].lineno if body else (node.end_lineno or 0) + 1)
    for change in _changes_to(node):
        yield runs_in, change
    in_body = isinstance(node, ast.FunctionDef)
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _left_alone(node, name, child, gpu and not inside):
                yield from _changes(child, range(0) if in_body and name == "body" else runs_in, gpu)


def _left_alone(parent: ast.AST, field: str, node: ast.AST, tiles: bool) -> bool:
    """Returns whether `LEFT_ALONE` names it; `tiles` where constants are sizes of tiles."""
    match node:
        case ast.Raise() | ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.expr_context():
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.FunctionDef(name=name) if name in _TILES:
            return True
        case ast.Assign(targets=[ast.Name(id=name)]) if name in _TILES:
            return True
        case ast.Assign(value=ast.Constant(value=int()) | ast.Tuple()) if tiles:
            return True
        case ast.keyword(arg=arg) if arg in _COMPILED | _TILES | {"strict"}:
            return True
        case ast.Constant() if isinstance(parent, ast.Call) and _name(parent) == "arange":
            return True
    # What masked places read is changed by the call that it belongs to.
    return field in ("annotation", "returns", "decorator_list") or getattr(parent, "arg", None) == "other"


def _name(call: ast.Call) -> str:
    """Returns the name of what is called, without what it belongs to."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _with(node: ast.AST, **fields: Any) -> str:
    """Returns the text of a node with other fields."""
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return ast.unparse(node)


def _changes_to(node: ast.AST) -> Iterator[Change]:
    """Yields the changes to a node itself."""

    def whole(kind: str, after: str) -> Change:
        return kind, node, node, after

    match node:
        case ast.Compare(ops=[op]):
            for other in _COMPARISONS[type(op)]:
                yield whole("comparison", _with(node, ops=[other()]))
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _ARITHMETIC:
            yield whole("arithmetic", _with(node, op=_ARITHMETIC[type(op)]()))
            if isinstance(node, ast.BinOp) and isinstance(op, ast.BitAnd) and not isinstance(node.right, ast.Constant):
                yield whole("mask", _with(node, left=_anything(node.left)))
                yield whole("mask", _with(node, right=_anything(node.right)))
        case ast.Constant(value=value):
            for other in _other_values(value):
                yield whole("constant", repr(other))
        case ast.Attribute(value=ast.Name(id="tl" | "torch"), attr=name) if name in _NARROWER:
            yield whole("dtype", _with(node, attr=_NARROWER[name]))
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield whole("minus" if isinstance(node.op, ast.USub) else "condition", ast.unparse(node.operand))
        case ast.BoolOp(op=op):
            yield whole("condition", _with(node, op=ast.And() if isinstance(op, ast.Or) else ast.Or()))
        case ast.If(test=test) | ast.IfExp(test=test) | ast.comprehension(ifs=[test]) if not isinstance(
            test, ast.Compare | ast.UnaryOp
        ):
            yield "condition", test, test, _with(ast.UnaryOp(ast.Not(), test))
        case ast.Call():
            yield from _changes_to_call(node)


def _anything(mask: ast.expr) -> ast.expr:
    """Returns a mask of the same shape that lets everything through."""
    return ast.BinOp(mask, ast.BitOr(), ast.Constant(True))


def _other_values(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value - 1] if value else [1]
        case float():
            return [other for other in (value + 1, 0.0) if other != value]
        case "ieee":
            return ["tf32"]
        case str():
            return [value + "x"]
    return []


def _changes_to_call(call: ast.Call) -> Iterator[Change]:
    name = _name(call)
    if name in _EXTREMES:
        field = "attr" if isinstance(call.func, ast.Attribute) else "id"
        yield "comparison", call.func, call.func, _with(call.func, **{field: _EXTREMES[name]})
    if name == "where" and len(call.args) == 3:
        yield "where", call, call, _with(call, args=[call.args[0], call.args[2], call.args[1]])
    elif name not in _COMMUTATIVE | {"store"}:
        for one, next_one in zip(call.args, call.args[1:], strict=False):
            if _kind(one) == _kind(next_one) != "constant":
                yield "swap", one, next_one, f"{ast.unparse(next_one)}, {ast.unparse(one)}"
    widens = any("int64" in ast.unparse(arg) for arg in call.args)
    if name in _CONVERSIONS and isinstance(call.func, ast.Attribute) and not widens:
        yield "dtype", call, call, ast.unparse(call.func.value)
    if name in ("range", "static_range"):
        start, stop, step = ([ast.Constant(0)] * (len(call.args) == 1) + call.args + [ast.Constant(1)])[:3]
        yield "bounds", call, call, _with(call, args=[ast.BinOp(start, ast.Add(), step), stop, step])
        yield "bounds", call, call, _with(call, args=[start, ast.BinOp(stop, ast.Sub(), step), step])
    for keyword in call.keywords:
        if keyword.arg == "mask":
            yield "mask", keyword.value, keyword.value, ast.unparse(_anything(keyword.value))
        elif keyword.arg == "other":
            number = isinstance(getattr(keyword.value, "value", None), float)
            yield "mask", keyword.value, keyword.value, "float('nan')" if number else "1"


def _kind(arg: ast.expr) -> str:
    """Returns what an argument is, so that two of a kind can take each other's place and only be wrong."""
    match arg:
        case ast.Starred(value=value):
            return _kind(value)
        case ast.Subscript(value=value):
            return _kind(value)
        case ast.Call(func=ast.Attribute(attr=name)):
            return name
        case ast.Name(id=name):
            if name.split("_")[0] in _KERNEL_KINDS:
                return name.split("_")[0]
            return "tensor" if re.search(r"_[A-Z]{1,2}$", name) else "name"
    return type(arg).__name__.lower()
