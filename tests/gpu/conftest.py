# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The small data set of the integration tests."""

from tests.integration.conftest import dataset_root

__all__ = ["dataset_root"]
