# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""PEDENet (Zhang, Wang, Kuo 2021) for anomalib: anomaly localisation, trained from scratch on normal images.

Installing the package makes ``Pedenet`` one of anomalib's models; importing it does so too.

Examples:
    >>> from anomalib.models import get_model
    >>> get_model("pedenet").name
    'Pedenet'
"""

from anomalib_pedenet.host.registration import register
from anomalib_pedenet.lightning_model import Pedenet
from anomalib_pedenet.recipe import Recipe
from anomalib_pedenet.torch_model import PedenetModel

__version__ = "0.1.0"
__all__ = ["Pedenet", "PedenetModel", "Recipe", "__version__"]

register()
