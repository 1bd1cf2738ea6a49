# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Make anomalib know ``Pedenet`` as soon as a program imports ``anomalib.models``.

anomalib has no plugin mechanism, so the interpreter's start-up files carry the news. Both call :func:`install`:
``anomalib_pedenet.pth`` before Python 3.15, and ``anomalib_pedenet.start`` since, where Python ignores the import
lines of a path file that has a start file beside it.

Every interpreter imports this module when it starts, so it costs as little as a module can: it imports nothing but
``sys``, and everything else waits for ``anomalib.models``. ``benchmarks/startup.py`` measures it.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

HOST = "anomalib.models"


class Finder:
    """Meta path finder that has :data:`HOST` followed by the registration of Pedenet, once.

    It finds nothing itself: it asks the other finders, and has the loader they name run the registration after the
    module's own code. The class is used as it is, without an instance.

    Attributes:
        anomalib_pedenet: Tells this finder from everybody else's, also where two copies of this module are loaded.
    """

    anomalib_pedenet = True

    @staticmethod
    def find_spec(
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Find the host module by the other finders and have its loader call the registration.

        Args:
            name: Full name of the module that is being imported.
            path: Search path of the parent package.
            target: Module that is being reloaded, if any.

        Returns:
            The host module's spec, or ``None`` for any other module, or where the other finders know no such module.
        """
        if name != HOST:
            return None
        for finder in sys.meta_path:
            if hasattr(finder, "anomalib_pedenet") or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _register_after_exec(spec)
                return spec
        return None


def install() -> None:
    """Put :class:`Finder` first on ``sys.meta_path``, unless it is there already.

    The check is needed: Python reads the start-up files of a virtual environment twice.
    """
    if not any(hasattr(finder, "anomalib_pedenet") for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder)


def _register_after_exec(spec: "ModuleSpec") -> None:
    """Have the loader of ``spec`` run the registration after the module's own code.

    Only this one loader object is touched, so that its type and every other method of it stay what tools expect.

    Args:
        spec: Spec of the host module.
    """
    loader = spec.loader

    def exec_module(module: "ModuleType") -> None:
        del loader.exec_module  # type: ignore[union-attr]  # uncovers the loader's own method
        loader.exec_module(module)  # type: ignore[union-attr]
        # A new list, since other threads may be going through the old one, where removing an entry would hide the
        # next one from them. An import that failed does not come here, so the next attempt is caught too.
        sys.meta_path = [finder for finder in sys.meta_path if not hasattr(finder, "anomalib_pedenet")]
        _register()

    try:
        loader.exec_module = exec_module  # type: ignore[method-assign,union-attr]
    except (AttributeError, TypeError) as error:
        # For instance a directory without __init__.py, which has no loader of its own.
        _warn(error)


def _register() -> None:
    """Call the registration; whatever goes wrong there must not stop the host."""
    try:
        from anomalib_pedenet.host.registration import register

        register()
    except ModuleNotFoundError as error:
        # Tools that run a program from an archive take site-packages off the path again: that anomalib is not the one
        # this package was installed for.
        if error.name != "anomalib_pedenet":
            _warn(error)
    except Exception as error:  # noqa: BLE001
        _warn(error)


def _warn(error: Exception) -> None:
    """Say that Pedenet could not be made known to anomalib, and what to do.

    Args:
        error: What went wrong.
    """
    import warnings

    warnings.warn(
        f"anomalib-pedenet could not be loaded, so anomalib does not know the model Pedenet "
        f"({type(error).__name__}: {error}). Run `pip install --upgrade anomalib-pedenet anomalib` for a pair that "
        f"fits together, or `pip uninstall anomalib-pedenet` if you do not use it.",
        RuntimeWarning,
        stacklevel=2,
    )
