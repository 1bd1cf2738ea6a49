# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Scorers: how abnormal is an embedding, given the embeddings of normal patches?"""

from anomalib_pedenet.scorers.base import Scorer
from anomalib_pedenet.scorers.nearest_neighbor import NearestNeighborScorer

__all__ = ["NearestNeighborScorer", "Scorer"]
