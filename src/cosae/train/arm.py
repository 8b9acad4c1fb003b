"""One contestant of a run: an SAE, how its loss is made, and how its parameters move."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosae.errors import CosaeError, check_least, check_most, check_positive
from cosae.io.generators import keyed_generator
from cosae.io.values import from_text
from cosae.sae.config import InitConfig, SAEConfig
from cosae.sae.file import load
from cosae.sae.fold import fold_decoder_norm
from cosae.sae.loss import LossConfig
from cosae.sae.model import SAE
from cosae.sae.selector import TOPK_SELECTORS
from cosae.sae.swap import swap_score
from cosae.train.optimizer import MOST_LR

NAME_LENGTH = 80
UNIT_ROW = 1e-4
"""How far a decoder row's length may be from 1 to count as 1."""
K_SCHEDULE = re.compile(r"\s*(\d+)\s*(?:→|->)\s*(\d+)\s*")
"""A schedule of k in the text of an arm: k=512→32 or k=512->32."""
NAME_PATTERN = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._=+-]{{0,{NAME_LENGTH - 1}}}")


@dataclass(frozen=True)
class Arm:
    """An SAE to train. What is None, in it or in `sae`, is taken from the run (width, k, seed, lr) when it starts.

    Raises CosaeError on a value that is not allowed.
    """

    name: str = "standard"
    """Name in tables, files and figures; unique within a run."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    """What it is made of."""
    init: InitConfig = field(default_factory=InitConfig)
    """What it starts from."""
    seed: int | None = None
    """Seed of the initial weights; None takes the run's."""
    lr: float | None = None
    """Learning rate; None takes the run's."""
    a_lr: float = 1.0
    """Learning rate of a, as a multiple of the run's."""
    value_exponent_lr: float = 1.0
    """Learning rate of the value exponent, as a multiple of the run's."""
    b_lr: float = 1.0
    """Learning rate of b, as a multiple of the run's."""
    threshold_lr: float = 1.0
    """Learning rate of JumpReLU's ln θ, as a multiple of the run's; their common level is the controller's."""
    sparsity_weight: float = 0.1
    """First λ of jumprelu and gated; the controller moves it."""
    k_start: int | None = None
    """k of the first step; it falls linearly to k over the first `k_steps` steps. None: k throughout."""
    k_steps: int | None = None
    """Steps over which k falls from `k_start`; from then on it is k."""
    start: str | None = None
    """Folder or file of a saved SAE to go on from, of any format that cosae reads, its score swapped to this arm's
    (cosae.sae.swap); None starts fresh."""
    input_noise: float = 1.0
    """Norm noise in training: each token is multiplied by U(1/input_noise, input_noise); 1 is none (paper §5.4). A
    transcoder's targets are left as they are."""
    kernel: str = "auto"
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise CosaeError(f"an arm's name must be letters, digits or ._-+= (at most 80). Got {self.name!r} instead.")
        for name in ("a_lr", "value_exponent_lr", "b_lr", "threshold_lr", "sparsity_weight"):
            check_positive(name, getattr(self, name), zero=True)
        if self.lr is not None:
            check_positive("lr", self.lr)
        for name in ("lr", "a_lr", "value_exponent_lr", "b_lr", "threshold_lr"):
            check_most(name, getattr(self, name), MOST_LR)
        if self.seed is not None:
            check_seed(self.seed)
        if not (math.isfinite(self.input_noise) and self.input_noise >= 1.0):
            raise CosaeError(f"input_noise must be at least 1 (none). Got {self.input_noise!r} instead.")
        self._check_k_schedule()

    def _check_k_schedule(self) -> None:
        """Raises CosaeError for a schedule of k that is none, as far as widths are known."""
        if self.k_start is None and self.k_steps is None:
            return
        if self.k_start is None or self.k_steps is None:
            raise CosaeError("a schedule of k needs both its first k and its steps: k=512→32,k_steps=1000.")
        if self.sae.selector not in TOPK_SELECTORS:
            what = f"a schedule of k is for {', '.join(TOPK_SELECTORS)}, which keep k features"
            raise CosaeError(f"{what}. Got the selector {self.sae.selector}: drop k_start and k_steps.")
        check_least("k_steps", self.k_steps, 1)
        if self.sae.k is not None and self.k_start <= self.sae.k:
            raise CosaeError(f"k falls from k_start to k, so k_start must be above {self.sae.k}. Got {self.k_start}.")
        if self.sae.d_sae is not None and self.k_start > self.sae.d_sae:
            raise CosaeError(f"k_start must be at most d_sae = {self.sae.d_sae}. Got {self.k_start}: lower it.")

    def k_at(self, step: int) -> int | None:
        """k of the training rule at 0-based `step`; None where it is that of the SAE."""
        if self.k_start is None or self.k_steps is None or self.sae.k is None or step >= self.k_steps:
            return None
        return self.k_start - ((self.k_start - self.sae.k) * step + self.k_steps // 2) // self.k_steps

    @classmethod
    def of(cls, name: str = "standard", score: str = "inner", selector: str = "batch_topk", **values: Any) -> Arm:
        """An arm by short names, as `parse_arm` reads them: Arm.of("mine", "cosine", k=64, a_init=1.0, lr=1e-3)."""
        return cls().changed({"name": name, "score": score, "selector": selector, **values})

    def changed(self, values: Mapping[str, Any]) -> Arm:
        """A copy with other values, by short ("k", "a_init", "lr") or dotted names ("loss.reweight")."""
        own: dict[str, Any] = {}
        parts: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            section, name = _place(key)
            (parts.setdefault(section, {}) if section else own)[name] = value
        changed = {section: replace(getattr(self, section), **part) for section, part in parts.items()}
        return replace(self, **own, **changed)

    def with_defaults(self, *, d_sae: int | None, k: int, seed: int, lr: float, kernel: str) -> Arm:
        """This arm with what it left open taken from the run."""
        d_sae = d_sae if self.sae.d_sae is None else self.sae.d_sae
        k = k if self.sae.k is None else self.sae.k
        return replace(
            self,
            sae=replace(self.sae, d_sae=d_sae, k=k),
            seed=seed if self.seed is None else self.seed,
            lr=lr if self.lr is None else self.lr,
            kernel=kernel if self.kernel == "auto" else self.kernel,
        )

    def build(
        self,
        d_in: int,
        sample_ND: Tensor | None,
        device: str = "cpu",
        d_out: int | None = None,
        target_ND: Tensor | None = None,
        sites: tuple[int, ...] = (),
        read: Callable[[Path], SAE] = load,
    ) -> SAE:
        """The SAE this arm begins with: fresh, initialised on a sample (n, d_in), or a saved one; with d_out, a
        transcoder, and target (n, d_out) the sample's targets; with the widths of several sites, a crosscoder. `read`
        reads the saved one: cosae.interop.read.read_sae knows other formats too.

        Raises CosaeError on a bad value, or a saved SAE that is not of this arm's make.
        """
        assert self.seed is not None
        cfg = self.sae.with_widths(d_in, d_out, sites)
        if self.start is not None:
            return self._continued(read(Path(self.start)), cfg, sample_ND).to(device)
        how: dict[str, Any] = {"seed": self.seed, "kernel": self.kernel, "device": device}
        return SAE.start(cfg, self.init, sample=sample_ND, target=target_ND, **how)

    def _continued(self, saved: SAE, cfg: SAEConfig, sample_ND: Tensor | None) -> SAE:
        """The saved SAE under this arm's score, with decoder rows of unit length, and with what of this arm is in no
        tensor; all else must be as this arm asks."""
        names = ["d_in", "d_sae", "k", "selector", "frame", "norm_restoring", "bias", *TRANSCODING]
        if saved.cfg.family == cfg.family and "group" in (cfg.family.exponent_owner, cfg.family.value_owner):
            names.append("n_groups")
        if "k_guessed" in saved.metadata:  # its file does not say: this arm does
            names.remove("k")
        for name in names:
            if getattr(saved.cfg, name) != getattr(cfg, name):
                asked, has = getattr(cfg, name), getattr(saved.cfg, name)
                what = f"the arm {self.name} asks for {name} {asked}; {self.start}, its start, has {has}"
                raise CosaeError(f"{what}: give the arm {name}={has}, or start from another.")
        saved.metadata, saved.kernel = {}, self.kernel
        if not bool((torch.linalg.vector_norm(saved.decoder.rows_FD.detach(), dim=-1) - 1).abs().max() < UNIT_ROW):
            saved = fold_decoder_norm(saved)
        if saved.cfg.family != cfg.family:
            saved = swap_score(
                saved,
                cfg.score,
                sample=sample_ND,
                refit=sample_ND is not None,
                a_init=self.init.a_init,
                value_exponent_init=self.init.value_exponent_init,
                a_owner=cfg.a_owner,
                value_exponent_owner=cfg.value_exponent_owner,
            )
        saved.cfg = replace(saved.cfg, **{name: getattr(cfg, name) for name in ("k", *IN_NO_TENSOR)})
        saved.selector.k, saved.selector.bandwidth, saved.selector.a_window = saved.k, cfg.bandwidth, cfg.a_window
        saved.decoder.prefixes = cfg.prefixes or (saved.d_sae,)
        return saved

    def lr_multipliers(self) -> dict[str, float]:
        """Learning-rate multiple by parameter name."""
        a = dict.fromkeys(("score.exponent", "score.exponent_base", "score.exponent_delta_F"), self.a_lr)
        own = {"score.value_exponent": self.value_exponent_lr, "score.log_gain": self.b_lr}
        return {**a, **own, "selector.log_threshold_F": self.threshold_lr}


def check_seed(seed: int) -> None:
    """Raises CosaeError for a seed that some generator would not take."""
    if not 0 <= seed < 2**63:
        raise CosaeError(f"seed must be a whole number from 0 to 2**63 - 1. Got {seed!r} instead.")


SECTIONS: dict[str, type[Any]] = {"sae": SAEConfig, "init": InitConfig, "loss": LossConfig}
OF_THE_DATA = ("d_in", "d_out")
TRANSCODING = ("d_out", "target_frame", "skip", "sites", "balanced")
IN_NO_TENSOR = ("prefixes", "bandwidth", "a_window")
_SHORT = {
    f.name: section for section in ("sae", "init") for f in fields(SECTIONS[section]) if f.name not in OF_THE_DATA
}


def _place(key: str) -> tuple[str, str]:
    """(section or "", field) of a short or dotted name."""
    section, _, name = key.rpartition(".")
    return section or _SHORT.get(key, ""), name


ARMS: dict[str, Arm] = {
    "standard": Arm.of("standard", "inner"),
    "standard_unit_frame": Arm.of("standard_unit_frame", "inner", frame="unit"),
    "standard_layer_norm": Arm.of("standard_layer_norm", "inner", frame="layer_norm"),
    "unit_rows": Arm.of("unit_rows", "inner_unit"),
    "cosine_fixed": Arm.of("cosine_fixed", "cosine_fixed"),
    "cosine": Arm.of("cosine", "cosine"),
    "cosine_per_feature": Arm.of("cosine_per_feature", "cosine_per_feature"),
    "cosine_base_delta": Arm.of("cosine_base_delta", "cosine_base_delta"),
    "cosine_grouped": Arm.of("cosine_grouped", "cosine_grouped"),
    "cosine_two_exponents": Arm.of("cosine_two_exponents", "cosine_two_exponents"),
}
"""Arms by name, for `--arms`. `cosine` is the paper's global form."""


def parse_arm(text: str) -> Arm:
    """ "NAME" or "NAME,field=value,…" → Arm: e.g. "cosine", "cosine,k=64,seed=1", "standard,selector=topk".

    The first part is one of ARMS; `name=` gives another name, otherwise changed fields are added to it. `loss.`
    fields are reached as "loss.reweight=1"; prefixes as "prefixes=256+1024". Raises CosaeError.
    """
    base, *parts = [part.strip() for part in text.split(",")]
    if base not in ARMS:
        raise CosaeError(f"an arm must start with one of {', '.join(ARMS)}. Got {base!r} instead.")
    changes: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise CosaeError(f"what follows an arm's name must read field=value. Got {part!r} in {text!r} instead.")
        if key in changes:
            raise CosaeError(f"{key} was given twice in {text!r}: give it once.")
        if key == "k" and (schedule := K_SCHEDULE.fullmatch(value)):
            if "k_start" in changes:
                raise CosaeError(f"k_start was given twice in {text!r}: give it once.")
            changes["k_start"], value = int(schedule[1]), schedule[2]
        changes[key] = from_text(_hint(key), value, key)
    if parts and "name" not in changes:
        changes["name"] = re.sub(r"[^A-Za-z0-9._=+-]+", "-", "-".join([base, *parts]))  # start= is a path
        if len(changes["name"]) > NAME_LENGTH:
            raise CosaeError(f"an arm with this many changes needs a name of its own: add name=… to {text!r}.")
    arm = ARMS[base].changed(changes)
    for key in changes:
        if idle := _idle(_place(key)[1], arm.sae):
            raise CosaeError(f"{key} has no say in an arm {idle}: drop it from {text!r}.")
    return arm


def _idle(name: str, sae: SAEConfig) -> str | None:
    """Why a field of an arm has no say in an SAE of this make; None where it has one."""
    family = sae.family
    if name == "n_groups" and "group" not in (family.exponent_owner, family.value_owner):
        return f"of the score {sae.score}" + (" without groups" if family.value_owner else "")
    if name.startswith("value_exponent_") and family.value_owner is None:
        return f"of the score {sae.score}, which has no value exponent"
    if (name == "a_init" and family.exponent is not None) or (name == "a_lr" and family.exponent_owner == "fixed"):
        return f"of the score {sae.score}, whose exponent is not learned"
    if name == "value_exponent_lr" and family.value_owner == "fixed":
        return f"of the score {sae.score}, whose value exponent is not learned here"
    if name in ("b_init", "b_lr") and family.gain_owner == "fixed":
        return f"of the score {sae.score}, which has no gain"
    if name == "target_frame" and sae.frame == "raw" and sae.target_frame == "input":
        return "of the frame raw, which takes nothing out of the input that could be put back"
    if name in ("bandwidth", "threshold_lr") and sae.selector != "jumprelu":
        return f"of the selector {sae.selector}"
    if name == "sparsity_weight" and sae.selector not in ("jumprelu", "gated"):
        return f"of the selector {sae.selector}"
    return None


def _hint(key: str) -> Any:
    """The type of that field of an arm."""
    section, name = _place(key)
    owner = SECTIONS.get(section, Arm if not section else None)
    hints = {} if owner is None else typing.get_type_hints(owner)
    if name not in hints or key in SECTIONS:
        own = [f.name for f in fields(Arm) if f.name not in SECTIONS]
        raise CosaeError(f"an arm has no field {key!r}. It has {', '.join([*own, *_SHORT])}, and loss.* for the loss.")
    return hints[name]


def check_arms(arms: Sequence[Arm]) -> None:
    """Raises CosaeError where there are none, or two share a name."""
    if not arms:
        raise CosaeError(f"a run needs at least one arm: name some of {', '.join(ARMS)}.")
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CosaeError(f"arms must have different names. {', '.join(twice)} came more than once: add name=….")


def input_noise(x_BD: Tensor, amount: float, seed: int, step: int) -> Tensor:
    """x with each row times U(1/amount, amount), a function of (seed, step) alone (paper §5.4: amount 2)."""
    if amount == 1.0:
        return x_BD
    generator = keyed_generator(seed, "input noise", step)
    factor_B = torch.rand(len(x_BD), generator=generator) * (amount - 1 / amount) + 1 / amount
    return x_BD * factor_B.to(x_BD)[:, None]
