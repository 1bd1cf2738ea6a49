# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The joint loss of PEDENet (Eqs. 8 to 11), a floor under the embeddings' spread, defect prediction, and compactness.

``L = lambda_1 L_DEN + lambda_2 L_LPN + lambda_3 L_reg`` (Eq. 8): the negative log density of the embeddings under the
mixture of their batch, the cross-entropy of location prediction, and a regulariser that keeps the covariances away
from singular ones.

L_DEN and L_reg are left out of default trainings (``lambda_den`` is 0). They fall as all embeddings draw together,
those of defects too, and no weight that was tried finds more defects.

``+ lambda_var L_var`` is not in the paper. While location prediction is still at chance, as it is for long on uniform
textures, its loss is lowest when all embeddings are equal, so it drives them there and never learns. VICReg's variance
term forbids that, and is zero wherever the embeddings spread by themselves.

``+ lambda_syn L_syn`` is not in the paper either: it asks the embeddings to tell patches with a drawn defect from those
without (:mod:`anomalib_pedenet.training.synthetic_defects`), which gives surfaces something to learn. It counts as far
as location prediction fails: where that has learned to tell places apart, drawn defects have little to add, and
distract.

``+ lambda_svdd L_SVDD'`` is what Patch-SVDD, the paper's closest relative, has in place of L_DEN: patches of nearly the
same place are to have the same embedding. It is there to compare with (0 by default).

Reference:
    PEDENet, https://arxiv.org/abs/2110.15525, section 3.3.
    A. Bardes, J. Ponce, Y. LeCun, "VICReg", ICLR 2022, https://arxiv.org/abs/2105.04906, Eq. 1 (L_var).
    J. Yi, S. Yoon, "Patch SVDD", ACCV 2020, https://arxiv.org/abs/2006.16067 (L_SVDD').
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pedenet.mixture import CovarianceType, GaussianMixture, estimate_mixture, log_density

DensityLossType = Literal["dagmm", "paper"]


def density_loss(log_densities: torch.Tensor, reading: DensityLossType = "dagmm") -> torch.Tensor:
    """Density estimation loss L_DEN (Eq. 9), in either reading.

    As printed, Eq. 9 is ``-(1/N) log sum_i P(z_i)``, the logarithm of the sum. DAGMM, which the paper follows, has
    ``-(1/N) sum_i log P(z_i)``, the mean negative log likelihood.

    Args:
        log_densities (torch.Tensor): log P(z) of a batch in nats, ``[N]``.
        reading (DensityLossType): ``"dagmm"`` for the sum of logarithms, ``"paper"`` for the logarithm of the sum.

    Returns:
        torch.Tensor: Scalar loss in nats.

    Raises:
        ValueError: If ``reading`` is unknown.
    """
    if reading == "dagmm":
        return -log_densities.mean()
    if reading == "paper":
        return -torch.logsumexp(log_densities, dim=0) / len(log_densities)
    msg = f"The reading of Eq. 9 must be 'dagmm' or 'paper', got {reading!r}."
    raise ValueError(msg)


def location_loss(logits: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Location prediction loss L_LPN (Eq. 10): cross-entropy over the eight neighbours.

    Args:
        logits (torch.Tensor): Output of the LP network, ``[N, 8]``.
        directions (torch.Tensor): True neighbour of each pair, ``[N]``, int64 in 0..7.

    Returns:
        torch.Tensor: Scalar loss in nats.
    """
    return F.cross_entropy(logits, directions)


def covariance_regularization(mixture: GaussianMixture) -> torch.Tensor:
    """Regularisation loss L_reg (Eq. 11): the sum of the inverse variances of all components and dimensions.

    Args:
        mixture (GaussianMixture): Mixture estimated from a batch.

    Returns:
        torch.Tensor: Scalar loss, in inverse squared embedding units.
    """
    return mixture.variances.reciprocal().sum()


def variance_loss(embeddings: torch.Tensor, min_std: float) -> torch.Tensor:
    """Variance loss L_var (VICReg, Eq. 1): how far the embeddings' standard deviations fall short of a floor.

    Args:
        embeddings (torch.Tensor): Embeddings of a batch, ``[N, Z]``.
        min_std (float): Floor of each dimension's standard deviation, in embedding units.

    Returns:
        torch.Tensor: Scalar loss, the mean shortfall over the dimensions; 0 if none is below the floor.
    """
    # The small constant keeps the gradient of the root finite where all embeddings are equal.
    return F.relu(min_std - (embeddings.var(dim=0) + 1e-4).sqrt()).mean()


def compactness_loss(embeddings: torch.Tensor, jittered: torch.Tensor) -> torch.Tensor:
    """Compactness loss L_SVDD' of Patch-SVDD: the mean distance of patches from nearly the same ones.

    Args:
        embeddings (torch.Tensor): Embeddings f(p_i) of patches, ``[M, Z]``.
        jittered (torch.Tensor): Embeddings f(p_i') of patches a pixel or two away, ``[M, Z]``.

    Returns:
        torch.Tensor: Scalar loss in embedding units.
    """
    return torch.linalg.vector_norm(embeddings - jittered, dim=1).mean()


MIN_CLASS_SHARE = 0.02
"""The rarer class weighs in L_syn as if it had at least this share: a handful of patches must not make a step."""


def defect_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Synthetic-defect loss L_syn: binary cross-entropy, with both classes of equal weight.

    Args:
        logits (torch.Tensor): Output of the defect prediction network, ``[N]``.
        labels (torch.Tensor): 1 for patches with a drawn defect, else 0, float ``[N]``.

    Returns:
        torch.Tensor: Scalar loss in nats; log 2 is chance.
    """
    share = labels.mean().clamp(MIN_CLASS_SHARE, 1 - MIN_CLASS_SHARE)
    weights = torch.where(labels > 0, 0.5 / share, 0.5 / (1 - share))
    return F.binary_cross_entropy_with_logits(logits, labels, weights)


def share_to_learn(location: torch.Tensor) -> torch.Tensor:
    """Return how far location prediction is from having learned all: ``min(1, L_LPN / log 8)^2``.

    Args:
        location (torch.Tensor): L_LPN of the step in nats, scalar.

    Returns:
        torch.Tensor: Scalar from 0, where location prediction is perfect, to 1, where it is at chance; detached.
    """
    return (location.detach() / math.log(8)).clamp(max=1.0).square()


class LossTerms(NamedTuple):
    """The weighted sum of one step and its unweighted terms, each a scalar tensor."""

    total: torch.Tensor
    density: torch.Tensor
    location: torch.Tensor
    regularization: torch.Tensor
    variance: torch.Tensor
    synthetic: torch.Tensor
    compactness: torch.Tensor


class PedenetLoss(nn.Module):
    """Joint loss of PEDENet (Eq. 8), with the variance, synthetic-defect and compactness losses added.

    The defaults are nearer to the paper than those of :class:`anomalib_pedenet.Recipe`.

    Args:
        lambda_den (float): Weight lambda_1 of L_DEN; 0 leaves the term out (Table 4, "L_LPN only").
        lambda_lpn (float): Weight lambda_2 of L_LPN; 0 leaves the term out (Table 4, "L_DEN only").
        lambda_reg (float): Weight lambda_3 of L_reg, which is left out with L_DEN.
        reading (DensityLossType): Reading of Eq. 9, see :func:`density_loss`.
        covariance_type (CovarianceType): Covariances of the mixture, ``"diag"`` or ``"full"``.
        covariance_jitter (float): Added to the covariances' diagonals.
        lambda_var (float): Weight of L_var; 0 leaves the term out, as in the paper.
        min_std (float): Floor of L_var, see :func:`variance_loss`.
        lambda_syn (float): Weight of L_syn, see :func:`defect_loss`, times :func:`share_to_learn` unless L_LPN is
            left out; 0 leaves the term out, as in the paper.
        lambda_svdd (float): Weight of Patch-SVDD's L_SVDD', see :func:`compactness_loss`; 0 leaves the term out.

    Examples:
        >>> loss = PedenetLoss(lambda_den=0.0, lambda_var=0.0)
        >>> embeddings, responsibilities = torch.randn(16, 64), torch.full((16, 2), 0.5)
        >>> terms = loss(embeddings, responsibilities, torch.zeros(4, 8), torch.arange(4))
        >>> round(terms.total.item(), 4)  # log 8
        2.0794
    """

    def __init__(
        self,
        lambda_den: float = 1e-4,
        lambda_lpn: float = 1.0,
        lambda_reg: float = 1e-7,
        reading: DensityLossType = "dagmm",
        covariance_type: CovarianceType = "diag",
        covariance_jitter: float = 1e-3,
        lambda_var: float = 1.0,
        min_std: float = 0.25,
        lambda_syn: float = 0.0,
        lambda_svdd: float = 0.0,
    ) -> None:
        super().__init__()
        self.lambda_den = lambda_den
        self.lambda_lpn = lambda_lpn
        self.lambda_reg = lambda_reg
        self.reading = reading
        self.covariance_type = covariance_type
        self.covariance_jitter = covariance_jitter
        self.lambda_var = lambda_var
        self.min_std = min_std
        self.lambda_syn = lambda_syn
        self.lambda_svdd = lambda_svdd

    @property
    def shown_terms(self) -> list[str]:
        """Short names of the terms that are worth watching, of those that count: location, defects, density."""
        weights = {"lpn": self.lambda_lpn, "syn": self.lambda_syn, "den": self.lambda_den, "reg": self.lambda_den}
        return [name for name, weight in weights.items() if weight > 0]

    def effective_lambda_syn(self, location: torch.Tensor) -> float | torch.Tensor:
        """Return the weight that L_syn has beside a location prediction loss.

        Args:
            location (torch.Tensor): L_LPN of the step in nats, scalar.

        Returns:
            float | torch.Tensor: ``lambda_syn`` times :func:`share_to_learn`, or ``lambda_syn`` if L_LPN is left out.
        """
        return self.lambda_syn * (share_to_learn(location) if self.lambda_lpn > 0 else 1.0)

    def forward(
        self,
        embeddings: torch.Tensor,
        responsibilities: torch.Tensor | None,
        logits: torch.Tensor,
        directions: torch.Tensor,
        density_scale: float | torch.Tensor = 1.0,
        defect_logits: torch.Tensor | None = None,
        defect_labels: torch.Tensor | None = None,
        jittered: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> LossTerms:
        """Compute the joint loss of one scale.

        Args:
            embeddings (torch.Tensor): Embeddings for the density, ``[N, Z]``.
            responsibilities (torch.Tensor | None): Output of the DE network for them, ``[N, K]``. Needed if
                ``lambda_den`` is above 0.
            logits (torch.Tensor): Output of the LP network for M pairs, ``[M, 8]``.
            directions (torch.Tensor): True neighbours of the pairs, ``[M]``, int64 in 0..7.
            density_scale (float | torch.Tensor): Factor on lambda_1 and lambda_3, in [0, 1], for their warm-up.
            defect_logits (torch.Tensor | None): Output of the defect prediction network for D patches, ``[D]``.
                Needed, with the labels, if ``lambda_syn`` is above 0.
            defect_labels (torch.Tensor | None): 1 for patches with a drawn defect, else 0, float ``[D]``.
            jittered (tuple[torch.Tensor, torch.Tensor] | None): Embeddings of pairs of nearly the same patch,
                ``[M, Z]`` each. Needed if ``lambda_svdd`` is above 0.

        Returns:
            LossTerms: Weighted total and unweighted terms. A term whose weight is 0 is 0.

        Raises:
            ValueError: If the weight of a term is above 0 that lacks what it needs: ``lambda_den``, ``lambda_syn`` or
                ``lambda_svdd``.
        """
        zero = embeddings.new_zeros(())
        location = location_loss(logits.float(), directions) if self.lambda_lpn > 0 else zero
        density = regularization = zero
        # The statistics divide by small variances: the products that autocast makes in bfloat16 would not do.
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.float()
            variance = variance_loss(embeddings, self.min_std) if self.lambda_var > 0 else zero
            if self.lambda_den > 0:
                if responsibilities is None:
                    msg = "lambda_den is above 0, but there is no mixture: pass responsibilities."
                    raise ValueError(msg)
                shares = responsibilities.float()
                mixture = estimate_mixture(embeddings, shares, self.covariance_type, self.covariance_jitter)
                density = density_loss(log_density(embeddings, mixture), self.reading)
                regularization = covariance_regularization(mixture)
        synthetic = zero
        if self.lambda_syn > 0:
            if defect_logits is None or defect_labels is None:
                msg = "lambda_syn is above 0, but there are no drawn defects: pass defect_logits and defect_labels."
                raise ValueError(msg)
            synthetic = defect_loss(defect_logits.float(), defect_labels)
        compactness = zero
        if self.lambda_svdd > 0:
            if jittered is None:
                msg = "lambda_svdd is above 0, but there are no pairs of nearly the same patch: pass jittered."
                raise ValueError(msg)
            compactness = compactness_loss(jittered[0].float(), jittered[1].float())
        total = (
            self.lambda_lpn * location
            + density_scale * (self.lambda_den * density + self.lambda_reg * regularization)
            + self.lambda_var * variance
            + self.effective_lambda_syn(location) * synthetic
            + self.lambda_svdd * compactness
        )
        return LossTerms(total, density, location, regularization, variance, synthetic, compactness)
