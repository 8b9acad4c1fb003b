"""sae-probes' data sets: labels, split and files, on small data in the wheel's layout."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosae.errors import CosaeError, CosaeWarning
from cosae.interop.sae_probes import datasets as sae_probes
from cosae.interop.sae_probes.activations import last_token_activations, write_activations
from cosae.models import embedded
from cosae.models.capture import capture
from cosae.types import Sequences
from tests.support.fetched import write_csv


@pytest.fixture
def folder(tmp_path):
    """A wheel's data folder with two binary data sets and one that is not."""
    master = [
        {
            "Dataset Tag": "colour",
            "Dataset save name": "cleaned_data/7_colour.csv",
            "Data type": "Binary Classification",
        },
        {"Dataset Tag": "long", "Dataset save name": "cleaned_data/8_long.csv", "Data type": "Continuous"},
        {"Dataset Tag": "size", "Dataset save name": "cleaned_data/9_size.csv", "Data type": "Binary Classification"},
    ]
    write_csv(tmp_path / sae_probes.MASTER, master)
    rows = [("a, b", "red"), ('say "hi"\nthere', "blue"), ("NA", "red")]
    write_csv(tmp_path / "cleaned_data/7_colour.csv.zst", [{"prompt": p, "target": t} for p, t in rows])
    write_csv(
        tmp_path / "cleaned_data/9_size.csv.zst", [{"prompt": p, "target": t} for p, t in [("x", "10"), ("y", "9")]]
    )
    return tmp_path


class TestDatasets:
    def test_binary_sets_in_the_order_of_the_list(self, folder):
        assert sae_probes.names(folder) == ["7_colour", "9_size"]
        assert [d.name for d in sae_probes.datasets(folder)] == ["7_colour", "9_size"]

    def test_texts_keep_commas_quotes_newlines_and_the_word_na(self, folder):
        assert sae_probes.datasets(folder)[0].texts == ["a, b", 'say "hi"\nthere', "NA"]

    def test_texts_sort_as_text_and_numbers_as_numbers(self, folder):
        colour, size = sae_probes.datasets(folder)
        assert colour.labels.tolist() == [1, 0, 1]  # blue < red
        assert size.labels.tolist() == [1, 0]  # 9 < 10, though "10" < "9"

    def test_some_sets_and_some_rows(self, folder):
        (size,) = sae_probes.datasets(folder, only="9_size", n_rows=1)
        assert size.name == "9_size"
        assert size.texts == ["x"]
        assert size.labels.tolist() == [1]

    def test_the_folder_may_be_an_unpacked_wheel(self, folder, tmp_path_factory):
        wheel = tmp_path_factory.mktemp("wheel")
        (wheel / "sae_probes").mkdir()
        (wheel / "sae_probes" / "data").symlink_to(folder)
        assert sae_probes.names(wheel) == ["7_colour", "9_size"]

    def test_an_absent_package_is_one_sentence(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sae_probes.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(CosaeError, match="cosae fetch sae-probes"):
            sae_probes.datasets()

    def test_a_folder_without_data(self, tmp_path):
        with pytest.raises(CosaeError, match="must be sae-probes' data folder"):
            sae_probes.datasets(tmp_path / "nowhere")

    def test_an_unknown_name_says_where_the_names_are(self, folder):
        with pytest.raises(CosaeError, match=r"Got '8_long'.*names\(\)"):
            sae_probes.datasets(folder, only=["8_long"])

    @pytest.mark.parametrize("content", [b"", b"not zstd at all", b"\x28\xb5\x2f\xfd\x00"])
    def test_a_damaged_file(self, folder, content):
        (folder / "cleaned_data/7_colour.csv.zst").write_bytes(content)
        with pytest.raises(CosaeError, match=r"7_colour\.csv\.zst"):
            sae_probes.datasets(folder)

    def test_a_missing_file(self, folder):
        (folder / "cleaned_data/7_colour.csv.zst").unlink()
        with pytest.raises(CosaeError, match="is missing"):
            sae_probes.datasets(folder)

    def test_other_columns(self, folder):
        write_csv(folder / "cleaned_data/7_colour.csv.zst", [{"text": "a", "label": "1"}])
        with pytest.raises(CosaeError, match="columns prompt and target"):
            sae_probes.datasets(folder)

    def test_three_targets(self, folder):
        write_csv(folder / "cleaned_data/7_colour.csv.zst", [{"prompt": "a", "target": str(i)} for i in range(3)])
        with pytest.raises(CosaeError, match=r"must have two targets\. Got 3"):
            sae_probes.datasets(folder)

    @pytest.mark.parametrize("name", ["../../secret.csv", "/etc/secret.csv"])
    def test_a_list_that_points_outside_its_folder(self, folder, name):
        write_csv(folder / sae_probes.MASTER, [{"Dataset save name": name, "Data type": "Binary Classification"}])
        with pytest.raises(CosaeError, match="is not sae-probes' list"):
            sae_probes.names(folder)

    def test_a_file_that_decompresses_without_end(self, folder, monkeypatch):
        monkeypatch.setattr(sae_probes, "LARGEST_FILE", 20)
        with pytest.raises(CosaeError, match="decompresses to more than 20 bytes"):
            sae_probes.names(folder)


class TestSplit:
    def test_the_packages_own_rows(self):
        """Drawn once with sae-probes 0.4.2's get_train_test_indices."""
        train, test = sae_probes.split(np.array([0, 1, 1, 0] * 100))
        assert train[:6].tolist() == [356, 16, 19, 304, 86, 73]
        assert test[:6].tolist() == [261, 364, 104, 377, 316, 300]
        assert (train[-1], test[-1]) == (122, 399)

    def test_rows_past_the_first_5000_are_never_used(self):
        labels = np.array([0, 1] * 3000)
        train, test = sae_probes.split(labels)
        assert len(train) == 1024
        assert len(test) == 5000 - 1024 - 1
        assert max(train.max(), test.max()) < 5000

    @settings(deadline=None, max_examples=40)
    @given(half=st.integers(60, 300), seed=st.integers(0, 2**31 - 1))
    def test_sides_are_disjoint_balanced_and_complete_but_for_one(self, half, seed):
        labels = np.array([0] * half + [1] * half)
        train, test = sae_probes.split(labels, seed=seed)
        assert len(train) == 2 * half - 100
        assert not set(train) & set(test)
        assert len(set(train)) + len(set(test)) == 2 * half - 1
        assert labels[train].sum() * 2 == len(train)

    def test_too_few_of_one_class(self):
        with pytest.raises(CosaeError, match=r"positive .*Got 10 and 290"):
            sae_probes.split(np.array([1] * 10 + [0] * 290))

    @pytest.mark.parametrize("labels", [np.array([0, 1, 2]), np.zeros((4, 2)), np.array(["a", "b"])])
    def test_other_labels(self, labels):
        with pytest.raises(CosaeError, match="vector of 0 and 1"):
            sae_probes.split(labels)

    def test_too_few_rows(self):
        with pytest.raises(CosaeError, match="a split of"):
            sae_probes.split(np.array([0, 1] * 20))


@pytest.fixture(scope="module")
def model():
    return embedded.load()


TEXTS = [
    "def f(x):",
    "import os",
    "x",
    "class A:\n    def g(self):\n        return self.x + 1\n",
    "for i in range(10):",
]


def alone(model, ids):
    """The last token's activation of one sequence, by itself."""
    ids_ST = torch.tensor([ids])
    mask_ST = torch.ones_like(ids_ST, dtype=torch.bool)
    zeros = torch.zeros_like(ids_ST, dtype=torch.int32)
    sequence = Sequences(ids_ST, zeros, zeros, mask_ST, ~mask_ST)
    return capture(model, sequence, "resid_post.2")["resid_post.2"].x_ND[-1]


class TestActivations:
    def test_every_text_in_its_place_whatever_the_batch(self, model):
        lm, tokenizer = model
        one = torch.stack([alone(lm, tokenizer(text)["input_ids"]) for text in TEXTS])
        for batch_texts in (1, 2, 16):
            found = last_token_activations(lm, tokenizer, "blocks.2.hook_resid_post", TEXTS, batch_texts=batch_texts)
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-4)

    def test_what_is_too_long_loses_its_beginning_but_not_the_bos(self, model):
        lm, tokenizer = model
        ids = tokenizer(TEXTS[3])["input_ids"]
        side = tokenizer.truncation_side
        found = last_token_activations(lm, tokenizer, "resid_post.2", [TEXTS[3]], max_tokens=5)
        torch.testing.assert_close(found[0], alone(lm, [ids[0], *ids[-4:]]), rtol=1e-4, atol=1e-4)
        assert tokenizer.truncation_side == side

    def test_no_more_than_the_models_context(self, model):
        lm, tokenizer = model
        long = "x = 1\n" * 500
        ids, context = tokenizer(long)["input_ids"], lm.config.max_position_embeddings
        assert len(ids) > context
        found = last_token_activations(lm, tokenizer, "resid_post.2", [long])
        torch.testing.assert_close(found[0], alone(lm, [ids[0], *ids[1 - context :]]), rtol=1e-4, atol=1e-4)

    def test_files_where_the_package_looks(self, model, tmp_path):
        lm, tokenizer = model
        data = [sae_probes.ProbeDataset("7_colour", TEXTS[:3], np.array([0, 1, 0]))]
        hook = "blocks.2.hook_resid_post"
        (place,) = write_activations(lm, tokenizer, hook, data, tmp_path, model_name="tiny")
        assert place == tmp_path / "model_activations_tiny" / "7_colour_blocks.2.hook_resid_post.pt"
        first = torch.load(place, weights_only=True)
        assert first.shape == (3, 192)
        assert first.dtype == torch.float32
        torch.save(torch.zeros(3, 192), place)
        write_activations(lm, tokenizer, hook, data, tmp_path, model_name="tiny")
        assert not torch.load(place, weights_only=True).any(), "a file with the right number of rows is kept"
        place.write_bytes(b"torn")
        write_activations(lm, tokenizer, hook, data, tmp_path, model_name="tiny")
        torch.testing.assert_close(torch.load(place, weights_only=True), first)
        assert [file.name for file in place.parent.iterdir()] == [place.name], "nothing half-written is left"

    def test_a_bos_that_the_text_spells_is_not_doubled(self, model):
        lm, tokenizer = model
        with pytest.warns(CosaeWarning, match="one of the two is kept"):
            twice, once = last_token_activations(lm, tokenizer, "resid_post.2", ["<|bos|>import os", "import os"])
        torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-4)

    def test_a_text_without_tokens(self, model):
        lm, _ = model

        class Tokenizer:
            truncation_side = "right"

            def __call__(self, texts, **options):
                return {"input_ids": [[3] if text else [] for text in texts]}

        with pytest.raises(CosaeError, match="Text 1 has none: ''"):
            last_token_activations(lm, Tokenizer(), "resid_post.2", ["a", ""])
