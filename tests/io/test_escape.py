"""Hostile strings stay text: in Markdown (read back by a parser), and on a terminal."""

import pytest
from markdown_it import MarkdownIt

from cosae.io.escape import code_span, markdown, printable

HOSTILE = [
    "![i](http://a.example/x.png)",
    "[l](javascript:alert(1))",
    "<http://a.example>",
    "see http://a.example/ or www.a.example or me@a.example",
    "<img src=x onerror=alert(1)>",
    "a | b",
    "a\\| b",
    "`code` and ``more``",
    "``",
    "`",
    "*bold* _it_ ~~x~~ $x$",
    "# head\n\n- list\n\n> quote",
    "</details>\n<script>alert(1)</script>",
    "&lt;b&gt; &amp;",
    "[x]: http://a.example",
    "\\",
    "a\\",
    "- [ ] x",
    "\N{RIGHT-TO-LEFT OVERRIDE}evil",
]
INERT = {"text", "code_inline", "softbreak"}


def leaves(text):
    parser = MarkdownIt("commonmark").enable("table")
    return [leaf for token in parser.parse(text) for leaf in token.children or ()], parser.render(text)


@pytest.mark.parametrize("escaped", [markdown, code_span])
@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_what_was_given_and_obeys_nothing(text, escaped):
    cells, html = leaves(f"| name | value |\n|---|---|\n| {escaped(text)} | after |\n")
    assert {leaf.type for leaf in cells} <= INERT
    assert [leaf.content for leaf in cells][-1] == "after"
    assert html.count("<td>") == 2
    shown = printable(" ".join(text.split())).replace("\\|", "\\ |")
    assert "".join(leaf.content for leaf in cells if leaf.type != "softbreak") == f"namevalue{shown}after"
    for link in ("http:", "www.", "@"):  # renderers make links of addresses, though not in code
        assert not any(link in leaf.content for leaf in cells if leaf.type == "text")


def test_plain_names_stay_bare_and_long_ones_are_cut():
    for name in ("standard, unit frame", "gpt2-small/res_jb 0.5", "été"):
        assert markdown(name) == name
    assert markdown("resid_post.x") == "`resid_post.x`"
    assert markdown("__init__") == "`__init__`"
    assert len(markdown("x" * 500)) == 200


def test_a_terminal_obeys_nothing():
    assert printable("\x1b[31mred\x07\r\n\u202e\ud800") == "?[31mred?????"
    assert printable("a\nb\tc", keep="\n") == "a\nb?c"
    assert printable("12\u202f345") == "12 345"
