"""documents → a byte-level BPE tokenizer for Python source.

A newline (or several) with the indentation after it is one piece, so that a common indentation is one token;
names, numbers, quotes and other punctuation are kept apart, so that a token belongs to one lexical element.
Every text comes back exactly, and offsets cover it without a gap.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

PIECES = "|".join(
    (
        r"(?:\r?\n)+[ \t]*",  # line ends and the indentation that follows
        r" ?_*\p{L}+",  # a word, or a part of a name with its leading underscores
        r" ?\p{N}{1,3}",
        r" ?_+",
        r" ?(?:'+|\"+)",
        r" ?#+",
        r" ?[^\s\p{L}\p{N}_'\"#]+",  # operators, brackets, everything else that is visible
        r"[^\S\r\n]+(?!\S)",  # alignment, without the last space before a word
        r"\s+",
    )
)


def train_tokenizer(texts: Iterable[str], n_vocab: int, context: int) -> PreTrainedTokenizerFast:
    """BPE merges learned on `texts`; n_vocab counts the 256 bytes and the three special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Called directly, the tokenizer starts a text with BOS, as the model expects.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
