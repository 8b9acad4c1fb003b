"""One forward pass, read at some sites and cut short after the last.

In: a model, a batch of `Sequences` and sites. Out: the (N, D) rows of the real tokens at each site. Nothing
of the hooks survives the pass, however it ends.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
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


def body_of(model: nn.Module) -> Any:
    """The model without its language-modelling head."""
    return getattr(model, "base_model", model)


def read_sites(
    model: nn.Module, batch: Sequences, sites: Sequence[Site], store_dtype: torch.dtype, store_device: str
) -> dict[Site, tuple[Tensor, Tensor]]:
    """(N, D) rows of the batch's real tokens at each site, and (N,) their fp32 norms, on `store_device`.

    The rows are in `store_dtype`; the norms are of the rows as the model made them, before any rounding. The first pass
    that reads a module runs to its end, to see how often the module runs; later ones are cut short.
    """
    body = body_of(model)
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
                rows = _real_rows(value, batch.mask_ST, site)
                norm_N = torch.linalg.vector_norm(rows.float(), dim=-1)
                found[site] = rows.to(device=store_device, dtype=store_dtype), norm_N.to(store_device)
                if is_known and len(found) == len(sites):
                    raise _Stop
            return value

        return read

    with _PASS, eager, suppress(_Stop), ExitStack() as hooks, torch.no_grad():
        for site in sites:
            hooks.callback(hook_site(model, site, reader(site)).remove)
        body(**arguments_of(body, batch))
    if not is_known:
        for site, module in zip(sites, modules, strict=True):
            counter.check(site)
            _RUNS[module] = site.calls
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
        if run == site.calls:
            check_calls(site, run + 1)
        return run == site.call

    def check(self, site: Site) -> None:
        """Raises CosaeError, after a pass, where a site was not reached as often as it must be."""
        check_calls(site, self._runs.get(site, 0))


def check_calls(site: Site, runs: int) -> None:
    """Raises CosaeError where a module does not run as often in one forward pass as the site says."""
    if not runs:
        raise CosaeError(f"Site '{site.name}' was never reached: the model does not call that module itself.")
    if runs != site.calls:
        must = "once" if site.calls == 1 else f"{site.calls} times"
        raise CosaeError(
            f"Site '{site.name}' is ambiguous: {site.module_path} must run {must} in a forward pass, but here it runs "
            f"{runs} times or more; choose a site outside the loop."
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
    """The output with its tensor replaced. Modules return a tensor, or a tuple that begins with one."""
    if isinstance(output, tuple | list) and output:
        changed = [act(output[0]), *output[1:]]
        if hasattr(output, "_fields"):
            return type(output)(*changed)
        return type(output)(changed)
    return act(output)


def _real_rows(value: Any, mask_ST: Tensor, site: Site) -> Tensor:
    """(N, D) copy of the rows under the mask."""
    if not isinstance(value, Tensor):
        raise CosaeError(f"Site '{site.name}' gives no tensor but {type(value).__name__}; choose another module.")
    n_sequences, n_positions = mask_ST.shape
    if value.shape[:-1] == (n_sequences * n_positions,):  # mixture-of-experts routers flatten the batch
        value = value.reshape(n_sequences, n_positions, -1)
    if value.shape[:-1] != mask_ST.shape:
        raise CosaeError(
            f"Site '{site.name}' gives a tensor of shape {tuple(value.shape)}, "
            f"not ({n_sequences} sequences, {n_positions} positions, width); choose another module."
        )
    rows: Tensor = value[mask_ST.to(value.device)]
    return rows


def arguments_of(body: Any, batch: Sequences) -> dict[str, Any]:
    """Arguments of the pass: a mask only where there is padding, positions only where it comes first."""
    device = body.get_input_embeddings().weight.device
    mask_ST = batch.mask_ST
    ids_ST = batch.ids_ST.masked_fill(~mask_ST, 0)  # padding ids may be out of the vocabulary
    inputs: dict[str, Any] = {"input_ids": ids_ST.to(device), "use_cache": False}
    if bool(mask_ST.all()):
        return inputs
    inputs["attention_mask"] = mask_ST.long().to(device)
    position_ST = positions(mask_ST)
    after_padding = bool((~mask_ST[:, :-1] & mask_ST[:, 1:]).any())
    if after_padding and "position_ids" in inspect.signature(body.forward).parameters:
        inputs["position_ids"] = position_ST.to(device)
    return inputs


def positions(mask_ST: Tensor) -> Tensor:
    """(S, T) int64: how many real tokens come before each, 0 in leading padding."""
    return (mask_ST.long().cumsum(dim=1) - 1).clamp(min=0)
