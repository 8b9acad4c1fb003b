"""One forward pass, read at some sites and cut short after the last.

In: a model, a batch of `Sequences` and sites. Out: the (N, D) rows of the real tokens at each site. Nothing
of the hooks survives the pass, however it ends.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.models.parts import INPUTS, runner_of
from cosae.shown import counted
from cosae.types import Sequences, Site

_PASS = threading.Lock()  # hooks sit on the model itself: two passes at once would read one another's batches


class _Stop(BaseException):
    """Ends a forward pass once every site is read. No `Exception`, so that no model code swallows it."""


class _Eager:
    """Sets torch.compile aside while it is open, any number of times: compiled code runs past hooks hung later."""

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._open:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._open += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._stance.__exit__(None, None, None)


eager = _Eager()


def read_sites(
    model: nn.Module, batch: Sequences, sites: Sequence[Site], store_dtype: torch.dtype, store_device: str
) -> dict[Site, tuple[Tensor, Tensor]]:
    """(N, D) rows of the batch's real tokens at each site, and (N,) their fp32 norms, on `store_device`.

    The rows are in `store_dtype`; the norms are of the rows as the model made them, before any rounding. The first pass
    that reads a module runs to its end, to see how often the module runs; later ones are cut short.
    """
    names = ("input_ids",) if batch.inputs is None else tuple(batch.inputs)
    runner, names = runner_of(model, [site.module_path for site in sites], names)
    found: dict[Site, tuple[Tensor, Tensor]] = {}
    counter = CallCounter()
    modules = [model.get_submodule(site.module_path) for site in sites]
    is_known = all(module in _RUNS for module in modules)
    if is_known:
        for site, module in zip(sites, modules, strict=True):
            check_calls(site, _RUNS[module])

    def reader(site: Site) -> Callable[[Any], Any]:
        def read(value: Any) -> Any:
            if counter.is_meant(site):
                # Copied at once: later modules may write into the same memory.
                rows = _rows(value, batch, site)
                norm_N = torch.linalg.vector_norm(rows.float(), dim=-1)
                found[site] = rows.to(device=store_device, dtype=store_dtype), norm_N.to(store_device)
                if is_known and len(found) == len(sites):
                    raise _Stop
            return value

        return read

    with _PASS, eager, suppress(_Stop), ExitStack() as hooks, torch.no_grad():
        for site in sites:
            hooks.callback(hook_site(model, site, reader(site)).remove)
        runner(**arguments_of(runner, batch, names))
    if not is_known:
        for site, module in zip(sites, modules, strict=True):
            counter.check(site)
            _RUNS[module] = counter.runs(site)
    return found


_RUNS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How often a module runs in one pass, of those that were read to the end of one."""


class CallCounter:
    """Counts the runs of sites' modules in one forward pass."""

    def __init__(self) -> None:
        self._runs: dict[Site, int] = {}

    def is_meant(self, site: Site) -> bool:
        """Whether this run, which is counted, is the one that the site names. Raises CosaeError for one too many."""
        run = self._runs.get(site, 0)
        self._runs[site] = run + 1
        if site.calls and run == site.calls:
            check_calls(site, run + 1)
        return run == site.call

    def runs(self, site: Site) -> int:
        """How often a site's module ran."""
        return self._runs.get(site, 0)

    def check(self, site: Site) -> None:
        """Raises CosaeError, after a pass, where a site was not reached as often as it must be."""
        check_calls(site, self._runs.get(site, 0))


def check_calls(site: Site, runs: int) -> None:
    """Raises CosaeError where a module does not run as often in one forward pass as the site says."""
    if not runs:
        raise CosaeError(f"Site '{site.name}' was never reached: the model does not call that module itself.")
    if not site.calls and runs <= site.call:
        raise CosaeError(
            f"Site '{site.name}' is out of range: in a forward pass {site.module_path} runs {counted(runs, 'time')}, "
            "and runs are counted from 0."
        )
    if site.calls and runs != site.calls:
        must = "once" if site.calls == 1 else f"{site.calls} times"
        raise CosaeError(
            f"Site '{site.name}' is ambiguous: {site.module_path} must run {must} in a forward pass, but here it runs "
            f"{runs} times or more; name the run, as in {site.module_path}#0."
        )


def hook_site(model: nn.Module, site: Site, act: Callable[[Any], Any]) -> Any:
    """A hook on a site's module that puts act(value) in the place of what it reads; returns its handle."""
    module = model.get_submodule(site.module_path)
    if site.reads == "input":
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: _with_first(args, kwargs, act), with_kwargs=True
        )
    return module.register_forward_hook(lambda _, args, output: _with_tensor(output, act))


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], act: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its first argument replaced; blocks get the residual stream first, or by name."""
    if args:
        return (act(args[0]), *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: act(kwargs[name])}


def _with_tensor(output: Any, act: Callable[[Any], Any]) -> Any:
    """The output with its tensor replaced. Modules return a tensor, a tuple with one, the first counting, or a record,
    of which last_hidden_state counts, else its first tensor."""
    if isinstance(output, Mapping):
        tensors = [key for key, value in output.items() if isinstance(value, Tensor)]
        key = "last_hidden_state" if "last_hidden_state" in tensors else next(iter(tensors), None)
        return act(output) if key is None else type(output)(**{**output, key: act(output[key])})
    if isinstance(output, tuple | list) and output:
        place = next((i for i, value in enumerate(output) if isinstance(value, Tensor)), 0)
        changed = [act(value) if i == place else value for i, value in enumerate(output)]
        if hasattr(output, "_fields"):
            return type(output)(*changed)
        return type(output)(changed)
    return act(output)


def _rows(value: Any, batch: Sequences, site: Site) -> Tensor:
    """(N, D) copy of the rows that are wanted of a batch; heads side by side."""
    if not isinstance(value, Tensor):
        raise CosaeError(f"Site '{site.name}' gives no tensor but {type(value).__name__}; choose another module.")
    n_sequences, n_positions = batch.mask_ST.shape
    if value.shape[:-1] == (n_sequences * n_positions,):  # mixture-of-experts routers flatten the batch
        value = value.reshape(n_sequences, n_positions, -1)
    if value.shape[:2] != batch.mask_ST.shape or value.ndim < 3:
        raise CosaeError(
            f"Site '{site.name}' gives a tensor of shape {tuple(value.shape)}, "
            f"not ({n_sequences} sequences, {n_positions} positions, width); choose another module."
        )
    rows_ST = batch.rows_ST.to(value.device)
    if not batch.pooled:
        rows: Tensor = value.flatten(2)[rows_ST]
        return rows
    total_SD = torch.where(rows_ST[..., None], value.flatten(2).float(), 0.0).sum(1)
    count_S = rows_ST.sum(1)
    mean_SD: Tensor = total_SD / count_S.clamp(min=1)[:, None]
    return mean_SD[count_S > 0].to(value.dtype)


def arguments_of(runner: nn.Module, batch: Sequences, names: Sequence[str] = ("input_ids",)) -> dict[str, Any]:
    """Arguments of the pass: a mask only where there is padding, positions only where it comes first."""
    weight = next(iter(runner.parameters()))
    known = inspect.signature(runner.forward).parameters
    if batch.inputs is not None:
        dtypes = {name: weight.dtype if value.is_floating_point() else None for name, value in batch.inputs.items()}
        return {name: value.to(weight.device, dtypes[name]) for name, value in batch.inputs.items()}
    mask_ST = batch.mask_ST
    ids_ST = batch.ids_ST.masked_fill(~mask_ST, _padding_id(runner)).to(weight.device)
    inputs: dict[str, Any] = dict.fromkeys(names, ids_ST)
    if "use_cache" in known or not known.keys() & INPUTS:
        inputs["use_cache"] = False
    if bool(mask_ST.all()):
        return inputs
    inputs |= {name.replace("input_ids", "attention_mask"): mask_ST.long().to(weight.device) for name in names}
    after_padding = bool((~mask_ST[:, :-1] & mask_ST[:, 1:]).any())
    if after_padding and "position_ids" in known and not _counts_itself(runner):
        inputs["position_ids"] = positions(mask_ST).to(weight.device)
    return inputs


def _counts_itself(runner: nn.Module) -> bool:
    """Whether a model counts positions by which ids are padding, and from another number than 0 (RoBERTa, ESM)."""
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in runner.modules())


def _padding_id(runner: nn.Module) -> int:
    """What stands for padding, whose own id may be out of the vocabulary: 0 where the model does not look at it."""
    given = getattr(getattr(runner, "config", None), "pad_token_id", None)
    return int(given) if given is not None and _counts_itself(runner) else 0


def positions(mask_ST: Tensor) -> Tensor:
    """(S, T) int64: how many real tokens come before each, 0 in leading padding."""
    return (mask_ST.long().cumsum(dim=1) - 1).clamp(min=0)
