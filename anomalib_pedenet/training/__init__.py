# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Training: from normal images to weights and memory bank. What Lightning calls is in ``hooks`` and ``bank_hooks``."""
