"""Tensors of a running model, replaced at sites: the hooks, and their removal.

While the context is open every forward pass of the model, inside `generate` as well, goes through the rules
(x, window) → x′, and afterwards the model is as it was, however it was left. Several may be open at once; at one site
the one opened first acts first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cosae.errors import CosaeError
from cosae.models.hooks import CallCounter, eager, hook_site
from cosae.models.intervene.call import read_window
from cosae.models.intervene.window import Window
from cosae.models.parts import body_of, caller_of, find_parts
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
        if odd := next((site.name for site in rules if site.joined), None):
            raise CosaeError(f"a crosscoder needs all of {odd} before it stands in for one of them: splice SAEs.")
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
        callees = self._callees()
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

    def _callees(self) -> list[nn.Module]:
        """The modules whose calls are passes: what holds the sites, and for a language model its body as well, past
        which some heads (OPT's) call."""
        self._reads_images_or_audio = False
        body = body_of(self.model)
        for path in [site.module_path for site in self.rules][:1]:
            runner, reads = caller_of(self.model, path)
            self._reads_images_or_audio = reads != "text"
            parts = find_parts(self.model)
            of_main = not parts or parts[0].is_main
            return [*dict.fromkeys((body, runner) if of_main and reads == "text" else (runner,))]
        return [body]

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        body = body_of(self.model)
        if module is not body and self._callee is body:
            return  # the body has begun, and knows more
        self._callee, self._counter, self._window = module, CallCounter(), None
        if not self._reads_images_or_audio:
            self._window = read_window(module, args, kwargs)
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
            if self._window is None and self._callee is not None and x.ndim > 2:
                # images and sound: as many places as there turn out to be
                self._window = Window.of(torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
                self._before(self._window)
            if self._window is None:
                raise CosaeError(
                    f"Site '{site.name}' ran outside a forward pass of the model: call the model, not a part of it."
                )
            if not self._counter.is_meant(site):
                return x
            if x.ndim > 3:  # heads, side by side
                return rule(x.flatten(2), self._window).reshape(x.shape)
            return rule(x, self._window)

        return act
