# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Scorers: how abnormal is an embedding, given the embeddings of normal patches?

A scorer is chosen by its name in :data:`SCORERS`, or by a class path with arguments. A new one is one file with a
subclass of :class:`Scorer`, and one line in :data:`SCORERS`.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from anomalib_pedenet.scorers.base import Scorer
from anomalib_pedenet.scorers.coreset import Coreset
from anomalib_pedenet.scorers.density import MahalanobisScorer, MixtureDensityScorer
from anomalib_pedenet.scorers.faiss_index import FaissScorer
from anomalib_pedenet.scorers.gaussian_mixture import GaussianMixtureScorer
from anomalib_pedenet.scorers.local import LocalNearestNeighborScorer
from anomalib_pedenet.scorers.nearest_neighbor import MemoryBankScorer, NearestNeighborScorer
from anomalib_pedenet.scorers.one_class import OneClassSvmScorer, SvddScorer
from anomalib_pedenet.scorers.ppca import ProbabilisticPcaScorer

__all__ = [
    "SCORERS",
    "Coreset",
    "FaissScorer",
    "GaussianMixtureScorer",
    "LocalNearestNeighborScorer",
    "MahalanobisScorer",
    "MemoryBankScorer",
    "MixtureDensityScorer",
    "NearestNeighborScorer",
    "OneClassSvmScorer",
    "ProbabilisticPcaScorer",
    "Scorer",
    "SvddScorer",
    "make_scorer",
    "scorer_class",
]

SCORERS: dict[str, tuple[type[Scorer], dict[str, Any]]] = {
    "exact": (NearestNeighborScorer, {}),
    "local": (LocalNearestNeighborScorer, {}),
    "faiss_flat": (FaissScorer, {"index": "flat"}),
    "faiss_ivf": (FaissScorer, {"index": "ivf"}),
    "faiss_hnsw": (FaissScorer, {"index": "hnsw"}),
    "faiss_pq": (FaissScorer, {"index": "pq"}),
    "gaussian_mixture": (GaussianMixtureScorer, {}),
    "density": (MixtureDensityScorer, {}),
    "mahalanobis": (MahalanobisScorer, {}),
    "ppca": (ProbabilisticPcaScorer, {}),
    "ocsvm": (OneClassSvmScorer, {}),
    "svdd": (SvddScorer, {}),
}
"""Scorers by name: the class, and arguments."""


def _resolve(scorer: str | Mapping[str, Any]) -> tuple[type[Scorer], dict[str, Any]]:
    """Return a scorer's class, and the arguments that its name and ``init_args`` give.

    Raises:
        ValueError: If it is neither a known name nor the path of a scorer's class.
    """
    name: str = scorer if isinstance(scorer, str) else scorer.get("class_path", "")
    arguments: dict[str, Any] = {} if isinstance(scorer, str) else dict(scorer.get("init_args") or {})
    if name in SCORERS:
        known, given = SCORERS[name]
        return known, given | arguments
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, ValueError, TypeError):
        found = None
    if isinstance(found, type) and issubclass(found, Scorer):
        return found, arguments
    msg = (
        f"scorer must be one of {', '.join(map(repr, SCORERS))}, or a class_path (with init_args) of a subclass of "
        f"anomalib_pedenet.scorers.Scorer, got {scorer!r}."
    )
    raise ValueError(msg)


def scorer_class(scorer: str | Mapping[str, Any]) -> type[Scorer]:
    """Return the class of a scorer.

    Args:
        scorer (str | Mapping[str, Any]): See :func:`make_scorer`.

    Returns:
        type[Scorer]: Its class.

    Raises:
        ValueError: If it is neither a known name nor the path of a scorer's class.
    """
    return _resolve(scorer)[0]


def make_scorer(scorer: str | Mapping[str, Any], **options: Any) -> Scorer:  # noqa: ANN401 - arguments of any scorer
    """Make a scorer.

    Args:
        scorer (str | Mapping[str, Any]): A name in :data:`SCORERS`, or a mapping with a ``class_path`` (a name, or the
            path of a subclass of :class:`Scorer`) and ``init_args``.
        **options (Any): Arguments for it, of which it is given those that it has and ``init_args`` does not give.

    Returns:
        Scorer: The scorer, not fitted.

    Raises:
        ValueError: If the scorer is unknown, or ``init_args`` has an argument that it does not have.
        ImportError: If it needs a library that is not installed.

    Examples:
        >>> make_scorer({"class_path": "exact", "init_args": {"num_neighbors": 3}}, bank_size=100).bank_size
        100
    """
    kind, arguments = _resolve(scorer)
    known = set(inspect.signature(kind).parameters)
    unknown = set(arguments) - known
    if unknown:
        msg = (
            f"The scorer {kind.__name__} has no argument {', '.join(sorted(unknown))}; it has "
            f"{', '.join(sorted(known - {'embedding_dim', 'density_network'}))}."
        )
        raise ValueError(msg)
    return kind(**{name: value for name, value in options.items() if name in known} | arguments)
