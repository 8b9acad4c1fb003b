"""Tensors of a running model, replaced at sites: the hooks, and their removal.

While the context is open every forward pass of the model, inside `generate` as well, goes through the rules
(x, window) → x′, and afterwards the model is as it was, however it was left. Several may be open at once; at one site
the one opened first acts first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.models.hooks import CallCounter, body_of, eager, hook_site
from cosae.models.intervene.call import read_window
from cosae.models.intervene.window import Window
from cosae.models.sites import holder_of_blocks, resolve_site
from cosae.types import Site

Rule = Callable[[Tensor, Window], Tensor]


class Intervention:
    """Rules at sites of a model, in force inside `with`.

    before(window) is called as a pass begins, after(window) when it ended with every site reached. The context may be
    entered again after it was left. A pass that never reaches a site raises CosaeError.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[Site, Rule],
        before: Callable[[Window], None] = lambda _: None,
        after: Callable[[Window], None] = lambda _: None,
    ) -> None:
        self.model = model
        self.rules = dict(rules)
        self._before, self._after = before, after
        self._hooks: ExitStack | None = None
        self._window: Window | None = None
        self._callee: nn.Module | None = None
        self._counter = CallCounter()

    @property
    def is_open(self) -> bool:
        """Whether the rules are in force."""
        return self._hooks is not None

    def __enter__(self) -> Intervention:
        if self._hooks is not None:
            raise CosaeError("This splice is already open; leave it first, or make another with spliced(...).")
        # the part that holds the blocks as well: some heads (OPT's) call that, past the body
        callees = dict.fromkeys((body_of(self.model), holder_of_blocks(self.model)))
        with ExitStack() as hooks:
            hooks.enter_context(eager)
            for module in callees:
                hooks.callback(module.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            for site, rule in self.rules.items():
                hooks.callback(hook_site(self.model, site, self._acting(site, rule)).remove)
            for module in callees:
                hooks.callback(module.register_forward_hook(self._end).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._hooks is not None:
            self._hooks.close()
        self._hooks = self._window = self._callee = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        body = body_of(self.model)
        if module is not body and self._callee is body:
            return  # the body has begun, and knows more
        self._window = read_window(module, args, kwargs)
        self._callee = module
        self._counter = CallCounter()
        self._before(self._window)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self._callee:
            return
        self._callee = None
        for site in self.rules:
            self._counter.check(site)
        window, self._window = self._window, None
        assert window is not None
        self._after(window)

    def _acting(self, site: Site, rule: Rule) -> Callable[[Any], Any]:
        def act(x: Any) -> Any:
            if self._window is None:
                raise CosaeError(
                    f"Site '{site.name}' ran outside a forward pass of the model: call the model, not a part of it."
                )
            return rule(x, self._window) if self._counter.is_meant(site) else x

        return act


def find_site(model: nn.Module, site: str | Site) -> Site:
    """`resolve_site`, and also a name followed by ":input": what goes into that module. Raises as it does."""
    if isinstance(site, str) and site.endswith(":input"):
        found = resolve_site(model, site.removesuffix(":input"))
        return replace(found, name=site, hook_name=site, reads="input")
    return resolve_site(model, site)
