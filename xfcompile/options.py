"""What a user can ask of the backend: our own options, validated, apart from those that Inductor understands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_origin

from xfcompile import extension, families
from xfcompile.unchanged import unchanged


@dataclass(frozen=True)
class Options:
    """Our own options.

    patterns: the families that are looked for.
    routes: a family's route, where the usual choice is not wanted. A site that cannot take it is left to Inductor.
    strict: raise our own errors, instead of leaving what they concern to Inductor with a warning.
    verify: at the first run of a compiled graph run each replaced site beside its original, both against fp64, and
        report the errors (`Report.checks`). A site that is wrong is a warning, and with `strict` an error.
    autotune: time the ways to run each site, on its real shapes, and take the fastest; mode="max-autotune" and
        "max-autotune-no-cudagraphs" ask for it too. What was found is kept on disk.
    autotune_budget: seconds that this may take for a graph. What was not timed by then runs as usual.
    """

    patterns: frozenset[str] = field(default_factory=lambda: frozenset(families.routes()))
    routes: Mapping[str, str] = field(default_factory=dict, hash=False)
    strict: bool = False
    verify: bool = False
    autotune: bool = False
    autotune_budget: float = 120.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", _families(self.patterns))
        object.__setattr__(self, "routes", _routes(self.routes))
        for name in ("strict", "verify", "autotune"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"option {name!r} must be True or False, not {getattr(self, name)!r}")
        budget = self.autotune_budget
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget < float("inf"):
            raise ValueError(f"option 'autotune_budget' must be a number of seconds, not {budget!r}")

    @staticmethod
    def parse(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
        """Ours, and what Inductor is to be told: the mode's settings, then the options, which win.

        Raises ValueError for a mode, a key or a value that neither we nor Inductor know.
        """
        ours: dict[str, Any] = {}
        patches = _mode(mode)
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"options must be a dict, not {options!r}")
        for key, value in (options or {}).items():
            if key in KEYS:
                ours[key] = value
            else:
                patches.update([_inductor(key, value)])
        if mode in AUTOTUNED:
            ours.setdefault("autotune", True)
        return Options(**ours), patches

    @staticmethod
    def of(options: Options | Mapping[str, Any] | None) -> Options:
        """The options of the bare pass, which has no Inductor behind it that could take any of its own."""
        if isinstance(options, Options):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"options must be a dict or xfcompile.Options, not {options!r}")
        for key in options or {}:
            if key not in KEYS:
                raise ValueError(f"unknown option {key!r}{_nearest(key, KEYS)}; the options are {_listed(KEYS)}")
        return Options(**(options or {}))

    def fingerprint(self) -> str | None:
        """A string that differs wherever the options ask for other code (not for a run beside it), or the families of
        other packages that they name are others; None if what these are made of cannot be read, or if this package is
        not the one any more that this process has imported."""
        others = extension.identity(self.patterns)
        if others is None or not unchanged():
            return None
        words = f"patterns={sorted(self.patterns)} routes={sorted(self.routes.items())} strict={self.strict}"
        return f"{words} others={others}" if others else words


KEYS = tuple(f.name for f in fields(Options))

AUTOTUNED = ("max-autotune", "max-autotune-no-cudagraphs")
"""Inductor's modes in which our sites are timed too."""


def _families(patterns: object) -> frozenset[str]:
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise ValueError(f"option 'patterns' must be a list of families such as ['attention'], not {patterns!r}")
    names = list(patterns)
    for name in names:
        if not isinstance(name, str) or name not in families.routes():
            raise ValueError(_no_family("patterns", name))
    return frozenset(names)


def _routes(routes: object) -> dict[str, str]:
    if not isinstance(routes, Mapping):
        raise ValueError(f"option 'routes' must be a dict such as {{'attention': 'sdpa'}}, not {routes!r}")
    known = families.routes()
    for family, route in routes.items():
        if family not in known:
            raise ValueError(_no_family("routes", family))
        if route not in known[family]:
            raise ValueError(
                f"option 'routes': {family} has no route {route!r}{_nearest(route, known[family])}; "
                f"its routes are {_listed(known[family])}"
            )
    return dict(routes)


def _no_family(option: str, name: object) -> str:
    known = families.routes()
    return f"option {option!r}: unknown family {name!r}{_nearest(name, known)}; the families are {_listed(known)}"


def _mode(mode: str | None) -> dict[str, Any]:
    """The settings behind one of Inductor's modes."""
    import torch._inductor

    modes = torch._inductor.list_mode_options()
    if mode is None:
        return {}
    if mode not in modes:
        raise ValueError(f"unknown mode {mode!r}{_nearest(mode, modes)}; the modes are {_listed(modes)}")
    return dict(torch._inductor.list_mode_options(mode))


def _inductor(key: object, value: Any) -> tuple[str, Any]:
    """One of Inductor's own settings, held to the type that Inductor declares for it."""
    from torch._inductor import config

    known = config.get_config_copy()
    name = key.replace("-", "_") if isinstance(key, str) else ""
    if name not in known:
        raise ValueError(
            f"unknown option {key!r}{_nearest(key, (*KEYS, *known))}; the options of xformers are {_listed(KEYS)}, "
            "all others go to Inductor: see torch._inductor.list_options()"
        )
    declared = config.get_type(name)  # type: ignore[attr-defined]
    # Generic types cannot be asked of a value; Inductor leaves them unchecked too.
    if get_origin(declared) is None and not isinstance(value, declared):
        wanted = getattr(declared, "__name__", str(declared))
        raise ValueError(f"Inductor's option {key!r} must be of type {wanted}, not {type(value).__name__} ({value!r})")
    return name, value


def _nearest(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
