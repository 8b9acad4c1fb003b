"""Labels of Python source against answers written by hand and against `ast.get_source_segment`."""

from __future__ import annotations

import ast
import re
import sys

import numpy as np
import pytest
import torch

from cosae.errors import CosaeError
from cosae.text import pylib
from cosae.text.concepts.labels import CONCEPTS, anchors, has_labels, label_activations, label_document
from cosae.text.concepts.table import COLUMN
from cosae.types import Activations

PIECE = re.compile(r"\w+|\s+|[^\w\s]")


def offsets(text: str) -> np.ndarray:
    """A BOS, then words, runs of white space and single signs: what a tokenizer without merges would give."""
    return np.array([(0, 0)] + [match.span() for match in PIECE.finditer(text)])


def pieces(text: str, concept: str, name: str = "") -> str:
    """The visible tokens that carry the concept, joined by blanks."""
    spans = offsets(text)
    labels = label_document(text, spans, name)
    assert labels is not None
    found = [text[a:b] for (a, b), has in zip(spans, labels[:, COLUMN[concept]], strict=True) if has]
    return " ".join(piece for piece in found if piece.strip())


LEXICAL = [
    ("keyword_def", "def f(): default = 1\n", "def"),
    ("keyword_elif_else", "if a: pass\nelif b: pass\nelse: pass\n", "elif else"),
    ("keyword_not", "not a\nb not in c\n", "not not"),
    ("keyword_except_finally", "try: pass\nexcept E: pass\nfinally: pass\n", "except finally"),
    ("boolean", "a = True; b = False; 'True'\n", "True False"),
    ("none", "a = None # None\n", "None"),
    ("number", "a = 1 + 0x2f + 'x 3'\n", "1 0x2f"),
    ("assign_operator", "a = b == c\nd = 1\n", "= ="),
    ("comparison_operator", "a = b == c < d\n", "= = <"),
    ("arithmetic_operator", "a = b - c\nf(*d)\n", "- *"),
    ("augmented_operator", "a += b + c\n", "+ ="),
    ("bitwise_operator", "a = b | ~c\n", "| ~"),
    ("open_parenthesis", "f((a), '(')\n", "( ("),
    ("dot", "a.b = 1.5\n", "."),
    ("comment_hash", "a # b # c\n'#'\n", "#"),
    ("string_quote", "a = rb'x' + '''y'''\n", "rb ' ' ' ' ' ' ' '"),
    ("name_self", "self.a = cls\n'self'\n", "self cls"),
    ("name_builtin", "len(x.len)\nlength\n", "len len"),
    ("name_dunder", "__init__ _a __b a__\n".replace(" ", "; "), "__init__"),
    ("name_private", "_a; __b; c_; __d__\n", "_a"),
    ("name_constant", "A_B; A; Ab; _CD\n", "A_B _CD"),
    ("name_capitalised", "Ab; HTTPError; AB; ab\n", "Ab HTTPError"),
    ("name_error", "KeyError; Errors; MyWarning\n", "KeyError MyWarning"),
    ("name_one_letter", "a; bb; c\n", "a c"),
]

DEFINITIONS = '''@deco(1)
async def outer(self, a, b: int = 2 + 3, *args, c=None, **kw) -> str:
    """Sum.

    More."""
    def inner():
        return a
    return b.a(c)

class Child(Base, meta.Other):
    limit = 10

    def __init__(self):
        self.a = self.b.c
        x, y = 1, 2

    @property
    def _value(self):
        return limit
'''

CONTEXTUAL = [
    ("decorator", DEFINITIONS, "@ deco ( 1 ) @ property"),
    ("function_name", DEFINITIONS, "outer inner"),
    ("method_name", DEFINITIONS, "__init__ _value"),
    ("class_name", DEFINITIONS, "Child"),
    ("parameter_name", DEFINITIONS, "self a b args c kw self self"),
    ("default_value", DEFINITIONS, "2 + 3 None"),
    ("annotation", DEFINITIONS, "int str"),
    ("base_class", DEFINITIONS, "Base meta . Other"),
    ("docstring", DEFINITIONS, '" " " Sum . More . " " "'),
    ("docstring_summary", DEFINITIONS, '" " " Sum .'),
    ("return_value", DEFINITIONS, "a b . a ( c ) limit"),
    ("nested_function_body", DEFINITIONS, "return a"),
    ("init_body", DEFINITIONS, "self . a = self . b . c x , y = 1 , 2"),
    ("property_body", DEFINITIONS, "return limit"),
    ("private_function_body", DEFINITIONS, "return limit"),
    ("parameter_use", DEFINITIONS, "b c"),  # `a` belongs to outer, not to inner; self is left out
    ("parameter_use", "def f(a):\n  def g(b=a, c=b): c\n", "a c"),  # defaults belong to the scope outside
    ("attribute", DEFINITIONS, "a Other a b c"),
    ("self_attribute", DEFINITIONS, "a b"),
    ("assigned_attribute", DEFINITIONS, "a"),
    ("assigned_local", DEFINITIONS, "x y"),
    ("assigned_outside_function", DEFINITIONS, "limit"),
    ("assigned_value", DEFINITIONS, "10 self . b . c 1 , 2"),
    ("tuple_literal", DEFINITIONS, "x , y 1 , 2"),
    ("imported_module", "import a.b as c\nfrom ..d import e as f\nfrom . import (g,\n h)\n", "a . b . . d ."),
    ("imported_name", "import a.b as c\nfrom ..d import e as f\nfrom . import (g,\n h)\n", "e g h"),
    ("called_function", "f(g(1)).h(i)\n", "f g"),
    ("called_method", "f(g(1)).h(i)\n", "h"),
    ("call_argument", "f(g(1)).h(i, k=2)\n", "g ( 1 ) i 2"),
    ("first_argument", "f(a, b)\nf(c=1)\n", "a"),
    ("nested_call_argument", "f(g(1), 2)\n", "1"),
    ("keyword_argument_name", "f(a, bc=d, **e)\n", "bc"),
    ("keyword_argument_value", "f(a, bc=d, **e)\n", "d"),
    ("string_argument", "f('a b', b'c', 'd' + e)\n", "' a b '"),
    ("percent_format", "'%d' % (a,)\nb % c\n", "' % d ' % ( a , )"),
    ("arithmetic", "'%d' % (a,)\nb % c\n", "b % c"),
    ("subscripted", "a[b.c][1:2]\n", "a [ b . c ]"),
    ("subscript_index", "a[b.c][1:2]\n", "b . c"),
    ("slice", "a[b.c][1:2]\n", "1 : 2"),
    ("loop_variable", "for a, b in c:\n  d\nelse:\n  e\n", "a , b"),
    ("loop_iterable", "for a, b in c.d:\n  d\nelse:\n  e\n", "c . d"),
    ("loop_body", "for a, b in c:\n  d\nelse:\n  e\nwhile f:\n  g\n", "d g"),
    ("nested_loop_body", "for a in b:\n  while c:\n    d\n  e\n", "d"),
    ("condition", "if a:\n  b\nelif c:\n  d\nwhile e: f\n", "a c e"),
    ("conditional_body", "if a:\n  b\nelif c:\n  d\nelse:\n  e\n", "b d"),
    ("nested_conditional_body", "if a:\n  if b: c\nelif d:\n  e\n", "c"),
    ("elif_branch", "if a:\n  b\nelif c:\n  d\nelse:\n  e\n", "elif c : d"),
    ("else_body", "if a:\n  b\nelif c:\n  d\nelse:\n  e\n  f\n", "e f"),
    ("conditional_expression", "a = b if c else d\n", "b if c else d"),
    ("boolean_expression", "a = b and (c or d)\n", "b and ( c or d )"),
    ("comparison", "a = b < c + d\n", "b < c + d"),
    ("compared_right", "a = b < c < d\n", "c d"),
    ("try_body", "try:\n  a\nexcept (B, C) as d:\n  e\nelse:\n  f\nfinally:\n  g\n", "a"),
    ("caught_exception", "try:\n  a\nexcept (B, C) as d:\n  e\nfinally:\n  g\n", "( B , C )"),
    ("except_body", "try:\n  a\nexcept (B, C) as d:\n  e\nfinally:\n  g\n", "e"),
    ("finally_body", "try:\n  a\nexcept (B, C) as d:\n  e\nfinally:\n  g\n", "g"),
    ("raised_exception", "raise A(b) from c\n", "A ( b )"),
    ("with_context", "with open(a) as b, c:\n  d\n", "open ( a ) c"),
    ("with_body", "with open(a) as b, c:\n  d\n", "d"),
    ("assertion", "assert a, 'b'\nc\n", "assert a , ' b '"),
    ("lambda", "a = lambda b: c\n", "lambda b : c"),
    ("comprehension", "a = [b for b in c]\nd(e for e in f)\n", "[ b for b in c ] ( e for e in f )"),
    ("generator_expression", "a = [b for b in c]\nd(e for e in f)\n", "( e for e in f )"),
    ("list_literal", "a = [b, c]\n", "[ b , c ]"),
    ("dict_literal", "a = {'b': c, **d}\n", "{ ' b ' : c , * * d }"),
    ("dict_key", "a = {'b': c, **d}\n", "' b '"),
    ("yielded_value", "def f():\n  yield a\n  yield from b\n", "a b"),
    ("awaited_value", "async def f():\n  await a\n  b\n", "a"),
    ("async_body", "async def f():\n  await a\ndef g(): c\n", "await a"),
    ("dunder_method_body", "class A:\n  def __eq__(self, b): c\n  def __init__(self): d\n", "c"),
    ("method_body", "class A:\n  def b(self): c\ndef d(): e\n", "c"),
    ("function_body", "class A:\n  def b(self): c\ndef d(): e\n", "c e"),
    ("class_body", "class A:\n  @b\n  def c(self): d\n\ne\n", "@ b def c ( self ) : d"),
    ("signature", "@a\ndef b(c):\n  d\n", "def b ( c ) :"),
    ("module_level", "a\nif b:\n  c\nd\n", "a if b : d"),
    ("indented_2", "if a:\n  if b:\n    c\n  d\n", "c"),
    ("brackets_1", "a(b[c])\n", "( b [ c ] )"),
    ("brackets_2", "a(b[c], d)\n", "[ c ]"),
    ("brackets_3", "a(b[c({d})])\n", "( { d } )"),
    ("continued_line", "f(a,\n  b)\nc\n", "b )"),
    ("statement_start", "a = b\nif c: d\n'e'\n", "a if"),
    ("first_mention", "a = b\nb = a.c\n", "a b c"),
    ("comment", "a # b c\n# d\n", "# b c # d"),
    ("comment_line", "a # b c\n  # d\n", "# d"),
    ("trailing_comment", "a # b c\n  # d\n", "# b c"),
    ("string", "a = 'b' 'c' + f'{d}'\n", "' b ' ' c ' f ' { d } '"),
    ("bytes_string", "a = b'c' + 'd'\n", "b ' c '"),
    ("raw_string", "a = r'c' + 'd'\n", "r ' c '"),
    ("f_string", "a = 'b' + f'{c}'\n", "f ' { c } '"),
]


@pytest.mark.parametrize(("concept", "source", "expected"), LEXICAL + CONTEXTUAL)
def test_concept_labels_exactly_the_tokens_marked_by_hand(concept: str, source: str, expected: str) -> None:
    assert pieces(source, concept) == expected


def test_every_concept_but_the_plainest_has_a_case() -> None:
    tested = {case[0] for case in LEXICAL + CONTEXTUAL} | {
        "f_string_field",
        "newline",
        "blank_line",
        "indented_3",
        "indented_4",
    }
    plain = ("keyword_", "module_", "close_", "square_", "brace", "comma", "colon")
    assert not [c.name for c in CONCEPTS if c.name not in tested and not c.name.startswith(plain)]


WORDS = ("class", "return", "if", "for", "while", "in", "is", "import", "from", "raise", "try")


@pytest.mark.parametrize("word", WORDS)
def test_keywords_with_a_name_of_their_own(word: str) -> None:
    source = "class A:\n  def f(self):\n    try:\n      for a in b:\n        if c is d: return e\n"
    source += "    except F: raise\n    while g: pass\nimport h\nfrom i import j\n"
    assert set(pieces(source, f"keyword_{word}").split()) == {word}


def test_table_is_large_named_once_and_says_which_group() -> None:
    assert len(CONCEPTS) >= 60
    assert len({c.name for c in CONCEPTS}) == len(CONCEPTS)
    assert {c.group for c in CONCEPTS} == {"lexical", "contextual"}
    assert all(c.description for c in CONCEPTS)


def test_a_token_over_two_regions_belongs_to_its_first_word_character() -> None:
    text = "x = self.append(1):\n    é\n"
    spans = {".append": (8, 15), "(1": (15, 17), "):\n": (17, 20), "    ": (20, 24), " = self": (1, 8), "\n": (25, 26)}
    got = anchors(text, np.array(list(spans.values())))
    assert dict(zip(spans, (text[i] for i in got), strict=True)) == {
        ".append": "a", "(1": "1", "):\n": ")", "    ": " ", " = self": "s", "\n": "\n",
    }  # fmt: skip
    assert anchors(text, np.array([(24, 25)])).tolist() == [24]  # letters beyond ASCII are letters


def test_merged_tokens_take_the_label_of_that_character() -> None:
    text = "a.append(b)\n"
    labels = label_document(text, np.array([(0, 0), (0, 1), (1, 8), (8, 10), (10, 12)]))
    assert labels is not None
    assert labels[:, COLUMN["called_method"]].tolist() == [False, False, True, False, False]
    assert labels[:, COLUMN["call_argument"]].tolist() == [False, False, False, True, False]
    assert labels[:, COLUMN["close_parenthesis"]].tolist() == [False, False, False, False, True]


def test_tokens_that_share_a_character_share_its_labels() -> None:
    """Byte-level tokenizers cut one character in pieces that all carry its offsets."""
    labels = label_document("# é\n", np.array([(0, 1), (1, 3), (2, 3), (3, 4)]))
    assert labels is not None
    assert labels[:, COLUMN["comment"]].tolist() == [True, True, True, False]


def test_bos_has_no_label_and_offsets_may_come_in_any_order() -> None:
    text, spans = DEFINITIONS, offsets(DEFINITIONS)
    labels = label_document(text, spans, "json/decoder.py")
    assert labels is not None
    assert not labels[0].any()
    shuffled = np.random.default_rng(0).permutation(len(spans))
    again = label_document(text, spans[shuffled], "json/decoder.py")
    assert again is not None
    assert (again == labels[shuffled]).all()


NON_ASCII = 'größe = "ä€😀"; länge(größe, "é").näher = f("ü", x)  # ü\ndef ß(ö="ä"): return "é", ö\n'


def test_byte_columns_become_characters_on_lines_beyond_ascii() -> None:
    assert pieces(NON_ASCII, "called_function") == "länge f"
    assert pieces(NON_ASCII, "call_argument") == 'größe " é " " ü " x'
    assert pieces(NON_ASCII, "assigned_attribute") == "näher"
    assert pieces(NON_ASCII, "function_name") == "ß"
    assert pieces(NON_ASCII, "default_value") == '" ä "'
    assert pieces(NON_ASCII, "return_value") == '" é " , ö'
    assert pieces(NON_ASCII, "comment") == "# ü"


def test_labels_agree_with_source_segments_of_ast() -> None:
    """Another road to the same answer: ast.get_source_segment has its own conversion of columns."""
    text = DEFINITIONS + NON_ASCII
    for kind, field, concept in ((ast.Return, "value", "return_value"), (ast.Assign, "value", "assigned_value")):
        nodes = sorted((n for n in ast.walk(ast.parse(text)) if isinstance(n, kind)), key=lambda n: n.lineno)
        segments = [ast.get_source_segment(text, getattr(node, field)) for node in nodes]
        words = [piece for segment in segments for piece in PIECE.findall(segment or "") if piece.strip()]
        assert pieces(text, concept) == " ".join(words)


def test_tabs_form_feeds_and_line_ends() -> None:
    tabs = "if a:\n\tif b:\n\t\tc = d(e)\n\x0c\nf(g)\n"
    assert pieces(tabs, "indented_2") == "c = d ( e )"
    assert pieces(tabs, "call_argument") == "e g"
    for end in ("\r\n", "\r"):
        assert pieces(tabs.replace("\n", end), "call_argument") == "e g"
        assert pieces(f"a{end}'''b{end}c'''{end}d(e) # f{end}g{end}", "comment") == "# f"
    assert pieces("'\u2028'; a\nf(b)\n", "call_argument") == "b"  # a line for str.splitlines, none for Python


def test_strings_over_several_lines() -> None:
    text = 'def f():\n    x = """a\n  b(c) # d\n"""\n    return x\n'
    assert pieces(text, "string") == '" " " a b ( c ) # d " " "'
    assert pieces(text, "called_function") == ""
    assert pieces(text, "comment") == ""
    assert pieces(text, "docstring") == ""
    assert pieces(text, "return_value") == "x"


FIELDS = [
    ("f'a {b} {{c}} {d!r:>{e}}'\n", "{ b } { d ! r : > { e } }"),
    ("f'{a[\"}\"]} b'\n", '{ a [ " } " ] }'),
    ("f'{a:\">10} b {c}'\n", '{ a : " > 10 } { c }'),
    ("f'{(lambda a: {1: 2})(3)} b'\n", "{ ( lambda a : { 1 : 2 } ) ( 3 ) }"),
    ("f'\\N{DIGIT ONE} {a} \\\\{b}'\n", "{ a } { b }"),
    ("rf'\\N{a} {{'\n", "{ a }"),
    ('f"""a\n{b\n} c"""\n', "{ b }"),
    ("f'{a}' 'b{c}' f'{d}'\n", "{ a } { d }"),
]


@pytest.mark.parametrize(("source", "expected"), FIELDS)
def test_replacement_fields_of_f_strings(source: str, expected: str) -> None:
    assert pieces(source, "f_string_field") == expected


@pytest.mark.skipif(sys.version_info < (3, 12), reason="equal quotes nest since Python 3.12")
def test_f_strings_nested_with_equal_quotes() -> None:
    source = "a = f'{f'{b}' + c['d']} e' + f(g)\n"
    assert pieces(source, "f_string_field") == "{ f ' { b } ' + c [ ' d ' ] }"
    assert pieces(source, "called_function") == "f"


def test_code_inside_an_f_string_counts_as_string_only() -> None:
    """Its inner positions are only right since Python 3.12; labels must not depend on the version that runs."""
    source = "a = g(f'{b(c.d)} e', h=f'{self.x}')\n"
    assert pieces(source, "called_function") == "g"
    assert pieces(source, "attribute") == ""
    assert pieces(source, "name_self") == ""
    assert pieces(source, "call_argument") == "f ' { b ( c . d ) } e ' f ' { self . x } '"


def test_walrus_and_async_forms() -> None:
    source = (
        "async def f():\n  if (n := g(1)): pass\n  async for a in b: c\n  async with d: e\n  [h async for h in i]\n"
    )
    assert pieces(source, "assigned_local") == "n a h"
    assert pieces(source, "assigned_value") == "g ( 1 )"
    assert pieces(source, "loop_body") == "c"
    assert pieces(source, "with_context") == "d"
    assert pieces(source, "comprehension") == "[ h async for h in i ]"


def test_newlines_and_blank_lines_are_labelled_by_where_the_run_begins() -> None:
    text = "a\n\n\nb\n"
    labels = label_document(text, np.array([(0, 1), (1, 2), (2, 4), (4, 5), (5, 6)]))
    assert labels is not None
    assert labels[:, COLUMN["newline"]].tolist() == [False, True, True, False, True]
    assert labels[:, COLUMN["blank_line"]].tolist() == [False, False, True, False, False]


def test_module_families_come_from_the_name() -> None:
    for name in ("json/decoder.py", "json.py", "test/json/x.py", "a\\json\\b.py"):
        assert pieces("a\n", "module_json", name) == "a"
    for name in ("jsonx/decoder.py", "a/myjson.py", ""):
        assert pieces("a\n", "module_json", name) == ""


@pytest.mark.parametrize("text", ["print 'a'\n", "def f(:\n", "a\0b\n", "x = '\ud800'\n", "(" * 5000 + ")" * 5000])
def test_what_does_not_parse_is_none(text: str) -> None:
    assert label_document(text, np.array([(0, 1)])) is None


def test_empty_documents_and_no_tokens() -> None:
    for text in ("", "\n", "# a"):
        labels = label_document(text, np.zeros((0, 2), dtype=np.int64))
        assert labels is not None
        assert labels.shape == (0, len(CONCEPTS))


def test_wrong_offsets_are_answered_in_one_sentence() -> None:
    with pytest.raises(CosaeError, match="within the 2 characters"):
        label_document("a\n", np.array([(0, 3)]))
    with pytest.raises(CosaeError, match="shape"):
        label_document("a\n", np.array([0, 1]))


def _activations(doc: list[int], index: list[int]) -> Activations:
    bare = Activations.bare(torch.ones(len(doc), 2))
    return Activations(
        **{
            **vars(bare),
            "doc_N": torch.tensor(doc, dtype=torch.int32),
            "index_N": torch.tensor(index, dtype=torch.int32),
        }
    )


def test_activations_are_labelled_by_document_and_index() -> None:
    first = label_document("a = 1\n", offsets("a = 1\n"))
    second = label_document("def f(): pass\n", offsets("def f(): pass\n"))
    assert first is not None
    assert second is not None
    activations = _activations([2, 0, -1, 1, 2], [1, 5, -1, 0, 3])
    labels = label_activations(activations, [first, None, second])
    assert (labels == np.stack([second[1], first[5], 0 * first[0], 0 * first[0], second[3]]).astype(bool)).all()
    assert labels[0, COLUMN["keyword_def"]]
    assert labels[1, COLUMN["number"]]
    assert has_labels(activations, [first, None, second]).tolist() == [True, True, False, False, True]


def test_activations_outside_the_labels_are_refused() -> None:
    labels = label_document("a\n", offsets("a\n"))
    with pytest.raises(CosaeError, match="document number 1"):
        label_activations(_activations([0, 1], [0, 0]), [labels])
    with pytest.raises(CosaeError, match="token index"):
        label_activations(_activations([0], [3]), [labels])


def test_concepts_are_frequent_on_the_held_out_library() -> None:
    """A third of the held-out files, split at words: enough for 40 concepts with 200 positives."""
    count_C = np.zeros(len(CONCEPTS), dtype=np.int64)
    for document in pylib.documents("held_out")[::3]:
        labels = label_document(document.text, offsets(document.text), document.name)
        assert labels is not None
        count_C += labels.sum(axis=0)
    assert (count_C >= 200).sum() >= 60
    contextual_C = np.array([concept.group == "contextual" for concept in CONCEPTS])
    assert (count_C[contextual_C] >= 200).sum() >= 40
