# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The loss of a training step: from images to the joint loss of all scales, on a GPU by a CUDA graph.

A step is some two thousand small operations, which a GPU makes in a fraction of the time that the host takes to launch
them. What follows the drawing of crops and defects is the same in every step, so it is recorded once, with its
gradients, and launched as a whole from then on.

Reference:
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from anomalib_pedenet.argument_checks import TrainPrecision
from anomalib_pedenet.loss import PedenetLoss
from anomalib_pedenet.torch_model import PedenetModel
from anomalib_pedenet.training.sampling import EmbeddingSample, draw_views, sample_dense, sample_patches

logger = logging.getLogger(__name__)


class TrainingStep:
    """Computes the loss of a step from the images to draw from.

    Args:
        model (PedenetModel): Model to train.
        loss (PedenetLoss): Loss of one scale.
        hparams (Mapping[str, Any]): Hyper-parameters of :class:`anomalib_pedenet.Pedenet`.
        records (bool): Whether to record a CUDA graph in the first step, where the device and the loss allow it.

    Examples:
        >>> from anomalib_pedenet import Pedenet
        >>> pedenet = Pedenet(lambda_syn=0.0)
        >>> step = TrainingStep(pedenet.model, pedenet.loss, pedenet.hparams, records=False)
        >>> loss, metrics = step(torch.randn(2, 3, 128, 128), density_scale=1.0)
        >>> loss.requires_grad, "loss_lpn_64" in metrics
        (True, True)
    """

    def __init__(
        self,
        model: PedenetModel,
        loss: PedenetLoss,
        hparams: Mapping[str, Any],
        records: bool,
    ) -> None:
        self._hparams = hparams
        self._region = model.region
        self._positions: tuple[torch.Size, torch.Tensor] | None = None  # of crops, for images of some size
        self._joint = _JointLoss(model, loss, hparams)
        # Full covariances may be singular, and the host asks whether they are.
        is_safe = hparams["lambda_den"] == 0 or hparams["covariance_type"] == "diag"
        self._records = records and hparams["training_mode"] == "dense" and is_safe

    def __call__(
        self, images: torch.Tensor, density_scale: float, precision: TrainPrecision = "float32"
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Draw patches and compute their loss.

        Args:
            images (torch.Tensor): Standardised images ``[B, C, H, W]``.
            density_scale (float): Factor on L_DEN and L_reg, in [0, 1].
            precision (str): ``"float32"`` or ``"bfloat16"`` (autocast), of the networks. A CUDA graph keeps that of its
                first step. Defaults to ``"float32"``.

        Returns:
            tuple[torch.Tensor, dict[str, torch.Tensor]]: Loss of all scales, and detached scalars to report.

        Raises:
            ValueError: If the images are too small, or a covariance is not positive definite.
        """
        hparams = self._hparams
        self._joint.uses_bfloat16 = precision == "bfloat16"
        scale = torch.full((), density_scale, device=images.device)
        disturbance = {"color_shift": hparams["color_shift"], "noise": hparams["noise"]}
        if hparams["training_mode"] == "patchwise":
            with self._joint.precision(images.device):
                samples = sample_patches(
                    self._joint.embedding_network,
                    images,
                    self._joint.patch_sizes,
                    **self._joint.drawn,
                    **disturbance,
                )
                total, values = self._joint.of_samples(samples, scale)
        else:
            views, masks = draw_views(
                images,
                hparams["crops_per_step"],
                hparams["crop_size"],
                with_defects=hparams["lambda_syn"] > 0,
                positions=self._crop_positions(images.shape[-2:]),
                **disturbance,
            )
            if self._records and images.is_cuda and not torch.is_autocast_enabled("cuda"):
                self._records = False
                self._record(views, masks, scale)
            total, values = self._joint(views, masks, scale)
        # A graph writes its results to the same memory each time.
        return total, dict(zip(self._joint.names, values.clone().unbind(), strict=True))

    def _crop_positions(self, size: torch.Size) -> torch.Tensor | None:
        """Return where crops of images of some height and width may lie; ``None`` for anywhere."""
        if self._region.is_everywhere:
            return None
        if self._positions is None or self._positions[0] != size:
            crop = (min(self._hparams["crop_size"], size[0]), min(self._hparams["crop_size"], size[1]))
            self._positions = (size, self._region.crop_positions((size[0], size[1]), crop))
        return self._positions[1]

    def _record(self, *inputs: torch.Tensor) -> None:
        """Replace the joint loss of drawn views, and its gradients, by a CUDA graph."""
        state = [buffer.clone() for buffer in self._joint.buffers()]
        try:
            with torch.random.fork_rng([inputs[0].device]):
                torch.cuda.make_graphed_callables(self._joint, inputs, allow_unused_input=True)
        except RuntimeError as error:
            logger.warning("Training steps could not be recorded as a CUDA graph and take longer: %s", error)
        else:
            logger.info("Training steps are recorded as a CUDA graph.")
        # Recording makes some steps to warm up: running averages must not remember them.
        for buffer, value in zip(self._joint.buffers(), state, strict=True):
            buffer.copy_(value)


class _JointLoss(nn.Module):
    """The loss of drawn views over all scales: whatever of a step is the same each time.

    Args:
        model (PedenetModel): Model to train.
        loss (PedenetLoss): Loss of one scale.
        hparams (Mapping[str, Any]): Hyper-parameters.

    Attributes:
        uses_bfloat16 (bool): Whether the networks compute in bfloat16 (autocast).
    """

    def __init__(self, model: PedenetModel, loss: PedenetLoss, hparams: Mapping[str, Any]) -> None:
        super().__init__()
        self.embedding_network = model.embedding_network
        self.density_networks = model.density_networks
        self.location_networks = model.location_networks
        self.defect_networks = model.defect_networks
        self.loss = loss
        self.patch_sizes = model.patch_sizes
        self.drawn = {
            "num_patches": hparams["patches_per_step"],
            "num_pairs": hparams["pairs_per_step"],
            "with_jitter": hparams["lambda_svdd"] > 0,
        }
        self.uses_bfloat16 = False
        # Patch by patch the small encoder's weights are used several times in a step; and a graph must not keep them.
        self._keeps_casts = hparams["training_mode"] == "patchwise"
        scalars = ("loss_den", "loss_lpn", "loss_reg", "loss_var", "loss_syn", "loss_svdd", "lp_accuracy", "spread")
        self.names = ["train_loss", *(f"{name}_{size}" for size in self.patch_sizes for name in scalars)]

    def precision(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Return the context in which the networks are to compute."""
        if self.uses_bfloat16:
            return torch.autocast(device.type, torch.bfloat16, cache_enabled=self._keeps_casts)
        return contextlib.nullcontext()

    def forward(
        self, views: torch.Tensor, masks: torch.Tensor, density_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of views, see :func:`.sampling.draw_views`, and the scalars to report."""
        with self.precision(views.device):
            samples = sample_dense(self.embedding_network, views, masks, self.patch_sizes, **self.drawn)
            return self.of_samples(samples, density_scale)

    def of_samples(
        self, samples: Mapping[int, EmbeddingSample], density_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of embeddings, and the scalars to report in the order of ``names``."""
        total = torch.zeros((), device=density_scale.device)
        scalars: list[torch.Tensor] = []
        for size, sample in samples.items():
            logits = self.location_networks[str(size)](sample.centers, sample.neighbors)
            has_density = self.loss.lambda_den > 0
            has_defects = sample.defect_embeddings is not None
            terms = self.loss(
                sample.embeddings,
                self.density_networks[str(size)](sample.embeddings) if has_density else None,
                logits,
                sample.directions,
                density_scale=density_scale,
                defect_logits=self.defect_networks[str(size)](sample.defect_embeddings)[:, 0] if has_defects else None,
                defect_labels=sample.defect_labels,
                jittered=sample.jittered,
            )
            total = total + terms.total
            scalars += [
                terms.density,
                terms.location,
                terms.regularization,
                terms.variance,
                terms.synthetic,
                terms.compactness,
                (logits.argmax(dim=-1) == sample.directions).float().mean(),
                sample.embeddings.float().std(dim=0).mean(),
            ]
        return total, torch.stack([total, *scalars]).detach()
