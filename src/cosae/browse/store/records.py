"""What a feature store gives to whoever shows it: plain frozen dataclasses.

Everything is data of others: names, tokens and labels are not escaped here. A number that may be missing is None and
says so; nothing is NaN. Token ids are spelled by `FeatureStore.spell`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cosae.models.layout import Layout

Group = Literal["top", "interval", "random", "negative"]
GROUPS: tuple[Group, ...] = ("top", "interval", "random", "negative")
"""top: the largest values, each of another sequence; interval: drawn from each fifth of 0 … the largest |value|;
random: drawn from all tokens on which it fires; negative: the most negative values, of signed codes alone."""


@dataclass(frozen=True)
class Pass:
    """The pass of the model over text that a store was built from.

    model      name or folder of the model; None where the store was built from activations that name none
    site       name of the site, such as resid_post.3; None likewise
    corpus     name of the text; None likewise
    tokens     tokens that were read (padding is none)
    left_out   of them: special tokens and those that the SAEs' filter leaves out, which are counted nowhere
    sequences  sequences that were read; documents: documents they come from
    context    tokens of a sequence; window: tokens of an example, at most
    seed       of all that was drawn
    written_at ISO time; commit: of cosae, None where it is not known
    layout     where the places of an image or a sound lie; None for text
    """

    model: str | None
    site: str | None
    corpus: str | None
    tokens: int
    left_out: int
    sequences: int
    documents: int
    context: int
    window: int
    seed: int
    written_at: str
    commit: str | None
    layout: Layout | None = None


@dataclass(frozen=True)
class Norms:
    """|x| of the tokens read, from a sample of them.

    tokens      of the sample
    median      median |x| of it, against which sinks are told; factor: a token of factor × median or more is a sink,
                and so are position 0 and special ids
    quantiles   |x| at 0, .01, .05, .25, .5, .75, .95, .99, 1
    cuts        the three cuts between the norm quartiles
    sinks       of all tokens read, how many are sinks
    edges, counts, sink_counts   a histogram of log10 |x| over all tokens read: (n + 1,), tokens and sinks a bin (n,)
    """

    tokens: int
    median: float
    factor: float
    quantiles: tuple[float, ...]
    cuts: tuple[float, float, float]
    sinks: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    sink_counts: tuple[int, ...]


@dataclass(frozen=True)
class SAEInfo:
    """One SAE of a store.

    name      what it is called everywhere: unique in the store, may hold slashes and markup
    path      where it was read from; None where it was made in memory
    sha256    of its configuration and weights
    score, selector, frame   words of cosae.sae.config; k: features kept a token
    signed    whether values may be negative (abs_topk); only then is there a negative group
    exponent  mean of the exponents a in force; 1 for the inner product. value_exponent: of its δ, None without one
    tokens    tokens that are counted for it; l0: mean number of features that fire on one
    dead      features that fire on none
    median_r  the length |x − c| that every token gets in the test of what is norm-driven
    norm_driven   pooled share of firings that the norm decides; None where nothing fires
    quartile_share   share of all its firings in each quartile of |x|; None where nothing fires
    quartile_null    what is expected of that: the quartiles' shares of the tokens
    logits    whether logits are known: whether its rows lie in the residual stream of a model with an unembedding
    evaluation    numbers of the run that trained it, by name (fve, l0 …); empty where there are none
    explained     features that have an explanation
    """

    name: str
    path: str | None
    sha256: str
    d_in: int
    d_sae: int
    score: str
    selector: str
    frame: str
    k: int
    signed: bool
    exponent: float
    tokens: int
    l0: float
    dead: int
    median_r: float
    norm_driven: float | None
    quartile_share: tuple[float, float, float, float] | None
    quartile_null: tuple[float, float, float, float]
    logits: bool
    evaluation: Mapping[str, float]
    explained: int
    value_exponent: float | None = None


@dataclass(frozen=True)
class Pairing:
    """How two SAEs of a store match: features of each that fire on 10 tokens or more, pairs that are each other's best
    by correlation, and how many of those are shared by the paper's rule (correlation ≥ 0.7 and cosine > 0.7)."""

    a: str
    b: str
    alive_a: int
    alive_b: int
    pairs: int
    shared: int


@dataclass(frozen=True)
class Overview:
    """What a store holds.

    concepts   (name, description) of the labels; empty where tokens have none. labelled: tokens of the sample on which
               AUROCs were measured
    pair_tokens  tokens on which features were paired: no sinks, counted for every SAE
    """

    read: Pass
    norms: Norms
    saes: tuple[SAEInfo, ...]
    pairings: tuple[Pairing, ...]
    concepts: tuple[tuple[str, str], ...]
    labelled: int
    pair_tokens: int


@dataclass(frozen=True)
class Score:
    """Balanced accuracy of a judge with its 95 % interval; of `judged` examples, `failed` had no answer that could be
    read and are in no number. value is None where no example was left."""

    value: float | None
    low: float | None
    high: float | None
    judged: int
    failed: int


@dataclass(frozen=True)
class Explanation:
    """What a language model says that a feature fires on, and how well that tells held-out examples apart.

    model      that wrote it
    detection  which texts does the feature fire on, by the explanation; fuzzing: which marked tokens does it fire on.
               None where not scored
    baselines  name → Score of what any explanation has to beat: "shuffled", "constant", "unigram"
    """

    text: str
    model: str
    detection: Score | None
    fuzzing: Score | None
    baselines: Mapping[str, Score]


@dataclass(frozen=True)
class Row:
    """One feature in a table.

    density      share of counted tokens on which it fires; firings: how many
    largest      largest |value|; mean: mean |value| over its firings; both None where it never fires
    norm_driven  share of its firings that the token's norm decides; None where it never fires
    firing_norm  mean |x| of the tokens on which it fires over the mean of all; None where it never fires
    auroc        highest AUROC of any concept, concept: its name; None both where tokens have no labels
    matched      in how many other SAEs it has a match
    tokens       ids of the distinct tokens of its largest examples, at most 6, the largest first
    label        text of its explanation; None without one
    score        mean of detection and fuzzing of the explanation; None where not scored
    """

    id: int
    density: float
    firings: int
    largest: float | None
    mean: float | None
    norm_driven: float | None
    firing_norm: float | None
    auroc: float | None
    concept: str | None
    matched: int
    tokens: tuple[int, ...]
    label: str | None
    score: float | None


NUMBERS = ("id", "density", "firings", "largest", "mean", "norm_driven", "firing_norm", "auroc", "matched", "score")
"""Columns of a table that can be sorted by, filtered and drawn."""


@dataclass(frozen=True)
class TablePage:
    """Some rows of a table, from `offset` on, of the `total` that passed filters and search."""

    rows: tuple[Row, ...]
    total: int
    offset: int


@dataclass(frozen=True)
class Example:
    """A stretch of text around one token, and what the feature makes of each of its tokens. All (W,), real tokens only.

    at         place of the example's own token in the stretch
    ids_W      token ids; −1 where the activations come without tokens
    value_W    value of the feature on every token, 0 where it does not fire
    r_W        |x − c|; kappa_W: cosine of x − c with the encoder row (NaN never; 0 for a token at the centre)
    sink_W     whether the token is a sink
    counted_W  whether it counts: it is not special, and the SAE's filter keeps it. Values of others are as encoded, but
               are in no number of the feature
    interval   0 … 4, which fifth of 0 … the largest |value|, in the group "interval"; None in the others
    document   name of the document of its token; None where not known. sequence: number of its sequence in the pass;
               position: place of its token in the sequence
    """

    group: Group
    at: int
    ids_W: NDArray[np.int32]
    value_W: NDArray[np.float32]
    r_W: NDArray[np.float32]
    kappa_W: NDArray[np.float32]
    sink_W: NDArray[np.bool_]
    counted_W: NDArray[np.bool_]
    interval: int | None
    document: str | None
    sequence: int
    position: int

    @property
    def value(self) -> float:
        """Of its own token."""
        return float(self.value_W[self.at])


@dataclass(frozen=True)
class Neighbour:
    """Another feature of the same SAE. cosine: of the decoder rows; jaccard: tokens on which both fire over those on
    which either does, exact over the pass without sinks; None where the two were not counted together."""

    id: int
    cosine: float | None
    jaccard: float | None


@dataclass(frozen=True)
class Match:
    """The feature of another SAE that is its mutual best by correlation; id and both numbers are None where there is
    none. shared: whether the paper's rule calls the two one feature."""

    sae: str
    id: int | None
    correlation: float | None
    cosine: float | None
    shared: bool


@dataclass(frozen=True)
class Feature:
    """Everything the store knows of one feature; of a dead one there are no examples, and most numbers are None.

    row            its row of the table
    quantiles      |value| over its firings at .05, .25, .5, .75, .95, to 2.2 %; None where it never fires
    edges, counts  histogram of |value| over its firings, equal on a log scale: (n + 1,), (n,); empty for a dead one
    negative       share of its firings with a negative value; None where codes are not signed
    promoted, suppressed   (token id, logit) that its direction raises most and lowers most; empty where not known
    quartile_share share of its firings in each quartile of |x|; None where it never fires. The null is the SAE's
    vanished, appeared   firings that vanish where every token has the median length; that appear there
    aurocs         (concept, AUROC), the highest first; empty where tokens have no labels
    exponent       its exponent a; value_exponent: its δ, None for scores without one
    log_gain       its b; bias: its β, None where the SAE has none; threshold: the score above which it fires,
                   None for selectors without one (topk)
    decoder_norm, encoder_norm   lengths of its rows
    examples       by group in the order of GROUPS: top from the largest down, interval from the highest fifth down
    by_cosine, by_cofiring   neighbours, the nearest first
    matches        one for every other SAE of the store, in its order
    explanation    None without one
    """

    row: Row
    sae: str
    quantiles: tuple[float, ...] | None
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    negative: float | None
    promoted: tuple[tuple[int, float], ...]
    suppressed: tuple[tuple[int, float], ...]
    quartile_share: tuple[float, ...] | None
    vanished: int
    appeared: int
    aurocs: tuple[tuple[str, float], ...]
    exponent: float
    value_exponent: float | None
    log_gain: float
    bias: float | None
    threshold: float | None
    decoder_norm: float
    encoder_norm: float
    examples: tuple[Example, ...]
    by_cosine: tuple[Neighbour, ...]
    by_cofiring: tuple[Neighbour, ...]
    matches: tuple[Match, ...]
    explanation: Explanation | None

    def group(self, group: Group) -> tuple[Example, ...]:
        """The examples of one group."""
        return tuple(one for one in self.examples if one.group == group)


@dataclass(frozen=True)
class Texts:
    """The sample's tokens, all (N,): ids, number of each one's sequence, and whether features were paired on it."""

    ids_N: NDArray[np.int32]
    sequence_N: NDArray[np.int64]
    pair_N: NDArray[np.bool_]


@dataclass(frozen=True)
class SharedText:
    """A stretch of text on which the values of both features are known; all (W,)."""

    ids_W: NDArray[np.int32]
    a_W: NDArray[np.float32]
    b_W: NDArray[np.float32]
    sink_W: NDArray[np.bool_]
    document: str | None
    sequence: int
    start: int
    """Place of the first token in the sequence."""


@dataclass(frozen=True)
class Comparison:
    """Two features side by side.

    correlation, cosine   None where this pair is not among those that were counted (its match, or a neighbour)
    jaccard    likewise
    texts      stretches in which both have an example: values of both; those where they differ most first
    concepts   (concept, AUROC of a, AUROC of b), the largest difference first; empty where tokens have no labels
    """

    a: Feature
    b: Feature
    correlation: float | None
    cosine: float | None
    jaccard: float | None
    texts: tuple[SharedText, ...]
    concepts: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class SAEComparison:
    """Two SAEs side by side.

    shared     (feature of a, feature of b, correlation, cosine) of mutual best pairs, the highest correlation first
    own_a, own_b   features that fire on 10 tokens or more and are in no pair, those that fire most first
    concepts   one for every concept: (concept, its best feature in a, that AUROC, its best in b, that AUROC), the
               largest difference first; empty where tokens have no labels
    """

    a: SAEInfo
    b: SAEInfo
    shared: tuple[tuple[int, int, float, float], ...]
    own_a: tuple[int, ...]
    own_b: tuple[int, ...]
    concepts: tuple[tuple[str, int, float, int, float], ...]


Columns = Mapping[str, NDArray[np.float64]]
"""Name → (F,) of every number of a table, NaN where there is none: for scatters."""
