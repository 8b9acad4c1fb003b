"""One run from recipe to report-ready folder.

Everything that can be refused is refused before the folder (`folder`) is made. A run that was interrupted goes on with
`resume`.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cosae.activations.stream import ActivationStream
from cosae.errors import CosaeError, advises_to_drop, sentences
from cosae.interop.public import Public
from cosae.interop.read import read_sae
from cosae.io.generators import generator_state, restore_generators
from cosae.io.lines import Index, Lines
from cosae.io.lock import hold
from cosae.io.progress import Progress
from cosae.io.signals import Stop, stop_on_signals
from cosae.io.values import from_plain, to_plain
from cosae.recipe import Recipe
from cosae.run import folder, provenance
from cosae.run.dataset.arrays import as_matrix
from cosae.run.dataset.base import Dataset
from cosae.run.dataset.open import dataset_of
from cosae.run.dataset.store import CAPTURED
from cosae.run.finished import Finished, as_extended, describe_extension, extended
from cosae.run.folder import RECIPE, RUN, check_free, write_json, write_recipe
from cosae.run.measure import evaluate, text_probes
from cosae.run.plan.check import check_run
from cosae.run.plan.resources import check_device
from cosae.run.record import exponent_changes, names_of_here, run_record, sae_provenance
from cosae.sae.calibrate import calibrate, measure_fve
from cosae.sae.file import save
from cosae.sae.model import SAE, Calibration
from cosae.sae.parts import cut_
from cosae.train.checkpoint import (
    checkpoints,
    has_checkpoints,
    part_stem,
    quarantine,
    read_latest,
    write_checkpoint,
)
from cosae.train.log import JsonLines, Logger, TensorBoard, TrainingDisplay, WandB
from cosae.train.loop import Interrupted, train
from cosae.train.parallel import mesh
from cosae.train.parallel.config import ParallelConfig
from cosae.train.ranks import ONE, Ranks
from cosae.train.step import ArmState


@dataclass(frozen=True)
class Logs:
    """Where numbers go beside metrics.jsonl."""

    progress: bool = True
    tensorboard: bool = False
    wandb: str | None = None
    """W&B project; None does not log there."""
    metrics_only: bool = False
    """Of a resumed run: whether to leave out the loggers it was started with."""

    def since(self, record: Mapping[str, Any]) -> Logs:
        """With the loggers a run was started with, as its run.json says."""
        logs = record.get("logs") or {}
        if self.metrics_only or not isinstance(logs, Mapping):
            return self
        return replace(
            self, tensorboard=self.tensorboard or bool(logs.get("tensorboard")), wandb=self.wandb or logs.get("wandb")
        )


@advises_to_drop()
def execute(
    recipe: Recipe,
    out: Path | None,
    *,
    logs: Logs | None = None,
    data: Dataset | None = None,
    tensor: Tensor | None = None,
    target: Tensor | None = None,
    measured: bool = True,
    progress: Progress | None = None,
) -> Finished:
    """Run `recipe` into the new folder `out` (None keeps everything in memory).

    data: opened already, by who closes it; otherwise opened and closed here.
    tensor, target: activations in memory instead of what the recipe names, and what transcoders make of them.
    progress: shows the phases; None makes one, shown as `logs` says.

    Under torchrun every process calls it, and what is Finished holds SAEs on the first of them alone.

    Raises CosaeError for what cannot be read or is not allowed, before `out` is made; Interrupted after a checkpoint
    was written.
    """
    recipe.check()
    check_device(recipe.device)
    mesh.check_world(recipe.parallel)
    if out is None and recipe.parallel.n > 1:
        raise CosaeError("several processes train together only where a run is written to a folder: give one.")
    if out is not None and mesh.restarted() and (out / RUN).is_file():
        return resume(out, logs)
    logs = logs or Logs()
    with ExitStack() as opened:
        ranks = opened.enter_context(mesh.joined(recipe.parallel, recipe.device))
        ranks.agree(_facts(recipe))
        if out is not None:
            ranks.first(lambda: check_free(out))
        stop = opened.enter_context(stop_on_signals(logs.progress and ranks.leads, KeyboardInterrupt()))
        progress = progress or Progress(logs.progress and ranks.leads)
        if ranks.n == 1:
            progress.stop = stop
        if data is None:
            data = opened.enter_context(dataset_of(recipe, tensor, target=target))
            check_run(recipe, data, out)
        run = opened.enter_context(closing(_Run(recipe, data, out, logs, measured, progress, ranks)))
        if out is not None and ranks.leads:
            opened.enter_context(hold(out))
        if out is not None:
            ranks.first(lambda: run.begin(out))
        return run.go(stop)


@advises_to_drop()
def resume(
    out: str | Path,
    logs: Logs | None = None,
    tensor: Tensor | ArrayLike | None = None,
    evaluate: bool | None = None,
    parallel: ParallelConfig | None = None,
    target: Tensor | ArrayLike | None = None,
    extend_to: int | None = None,
) -> Finished:
    """Go on with the run in `out` from its last whole checkpoint, to the same end as without the interruption.

    A run that ended before its first checkpoint begins again, and so ends the same too. It logs where it was started to
    log, and measures at its end if it was started so (`evaluate` says otherwise).

    tensor, target: the activations (N, D) of a run that was started on a tensor or array in memory, and their targets
    where it had any; None for all others.
    parallel: another mesh than the run was started on.
    extend_to: of a finished run, how many steps it shall have in all. The new ones have a schedule of the learning rate
    of their own, and read on in the stream; SAEs and what was measured before are replaced at the end. All is as if the
    run had been planned with `training.extended_from`.
    Raises CosaeError where there is no run, none of its checkpoints is whole, the run is finished, another process
    writes it, what is left to do cannot fit in memory or on disk, or its recipe or data are no longer those it was
    started with.
    """
    out = Path(out)
    if not (out / RECIPE).is_file() and not (out / RUN).is_file():
        raise CosaeError(f"{out} holds no run to go on with (it has no {RECIPE}); give the folder of a run.")
    logs = logs or Logs()
    with ExitStack() as opened:
        known = (out / RECIPE).is_file()  # not where the run ended between the writing of the two
        record = folder.read_json(out / RUN) if (out / RUN).exists() else {}
        recipe = Recipe.read(out / RECIPE) if known else from_plain(Recipe, record.get("recipe"), str(out / RUN))
        recipe = recipe if parallel is None else replace(recipe, parallel=parallel)
        ranks = opened.enter_context(mesh.joined(recipe.parallel, recipe.device))
        if ranks.leads:
            opened.enter_context(hold(out))
        stop = opened.enter_context(stop_on_signals(logs.progress and ranks.leads, KeyboardInterrupt()))
        record = folder.read_json(out / RUN) if (out / RUN).exists() else {}
        if extend_to is not None:
            recipe = extended(recipe, record, out, extend_to)
        elif record.get("status") == "finished":
            raise CosaeError(f"the run in {out} is finished; see `cosae report {out}`, or start another run elsewhere.")
        if tensor is None and (record.get("source") or {}).get("source") == "tensor":
            raise CosaeError(
                f"the run in {out} was started on a tensor in memory: go on with cosae.resume(out, tensor=…)."
            )
        ranks.agree(_facts(recipe))
        check_device(recipe.device)
        given = [None if one is None else as_matrix(one) for one in (tensor, target)]
        data = opened.enter_context(dataset_of(recipe, given[0], target=given[1]))
        check_run(recipe, data, out, begun=True)
        measured = bool(record.get("evaluate", True)) if evaluate is None else evaluate
        progress = Progress(logs.progress and ranks.leads)
        if ranks.n == 1:
            progress.stop = stop
        run = opened.enter_context(closing(_Run(recipe, data, out, logs.since(record), measured, progress, ranks)))
        run.restore(record)
        if (not known or parallel is not None or extend_to is not None) and ranks.leads:
            write_recipe(out, run.recipe)
        return run.go(stop)


@dataclass
class _Records:
    """The log of a run that writes no files."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def log(self, record: dict[str, Any]) -> None:
        self.lines.append(record)

    def close(self) -> None:
        pass


class _Run:
    """What one execution holds while it goes: data, stream, arms, and where it writes."""

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        out: Path | None,
        logs: Logs,
        measured: bool,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        torch.manual_seed(recipe.training.seed)
        self.ranks, self.device = ranks, mesh.local_device(recipe.device)
        self.data, self.out, self.logs, self.measured, self.progress = data, out, logs, measured, progress
        data.progress = progress
        self.recipe = recipe = replace(recipe.resolved(data.d_in, data.d_out, data.site_widths), data=data.resolved())
        recipe.check()  # widths are known now
        training = recipe.training
        self.stream = ActivationStream(
            ranks.source(data.source, recipe.data.prefetch_chunks),
            batch_tokens=training.batch_tokens,
            buffer_tokens=training.buffer_tokens,
            seed=training.seed,
            filter=recipe.filter,
            perturbation=recipe.training_perturbation,
            device=self.device,
            store_dtype=getattr(torch, training.store_dtype),
            prefetch_chunks=recipe.data.prefetch_chunks if ranks.n == 1 else 0,
            non_finite=recipe.data.non_finite,
            progress=progress,
        )
        try:
            self.texts = text_probes(recipe, data) if measured and ranks.leads else None
            self.states = self._initialised()
        except BaseException:
            self.close()
            raise
        self._records = _Records()
        self.start, self.seconds = 0, 0.0
        self.started_at = provenance.now()
        self.wandb_run = uuid.uuid4().hex[:12]
        self._known_lines: dict[str, Index] = {}
        self._lines: dict[str, Lines] = {}
        self.resumed: list[dict[str, Any]] = []

    def begin(self, out: Path) -> None:
        """Write what a run's folder begins with."""
        check_free(out)  # nobody else came first
        self.write_record("running")
        write_recipe(out, self.recipe)

    def _initialised(self) -> list[ArmState]:
        """The fresh state of every arm of this rank, from a sample of the first window."""
        sample_ND, target_ND = self.stream.sample_ND, self.stream.target_sample_ND
        total_variance = self.stream.norm_summary.total_variance
        if self.stream.target_variance is not None:
            total_variance = min(total_variance, self.stream.target_variance)
        if not total_variance > 0:
            raise CosaeError("activations must differ from one another: their variance in the first window is 0.")
        states: list[ArmState] = []
        recipe, centred = self.recipe, any(arm.init.centre == "geometric_median" for arm in self.recipe.arms)
        name = "initialising with the geometric median" if centred else "initialising"
        peers, widths = self.ranks.peers, (self.data.d_out, target_ND, self.data.site_widths)
        for arm in self.progress.each(self.ranks.mine(recipe.arms), name, "SAEs"):
            sae = arm.build(self.data.d_in, sample_ND, self.device, *widths, read=read_sae)
            variance = _variance(sae, sample_ND, target_ND) if arm.loss.normalise == "variance" else 1.0
            if arm.loss.normalise == "variance" and arm.loss.space == "raw":
                of_target = self.stream.target_variance
                variance = self.stream.norm_summary.total_variance if of_target is None else of_target
            if (sae.target is not None or sae.cfg.sites) and not peers.alone:
                raise CosaeError("one process trains a transcoder or crosscoder: give arms to processes, not parts.")
            if peers.feature_ranks > 1:
                sae = cut_(sae, peers.feature_rank, peers.feature_ranks)
            states.append(ArmState.start(arm, sae, variance, recipe.training.optimizer, peers))
        return states

    def restore(self, record: Mapping[str, Any]) -> None:
        """Put back the last whole checkpoint, if there is any; `record` is run.json as it was left."""
        assert self.out is not None
        if not has_checkpoints(self.out):
            self._check_unchanged(from_plain(Recipe, record["recipe"], str(self.out / RUN)) if record else None)
            if record and record["source"] != json.loads(json.dumps(self.data.describe(), default=str)):
                raise CosaeError(f"the data are not those the run in {self.out} was started with: put them back.")
            warnings = ["there is no checkpoint yet: the run begins again, and ends as it would have."]
        else:
            others = tuple(f"arm.{arm.name}" for arm in self.recipe.arms)
            own = {f"arm.{state.arm.name}" for state in self.states}
            parts, numbers, warnings = read_latest(
                self.out, lambda stem: not stem.startswith(others) or stem.partition("@")[0] in own
            )
            self._check_unchanged(from_plain(Recipe, numbers["recipe"], "checkpoint"))
            self.stream.restore({**parts["stream"], **numbers["stream"]})
            self._restore_arms(parts, numbers)
            self.start, self.seconds = int(numbers["step"]), float(numbers["seconds"])
            if "random" in parts:
                restore_generators(parts["random"])
            if self.ranks.leads:
                quarantine(self.out, self.start)
            known = numbers.get("lines", {})
            self._known_lines = {name: [(step, crc) for step, crc in index] for name, index in known.items()}
        for warning in warnings if self.ranks.leads else ():
            print(warning, file=sys.stderr, flush=True)  # with or without a progress display
        self.started_at = record.get("started_at") or self.started_at
        self.wandb_run = (record.get("logs") or {}).get("wandb_run") or self.wandb_run
        self.resumed = [*record.get("resumed", []), {"at": provenance.now(), "step": self.start, "warnings": warnings}]

    def _restore_arms(self, parts: Mapping[str, dict[str, Tensor]], numbers: Mapping[str, Any]) -> None:
        n = int(numbers.get("feature_parts", 1))
        for state in self.states:
            name = state.arm.name
            state.restore(state.own_part([parts[part_stem(name, i, n)] for i in range(n)]), numbers["arms"][name])

    def _check_unchanged(self, begun_with: Recipe | None) -> None:
        """Raises CosaeError where the recipe differs, in what decides weights, from that of the run's beginning."""
        begun_with = None if begun_with is None else as_extended(begun_with, self.recipe.training)
        differing = () if begun_with is None else begun_with.diff(self.recipe)
        free = [*_FREE, *(f"data.{name}" for name in ("site", *CAPTURED) if self.recipe.data.store is not None)]
        if changed := [path for path in differing if path not in free and not path.startswith("evaluation.")]:
            what = f"the recipe in {self.out}/{RECIPE} is not the one this run was started with"
            raise CosaeError(f"{what}: it differs in {', '.join(changed)}. Put it back, or start another run.")

    def go(self, stop: Stop) -> Finished:
        """Train, calibrate, save, measure; Ctrl-C and SIGTERM save first what is not saved yet."""
        try:
            self._train(stop)
            if self.ranks.n > 1 and not self._lead_on():
                return Finished({}, None, {}, self.out)
            # nothing is left to save: the next signal stops at once
            stop.at_once = KeyboardInterrupt() if self.out is None else Interrupted(self.recipe.training.steps)
            if self.out is not None:
                stop.check()
            return self._finish()
        except (KeyboardInterrupt, CosaeError) as end:
            with suppress(CosaeError):  # a full disk: what stopped the run is what is said
                self.write_record("failed" if isinstance(end, CosaeError) else "interrupted")
            resumable = isinstance(end, CosaeError) and not all(state.stopped for state in self.states)
            saved = checkpoints(self.out) if resumable and self.out is not None else []
            if saved and "cosae resume" not in str(end):
                how = f"Saved up to {saved[-1].name}: go on with `cosae resume {self.out}`."
                raise CosaeError(sentences(end, how)) from None
            raise

    def _lead_on(self) -> bool:
        """Leave the other ranks: what is left the leader does alone, with whole SAEs from the last checkpoint."""
        assert self.out is not None
        leads = self.ranks.leads
        self.ranks.leave()
        self.ranks, self.states = ONE, []
        if leads:
            self.progress.shown, self.states = False, self._initialised()
            parts, numbers, _ = read_latest(self.out)
            self._restore_arms(parts, numbers)
            self.progress.shown = self.logs.progress
        return leads

    def _train(self, stop: Stop) -> None:
        """All steps that are left, and a checkpoint after the last."""
        training, names = self.recipe.training, [state.arm.name for state in self.states]
        extension = [describe_extension(training), *self.recipe.warnings] if training.extended_from else []
        for line in (*self.data.warnings, self.stream.sinks["text"], *extension):
            self.progress.note(line)
        with ExitStack() as opened:
            opened.callback(self.stream.close)  # what comes after needs the model for itself
            loggers = self._loggers(opened)
            events = self._lines.get(folder.EVENTS)
            if events is not None and self.start == 0 and self.stream.sinks["share"]:
                events.write({"step": 0, "arm": None, **self.stream.sinks})
            if self.start < training.steps:
                self.stream.fill()
            shown = opened.enter_context(TrainingDisplay(self.progress, training, names, self.start))

            def on_event(event: dict[str, Any]) -> None:
                shown.event(event)
                if events is not None:
                    events.write(event)

            stop.at_once = None
            self.seconds = train(
                self.states,
                self.stream,
                training,
                start=self.start,
                seconds=self.seconds,
                loggers=[*loggers, shown],
                save=self._checkpoint if self.out is not None else None,
                on_step=shown.step,
                log=self.progress.note,
                on_event=on_event,
                stop=stop,
                ranks=self.ranks,
            )
            if self.out is not None and self.start < training.steps:
                self._checkpoint(training.steps, self.seconds)

    def close(self) -> None:
        self.stream.close()

    def _finish(self) -> Finished:
        saes = {state.arm.name: state.sae for state in self.states}
        calibrations = self._calibrate(saes)
        for name, sae in saes.items():
            sae.metadata = sae_provenance(name, self.recipe, self.data, self.stream, calibrations[name])
            if self.out is not None:
                save(sae, self.out / folder.ARMS / name, self.stream.sample_ND[:8])
        evaluation = None
        if self.measured:
            evaluation = evaluate(saes, self.recipe, self.data, self.stream.filter, self.progress, self.texts)
            if self.out is not None:
                write_json(self.out / folder.EVALUATION, evaluation)
        record = self.write_record("finished", calibrations)
        return Finished(saes, evaluation, record, self.out, calibrations)

    def _calibrate(self, saes: Mapping[str, SAE]) -> dict[str, Calibration]:
        """Thresholds on calibration tokens that the filter keeps, the same for every arm.

        Held-out ones, other than those that are measured: on tokens it was trained on an SAE fires differently.
        """
        sample = self.data.sample("calibration", self.recipe.evaluation.calibration_tokens).activations
        kept = sample[self.stream.filter.keep(sample)]
        x_ND = kept.x_ND.float().to(self.recipe.device)
        y_ND = None if kept.y_ND is None else kept.y_ND.float().to(self.recipe.device)
        found = {}
        with self.progress.phase("calibrating thresholds", 2 * len(x_ND) * len(saes)):
            for i, (name, sae) in enumerate(saes.items(), 1):
                calibration = calibrate(sae, x_ND, on_rows=self.progress.rows)
                found[name] = replace(calibration, fve=measure_fve(sae, x_ND, y_ND=y_ND))
                self.progress.reached(2 * len(x_ND) * i)
        return found

    def write_record(self, status: str, calibrations: Mapping[str, Calibration] | None = None) -> dict[str, Any]:
        """run.json as things stand."""
        finished = status == "finished"
        moving = exponent_changes(self.recipe, self._records.lines, self.out) if finished else {}
        found = run_record(status, self.recipe, self.data, self.stream, self.states, calibrations or {}, moving)
        logs = {"tensorboard": self.logs.tensorboard, "wandb": self.logs.wandb, "wandb_run": self.wandb_run}
        asked: dict[str, Any] = {"logs": logs, "evaluate": self.measured}
        if self.recipe.training.extended_from:
            asked["parts"] = [{"start": begin, "end": end} for begin, end in self.recipe.training.parts]
        record = {**found, **asked, "started_at": self.started_at, "resumed": self.resumed, "seconds": self.seconds}
        if self.out is not None and self.ranks.leads:
            write_json(self.out / RUN, record)
        return record

    def _checkpoint(self, step: int, seconds: float) -> None:
        assert self.out is not None
        whole = self.stream.state()
        tensors = {key: value for key, value in whole.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in whole.items() if key not in tensors}
        for lines in self._lines.values():
            lines.sync()
        index = {name: one.index for name, one in self._lines.items()}
        ranks, peers = self.ranks, self.ranks.peers
        parts = {"stream": tensors, "random": generator_state()} if ranks.leads else {}
        if peers.token_rank == 0:
            place = (peers.feature_rank, peers.feature_ranks)
            parts |= {part_stem(s.arm.name, *place): s.tensors() for s in self.states}
        every = ranks.gather({state.arm.name: state.numbers() for state in self.states})
        arms = {arm.name: one[arm.name] for arm in self.recipe.arms for one in every if arm.name in one}
        numbers = {"seconds": seconds, "recipe": to_plain(self.recipe), "stream": plain, "arms": arms, "lines": index}
        if peers.feature_ranks > 1:
            numbers["feature_parts"] = peers.feature_ranks
        write_checkpoint(self.out, step, parts, numbers, ranks)

    def _loggers(self, opened: ExitStack) -> list[Logger]:
        """Where numbers go, closed with `opened`. Damage of the files to go on with is said and recorded."""
        if self.out is None or not self.ranks.leads:
            return [self._records]
        metrics = JsonLines(self.out / folder.METRICS, self.start, self._known_lines)
        opened.callback(metrics.close)
        events = Lines(self.out / folder.EVENTS, self.start, self._known_lines.get(folder.EVENTS))
        opened.callback(events.close)
        self._lines = {one.path.name: one for one in (metrics.metrics, metrics.timing, events)}
        for warning in [one.warning for one in self._lines.values() if one.warning is not None]:
            print(warning, file=sys.stderr, flush=True)  # with or without a progress display
            self.resumed[-1]["warnings"].append(warning)
        self.write_record("running")
        loggers: list[Logger] = [metrics]
        if self.logs.tensorboard:
            loggers.append(TensorBoard(self.out, self.start))
            opened.callback(loggers[-1].close)
        if self.logs.wandb is not None:
            sent = Public().recipe(to_plain(self.recipe), names_of_here(self.recipe))
            arms = Public().arms(arm.name for arm in self.recipe.arms)
            loggers.append(WandB(self.out, self.logs.wandb, sent, self.wandb_run, arms))
            opened.callback(loggers[-1].close)
        return loggers


def _facts(recipe: Recipe) -> dict[str, Any]:
    """What all ranks of a run must share: code, packages, and what the recipe changes of the defaults."""
    changed = {path: here for path, (here, _) in recipe.diff(Recipe()).items()}
    return {"the code's commit": provenance.commit(), "packages": provenance.packages(), **changed}


@torch.no_grad()
def _variance(sae: SAE, sample_ND: Tensor, target_ND: Tensor | None) -> float:
    """Mean |z − mean z|² of a sample in the frame's units, or of a transcoder's targets in theirs."""
    framed = sae._framed(sample_ND)
    z_ND = framed.z_BD
    if sae.target is not None and target_ND is not None:
        z_ND = sae.target.of(target_ND, sae.target.stats(framed))
    z_ND = z_ND[framed.live_B].double()
    return float((z_ND - z_ND.mean(0)).square().sum(-1).mean())


_FREE = ["name", *(f"data.{name}" for name in ("n_workers", "prefetch_chunks", "store", "non_finite"))]
_FREE += ["training.log_every", "training.checkpoint_every"]
_FREE += [f"parallel.{f.name}" for f in fields(ParallelConfig)]
"""Fields of a recipe that have no say in what the weights become, beside those of its evaluation."""
