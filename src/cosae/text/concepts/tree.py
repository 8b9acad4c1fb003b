"""Syntax tree of Python source → regions: definitions, calls, bodies, clauses and expressions by their role.

Enters: a `Source`. Leaves: `Regions`, character spans by region name. One painter per kind of node; what a
node cannot know of itself (is it in a class, a loop, a function?) is carried down in `Place`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
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


Painter = Callable[[Source, Regions, ast.AST, Place], None]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def paint_tree(source: Source, regions: Regions) -> None:
    """Add every region of this module to `regions`. What stands inside an f-string is not looked at."""
    stack: list[tuple[ast.AST, Place]] = [(source.tree, Place())]
    _paint_docstring(source, regions, source.tree)
    while stack:
        node, place = stack.pop()
        painter = PAINTERS.get(type(node))
        if painter is not None:
            painter(source, regions, node, place)
        if isinstance(node, _FORMATTED):
            continue
        inner = _inside(node, place)
        outside = _evaluated_outside(node) if isinstance(node, Function) else ()
        stack += [(child, inner) for child in ast.iter_child_nodes(node) if child not in outside]
        stack += [(child, place) for child in outside]


def _evaluated_outside(node: Function) -> list[ast.AST]:
    """What a definition computes in the scope around it, not in its own."""
    return [*node.decorator_list, node.args, *([] if node.returns is None else [node.returns])]


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


def _body(source: Source, body: Sequence[ast.stmt]) -> list[tuple[int, int]]:
    """One span over a list of statements, decorators of the first included; nothing when it is empty."""
    if not body:
        return []
    decorators = getattr(body[0], "decorator_list", None)
    start = source.start(decorators[0] if decorators else body[0])
    if decorators:
        start = source.text.rfind("@", 0, start)
    return [(start, source.end(body[-1]))]


def _paint_docstring(source: Source, regions: Regions, node: ast.AST) -> None:
    body: list[ast.stmt] = node.body  # type: ignore[attr-defined]
    if not body or not isinstance(body[0], ast.Expr) or not isinstance(body[0].value, ast.Constant):
        return
    if isinstance(body[0].value.value, str):
        start, end = source.span(body[0])
        regions["docstring"].append((start, end))
        cut = source.text.find("\n", start, end)
        regions["docstring_summary"].append((start, end if cut < 0 else cut))


def _paint_definition(source: Source, regions: Regions, node: ast.AST, kind: str) -> None:
    """Name, signature, decorators and docstring of a function or class."""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    start = source.start(node)
    name = _DEFINED.match(source.text, start)
    if name is not None:
        regions[kind].append(name.span(1))
    regions["signature"].append((start, _body(source, node.body)[0][0]))
    for decorator in node.decorator_list:
        first, last = source.span(decorator)
        regions["decorator"].append((source.text.rfind("@", 0, first), last))
    _paint_docstring(source, regions, node)


def _function(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, Function)
    _paint_definition(source, regions, node, "method_name" if place.in_class else "function_name")
    body = _body(source, node.body)
    regions["function_body"] += body
    if place.in_class:
        regions["method_body"] += body
    if place.functions:
        regions["nested_function_body"] += body
    if node.name == "__init__":
        regions["init_body"] += body
    elif node.name.startswith("__") and node.name.endswith("__"):
        regions["dunder_method_body"] += body
    elif node.name.startswith("_"):
        regions["private_function_body"] += body
    if isinstance(node, ast.AsyncFunctionDef):
        regions["async_body"] += body
    if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
        regions["property_body"] += body
    if node.returns is not None:
        regions["annotation"].append(source.span(node.returns))
    for default in (*node.args.defaults, *node.args.kw_defaults):
        if default is not None:
            regions["default_value"].append(source.span(default))


def _class(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.ClassDef)
    _paint_definition(source, regions, node, "class_name")
    regions["class_body"] += _body(source, node.body)
    regions["base_class"] += [source.span(base) for base in node.bases]


def _parameter(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.arg)
    start = source.start(node)
    regions["parameter_name"].append((start, start + len(node.arg)))
    if node.annotation is not None:
        regions["annotation"].append(source.span(node.annotation))


def _import(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.Import)
    for alias in node.names:
        start = source.start(alias)
        regions["imported_module"].append((start, start + len(alias.name)))


def _import_from(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.ImportFrom)
    module = _FROM_MODULE.match(source.text, source.start(node))
    if module is not None:
        regions["imported_module"].append(module.span(1))
    for alias in node.names:
        start = source.start(alias)
        regions["imported_name"].append((start, start + len(alias.name)))


def _call(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.Call)
    end = source.end(node.func)
    if isinstance(node.func, ast.Name):
        regions["called_function"].append((source.start(node.func), end))
    elif isinstance(node.func, ast.Attribute):
        regions["called_method"].append((end - len(node.func.attr), end))
    arguments = [source.span(value) for value in (*node.args, *(pair.value for pair in node.keywords))]
    regions["call_argument"] += arguments
    if place.calls:
        regions["nested_call_argument"] += arguments
    for position, value in enumerate(node.args):
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            regions["string_argument"].append(source.span(value))
        if position == 0:
            regions["first_argument"].append(source.span(value))
    for pair in node.keywords:
        if pair.arg is not None:
            start = source.start(pair)
            regions["keyword_argument_name"].append((start, start + len(pair.arg)))
            regions["keyword_argument_value"].append(source.span(pair.value))


def _attribute(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.Attribute)
    end = source.end(node)
    span = (end - len(node.attr), end)
    regions["attribute"].append(span)
    if isinstance(node.value, ast.Name) and node.value.id == "self":
        regions["self_attribute"].append(span)
    if isinstance(node.ctx, ast.Store):
        regions["assigned_attribute"].append(span)


def _name(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.Name)
    if isinstance(node.ctx, ast.Store):
        kind = "assigned_local" if place.functions and not place.in_class else "assigned_outside_function"
        regions[kind].append(source.span(node))
    elif node.id in place.parameters:
        regions["parameter_use"].append(source.span(node))


def _subscript(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.Subscript)
    regions["subscripted"].append(source.span(node.value))
    kind = "slice" if isinstance(node.slice, ast.Slice) else "subscript_index"
    regions[kind].append(source.span(node.slice))


def _for(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.For | ast.AsyncFor)
    regions["loop_variable"].append(source.span(node.target))
    regions["loop_iterable"].append(source.span(node.iter))
    _loop_body(source, regions, node.body, place)


def _while(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.While)
    regions["condition"].append(source.span(node.test))
    _loop_body(source, regions, node.body, place)


def _loop_body(source: Source, regions: Regions, body: Sequence[ast.stmt], place: Place) -> None:
    regions["loop_body"] += _body(source, body)
    if place.loops:
        regions["nested_loop_body"] += _body(source, body)


def _if(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.If)
    regions["condition"].append(source.span(node.test))
    regions["conditional_body"] += _body(source, node.body)
    is_elif = source.text.startswith("elif", source.start(node))
    if is_elif:
        regions["elif_branch"].append((source.start(node), source.end(node.body[-1])))
    elif place.tests:
        regions["nested_conditional_body"] += _body(source, node.body)
    if node.orelse and not source.text.startswith("elif", source.start(node.orelse[0])):
        regions["else_body"] += _body(source, node.orelse)


def _try(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.Try | ast.TryStar)
    regions["try_body"] += _body(source, node.body)
    regions["finally_body"] += _body(source, node.finalbody)
    for handler in node.handlers:
        regions["except_body"] += _body(source, handler.body)
        if handler.type is not None:
            regions["caught_exception"].append(source.span(handler.type))


def _with(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.With | ast.AsyncWith)
    regions["with_context"] += [source.span(item.context_expr) for item in node.items]
    regions["with_body"] += _body(source, node.body)


def _assign(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.NamedExpr)
    if node.value is not None:
        regions["assigned_value"].append(source.span(node.value))
    if isinstance(node, ast.AnnAssign):
        regions["annotation"].append(source.span(node.annotation))


def _comprehension(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    regions["comprehension"].append(source.span(node))
    if isinstance(node, ast.GeneratorExp):
        regions["generator_expression"].append(source.span(node))


def _comparison(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.Compare)
    regions["comparison"].append(source.span(node))
    regions["compared_right"] += [source.span(side) for side in node.comparators]


def _binary(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.BinOp)
    text = isinstance(node.left, ast.Constant) and isinstance(node.left.value, str)
    if isinstance(node.op, ast.Mod) and text:
        regions["percent_format"].append(source.span(node))
    else:
        regions["arithmetic"].append(source.span(node))


def _dict(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
    assert isinstance(node, ast.Dict)
    regions["dict_literal"].append(source.span(node))
    regions["dict_key"] += [source.span(key) for key in node.keys if key is not None]


def _whole(name: str) -> Painter:
    """The node from its first character to its last."""

    def paint(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
        regions[name].append(source.span(node))

    return paint


def _part(name: str, field: str) -> Painter:
    """One child of the node, where it has that child."""

    def paint(source: Source, regions: Regions, node: ast.AST, place: Place) -> None:
        child = getattr(node, field)
        if child is not None:
            regions[name].append(source.span(child))

    return paint


PAINTERS: dict[type[ast.AST], Painter] = {
    **dict.fromkeys((ast.FunctionDef, ast.AsyncFunctionDef), _function),
    **dict.fromkeys((ast.For, ast.AsyncFor), _for),
    **dict.fromkeys((ast.Try, ast.TryStar), _try),
    **dict.fromkeys((ast.With, ast.AsyncWith), _with),
    **dict.fromkeys((ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr), _assign),
    **dict.fromkeys((ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), _comprehension),
    ast.ClassDef: _class,
    ast.arg: _parameter,
    ast.Import: _import,
    ast.ImportFrom: _import_from,
    ast.Call: _call,
    ast.Attribute: _attribute,
    ast.Name: _name,
    ast.Subscript: _subscript,
    ast.While: _while,
    ast.If: _if,
    ast.Compare: _comparison,
    ast.BinOp: _binary,
    ast.Dict: _dict,
    ast.BoolOp: _whole("boolean_expression"),
    ast.IfExp: _whole("conditional_expression"),
    ast.Lambda: _whole("lambda"),
    ast.List: _whole("list_literal"),
    ast.Tuple: _whole("tuple_literal"),
    ast.Assert: _whole("assertion"),
    ast.Return: _part("return_value", "value"),
    ast.Raise: _part("raised_exception", "exc"),
    ast.Yield: _part("yielded_value", "value"),
    ast.YieldFrom: _part("yielded_value", "value"),
    ast.Await: _part("awaited_value", "value"),
}
