"""Pushes and pulls against a stand-in for the hub: every file, every refusal in one sentence, nothing half-written."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

import cosae
from cosae.cli import main
from cosae.errors import CosaeError
from cosae.interop.hub.card import arm_metrics, card, histogram_text
from cosae.interop.hub.transfer import Place, pull, push
from cosae.interop.public import Public
from tests.support.hub_stand_in import READER, WRITER, Hub, running

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of the client's own call
NAMES = ["README.md", "cfg.json", "sae_weights.safetensors", "self_check.safetensors"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.utils

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
    huggingface_hub.utils.close_session()


@pytest.fixture(scope="module")
def sae() -> cosae.SAE:
    made = cosae.SAE.build(d_in=16, d_sae=32, score="cosine_per_feature", selector="topk", k=4, seed=0)
    made.metadata = {
        "model": "/home/somebody/models/tiny<b>",
        "site": "resid_post.3",
        "hook_name": "blocks.3.hook_resid_post",
        "tokens": 1_234_567,
        "seed": 7,
        "filter": {"policy": {"kind": "norm", "factor": 10.0}},
        "norm_summary": {
            "window_tokens": 4096,
            "median_norm": 53.5,
            "mean_norm": 54.25,
            "max_over_median": 160.0,
            "quantiles": [float(i) for i in range(9)],
            "filtered_frac": 0.006,
        },
        "recipe": {"data": {"corpus": "pylib", "context": 256}, "training": {"steps": 4000, "batch_tokens": 1024}},
    }
    return made


def same(a: cosae.SAE, b: cosae.SAE) -> bool:
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(5))
    return torch.equal(a.encode(x).to_dense(), b.encode(x).to_dense()) and a.cfg == b.cfg


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------- there and back


def test_an_sae_there_and_back(hub: Hub, sae: cosae.SAE, tmp_path: Path) -> None:
    said: list[str] = []
    url = push(sae, "me/thing", token=WRITER, license="apache-2.0", log=said.append)
    repository = hub.repositories["me/thing"]
    assert url == f"{hub.url}/me/thing/commit/{repository.branches['main']}"
    assert sorted(repository.files("main")[1]) == NAMES  # type: ignore[index]
    assert len(repository.commits) == 2  # one commit holds it all
    out = pull("me/thing", tmp_path / "out", log=said.append)
    assert out == tmp_path / "out"
    assert files(out) == NAMES
    assert same(cosae.load(out), sae)
    metadata = cosae.load(out).metadata
    assert metadata == {**sae.metadata, "model": "local model"}  # a folder of somebody's machine stays there
    assert "/home/somebody" not in (out / "cfg.json").read_text("utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    text = (out / "README.md").read_text("utf-8")
    assert text.startswith(
        "---\nlibrary_name: cosae\nlicense: apache-2.0\ntags:\n- cosae\n- saelens\n- sparse-autoencoder\n---\n"
    )


def test_an_sae_of_a_folder_of_a_private_repository_on_a_branch(hub: Hub, sae: cosae.SAE, tmp_path: Path) -> None:
    folder = cosae.save(sae, tmp_path / "mine")
    push(folder, "me/thing:layer_3/cosine", token=WRITER, private=True)
    assert hub.repositories["me/thing"].private
    assert sorted(hub.repositories["me/thing"].files("main")[1]) == sorted(  # type: ignore[index]
        ["README.md", *(f"layer_3/cosine/{name}" for name in NAMES)]
    )
    hub.repositories["me/thing"].branches["v2"] = "0" * 40
    push(folder, "me/thing:other", token=WRITER, revision="v2")
    assert "other/cfg.json" not in hub.repositories["me/thing"].files("main")[1]  # type: ignore[index]
    assert same(cosae.load(pull("me/thing:layer_3/cosine", tmp_path / "a", token=READER)), sae)
    assert same(cosae.load(pull("hf:me/thing:other", tmp_path / "b", token=READER, revision="v2")), sae)
    with pytest.raises(CosaeError, match="no such revision"):
        pull("me/thing:other", tmp_path / "c", token=READER, revision="v3")
    with pytest.raises(CosaeError, match="SAEs lie in layer_3/cosine"):
        pull("me/thing:elsewhere", tmp_path / "c", token=READER)
    with pytest.raises(CosaeError, match="no such revision"):
        push(folder, "me/thing:other", token=WRITER, revision="v3")


def test_a_run_goes_up_arm_by_arm_with_what_was_measured(hub: Hub, sae: cosae.SAE, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("cosine", "standard"):
        cosae.save(sae, run / "arms" / name)
    one = {"fve": 0.8125, "fve_per_batch": 0.75, "median_token_fve": 0.8, "l0": 31.5, "tokens": 4000, "dead_frac": 0.01}
    one["l0_histogram"] = {"edges": [0, 1, 2, 3], "counts": [1, 8, 4]}
    evaluation = {"tokens": 4096, "reconstruction": {"cosine": {"sinks_out": one, "sinks_in": {**one, "fve": 0.5}}}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    push(run, "me/run", token=WRITER)
    found = hub.repositories["me/run"].files("main")[1]  # type: ignore[index]
    assert "cosine/metrics.json" in found
    assert "standard/metrics.json" not in found
    assert json.loads(found["cosine/metrics.json"])["sinks_out"]["fve"] == 0.8125
    text = found["README.md"].decode()
    assert "| `cosine` | cosine_per_feature | topk | 32 | 4 | 0.8125 | 31.5 |" in text
    assert "| `standard` | cosine_per_feature | topk | 32 | 4 | unknown | unknown |" in text
    assert "| 4,000 (without attention sinks) | 0.8125 | 0.75 | 0.8 | 31.5 | 0.01 |" in text
    assert "active features per token: 0 |▂█▅| 3" in text
    out = pull("me/run", tmp_path / "out")
    assert same(cosae.load(out / "cosine"), sae)
    assert same(cosae.load(out / "standard"), sae)
    push(run / "arms" / "cosine", "me/one", token=WRITER)
    assert "metrics.json" in hub.repositories["me/one"].files("main")[1]  # type: ignore[index]


def test_somebodys_own_card_stays_and_ours_is_renewed(hub: Hub, sae: cosae.SAE) -> None:
    hub.put("me/thing", {"README.md": b"---\nlicense: mit\n---\nMy work of years."})
    push(sae, "me/thing:a", token=WRITER)
    found = hub.repositories["me/thing"].files("main")[1]  # type: ignore[index]
    assert found["README.md"].endswith(b"My work of years.")
    assert b"library_name: cosae" in found["a/README.md"]
    push(sae, "me/other:a", token=WRITER)
    push(sae, "me/other:b", token=WRITER)
    assert b"me/other:b" in hub.repositories["me/other"].files("main")[1]["README.md"]  # type: ignore[index]


def test_other_libraries_files_are_pulled_and_pushed_as_ours(hub: Hub, tmp_path: Path) -> None:
    from tests.support.foreign_files import write

    for number, (format_, kind) in enumerate((("saelens", "topk"), ("dictionary_learning", "AutoEncoderTopK"))):
        folder = write(format_, kind, tmp_path / format_).folder
        hub.put(f"me/{format_}", {p.name: p.read_bytes() for p in folder.iterdir()} | {"big/model.bin": b"not wanted"})
        out = pull(f"me/{format_}", tmp_path / f"out{number}")
        assert "big/model.bin" not in files(out)
        push(out, f"me/ours{number}", token=WRITER)
        again = cosae.load(pull(f"me/ours{number}", tmp_path / f"again{number}"))
        assert again.cfg.selector == "topk"


# ---------------------------------------------------------------- the card


def test_the_card_says_what_the_file_says_and_no_more(sae: cosae.SAE) -> None:
    text = card("me/thing", {"layer_3/cosine": sae}, {}, "mit")
    for said in (
        "exp(b) · \\|x − c\\|^a · cos(x − c, w) + β with a learned",
        "| width | 32 features of 16 dimensions |",
        "| k | 4 features per token |",
        "`resid_post.3` = `blocks.3.hook_resid_post`",
        "fraction of variance explained (FVE) and L0 are unknown",
        "| median \\|x\\| | 53.5 |",
        "tokens of at least 10 × the median norm were left out; it drops 0.60 % of tokens",
        "| tokens | 1,234,567 |",
        "| steps × tokens per step | 4,000 × 1,024 |",
        "pull('me/thing:layer_3/cosine', out='sae')",
        "SAE.from_pretrained('me/thing', 'layer_3/cosine')",
        "A cosine score does not shrink with the activation",
        "(median 53.5 in training)",
        "a: ",
    ):
        assert said in text, said
    assert "/home/somebody" not in text  # folders of a machine are nobody's business
    assert "tiny" not in text
    assert "`tiny<b>`" in card("me/x", {"": sae}, {}, "mit", public=Public(("tiny<b>",)))  # in code: no HTML
    bare = cosae.SAE.build(d_in=8, d_sae=16, score="inner", selector="batch_topk", k=2)
    text = card("me/bare", {"": bare}, {}, "mit")
    for said in (
        "⟨x − c, w⟩ + β", "none yet: calibrate before use", "a model the file does not name", "Unknown: the file",
        "scores by inner product", "SAE.load_from_disk('sae')", "| k | 2 features per token in the mean |",
    ):  # fmt: skip
        assert said in text, said


@pytest.mark.parametrize("evil", ["![i](http://a.example)", "[l](javascript:x)", "<http://a.example>", "a`|\n# b <i>"])
def test_a_card_obeys_nothing_in_the_metadata(sae: cosae.SAE, evil: str) -> None:
    def everywhere(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: everywhere(one) for name, one in value.items()}
        return evil if isinstance(value, str) else value

    sae.metadata.update(
        everywhere(dict(sae.metadata)) | {"commit": evil, "seed": evil, "tokens": evil, "context": evil},
        perturbation={"kind": evil}, filter={"policy": {"kind": evil}},
    )  # fmt: skip
    found, public = {"y": {"sinks_out": {"fve": evil, "tokens": evil}}}, Public((evil,))
    text = card(f"me/{evil}", {f"x{evil}": sae, "y": sae}, found, "mit", public=public)
    blocks = MarkdownIt("commonmark").enable("table").parse(text)
    leaves = [leaf for block in blocks for leaf in block.children or ()]
    assert {leaf.type for leaf in leaves} <= {"text", "code_inline", "softbreak"}
    assert {block.content for block in blocks if block.type == "html_block"} <= {
        "<details><summary>The recipe, whole</summary>\n", "</details>\n",
    }  # fmt: skip
    shown = " ".join(evil.split())
    assert sum(shown in leaf.content for leaf in leaves if leaf.type == "code_inline") >= 10
    assert not any("a.example" in leaf.content for leaf in leaves if leaf.type == "text")
    assert [block.content for block in blocks if block.tag == "h1"] != ["b"]


def test_cards_of_every_score_are_written(sae: cosae.SAE) -> None:
    from cosae.sae.score import SCORES

    for score in SCORES:
        made = cosae.SAE.build(d_in=8, d_sae=16, score=score, selector="topk", k=2)
        assert f"`{score}`" in card("me/x", {"": made}, {}, "mit")
    assert histogram_text([1.0, 1.0]).count("█") == 1
    assert arm_metrics({}, "x") == {}


# ---------------------------------------------------------------- refusals


def sentence(error: Any) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_who_may_not(hub: Hub, sae: cosae.SAE, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CosaeError, match="HF_TOKEN") as error:
        push(sae, "me/thing")
    sentence(error)
    assert hub.asked == []
    with pytest.raises(CosaeError, match="the token is not accepted") as error:
        push(sae, "me/thing", token="hf_wrong")
    sentence(error)
    with pytest.raises(CosaeError, match="it needs write access") as error:
        push(sae, "me/thing", token=READER)
    sentence(error)
    assert hub.repositories == {}
    push(sae, "me/secret", token=WRITER, private=True)
    for repo, token in (("me/secret", None), ("me/nothing", None), ("me/nothing", READER)):
        with pytest.raises(CosaeError, match="no such repository") as error:
            pull(repo, out, token=token)
        sentence(error)
    with pytest.raises(CosaeError, match="the token is not accepted") as error:
        pull("me/secret", out, token="hf_wrong")
    sentence(error)
    hub.repositories["me/secret"].gated = True
    hub.repositories["me/secret"].private = False
    for token in (READER, None):
        with pytest.raises(CosaeError, match="the repository is gated: ask for access") as error:
            pull("me/secret", out, token=token)
        sentence(error)
    assert list(tmp_path.iterdir()) == []
    assert same(cosae.load(pull("me/secret", out, token=WRITER)), sae)


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_whatever_the_hub_answers_is_one_sentence(
    hub: Hub, sae: cosae.SAE, tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda _: None)
    push(sae, "me/thing", token=WRITER)
    before = dict(hub.repositories["me/thing"].commits)
    for part in ("preupload", "objects/batch", "PUT /objects", "/commit/"):
        hub.fail = {part: status}
        with pytest.raises(CosaeError, match="was not pushed") as error:
            push(sae, "me/thing", token=WRITER)
        sentence(error)
        assert hub.repositories["me/thing"].commits == before
    for part in ("GET /api/models", "HEAD /me/thing", "GET /me/thing/resolve"):
        hub.fail = {part: status}
        with pytest.raises(CosaeError, match="was not pulled") as error:
            pull("me/thing", tmp_path / "out")
        sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_no_server_and_offline(hub: Hub, sae: cosae.SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.utils
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda _: None)
    with pytest.raises(CosaeError, match="could not be reached") as error:
        pull("me/thing", tmp_path / "out", endpoint="http://127.0.0.1:9")
    sentence(error)
    with pytest.raises(CosaeError, match="could not be reached") as error:
        push(sae, "me/thing", token=WRITER, endpoint="http://127.0.0.1:9")
    sentence(error)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils.close_session()
    with pytest.raises(CosaeError, match="HF_HUB_OFFLINE is set") as error:
        pull("me/thing", tmp_path / "out")
    sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(
    hub: Hub, sae: cosae.SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.file_download as download

    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    push(sae, "me/thing", token=WRITER)
    hub.truncate = "sae_weights"
    with pytest.raises(CosaeError, match="was not pulled: a download stopped short") as error:
        pull("me/thing", tmp_path / "out")
    sentence(error)
    assert list(tmp_path.iterdir()) == []
    hub.truncate = ""
    assert same(cosae.load(pull("me/thing", tmp_path / "out")), sae)


def test_a_full_disk_and_an_interruption_leave_nothing(
    hub: Hub, sae: cosae.SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.utils

    push(sae, "me/thing", token=WRITER)
    for raised, expected in (
        (OSError(28, "No space left on device"), CosaeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def stop(self: Any, repo: str, name: str, *, local_dir: Path, error: BaseException = raised, **_: Any) -> None:
            local_dir.mkdir(exist_ok=True)
            (local_dir / "half").write_bytes(b"half")
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", stop)
        with pytest.raises(expected) as error:
            pull("me/thing", tmp_path / "out")
        if expected is CosaeError:
            assert "No space left on device" in sentence(error)
        assert list(tmp_path.iterdir()) == []


def test_what_is_pulled_is_data(hub: Hub, sae: cosae.SAE, tmp_path: Path) -> None:
    push(sae, "me/thing", token=WRITER)
    sound = dict(hub.repositories["me/thing"].files("main")[1])  # type: ignore[index]
    planted = tmp_path / "planted"

    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (planted,))

    weights = bytearray(sound["sae_weights.safetensors"])
    weights[-5] ^= 1
    broken = {
        "altered": {**sound, "sae_weights.safetensors": bytes(weights)},
        "empty": {**sound, "sae_weights.safetensors": b""},
        "config": {**sound, "cfg.json": b"{"},
        "lacking": {k: v for k, v in sound.items() if not k.startswith("self_check")},
        "code": {"ae.pt": pickle.dumps(Payload()), "config.json": b'{"trainer": {"dict_class": "AutoEncoderTopK"}}'},
    }
    for name, content in broken.items():
        hub.put(f"me/{name}", content)
        with pytest.raises(CosaeError, match=f"no sound SAE: .*me/{name}") as error:
            pull(f"me/{name}", tmp_path / "out")
        assert str(tmp_path) not in sentence(error)
        assert list(tmp_path.iterdir()) == []
    hub.put("me/paths", {"../../escape/cfg.json": b"{}", "../../escape/ae.pt": b""})
    with pytest.raises(CosaeError, match="holds no SAE of a format"):
        pull("me/paths", tmp_path / "out")
    assert not planted.exists()


def test_places_that_are_none(tmp_path: Path, sae: cosae.SAE) -> None:
    assert Place.parse("me/thing:a/b/") == Place("me/thing", "a/b")
    assert str(Place("me/thing")) == "me/thing"
    for text in ("", "thing", "a/b/c", "me/", "/thing", "me/../x", "me/thing:../x", "me/thing:a b", "me/thing:.git"):
        with pytest.raises(CosaeError, match="on the hub is"):
            Place.parse(text)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").touch()
    with pytest.raises(CosaeError, match="already holds something"):
        pull("me/thing", tmp_path / "full")
    with pytest.raises(CosaeError, match="license must be an identifier"):
        push(sae, "me/thing", license="do what you like", token=WRITER)
    with pytest.raises(CosaeError, match="does not exist"):
        push(tmp_path / "nothing", "me/thing", token=WRITER)
    (tmp_path / "run" / "arms").mkdir(parents=True)
    with pytest.raises(CosaeError, match="a run without finished SAEs"):
        push(tmp_path / "run", "me/thing", token=WRITER)


def test_only_this_door_imports_the_hubs_client_and_only_when_called() -> None:
    source = Path(cosae.__file__).parent
    found = {
        path.relative_to(source).as_posix(): line
        for path in source.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if re.match(r"\s*(import|from) huggingface_hub", line)
    }
    assert set(found) == {"interop/hub/transfer.py"}
    assert all(line.startswith("    ") for line in found.values())


def test_the_pages_example(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "interop" / "hub.md"
    (block,) = re.findall(r"^```python hub\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), namespace)
    assert same(namespace["again"], namespace["sae"])


def test_on_the_command_line(
    hub: Hub, sae: cosae.SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cosae.save(sae, tmp_path / "sae")
    monkeypatch.setenv("HF_TOKEN", WRITER)

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return int(ended.value.code or 0)

    assert run("push", str(folder), "me/thing:a", "--license", "cc-by-4.0", "--private", "--quiet") == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/me/thing/commit/")
    assert hub.repositories["me/thing"].private
    assert run("pull", "me/thing:a", "--out", str(tmp_path / "out"), "--quiet") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert same(cosae.load(tmp_path / "out"), sae)
    assert run("pull", "me/nothing", "--out", str(tmp_path / "no"), "--quiet") == 2
    assert capsys.readouterr().err.startswith("cosae: me/nothing was not pulled: there is no such repository")
