# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""anomalib's post-processor, without its loss of order.

anomalib normalises a score ``s`` to ``(s - threshold) / (max - min) + 0.5`` and clips it to 0..1. Where the threshold
lies beyond the middle of the validation scores' range, as it does where defects stand out by far, most scores below the
threshold become 0. They are no longer told apart then: on a surface, pixel AUROC fell from 0.92 to 0.72 by that alone.
"""

import torch
from anomalib.post_processing import PostProcessor


class PedenetPostProcessor(PostProcessor):
    """Thresholds and normalises as anomalib's does, and keeps the order of all scores within the validation's range.

    On the side of the threshold where anomalib's formula would leave 0..1, the scores are pressed together just enough
    to end at 0 or 1. The other side is as anomalib's; the threshold is at 0.5.
    """

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        """Normalise scores of any shape to 0..1.

        Args:
            preds (torch.Tensor | None): Scores, or ``None``.
            norm_min (torch.Tensor): Least score of the validation, scalar; NaN if there was none.
            norm_max (torch.Tensor): Greatest score of the validation, likewise.
            threshold (torch.Tensor): Score from which an image or a pixel is defective, scalar; NaN for the middle of
                the range.

        Returns:
            torch.Tensor | None: Normalised scores in the same shape; as they were if there was no validation.
        """
        if preds is None:
            return None
        threshold = torch.where(torch.isnan(threshold), (norm_max + norm_min) / 2, threshold)
        reach = torch.where(preds < threshold, threshold - norm_min, norm_max - threshold)
        value_range = torch.maximum(norm_max - norm_min, 2 * reach)
        return PostProcessor._normalize(preds, norm_max - value_range, norm_max, threshold)  # noqa: SLF001
