# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What ``register`` sets in anomalib, and what it says when it cannot."""

import copy
import sys
import types
import warnings

import pytest
from anomalib import models
from anomalib.models import image

import anomalib_pedenet
from anomalib_pedenet.host.registration import MODULES, register


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own copy of what the registration changes."""
    monkeypatch.setattr(models, "ALLOWED_MODULES", copy.copy(models.ALLOWED_MODULES))
    for module in (models, image):
        monkeypatch.setattr(module, "__all__", copy.copy(module.__all__))
        monkeypatch.setattr(module, "Pedenet", module.Pedenet)


def forget() -> None:
    """Take the registration back."""
    models.ALLOWED_MODULES.difference_update(MODULES)
    for module in (models, image):
        module.__all__.remove("Pedenet")
        del module.Pedenet


def names() -> list[dict[str, object]]:
    """Return all names of the host's modules."""
    return [dict(vars(module)) for module in (models, image)]


def test_register_sets_its_names_and_no_others() -> None:
    forget()
    unregistered = names()
    allowed, listed = set(models.ALLOWED_MODULES), [list(module.__all__) for module in (models, image)]
    register()
    assert models.ALLOWED_MODULES - allowed == {"anomalib_pedenet", "anomalib_pedenet.lightning_model"}
    assert [module.__all__ for module in (models, image)] == [[*before, "Pedenet"] for before in listed]
    for now, before in zip(names(), unregistered, strict=True):
        assert now.keys() - before.keys() == {"Pedenet"}
        assert now["Pedenet"] is anomalib_pedenet.Pedenet
        assert {name for name in before if now[name] is not before[name]} == set()


def test_registering_again_changes_nothing() -> None:
    allowed, before = set(models.ALLOWED_MODULES), (list(models.__all__), list(image.__all__))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()
        register()
    assert allowed == models.ALLOWED_MODULES
    assert set(MODULES) <= models.ALLOWED_MODULES
    assert before == (models.__all__, image.__all__)
    assert models.__all__.count("Pedenet") == image.__all__.count("Pedenet") == 1


def test_half_imported_package_is_left_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setitem(sys.modules, "anomalib_pedenet", types.ModuleType("anomalib_pedenet"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()
    assert not hasattr(models, "Pedenet")


@pytest.mark.parametrize(("module", "name"), [(models, "ALLOWED_MODULES"), (models, "__all__"), (image, "__all__")])
def test_anomalib_that_lacks_a_name_is_a_warning(
    module: types.ModuleType,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forget()
    monkeypatch.delattr(module, name)
    with pytest.warns(RuntimeWarning, match=rf"(?s)anomalib-pedenet could not register.*{name}.*pip install"):
        register()
    assert not hasattr(models, "Pedenet")
    assert not hasattr(image, "Pedenet")
    if hasattr(models, "ALLOWED_MODULES"):
        assert not set(MODULES) & models.ALLOWED_MODULES


def test_another_model_of_the_name_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    other = type("Pedenet", (), {"__module__": "anomalib.models.image.pedenet"})
    monkeypatch.setattr(image, "Pedenet", other, raising=False)
    with pytest.warns(RuntimeWarning, match=r"already has another Pedenet, from anomalib\.models\.image\.pedenet"):
        register()
    assert image.Pedenet is other
    assert not hasattr(models, "Pedenet")
