# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""After the training: inspect folders of images, see why they are flagged, and correct the model without training.

Start with :class:`Inspector`. :func:`mask_checkpoint` hides all but a region, :func:`calibrate_checkpoint` keeps a
rate of false alarms, :func:`teach_checkpoint` takes for good what was flagged wrongly, and :func:`undo_edit` takes them
back. The command ``anomalib-pedenet`` (:mod:`anomalib_pedenet.aftercare.command`) does the same.
"""

from anomalib_pedenet.aftercare.calibration import Calibration, calibrate_checkpoint
from anomalib_pedenet.aftercare.edits import undo_edit
from anomalib_pedenet.aftercare.exported import set_export_thresholds
from anomalib_pedenet.aftercare.inspection import Inspection
from anomalib_pedenet.aftercare.inspector import Inspector
from anomalib_pedenet.aftercare.masking import Masking, mask_checkpoint
from anomalib_pedenet.aftercare.report import write_report
from anomalib_pedenet.aftercare.teaching import Lesson, teach_checkpoint

__all__ = [
    "Calibration",
    "Inspection",
    "Inspector",
    "Lesson",
    "Masking",
    "calibrate_checkpoint",
    "mask_checkpoint",
    "set_export_thresholds",
    "teach_checkpoint",
    "undo_edit",
    "write_report",
]
