# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What makes stock anomalib and Lightning work with the model: names, loops, checkpoints and exports."""
