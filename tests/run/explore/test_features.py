"""`cosae features` and `cosae steer`: values against direct computation, and safe output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cosae.cli import main
from cosae.errors import CosaeError
from cosae.models.embedded import load
from cosae.run.explore.features import look, screen
from cosae.run.explore.steer import steer
from cosae.run.requests import FeatureOptions, Place, Reading, SteerOptions
from cosae.run.saes import choose_sae
from cosae.sae.calibrate import calibrate
from cosae.sae.file import save
from cosae.sae.model import SAE
from cosae.shown import spelled_out

SITE = "resid_post.3"
FILTER = {"policy": {"kind": "position_0"}, "median_norm": 1.0, "seen_tokens": 9}
TEXT = "def f(x):\n    return x + 1\n\nclass A:\n    def g(self, other):\n        return [self, other, \x1b[31m]\n" * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of three files, and a run's folder with two SAEs that read the embedded model."""
    folder = tmp_path_factory.mktemp("explore")
    (folder / "corpus").mkdir()
    for i in range(3):
        (folder / "corpus" / f"{i}.py").write_text(TEXT + f"# {i}\n" * 30)
    model, tokenizer = load()
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :100]
    x_ND = model(ids, output_hidden_states=True).hidden_states[4][0]
    for name, seed in (("one", 0), ("two", 1)):
        sae = SAE.build(192, 64, "inner", k=6, seed=seed, sample=x_ND)
        calibrate(sae, x_ND)
        sae.metadata = {"model": "embedded", "site": SITE, "filter": FILTER}
        save(sae, folder / "run" / "arms" / name)
    return folder


def small(folder: Path, **more: Any) -> Reading:
    return Reading(**{"corpus": str(folder / "corpus"), "context": 32, "prompts": 12, **more})


@pytest.fixture(scope="module")
def looked(folder: Path) -> Any:
    return look(folder / "run" / "arms" / "one", small(folder), examples=3)


def test_examples_in_context_are_marked_and_safe_for_a_terminal(looked: Any) -> None:
    _, tokenizer = load()
    row_T = looked.opened.sequences.ids_ST[0]
    feature = int(looked.found.largest_F.argmax())
    example = looked.found.examples(feature)[0]
    text = looked.in_context(example)
    before, token, after = text.replace("«", "»").split("»")
    assert token == spelled_out(tokenizer.decode([example.ids_T[example.at]]))
    whole = spelled_out(tokenizer.decode(row_T.new_tensor(example.ids_T), skip_special_tokens=False))
    assert before + token + after in whole
    shown = screen(looked, FeatureOptions(feature=(feature,)))
    assert text in shown
    assert "\\n" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert f"largest {example.value:.3g}" in shown


def test_promoted_tokens_are_those_of_the_unembedding(looked: Any) -> None:
    model, tokenizer = load()
    logit_V = model.lm_head.weight.float() @ looked.opened.sae.W_dec[5].detach()
    best = logit_V.argsort(descending=True)[:4]
    assert looked.promoted(5, 4) == [
        (spelled_out(tokenizer.decode([i])), pytest.approx(float(logit_V[i]), rel=1e-4)) for i in best
    ]
    (lowest,) = looked.promoted(5, 1, down=True)
    assert lowest[1] == pytest.approx(float(logit_V.min()), rel=1e-4)


def test_a_search_ranks_features_by_the_share_of_their_own_largest_value(looked: Any) -> None:
    matches = looked.search("def g(self", 200)
    model, tokenizer = load()
    ids = [tokenizer.bos_token_id, *tokenizer("def g(self", add_special_tokens=False)["input_ids"]]
    x_TD = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[4][0]
    best_F = looked.opened.sae.encode(x_TD[1:]).to_dense().detach().amax(0).double()
    largest_F = torch.from_numpy(looked.found.largest_F)
    wanted = torch.where(largest_F > 0, best_F / largest_F, 0.0)
    assert {m.feature: m.relative for m in matches} == {
        f: pytest.approx(float(wanted[f]), rel=1e-3) for f in wanted.nonzero()[:, 0].tolist()
    }
    assert [m.relative for m in matches] == sorted((m.relative for m in matches), reverse=True)
    with pytest.raises(CosaeError, match="no token that counts"):
        looked.search("")


def test_the_table_is_sorted_as_asked(looked: Any) -> None:
    for sort, key_F in (("density", looked.found.density_F), ("largest", looked.found.largest_F)):
        shown = screen(looked, FeatureOptions(sort=sort, rows=5)).splitlines()
        rows = [line.split()[0] for line in shown if line.split()[:1] and line.split()[0].isdigit()]
        values = [key_F[int(row)] for row in rows if int(row) < 64][-5:]
        assert values == sorted(values, reverse=True)
        assert values[0] == key_F.max()


def test_the_command_takes_a_run_and_a_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["features", str(folder / "run"), "--corpus", str(folder / "corpus"), "--context", "32", "--prompts", "3"]
    with pytest.raises(SystemExit) as end:
        main(asked)
    assert end.value.code == 2
    assert "several SAEs: choose one with --sae NAME, of one, two" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([*asked, "--sae", "two", "--search", "return", "--rows", "2", "--quiet"])
    shown = capsys.readouterr()
    assert (end.value.code, shown.err) == (0, "")
    assert "features on 'return'" in shown.out
    assert choose_sae(folder, "run/two") == folder / "run" / "arms" / "two"
    with pytest.raises(CosaeError, match="no SAE 'three': choose from one, two"):
        choose_sae(folder / "run", "three")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"examples": 0}, "examples must be at least 1"),
        ({"sort": "size"}, "sort must be one of"),
        ({"search": " "}, "nothing but spaces"),
        ({"search": "a", "feature": (1,)}, "not both"),
    ],
)
def test_options_of_features_that_are_not_allowed(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CosaeError, match=says):
        FeatureOptions(**options).check()


def steered(path: Path, prompt: str = "def g(", place: Place | None = None, **options: Any) -> Any:
    asked = {"feature": (7,), "add": 40.0, "new_tokens": 8, **options}
    return steer(path, prompt, place or Place(), SteerOptions(**asked))


def test_steering_is_the_models_own_text_and_that_of_the_edit_where_the_filter_lets_it(folder: Path) -> None:
    path = folder / "run" / "arms" / "one"
    found = steered(path)
    model, tokenizer = load()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("def g(", add_special_tokens=False)["input_ids"]]])
    own_T = model.generate(ids, max_new_tokens=8, do_sample=False)[0]
    assert found.without_T == tuple(own_T.tolist())
    assert found.without == tokenizer.decode(own_T, skip_special_tokens=True)
    direction_D = 40.0 * look(path, small(folder, prompts=1)).opened.sae.W_dec[7].detach()

    def add(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x[:, 1:] += direction_D  # position 0 is what the filter leaves out
        return output

    hook = model.model.layers[3].register_forward_hook(add)
    changed_T = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)[0]
    hook.remove()
    assert found.changed_T == tuple(changed_T.tolist()) != found.without_T
    assert "steer 7 by 40 at resid_post.3 of embedded, at all tokens but position 0" in str(found)


def test_edits_of_steer(folder: Path) -> None:
    path = folder / "run" / "arms" / "one"
    nothing = steered(path, add=0.0)
    assert nothing.without_T == nothing.changed_T
    assert "no difference" in str(nothing)
    edits = ({"set": 9.0}, "set 7 to 9"), ({"scale": 3.0}, "scale 7 by 3"), ({"ablate": True}, "ablate 7")
    for option, word in edits:
        assert word in steered(path, add=None, **option).what
    drawn = [steered(path, temperature=1.0, place=Place(seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0].without_T != drawn[2].without_T
    with pytest.raises(CosaeError, match="Feature 64 is out of range"):
        steered(path, feature=(64,))
    with pytest.raises(CosaeError, match="must fit in"):
        steered(path, new_tokens=10**6)
    wrong = (({"add": None}, "Got none"), ({"ablate": True}, "--add and --ablate"), ({"feature": ()}, "--feature 7"))
    for options, says in wrong:
        with pytest.raises(CosaeError, match=says):
            steered(path, **options)


def test_the_command_prints_both_texts_and_warns_of_an_sae_without_a_filter(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = SAE.build(192, 32, "inner", "topk", k=4)
    save(sae, tmp_path / "bare")
    command = ["steer", str(tmp_path / "bare"), "--model", "embedded", "--site", SITE, "--feature", "7", "--add", "-5"]
    with pytest.raises(SystemExit) as end:
        main([*command, "--new-tokens", "3", "--quiet", "def g(\x1b["])
    shown = capsys.readouterr()
    assert (end.value.code, shown.err) == (0, "")
    assert "does not say which tokens it was trained on" in shown.out
    assert "without:\ndef g(" in shown.out
    assert "\x1b" not in shown.out
