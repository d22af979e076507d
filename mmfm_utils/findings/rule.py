"""The rule that judges a finding: a condition on measured numbers, read as a tree and never run as code."""

import ast
import operator
import random
import re

from .. import UsageError

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le,
}  # fmt: skip
FUNCTIONS = {"abs": abs, "min": min, "max": max}
NAMES = ("value", "control", "interval", "n")


def shown(value) -> str:
    """A number, a pair or a mapping of either, for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(v)}" for name, v in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    return "none" if value is None else f"{value:.3g}"


class _Any(float):
    """Stands for any number, and for a mapping of any names to numbers, while a rule is checked."""

    def __getitem__(self, key):
        return _Any(random.random())


class Rule:
    """A condition such as `value.late > control.late + 0.1 and interval[0] > 0`; read as a tree, never run as code."""

    def __init__(self, text: str):
        self.text = " ".join(text.split())
        try:
            self.tree = ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            raise UsageError(f"`{self.text}` is no expression ({error.msg})") from None
        self.names = {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)} & set(NAMES)
        self({name: _Any(random.random()) for name in NAMES})

    def __call__(self, known: dict) -> bool:
        try:
            return _typed(self.tree, known, bool)
        except (TypeError, KeyError, IndexError, ZeroDivisionError) as error:
            told = ", ".join(f"{name}={known[name]}" for name in sorted(self.names))
            raise UsageError(f"`{self.text}` does not fit {told} ({type(error).__name__}: {error})") from None

    def filled(self, known: dict) -> str:
        """The rule with the measured numbers in the places of the names."""

        class Fill(ast.NodeTransformer):
            def visit_Call(self, node):
                node.args = [self.visit(part) for part in node.args]
                return node

            def visit_Name(self, node):
                return ast.Name(shown(_eval(node, known)))

            visit_Attribute = visit_Subscript = visit_Name

        return ast.unparse(Fill().visit(ast.parse(self.text, mode="eval")))

    def words(self) -> str:
        """The rule for people: `interval[0]` is the low end of the interval, `value` is ours."""
        text = re.sub(r"\binterval((\.\w+)?)\[0\]", r"low end of interval\1", self.text)
        text = re.sub(r"\binterval((\.\w+)?)\[1\]", r"high end of interval\1", text)
        return re.sub(r"(?<![.\w\"'])value\b", "ours", text)


def _eval(node: ast.AST, known: dict):
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.Attribute(value=base, attr=key) | ast.Subscript(value=base, slice=ast.Constant(value=key)):
            return _eval(base, known)[key]
        case ast.UnaryOp(op=ast.USub(), operand=part):
            return -_typed(part, known)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not _typed(part, known, bool)
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)([_typed(part, known, bool) for part in parts])
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_typed(left, known), _typed(right, known))
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in OPERATORS for op in ops):
            numbers = [_typed(part, known) for part in (left, *rest)]
            return all(OPERATORS[type(op)](a, b) for op, a, b in zip(ops, numbers, numbers[1:]))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*[_typed(part, known) for part in args])
    allowed = ", ".join((*NAMES, *FUNCTIONS))
    raise UsageError(f"`{ast.unparse(node)}` is not allowed in a rule; its names are {allowed}")


def _typed(node: ast.AST, known: dict, condition=None):
    """The value of a part that must be a condition, or else a number."""
    found = _eval(node, known)
    if isinstance(found, bool) != (condition is bool) or not isinstance(found, int | float):
        raise UsageError(f"`{ast.unparse(node)}` must be {'a condition' if condition else 'a number'} in a rule")
    return found
