"""The table of concepts: everything a token of Python source can be, or stand in.

Two groups. `lexical` concepts are plain from the characters of the token alone, so they flatter every method;
`contextual` ones need what stands around it. `python_tokens` and `python_tree` find the regions of these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Concept:
    """Something a token is or stands in; `name` is unique, `description` for readers."""

    name: str
    description: str
    group: Literal["lexical", "contextual"]


_LEXICAL = """
keyword_def: the keyword def
keyword_class: the keyword class
keyword_return: the keyword return
keyword_if: the keyword if
keyword_elif_else: the keywords elif and else
keyword_for: the keyword for
keyword_while: the keyword while
keyword_in: the keyword in
keyword_not: the keyword not
keyword_and_or: the keywords and, or
keyword_is: the keyword is
keyword_import: the keyword import
keyword_from: the keyword from
keyword_try: the keyword try
keyword_except_finally: the keywords except and finally
keyword_raise: the keyword raise
keyword_with_as: the keywords with and as
keyword_break_continue_pass: the keywords break, continue and pass
keyword_async_yield_lambda: the keywords async, await, yield and lambda
keyword_assert_del_global: the keywords assert, del, global and nonlocal
boolean: True and False
none: None
number: a number
assign_operator: =
augmented_operator: += and its like
comparison_operator: ==, !=, <, >, <=, >=
arithmetic_operator: +, -, *, /, //, %, ** (as characters: also the stars of *args)
bitwise_operator: &, |, ^, ~, <<, >>
open_parenthesis: (
close_parenthesis: )
square_bracket: [ or ]
brace: { or }
comma: a comma
colon: a colon
dot: a dot between names
comment_hash: the # that opens a comment
string_quote: the quotes of a string, its prefix included
newline: the end of a line
name_self: the name self or cls
name_builtin: the name of a common builtin, such as len
name_dunder: a name such as __init__
name_private: a name with one leading underscore
name_constant: a name in capitals
name_capitalised: a name in mixed case that begins with a capital
name_error: a name that ends in Error, Exception or Warning
name_one_letter: a name of one letter
"""

_CONTEXTUAL = """
string: in a string
docstring: in a docstring
docstring_summary: in the first line of a docstring
bytes_string: in a bytes literal
raw_string: in a raw string
f_string: in an f-string
f_string_field: in a replacement field of an f-string
string_argument: in a string that is an argument of a call
percent_format: in a string % values expression
comment: in a comment
comment_line: in a comment that has the line for itself
trailing_comment: in a comment behind code
function_name: the name of a function being defined
method_name: the name of a method being defined
class_name: the name of a class being defined
parameter_name: the name of a parameter being defined
default_value: in the default value of a parameter
annotation: in a type annotation
signature: between def or class and the body
base_class: in a base class of a class being defined
decorator: in a decorator, its @ included
imported_module: the module that an import names
imported_name: a name imported from a module
called_function: a plain name being called
called_method: an attribute being called
call_argument: in an argument of a call
first_argument: in the first argument of a call
nested_call_argument: in an argument of a call that is itself in an argument
keyword_argument_name: the name of a keyword argument in a call
keyword_argument_value: in the value of a keyword argument
attribute: the name of an attribute
self_attribute: the name of an attribute of self
assigned_attribute: the name of an attribute being assigned
assigned_local: a local name being assigned
assigned_outside_function: a name being assigned in a module or class body
assigned_value: in the right-hand side of an assignment
parameter_use: a parameter of the nearest function being read
first_mention: the first place where the document uses a name
statement_start: the first word of a statement that does not begin with a string
subscripted: in what is subscripted
subscript_index: in a subscript that is no slice
slice: in a slice
loop_variable: in the target of a for statement
loop_iterable: in what a for statement runs over
loop_body: in the body of a loop
nested_loop_body: in the body of a loop inside a loop
condition: in the test of an if, elif or while
conditional_body: in the body of an if or elif
nested_conditional_body: in the body of an if inside an if
elif_branch: in an elif branch, its test included
else_body: in the else body of an if
conditional_expression: in an a if b else c
boolean_expression: in an and/or expression
comparison: in a comparison
compared_right: in the right-hand side of a comparison
arithmetic: in arithmetic
try_body: in the body of a try
except_body: in the body of an except
finally_body: in the body of a finally
caught_exception: in the exception that an except names
raised_exception: in what is raised
with_context: in the context expression of a with
with_body: in the body of a with
return_value: in what is returned
yielded_value: in what is yielded
awaited_value: in what is awaited
assertion: in an assert statement
lambda: in a lambda
comprehension: in a comprehension or generator expression
generator_expression: in a generator expression
list_literal: in a list
tuple_literal: in a tuple
dict_literal: in a dict
dict_key: in a key of a dict
function_body: in the body of a function or method
method_body: in the body of a method
nested_function_body: in the body of a function inside a function
init_body: in the body of an __init__
dunder_method_body: in the body of a __name__ other than __init__
private_function_body: in the body of a function with a leading underscore
property_body: in the body of a property
async_body: in the body of an async function
class_body: in the body of a class
module_level: outside every block
indented_2: in code at least two blocks deep
indented_3: in code at least three blocks deep
indented_4: in code at least four blocks deep
brackets_1: inside brackets, the brackets included
brackets_2: inside brackets inside brackets
brackets_3: inside brackets at least three deep
continued_line: on a line that an open bracket carries on
blank_line: the line break of an empty line
"""

FAMILIES = (
    *("asyncio", "concurrent", "ctypes", "email", "html", "http", "idlelib", "importlib", "json", "lib2to3"),
    *("logging", "multiprocessing", "sqlite3", "tkinter", "unittest", "urllib", "wsgiref", "xml", "test"),
)
"""Module families: a file is in one when a folder of its name, or its own name, is the family's name."""


def _read(table: str, group: Literal["lexical", "contextual"]) -> list[Concept]:
    rows = (line.split(": ", 1) for line in table.strip().split("\n"))
    return [Concept(name, description, group) for name, description in rows]


CONCEPTS: tuple[Concept, ...] = (
    *_read(_LEXICAL, "lexical"),
    *_read(_CONTEXTUAL, "contextual"),
    *(Concept(f"module_{name}", f"in a file of the {name} family", "contextual") for name in FAMILIES),
)
"""Every concept, in the order of the label columns."""

COLUMN = {concept.name: column for column, concept in enumerate(CONCEPTS)}
"""The column of each concept by name."""
