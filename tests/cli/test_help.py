"""What `--help` shows: values that are true, in groups, and nothing that only a programmer reads."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

from cosae.cli import VERBS, main
from cosae.cli.help import DEFAULTS, FIELDS, defaults_of
from cosae.presets import PRESETS, preset

EVERY = [*(verb for verb in VERBS if verb != "export"), "export neuronpedia", "export delphi", "plan capture"]


@cache
def help_of(*arguments: str) -> str:
    """The help of a verb, its boxes and line ends taken out."""
    shown = StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    lines = (line.strip(" │|+") for line in re.sub("[╭╮╰╯─]|-{3,}", " ", shown.getvalue()).splitlines())
    return " ".join(" ".join(lines).split())


def test_defaults_that_are_written_down_are_those_of_the_preset() -> None:
    assert defaults_of(["--preset", "embedded"]) == DEFAULTS
    assert set(FIELDS) - set(DEFAULTS) == {"activations", "store", "target", "world"}
    assert {name: defaults_of(["--preset", name])["k"] for name in PRESETS}["paper"] == "80"


def test_help_shows_the_values_of_the_recipe_that_is_named(tmp_path: Path) -> None:
    usual, paper = help_of("train"), help_of("train", "--preset=paper")
    for shown, steps, k, width, rate in ((usual, 2000, 32, "16 × the width", 0.001), (paper, 244140, 80, 65536, 5e-05)):
        for option, value in (("steps", steps), ("k", k), ("d-sae", width), ("lr", rate)):
            assert re.search(rf"--{option} (INT|FLOAT) [^()]*\(default: {value}\)", shown), (option, value)
    preset("paper").changed({"training.steps": 7}).write(tmp_path / "mine.json")
    assert "Training steps. (default: 7)" in help_of("train", "--recipe", str(tmp_path / "mine.json"))
    assert "(default: resid_post.18)" in help_of("capture", "--preset", "paper")


@pytest.mark.parametrize("verb", EVERY)
def test_help_reads_as_a_person_would_write_it(verb: str) -> None:
    shown = help_of(*verb.split())
    assert re.findall(r"None|\{[^}]*\}|\(default: ?\)|--no-|\[\[", shown) == []
    assert re.findall(r"--[a-z-]+(?: [A-Z]+(?: …)?)? (?=--[a-z]|\(default|$)", shown) == [], "an option without a word"
    assert re.findall(r"Default: (?:(?!--)[^()])*\(default", shown) == [], "two defaults of one option"


def test_options_are_in_groups_the_common_ones_first() -> None:
    shown = help_of("train")
    heads = ["--out", "data options", "SAE options", "training options", "output options", "other options"]
    assert [shown.index(head) for head in heads] == sorted(shown.index(head) for head in heads)
    assert "one of --model | --store | --world | --activations." in shown
    assert "one of --model | --store | --activations." in help_of("audit")
    assert shown.index("--out") < shown.index("--preset") < shown.index("--model") < shown.index("--set")
    assert "Of `eval probing` alone." in help_of("eval")
    assert help_of("eval").index("--tokens INT") < help_of("eval").index("--texts STR")
    assert "dashboard options" in help_of("export", "neuronpedia")


def test_capture_says_that_held_out_tokens_come_on_top() -> None:
    for verb in (("capture",), ("plan", "capture")):
        assert re.search(r"--tokens INT [^()]*--held-out-tokens come on top", help_of(*verb))


def test_a_preset_that_is_not_there_is_refused_in_help_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--preset", "nonsense", "--help"])
    assert end.value.code == 2
    assert "preset must be one of" in capsys.readouterr().err
