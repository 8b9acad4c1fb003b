"""Trains the embedded model: Python's standard library → tokenizer, Qwen3, provenance.

    python studies/embedded_model/train.py --minutes 45
    python studies/embedded_model/train.py --architecture gpt2 --out studies/layer_norm_twin/model     (its twin)

The learning rate warms up and then falls linearly to zero over the run, where "over the run" is the larger of
tokens seen / --tokens and time passed / --minutes: a slow machine ends on time with fewer tokens, a fast one
ends early. A run that time did not cut is a function of its seed and settings up to rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from measure import baselines, bits_per_byte, norm_summary
from tokenizer import train_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cosae.text import pylib
from cosae.text.tokenization import TokenizedDocument, tokenize_documents

EMBEDDED = Path(__file__).parents[2] / "src" / "cosae" / "embedded"


@dataclass(frozen=True)
class Settings:
    architecture: str = "qwen3"  # or gpt2: LayerNorm, learned positions, GELU, as many heads for keys as for queries
    minutes: float = 45.0
    tokens: int = 40_000_000
    seed: int = 0
    n_vocab: int = 4096
    d_model: int = 192
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 3
    head_dim: int = 32
    d_mlp: int = 512
    context: int = 256
    rows: int = 16  # sequences a step
    library_repeats: int = 2  # times the library appears beside the test suite once, in each epoch
    lr: float = 3e-3
    warmup_steps: int = 300
    weight_decay: float = 0.1
    beta2: float = 0.99
    clip: float = 1.0


def initialise(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Normal(0, 0.02); projections back into the residual stream a factor sqrt(2 L) smaller."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(settings.seed)
    if settings.architecture == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(gpt2_config(settings, len(tokenizer), special))
    elif settings.architecture == "qwen3":
        model = Qwen3ForCausalLM(qwen3_config(settings, len(tokenizer), special))
    else:
        raise SystemExit(f"--architecture must be qwen3 or gpt2. Got {settings.architecture!r} instead.")
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # GPT-2's own start does this to its c_proj
            parameter.data /= math.sqrt(2 * settings.n_layers)
    return model


def qwen3_config(settings: Settings, n_vocab: int, special: dict[str, int]) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=n_vocab,
        hidden_size=settings.d_model,
        intermediate_size=settings.d_mlp,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        **special,
    )


def gpt2_config(settings: Settings, n_vocab: int, special: dict[str, int]) -> GPT2Config:
    return GPT2Config(
        vocab_size=n_vocab,
        n_positions=settings.context,
        n_embd=settings.d_model,
        n_layer=settings.n_layers,
        n_head=settings.n_heads,
        n_inner=4 * settings.d_model,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=True,
        **special,
    )


class Rows:
    """An endless, seeded order of training rows. In each epoch the documents are shuffled, laid end to end
    and cut anew, and the rows are shuffled. State: the epoch and the place in it."""

    def __init__(self, library: list[TokenizedDocument], tests: list[TokenizedDocument], settings: Settings):
        self.documents = [d.ids_T for d in library * settings.library_repeats + tests]
        self.settings = settings
        self.epoch, self.at = 0, 0
        self._lay_out()

    def _lay_out(self) -> None:
        rng = np.random.default_rng((self.settings.seed, self.epoch))
        stream = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
        n = (len(stream) - 1) // self.settings.context
        start = int(rng.integers(len(stream) - n * self.settings.context))
        self.stream = torch.from_numpy(stream[start : start + n * self.settings.context + 1].astype(np.int64))
        self.order = torch.from_numpy(rng.permutation(n))

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, (rows, context) int64."""
        if self.at + self.settings.rows > len(self.order):
            self.epoch, self.at = self.epoch + 1, 0
            self._lay_out()
        chosen = self.order[self.at : self.at + self.settings.rows]
        self.at += self.settings.rows
        place = chosen[:, None] * self.settings.context + torch.arange(self.settings.context)
        return self.stream[place], self.stream[place + 1]


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    return settings.lr * min((step + 1) / settings.warmup_steps, 1.0) * max(1.0 - progress, 0.0)


def make_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(0.9, settings.beta2),
        fused=True,
    )


def ship(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, provenance: dict[str, object], folder: Path
) -> None:
    """The model in bf16, its tokenizer and its provenance; each file replaced in one move."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        draft = Path(temporary)
        half = type(model)(model.config)
        half.load_state_dict(model.state_dict())
        half.to(torch.bfloat16).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        config = draft / "tokenizer_config.json"
        fields = json.loads(config.read_text())
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
        config.write_text(json.dumps(fields, indent=2) + "\n")
        (draft / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        folder.mkdir(exist_ok=True)
        for file in draft.iterdir():
            file.chmod(0o644)
            shutil.move(file, folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="where the finished model goes")
    parser.add_argument("--work", type=Path, default=Path("runs/embedded_model"), help="checkpoints")
    parser.add_argument("--early", type=float, default=5.0, help="minutes after which a first model is shipped")
    parser.add_argument("--no-compile", action="store_true", help="where there is no C++ compiler")
    arguments = vars(parser.parse_args())
    out, work, early = arguments.pop("out"), arguments.pop("work"), arguments.pop("early")
    compiled = not arguments.pop("no_compile")
    train(Settings(**arguments), out, work, early, compiled)


def train(settings: Settings, out: Path, work: Path, early_minutes: float, compiled: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()}")
    print(settings, flush=True)

    library = pylib.documents("train")
    everything = pylib.documents("train", include_tests=True)
    names = {d.name for d in library}
    tests = [d for d in everything if d.name not in names]
    held_out = pylib.documents("held_out")
    n_bytes = sum(len(d.text.encode()) for d in held_out)

    # Library text counts double in the merges, because it is what the model is for.
    tokenizer = train_tokenizer((d.text for d in library + everything), settings.n_vocab, settings.context)
    library_ids = list(tokenize_documents(library, tokenizer, add_bos=True))
    test_ids = list(tokenize_documents(tests, tokenizer, add_bos=True))
    held_out_ids = list(tokenize_documents(held_out, tokenizer, add_bos=True))
    n_tokens = {
        "library": sum(len(d.ids_T) for d in library_ids),
        "test_suite": sum(len(d.ids_T) for d in test_ids),
        "held_out": sum(len(d.ids_T) for d in held_out_ids),
    }
    base = baselines(library_ids + test_ids, held_out_ids, n_bytes, settings.n_vocab)
    print(f"tokens {n_tokens}, held-out bytes {n_bytes}")
    print(f"baselines, bits per byte: {base}", flush=True)

    model = initialise(settings, tokenizer)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"parameters {n_parameters}", flush=True)
    optimizer = make_optimizer(model, settings)
    rows = Rows(library_ids, test_ids, settings)

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=x, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    loss_fn = torch.compile(loss_of) if compiled else loss_of
    step, seen, passed, recent = 0, 0, 0.0, []
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seen, passed = state["step"], state["seen"], state["passed"]
        rows.epoch, rows.at = state["epoch"], state["at"]
        rows._lay_out()
        print(f"resumed at step {step}, {passed / 60:.1f} minutes", flush=True)

    def score(stride: int) -> float:
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            return bits_per_byte(model, held_out_ids, n_bytes, settings.context, stride, tokenizer.pad_token_id)

    def metadata(finished: bool) -> dict[str, object]:
        return {
            "finished": finished,
            "made": datetime.now(UTC).strftime("%Y-%m-%d"),
            "settings": asdict(settings),
            "steps": step,
            "tokens_seen": seen,
            "epochs": rows.epoch + rows.at / len(rows.order),
            "training_minutes": passed / 60,
            "hardware": f"{torch.get_num_threads()} CPU cores",
            "n_parameters": n_parameters,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "corpus": {
                "train_digest": pylib.digest_of(everything),
                "held_out_digest": pylib.digest_of(held_out),
                "tokens": n_tokens,
                "held_out_bytes": n_bytes,
                "held_out_names": [d.name for d in held_out],
            },
            "bits_per_byte": {},
            "baselines_bits_per_byte": base,
            "norms": [],
        }

    started = time.monotonic() - passed
    shipped_early = (out / "provenance.json").exists() and step > 0
    last_save = last_log = time.monotonic()
    model.train()
    while (progress := max(seen / settings.tokens, passed / (60 * settings.minutes))) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, progress)
        loss = loss_fn(*rows.next())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + settings.rows * settings.context
        recent.append(float(loss.detach()))
        now = time.monotonic()
        passed = now - started
        if now - last_log > 30:
            last_log = now
            print(
                f"step {step}  {seen / 1e6:.2f}M tokens  {passed / 60:.1f} min  progress {progress:.3f}  "
                f"loss {np.mean(recent):.4f}  lr {optimizer.param_groups[0]['lr']:.2e}  "
                f"{seen / passed:.0f} tok/s",
                flush=True,
            )
            recent = []
        if not shipped_early and passed > 60 * early_minutes:
            shipped_early = True
            ship(model, tokenizer, metadata(False), out)
            print(f"shipped a first model at {passed / 60:.1f} min", flush=True)
        if now - last_save > 240:
            last_save = now
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seen": seen,
                "passed": passed,
                "epoch": rows.epoch,
                "at": rows.at,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)

    torch.save({"model": model.state_dict()}, work / "final.pt")
    model.to(torch.bfloat16).float()  # what is measured is what is shipped
    record = metadata(True)
    record["bits_per_byte"] = {
        "no_overlap": score(settings.context),
        "stride_half": score(settings.context // 2),
    }
    record["norms"] = norm_summary(model, held_out_ids, settings.context, tokenizer.pad_token_id)
    ship(model, tokenizer, record, out)
    checkpoint.unlink(missing_ok=True)
    print(json.dumps({k: record[k] for k in ("bits_per_byte", "baselines_bits_per_byte", "norms")}, indent=2))


if __name__ == "__main__":
    main()
