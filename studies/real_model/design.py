"""What the study runs: sites, arms, labelled sets. Numbers stand here and nowhere else.

SmolLM2-135M-Instruct (d 576, 30 blocks), documents of at most 128 tokens of Wikipedia introductions in three languages
(equal shares of the tokens), a document a sequence. Captured once for all sites; 2,048,000 training tokens an arm are
four passes over 512,000.
"""

from __future__ import annotations

from pathlib import Path

from cosae.interop.sae_probes.datasets import datasets
from cosae.text.labelled import LabelledTexts, read_labelled
from studies.runsets import CACHE

FOLDER = Path(__file__).parent
STORES = CACHE / "real_model" / "stores"
TEXTS = CACHE / "real_model" / "texts"
MODEL = "smollm2"
CORPUS = ("wiki:en", "wiki:fr", "wiki:es")
CONTEXT = 128
TRAIN_TOKENS, HELD_OUT_TOKENS = 512_000, 65_536

BLOCKS = (10, 11, 12, 14, 18, 24, 28)
"""Blocks whose output is read. Position 0 is ordinary at 10 alone: block 11 makes the sink. (The predictions count 11
among the ordinary ones: a model's hidden state 11, which was looked at, is the output of block 10.)"""

LIKE_THE_PAPER = (
    "158_code_C",
    "159_code_Python",
    "160_code_HTML",
    "161_agnews_0",
    "162_agnews_1",
    "163_agnews_2",
    "157_amazon_5star",
    "60_wikidata_occupation_isathlete",
    "61_wikidata_occupation_isactor",
    "62_wikidata_occupation_ispolitician",
)
"""Sets of sae-probes that ask what SAEBench's eight sets ask: code language, news, stars, occupation."""
OTHERS = (
    *("21_headline_istrump", "22_headline_isobama", "23_headline_ischina", "24_headline_isiran"),
    *("26_headline_isfrontpage", "36_sciq_tf", "41_truthqa_tf", "42_temp_sense", "44_phys_tf", "47_reasoning_tf"),
    *("50_deon_isvalid", "51_just_is", "52_virtue_is", "54_cs_tf", "65_high-school", "66_living-room"),
    *("67_social-security", "68_credit-card", "69_blood-pressure", "70_prime-factors", "71_social-media"),
    *("72_gene-expression", "73_control-group", "74_magnetic-field", "75_cell-lines", "76_trial-court"),
    *("77_second-derivative", "78_north-america", "79_human-rights", "80_side-effects", "81_public-health"),
    *("82_federal-government", "83_third-party", "84_clinical-trials", "85_mental-health", "87_glue_cola"),
    *("89_glue_mrpc", "90_glue_qnli", "91_glue_qqp", "92_glue_sst2", "95_toxic_is", "96_spam_is", "105_click_bait"),
    *("106_hate_hate", "107_hate_offensive", "110_aimade_humangpt3", "113_movie_sent", "114_nyc_borough_Manhattan"),
    *("115_nyc_borough_Brooklyn", "116_nyc_borough_Bronx", "129_arith_mc_A", "130_temp_cat_Frequency"),
    *("131_temp_cat_Typical Time", "132_temp_cat_Event Ordering", "133_context_type_Causality"),
    *("134_context_type_Belief_states", "135_context_type_Event_duration", "136_glue_mnli_entailment"),
    *("137_glue_mnli_neutral", "138_glue_mnli_contradiction", "139_news_class_Politics", "140_news_class_Technology"),
    *("141_news_class_Entertainment", "148_twt_emotion_worry", "149_twt_emotion_happiness", "150_twt_emotion_sadness"),
    *("151_it_tick_HR Support", "152_it_tick_Hardware", "153_it_tick_Administrative rights"),
)
"""Every other set of sae-probes whose texts have 8 to 60 tokens on average: long enough that one token is not most of
the text, short enough to read in minutes."""
WIKI = ("wiki:language", "wiki:topic")
TEXTS_A_QUESTION = {"wiki:topic": 100}
"""Texts of one question, half of them of the class, a fifth for test; 200 where nothing else is said."""


def labelled_sets() -> list[LabelledTexts]:
    """All labelled sets, in order."""
    named = [*LIKE_THE_PAPER, *OTHERS]
    probes = [LabelledTexts.of(one.name, one.texts, one.labels.tolist()) for one in datasets(only=named)]
    return [*(read_labelled(name) for name in WIKI), *probes]
