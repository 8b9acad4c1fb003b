"""What `--help` shows of a verb: its options in groups, the common ones first, each with the value it has if not given.

Option classes stay flat, and the library's own dataclasses stay as they are: `REGISTRY` tells tyro how a verb's class
and what is nested in it fall into groups. Nothing here waits for torch; the defaults of a recipe's fields are those of
the preset that the command line names, and only a preset other than the usual one is read for them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

FIELDS = {
    **{name: name for name in ("inject_into", "d_sae", "k", "arms", "device", "kernel")},
    **{name: f"data.{name}" for name in ("model", "corpus", "inputs", "positions", "site", "target", "context")},
    **{name: f"data.{name}" for name in ("activations", "store", "world")},
    **{name: f"training.{name}" for name in ("steps", "seed")},
    "dtype": "data.model_dtype",
    "inject": "perturbation",
    "filter": "filter.kind",
    "batch": "training.batch_tokens",
    "lr": "training.optimizer.lr",
}
"""Options that are short for a field of the recipe, by its dotted path."""

DEFAULTS = {
    "model": "embedded",
    "site": "resid_post.5",
    "corpus": "pylib",
    "inputs": "text",
    "positions": "all",
    "context": "256",
    "dtype": "float32",
    "arms": "standard standard_unit_frame",
    "d_sae": "16 × the width",
    "k": "32",
    "steps": "2000",
    "batch": "1024",
    "lr": "0.001",
    "seed": "0",
    "filter": "norm",
    "inject": "none",
    "inject_into": "both",
    "device": "cpu",
    "kernel": "auto",
}
"""`defaults_of` the preset that commands start from, written down so that help need not wait for torch."""

GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": (
        "Activations come from one of {sources}.",
        (
            *("model", "site", "corpus", "inputs", "positions", "store", "store_site", "world", "activations"),
            *("tokens", "held_out_tokens", "prompts", "context", "dtype", "inject", "inject_into", "sink_factor"),
        ),
    ),
    "SAE": ("", ("arms", "d_sae", "k")),
    "training": ("", ("steps", "batch", "lr", "filter")),
    "storage": ("", ("store_dtype", "shard_tokens", "n_splits")),
    "probing": (
        "Of `eval probing` alone.",
        ("texts", "text_column", "label_column", "max_texts", "seeds", "top", "pooling"),
    ),
    "causal": ("Of `eval causal` alone.", ("features",)),
    "dashboard": ("", ("model_id", "set_name", "top", "n_quantiles", "per_quantile", "ignore_norm_above")),
    "output": ("", ("show", "dry_run", "quiet", "tensorboard", "wandb")),
    "other": ("", ("seed", "device", "kernel", "format", "set")),
}
"""Group → what it says of itself, and its options in their order. An option of no group comes first; those of a nested
field with the name of a group are in that group."""

SOURCES = ("model", "store", "world", "activations")
"""Options that name where activations come from; one of them is taken."""


@dataclass(frozen=True)
class _Option:
    """A field of a verb, or of a dataclass that the verb holds: where it belongs, and all that help shows of it."""

    owner: str
    name: str
    hint: Any
    default: Any
    text: Callable[[], str]


class _Group:
    """Base of the classes that stand for a group of a verb's options."""

    options: tuple[StructFieldSpec, ...]


def defaults_of(arguments: Sequence[str] = ()) -> dict[str, str]:
    """Option → the value that the recipe gives it: that of --preset or --recipe where the arguments name one."""
    named = {
        name: value
        for name, _, value in (
            (given if "=" in given else f"{given}={following}").partition("=")
            for given, following in zip(arguments, [*arguments[1:], ""], strict=True)
        )
        if name in ("--preset", "--recipe")
    }
    if not named:
        return DEFAULTS
    from cosae.presets import preset
    from cosae.recipe import Recipe

    recipe = Recipe.read(named["--recipe"]) if "--recipe" in named else preset(named["--preset"])
    return {option: text for option, path in FIELDS.items() if (text := _shown(recipe, path))}


def _shown(recipe: Any, path: str) -> str:
    """The value at a dotted path of a recipe, as one would write it as an option; nothing where there is none."""
    value = recipe
    for name in path.split("."):
        value = getattr(value, name)
    if path == "arms":
        return " ".join(arm.name for arm in value)
    if path == "d_sae" and value is None:
        return "16 × the width"
    if path == "perturbation":
        value = value.kind
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def registry(arguments: Sequence[str]) -> ConstructorRegistry:
    """How tyro reads our option classes."""
    found = ConstructorRegistry()
    found.struct_rule(_group_rule)
    found.struct_rule(partial(_verb_rule, arguments=tuple(arguments)))
    return found


def _group_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    if isinstance(info.type, type) and issubclass(info.type, _Group):
        return StructConstructorSpec(dict, info.type.options)
    return None


def _verb_rule(info: StructTypeInfo, arguments: tuple[str, ...]) -> StructConstructorSpec | None:
    kind = info.type
    if not (is_dataclass(kind) and isinstance(kind, type) and kind.__module__.startswith("cosae.cli.")):
        return None
    options = list(_options(kind, info.default))
    defaults: dict[str, str] = {}
    if any(option.name == "preset" for option in options) and {"-h", "--help"} & set(arguments):
        defaults = defaults_of(arguments)
    groups: dict[str, list[_Option]] = {}
    for option in options:
        groups.setdefault(_group_of(option), []).append(option)
    sources = " | ".join(f"--{name}" for name in SOURCES if any(o.name == name for o in groups.get("data", ())))
    specs = [_spec(option, defaults) for option in groups.get("", ())]
    specs.sort(key=lambda spec: spec.default is not tyro.MISSING_NONPROP)
    for name, (said, order) in GROUPS.items():
        if name in groups:
            listed = sorted(groups[name], key=lambda option: order.index(option.name))
            group = type(name, (_Group,), {"options": tuple(_spec(option, defaults) for option in listed)})
            flat: Any = tyro.conf.OmitArgPrefixes
            shown: Any = Annotated[flat[group], tyro.conf.arg(name=name)]
            said = "" if "{" in said and "|" not in sources else said.format(sources=sources)
            specs.append(StructFieldSpec(f"{name} options", shown, tyro.MISSING_NONPROP, said))

    def build(**given: Any) -> Any:
        return _build(kind, {option.name: option.owner for option in options}, given)

    build.__doc__ = inspect.getdoc(kind)
    return StructConstructorSpec(build, tuple(specs))


def _group_of(option: _Option) -> str:
    named = (name for name, (_, listed) in GROUPS.items() if option.name in listed)
    return option.owner if option.owner in GROUPS else next(named, "")


def _options(kind: type[Any], default: Any) -> Iterator[_Option]:
    """Fields of a class, and those of dataclasses in it in their place."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for f in fields(kind):
        value = getattr(default, f.name, MISSING)
        if value is MISSING:
            value = f.default if f.default_factory is MISSING else f.default_factory()
        plain = typing.get_args(hints[f.name])[0] if typing.get_origin(hints[f.name]) is Annotated else hints[f.name]
        if isinstance(plain, type) and is_dataclass(plain):
            for option in _options(plain, value):
                yield _Option(f.name, option.name, option.hint, option.default, option.text)
        else:
            yield _Option("", f.name, hints[f.name], value, partial(_text_of, kind, f.name))


def _spec(option: _Option, defaults: Mapping[str, str]) -> StructFieldSpec:
    plain, *marks = typing.get_args(option.hint) if hasattr(option.hint, "__metadata__") else (option.hint,)
    default = tyro.MISSING_NONPROP if option.default is MISSING else option.default
    hint: dict[str, Any] = {}
    if option.default is None or option.default is False or option.default == () or tyro.conf.Positional in marks:
        value = None if option.default is False else defaults.get(option.name)
        hint["help_behavior_hint"] = f"(default: {value})" if value else ""
    if typing.get_origin(plain) is tuple:
        one = option.name.removesuffix("s") if tyro.conf.Positional in marks else typing.get_args(plain)[0].__name__
        hint["metavar"] = f"{one.upper()} …"
    elif marks:
        hint["metavar"] = option.name.upper()
    kind: Any = Annotated[(plain, *marks, tyro.conf.arg(**hint))] if hint else option.hint
    return StructFieldSpec(option.name, kind, default, option.text)


def _build(kind: type[Any], owners: Mapping[str, str], given: Mapping[str, Any]) -> Any:
    """The verb's class from what tyro read, group by group."""
    values = {name: value for name, value in given.items() if name in owners}
    for name in GROUPS:
        values |= given.get(f"{name} options", {})
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        nested.setdefault(owners[name], {})[name] = value
    own = nested.pop("", {})
    hints = typing.get_type_hints(kind)
    return kind(**own, **{name: hints[name](**part) for name, part in nested.items()})


@cache
def _texts(kind: type[Any]) -> dict[str, str]:
    """Field → the text under it in the class' own source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for node, after in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            text = ast.literal_eval(after.value)
            found[node.target.id] = " ".join(text.split())
    return found


def _text_of(kind: type[Any], name: str) -> str:
    owner = next(cls for cls in kind.__mro__ if name in inspect.get_annotations(cls))
    return _texts(owner).get(name, "")
