# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Normal images as a training needs them: read in order from anomalib's data modules, refused by name, and kept."""
