# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Make stock anomalib know :class:`~anomalib_pedenet.Pedenet`.

anomalib has no plugin mechanism. It finds models among the imported direct subclasses of ``AnomalibModule``, takes
bare class names from ``anomalib.models``, and imports dotted class paths only from modules it lists in
``ALLOWED_MODULES``. :func:`register` sets these names and nothing else.

It runs on its own in two places: after ``import anomalib_pedenet``, and, by the start-up files that are installed
beside this package, after ``import anomalib.models`` (not under ``python -S``, which reads no start-up files).
"""

import sys
import warnings
from types import ModuleType

MODULES = ("anomalib_pedenet", "anomalib_pedenet.lightning_model")
"""Modules that anomalib may import a dotted ``class_path`` from."""


def register() -> None:
    """Make ``Pedenet`` one of the models of anomalib; calling it again changes nothing.

    Afterwards ``from anomalib.models import Pedenet``, ``anomalib.models.get_model("pedenet")``,
    ``anomalib.models.list_models()``, the class paths ``Pedenet``, ``anomalib.models.Pedenet``,
    ``anomalib.models.image.Pedenet`` and ``anomalib_pedenet.Pedenet``, and anomalib's command line know the model.

    Nothing is done while ``anomalib_pedenet`` itself is still being imported: its own imports may be what imports
    ``anomalib.models``, and it calls this function as its last statement.

    Warns:
        RuntimeWarning: If anomalib lacks what the registration relies on, or has another model of that name. Nothing
            of the host is overwritten, and ``from anomalib_pedenet import Pedenet`` still works.

    Examples:
        >>> from anomalib_pedenet.host.registration import register
        >>> register()
        >>> from anomalib.models import list_models
        >>> "pedenet" in list_models()
        True
    """
    if not hasattr(sys.modules["anomalib_pedenet"], "Pedenet"):
        return
    try:
        _register()
    except Exception as error:  # noqa: BLE001  # the host must go on without us, whatever changed in it
        # stacklevel 1: the caller is our own code too, and one place keeps a second call from warning again.
        warnings.warn(
            f"anomalib-pedenet could not register its model Pedenet with anomalib {_host_version()} "
            f"({type(error).__name__}: {error}). Import the class by `from anomalib_pedenet import Pedenet`, or run "
            f"`pip install --upgrade anomalib-pedenet anomalib` for a pair that fits together.",
            RuntimeWarning,
            stacklevel=1,
        )


def _register() -> None:
    """Set the names in anomalib's modules.

    Raises:
        AttributeError: If anomalib lacks a name that the registration relies on; nothing is set then.
        ImportError: If anomalib lacks a module that the registration relies on; nothing is set then.
        RuntimeError: If anomalib has another model of that name; nothing is set then.
    """
    from anomalib import models
    from anomalib.models import image

    from anomalib_pedenet import Pedenet

    # Everything is looked at before anything is set: half a registration would be harder to understand than none.
    hosts: tuple[ModuleType, ...] = (models, image)
    allow = models.ALLOWED_MODULES.update
    public_names = [host.__all__ for host in hosts]
    for host in hosts:
        present = getattr(host, "Pedenet", Pedenet)
        if present is not Pedenet:
            msg = f"{host.__name__} already has another Pedenet, from {present.__module__}"
            raise RuntimeError(msg)

    allow(MODULES)
    for host, names in zip(hosts, public_names, strict=True):
        host.Pedenet = Pedenet  # type: ignore[attr-defined]
        if "Pedenet" not in names:
            names.append("Pedenet")


def _host_version() -> str:
    """Return the version of the imported anomalib, or ``"of unknown version"``."""
    return getattr(sys.modules.get("anomalib"), "__version__", "of unknown version")
