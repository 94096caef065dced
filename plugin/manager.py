"""Loads the plugins and calls their hooks; a broken plugin is named, not crashed into."""

import os
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import TracebackType
from typing import Any

import pluggy

from lorafuse.plugin import hookspecs, log
from lorafuse.plugin.config import FuseConfig
from lorafuse.plugin.errors import FuseError

BUILTIN = "lorafuse.plugin.builtin"
SWITCH_OFF = "set `fused_plugins: false` (or LORAFUSE_PLUGINS=0)"


class Plugins:
    """The plugins of one run.

    Args:
        config: Says whether third parties' plugins are loaded and whether calls are traced.

    Raises:
        FuseError: A third party's plugin does not load or does not fit the hooks.
    """

    def __init__(self, config: FuseConfig) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._distributions: dict[str, str] = {}
        self.blocked: list[str] = []
        third_parties = config.fused_plugins and os.environ.get("LORAFUSE_PLUGINS") != "0"
        for entry in entry_points(group=hookspecs.PROJECT):
            if entry.value == BUILTIN:
                self._manager.register(entry.load(), name=BUILTIN)
            elif third_parties:
                self._load(entry)
            else:
                self.blocked.append(_origin(entry))
        if not self._manager.has_plugin(BUILTIN):
            # A bare checkout on PYTHONPATH has no entry points.
            self._manager.register(import_module(BUILTIN), name=BUILTIN)
        if config.fused_trace or os.environ.get("LORAFUSE_TRACE") == "1":
            self._manager.trace.root.setwriter(lambda line: log.info(f"trace: {line.rstrip()}"))
            self._manager.enable_tracing()

    @property
    def third_parties(self) -> list[str]:
        """The loaded plugins that are not ours, each as `name of distribution version`."""
        return list(self._distributions.values())

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Calls a hook of all plugins and returns what they returned.

        Raises:
            FuseError: A third party's implementation raised; the message names its distribution.
        """
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        try:
            results: list[Any] = caller(**arguments)
        except FuseError:
            raise
        except Exception as error:
            culprit = self._culprit(caller, error.__traceback__)
            if culprit is None:
                raise
            raise FuseError(
                f"plugin {culprit} failed in {hook}: {type(error).__name__}: {error}; "
                f"fix or uninstall it, or {SWITCH_OFF}"
            ) from error
        return results

    def contributions(self, hook: str) -> list[Any]:
        """What all plugins return from a hook that adds things, in one list, ours last."""
        return [item for items in self.call(hook) for item in items]

    def _load(self, entry: EntryPoint) -> None:
        origin = _origin(entry)
        name = f"{origin} ({entry.value})"
        try:
            self._manager.register(entry.load(), name=name)
            self._manager.check_pending()
        except Exception as error:
            raise FuseError(
                f"plugin {origin} does not load: {type(error).__name__}: {error}; "
                f"fix or uninstall it, or {SWITCH_OFF}"
            ) from error
        self._distributions[name] = origin

    def _culprit(self, caller: pluggy.HookCaller, traceback: TracebackType | None) -> str | None:
        """The third party whose implementation is among the frames of the exception."""
        codes = {
            implementation.function.__code__: implementation.plugin_name
            for implementation in caller.get_hookimpls()
            if hasattr(implementation.function, "__code__")
        }
        while traceback is not None:
            plugin = codes.get(traceback.tb_frame.f_code)
            if plugin in self._distributions:
                return self._distributions[plugin]
            traceback = traceback.tb_next
        return None


def _origin(entry: EntryPoint) -> str:
    if entry.dist is None:
        return repr(entry.name)
    return f"{entry.name!r} of {entry.dist.name} {entry.dist.version}"
