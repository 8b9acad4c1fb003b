"""Syntax tree of Python source → regions: definitions, calls, bodies, clauses and expressions by their role.

What a node cannot know of itself (is it in a class, a loop, a function?) is carried down in `Place`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import NamedTuple

from cosae.text.concepts.source import Regions, Source

_DEFINED = re.compile(r"(?:async[ \t]+)?(?:def|class)[\s\\]+(\w+)")
_FROM_MODULE = re.compile(r"from\b[ \t]*((?:[.\w]|[ \t]+(?!import\b))+)")
_FORMATTED = tuple(getattr(ast, name) for name in ("JoinedStr", "TemplateStr") if hasattr(ast, name))


class Place(NamedTuple):
    """Where in the program a node stands."""

    in_class: bool = False  # a class body is the nearest enclosing scope
    functions: int = 0
    loops: int = 0  # within the nearest function
    tests: int = 0  # `if` statements within the nearest function
    calls: int = 0  # calls in whose arguments the node stands
    parameters: frozenset[str] = frozenset()  # of the nearest function


Function = ast.FunctionDef | ast.AsyncFunctionDef


def paint_tree(source: Source, regions: Regions) -> None:
    """Add every region of this module to `regions`. What stands inside an f-string is not looked at."""
    painter = _Painter(source, regions)
    stack: list[tuple[ast.AST, Place]] = [(source.tree, Place())]
    painter.docstring(source.tree.body)
    while stack:
        node, place = stack.pop()
        painter.roles(node)
        painter.definition(node, place)
        painter.statement(node, place)
        painter.expression(node, place)
        if isinstance(node, _FORMATTED):
            continue
        inner = _inside(node, place)
        outside: list[ast.AST | None] = []  # what a definition computes in the scope around it, not in its own
        if isinstance(node, Function):
            outside = [*node.decorator_list, node.args, node.returns]
        stack += [(child, place if child in outside else inner) for child in ast.iter_child_nodes(node)]


def _inside(node: ast.AST, place: Place) -> Place:
    """The place of a node's children."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            names = frozenset(arg.arg for arg in _parameters(node.args)) - {"self", "cls"}
            return Place(functions=place.functions + 1, parameters=names)
        case ast.ClassDef():
            return Place(in_class=True, functions=place.functions)
        case ast.For() | ast.AsyncFor() | ast.While():
            return place._replace(loops=place.loops + 1)
        case ast.If():
            return place._replace(tests=place.tests + 1)
        case ast.Call():
            return place._replace(calls=place.calls + 1)
    return place


def _parameters(args: ast.arguments) -> list[ast.arg]:
    extra = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *extra]


class _Painter:
    """Adds the spans of one node at a time."""

    def __init__(self, source: Source, regions: Regions) -> None:
        self.source, self.regions = source, regions

    def add(self, name: str, *nodes: ast.AST | None) -> None:
        """The nodes, each from its first character to its last."""
        self.regions[name] += [self.source.span(node) for node in nodes if node is not None]

    def add_first(self, name: str, node: ast.AST, length: int) -> None:
        start = self.source.start(node)
        self.regions[name].append((start, start + length))

    def roles(self, node: ast.AST) -> None:
        """What `ROLES` says of the node and its parts."""
        for region, part in ROLES.get(type(node), ()):
            found = getattr(node, part) if part else node
            self.add(region, *(found if isinstance(found, list) else [found]))

    def add_last(self, name: str, node: ast.AST, length: int) -> None:
        end = self.source.end(node)
        self.regions[name].append((end - length, end))

    def add_body(self, name: str, body: Sequence[ast.stmt]) -> None:
        """A list of statements; nothing when it is empty."""
        if body:
            self.regions[name].append((self._first_of(body), self.source.end(body[-1])))

    def _first_of(self, body: Sequence[ast.stmt]) -> int:
        """Where statements begin, decorators of the first included."""
        decorators = getattr(body[0], "decorator_list", None)
        if decorators:
            return self.source.text.rfind("@", 0, self.source.start(decorators[0]))
        return self.source.start(body[0])

    def docstring(self, body: Sequence[ast.stmt]) -> None:
        """The docstring of a module, class or function, where it has one."""
        match body:
            case [ast.Expr(value=ast.Constant(value=str())) as first, *_]:
                start, end = self.source.span(first)
                self.regions["docstring"].append((start, end))
                cut = self.source.text.find("\n", start, end)
                self.regions["docstring_summary"].append((start, end if cut < 0 else cut))

    def definition(self, node: ast.AST, place: Place) -> None:
        """Functions, classes, their parameters, and imports."""
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._head(node, "method_name" if place.in_class else "function_name")
                for name in _kinds_of_body(node, place):
                    self.add_body(name, node.body)
                self.add("default_value", *node.args.defaults, *node.args.kw_defaults)
            case ast.ClassDef():
                self._head(node, "class_name")
                self.add_body("class_body", node.body)
            case ast.arg():
                self.add_first("parameter_name", node, len(node.arg))
            case ast.Import():
                for alias in node.names:
                    self.add_first("imported_module", alias, len(alias.name))
            case ast.ImportFrom():
                module = _FROM_MODULE.match(self.source.text, self.source.start(node))
                if module is not None:
                    self.regions["imported_module"].append(module.span(1))
                for alias in node.names:
                    self.add_first("imported_name", alias, len(alias.name))

    def _head(self, node: Function | ast.ClassDef, kind: str) -> None:
        """Name, signature, decorators and docstring of a function or class."""
        start = self.source.start(node)
        name = _DEFINED.match(self.source.text, start)
        if name is not None:
            self.regions[kind].append(name.span(1))
        self.regions["signature"].append((start, self._first_of(node.body)))
        for decorator in node.decorator_list:
            first, last = self.source.span(decorator)
            self.regions["decorator"].append((self.source.text.rfind("@", 0, first), last))
        self.docstring(node.body)

    def statement(self, node: ast.AST, place: Place) -> None:
        """The bodies of loops, conditions and other blocks."""
        match node:
            case ast.For() | ast.AsyncFor() | ast.While():
                self.add_body("loop_body", node.body)
                if place.loops:
                    self.add_body("nested_loop_body", node.body)
            case ast.If():
                self._if(node, place)
            case ast.Try() | ast.TryStar():
                self.add_body("try_body", node.body)
                self.add_body("finally_body", node.finalbody)
                for handler in node.handlers:
                    self.add_body("except_body", handler.body)
            case ast.With() | ast.AsyncWith():
                self.add_body("with_body", node.body)

    def _if(self, node: ast.If, place: Place) -> None:
        self.add_body("conditional_body", node.body)
        if self._is_elif(node):
            self.regions["elif_branch"].append((self.source.start(node), self.source.end(node.body[-1])))
        elif place.tests:
            self.add_body("nested_conditional_body", node.body)
        if node.orelse and not self._is_elif(node.orelse[0]):
            self.add_body("else_body", node.orelse)

    def _is_elif(self, node: ast.AST) -> bool:
        return self.source.text.startswith("elif", self.source.start(node))

    def expression(self, node: ast.AST, place: Place) -> None:
        """Names, calls, attributes, and what `ROLES` cannot say."""
        match node:
            case ast.Name(ctx=ast.Store()):
                local = place.functions and not place.in_class
                self.add("assigned_local" if local else "assigned_outside_function", node)
            case ast.Name():
                if node.id in place.parameters:
                    self.add("parameter_use", node)
            case ast.Call():
                self._call(node, place)
            case ast.Attribute():
                self.add_last("attribute", node, len(node.attr))
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    self.add_last("self_attribute", node, len(node.attr))
                if isinstance(node.ctx, ast.Store):
                    self.add_last("assigned_attribute", node, len(node.attr))
            case ast.Subscript():
                self.add("slice" if isinstance(node.slice, ast.Slice) else "subscript_index", node.slice)
            case ast.BinOp():
                percent = isinstance(node.op, ast.Mod) and _is_string(node.left)
                self.add("percent_format" if percent else "arithmetic", node)

    def _call(self, node: ast.Call, place: Place) -> None:
        if isinstance(node.func, ast.Name):
            self.add("called_function", node.func)
        elif isinstance(node.func, ast.Attribute):
            self.add_last("called_method", node.func, len(node.func.attr))
        arguments = (*node.args, *(pair.value for pair in node.keywords))
        self.add("call_argument", *arguments)
        if place.calls:
            self.add("nested_call_argument", *arguments)
        self.add("first_argument", *node.args[:1])
        self.add("string_argument", *filter(_is_string, node.args))
        for pair in node.keywords:
            if pair.arg is not None:
                self.add_first("keyword_argument_name", pair, len(pair.arg))
                self.add("keyword_argument_value", pair.value)


_ROLES = """
FunctionDef AsyncFunctionDef: annotation=returns
ClassDef: base_class=bases
arg: annotation=annotation
For AsyncFor: loop_variable=target loop_iterable=iter
While If: condition=test
ExceptHandler: caught_exception=type
withitem: with_context=context_expr
Assign AugAssign NamedExpr: assigned_value=value
AnnAssign: assigned_value=value annotation=annotation
Return: return_value=value
Raise: raised_exception=exc
Assert: assertion
Subscript: subscripted=value
ListComp SetComp DictComp: comprehension
GeneratorExp: comprehension generator_expression
Compare: comparison compared_right=comparators
Dict: dict_literal dict_key=keys
Yield YieldFrom: yielded_value=value
Await: awaited_value=value
BoolOp: boolean_expression
IfExp: conditional_expression
Lambda: lambda
List: list_literal
Tuple: tuple_literal
"""
ROLES: dict[type[ast.AST], list[tuple[str, str]]] = {
    getattr(ast, kind): [(region, part) for region, _, part in (role.partition("=") for role in roles.split())]
    for kinds, roles in (line.split(": ") for line in _ROLES.strip().split("\n"))
    for kind in kinds.split()
}
"""Node → regions, and for each the field whose nodes are in it; none: the node itself."""


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _kinds_of_body(node: Function, place: Place) -> list[str]:
    """The regions that a function's body is in."""
    dunder = node.name.startswith("__") and node.name.endswith("__")
    kinds = {
        "function_body": True,
        "method_body": place.in_class,
        "nested_function_body": place.functions > 0,
        "init_body": node.name == "__init__",
        "dunder_method_body": dunder and node.name != "__init__",
        "private_function_body": node.name.startswith("_") and not dunder,
        "async_body": isinstance(node, ast.AsyncFunctionDef),
        "property_body": any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list),
    }
    return [name for name, applies in kinds.items() if applies]
