# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Nearest-neighbour scorers with faiss: exact, or approximate and fast on large memory banks."""

import hashlib
import logging
import math
import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch

from anomalib_pedenet.scorers.coreset import Coreset
from anomalib_pedenet.scorers.nearest_neighbor import MemoryBankScorer

logger = logging.getLogger(__name__)

# The recall is measured, and the typical score estimated, on at most this many rows of the bank.
_MEASURED_ROWS = 512

# k-means of an inverted file or a quantiser learns from at most this many rows for each centroid.
_TRAINING_ROWS = 64

_INDICES = ("flat", "ivf", "hnsw", "pq")

# Bytes of a product-quantised row, at most.
_LARGEST_CODE = 22

# Bits of a product-quantised row's codes that faiss's GPU search takes.
_GPU_CODE_BITS = (4, 5, 6, 8)

# Rounds of k-means for a product quantiser, instead of faiss's 25: it has one for each byte.
_QUANTIZER_ROUNDS = 10

# A search that is twice as wide and finds no more than this part more of the neighbours is wide enough: a quantiser may
# never find them all.
_LEAST_GAIN = 0.002

# First bytes of a serialised index: type (4 characters) and dimension (int32).
_HEADER = struct.Struct("<4si")


class FaissScorer(MemoryBankScorer):
    """Distance to the nearest rows of the memory bank, found by a faiss index.

    An inverted file is searched in as many of its cells, and a graph with as long a list of candidates, as it takes to
    find the true nearest neighbour of ``recall`` of a sample of the bank's rows (themselves left out). On CUDA devices
    the index is copied to the GPU, and takes and gives tensors without a detour. A graph stays on the CPU, and so do
    product-quantised rows whose codes are of 3 or 7 bits (fewer than 1,024 rows, and 8,192 to 16,383), for which faiss
    has no GPU search.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        bank_size (float): Largest number of rows of the bank, or below 1 a fraction. Defaults to ``5_000``.
        coreset (Coreset): How they are chosen, see :class:`MemoryBankScorer`. Defaults to ``"auto"``.
        seed (int): Seed of that choice. Defaults to ``0``.
        index (str): ``"flat"`` (exact), ``"ivf"`` (inverted file), ``"hnsw"`` (graph), ``"pq"`` (inverted
            file of product-quantised rows, a small bank) or a string for ``faiss.index_factory``.
            Defaults to ``"ivf"``.
        num_neighbors (int): Number k of nearest rows whose mean distance is the score; all rows if the bank has fewer.
            Defaults to ``1``.
        recall (float): Part of the nearest neighbours that are to be found, in (0, 1]. Defaults to ``0.95``.
        all_gpus (bool): On CUDA devices, whether the rows are divided among all GPUs instead of lying on the model's.
            Product-quantised rows are small, and always lie on the model's. Defaults to ``False``.

    Raises:
        ImportError: If faiss is not installed; the message names the extra that brings it.
        ValueError: If an argument is outside its range.
    """

    exportable: ClassVar[bool] = False
    index_bytes: torch.Tensor
    digest: torch.Tensor

    def __init__(
        self,
        embedding_dim: int = 64,
        bank_size: float = 5_000,
        coreset: Coreset = "auto",
        seed: int = 0,
        index: str = "ivf",
        num_neighbors: int = 1,
        recall: float = 0.95,
        all_gpus: bool = False,
    ) -> None:
        super().__init__(embedding_dim, bank_size, coreset, seed, num_neighbors)
        faiss = _import_faiss()
        if not 0 < recall <= 1:
            msg = f"recall must be above 0 and at most 1, got {recall}."
            raise ValueError(msg)
        if index not in _INDICES:
            try:
                faiss.index_factory(embedding_dim, index)
            except RuntimeError as error:
                names = ", ".join(map(repr, _INDICES))
                msg = f"index must be one of {names}, or a string for faiss.index_factory, got {index!r}."
                raise ValueError(msg) from error
        self.index = index
        self.recall = recall
        self.all_gpus = all_gpus
        self.register_buffer("index_bytes", torch.zeros(0, dtype=torch.uint8))  # the serialised index, on the CPU
        self.register_buffer("digest", torch.zeros(0, dtype=torch.uint8))  # their SHA-256, on the CPU
        # Bytes, device and index of the last use, and the device that searches it.
        self._loaded: tuple[torch.Tensor, torch.device, Any, torch.device] | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether there is an index."""
        return len(self.index_bytes) > 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - of torch
        self.index_bytes = self.index_bytes.clone()  # a tensor that NumPy has seen cannot be resized
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "FaissScorer":
        """Apply ``fn`` to all buffers but the bytes, which are of no use on another device."""
        kept = self.index_bytes, self.digest
        super()._apply(fn, recurse)
        self.index_bytes, self.digest = kept
        return self

    def _set_bank(self, rows: torch.Tensor) -> torch.Tensor:
        faiss = _import_faiss()
        rows = rows.cpu().contiguous()
        index = faiss.index_factory(self.embedding_dim, self._factory(len(rows)))
        _prepare_clustering(faiss, index, self.seed)
        index.train(rows)
        index.add(rows)
        typical = self._tune(faiss, index, rows)
        self.index_bytes = torch.from_numpy(faiss.serialize_index(index)).clone()  # a buffer must own its memory
        self.digest = _digest(self.index_bytes)
        return typical

    def _factory(self, num_rows: int) -> str:
        """Return the string for ``faiss.index_factory`` that suits a bank of ``num_rows`` rows."""
        # With fewer rows there is nothing to learn two cells from, or the eight values that faiss's arithmetic needs.
        smallest = {"ivf": 2 * _TRAINING_ROWS, "pq": 8 * _TRAINING_ROWS}.get(self.index, 0)
        if self.index == "flat" or num_rows < smallest:
            return "Flat"
        cells = f"IVF{min(int(4 * num_rows**0.5), num_rows // _TRAINING_ROWS)}"
        if self.index == "ivf":
            return f"{cells},Flat"
        if self.index == "hnsw":
            return "HNSW32,Flat"
        if self.index == "pq":
            # A byte for each of the parts, equally long and of 2 dimensions or more: 22 bytes for 64 and a position.
            limit = max(1, min(_LARGEST_CODE, self.embedding_dim // 2))
            parts = max(n for n in range(1, limit + 1) if self.embedding_dim % n == 0)
            return f"{cells},PQ{parts}x{min(8, int(math.log2(num_rows / _TRAINING_ROWS)))}"
        return self.index

    def _tune(self, faiss: ModuleType, index: Any, rows: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - faiss has no types
        """Search as widely as ``recall`` needs, and return the typical score: that of rows against the others."""
        if len(rows) < 2:
            return torch.tensor(torch.nan)
        queries = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _MEASURED_ROWS)).long()]
        exact, _ = faiss.knn(queries, rows, 2)  # the first is the row itself

        def found() -> tuple[float, torch.Tensor]:
            squared, labels = index.search(queries, 2)
            # By the distance to the row that was found, which a quantiser only estimates, from the row itself.
            reached = (rows[labels[:, 1].clamp(min=0)] - queries).square().sum(dim=1)
            is_found = (labels[:, 1] >= 0) & (reached <= exact[:, 1] * (1 + 1e-4) + 1e-9)
            return is_found.float().mean().item(), squared[labels[:, 1] >= 0, 1]

        space = faiss.ParameterSpace()
        name, width, widest = _search_width(faiss, index)
        recall, squared = found()
        gain = 1.0
        while name and recall < self.recall and width < widest and gain > _LEAST_GAIN:
            width = min(2 * width, widest)
            space.set_index_parameter(index, name, width)
            before = recall
            recall, squared = found()
            gain = recall - before
        logger.info("faiss index %s: recall %.3f%s.", self.index, recall, f" with {name} {width}" if name else "")
        if name and recall < self.recall:
            logger.warning(
                "The faiss index %s finds the nearest neighbour in %.1f %% of searches, hardly more if wider.",
                self.index,
                100 * recall,
            )
        return squared.clamp(min=0).sqrt().mean()

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return each embedding's distance to the nearest row that is found (the mean distance to the k nearest).

        Args:
            embeddings (torch.Tensor): Embeddings ``[..., Z]``.

        Returns:
            torch.Tensor: Distances ``[...]`` in embedding units, float32.

        Raises:
            ValueError: If the index was damaged, or is not one of this scorer.
        """
        faiss = _import_faiss()
        index, device = self._index(faiss, embeddings.device)
        queries = embeddings.detach().float().reshape(-1, self.embedding_dim).to(device).contiguous()
        count = min(self.num_neighbors, index.ntotal)
        squared, labels = index.search(queries, count)
        is_missing = labels < 0  # fewer rows than asked for in the cells that were searched
        if bool(is_missing.any()):
            nearest = squared[:, :1]
            squared = torch.where(is_missing, nearest, squared)
            lost = is_missing[:, 0]
            squared[lost] = self._search_everywhere(faiss, queries[lost].cpu(), count).to(squared.device)
        distances = squared.clamp(min=0).sqrt().mean(dim=1)
        return distances.to(embeddings.device).reshape(embeddings.shape[:-1])

    def _search_everywhere(self, faiss: ModuleType, queries: torch.Tensor, count: int) -> torch.Tensor:
        """Return the squared distances ``[N, k]`` of queries that found nothing, searching as widely as possible."""
        index = faiss.deserialize_index(self.index_bytes.numpy())
        name, _, widest = _search_width(faiss, index)
        if name:
            faiss.ParameterSpace().set_index_parameter(index, name, widest)
        return index.search(queries, count)[0]

    def _index(self, faiss: ModuleType, device: torch.device) -> tuple[Any, torch.device]:
        """Return the index and the device it searches on.

        Raises:
            ValueError: If the bytes are damaged, or are not an index of this scorer.
        """
        if self._loaded is None or self._loaded[0] is not self.index_bytes or self._loaded[1] != device:
            check_index_bytes(self.index_bytes, self.digest, self.embedding_dim)
            index = faiss.deserialize_index(self.index_bytes.numpy())
            searched_on = torch.device("cpu")
            if device.type == "cuda" and not stays_on_cpu(faiss, index):
                index, searched_on = _to_gpus(faiss, index, device, self.all_gpus), device
            self._loaded = (self.index_bytes, device, index, searched_on)
        return self._loaded[2:]


def check_index_bytes(index_bytes: torch.Tensor, digest: torch.Tensor, embedding_dim: int) -> None:
    """Check the bytes of a serialised index before faiss reads them.

    Args:
        index_bytes (torch.Tensor): The bytes, uint8.
        digest (torch.Tensor): SHA-256 of the bytes that were saved, uint8 ``[32]``.
        embedding_dim (int): Dimension that the index must have.

    Raises:
        ValueError: If they are not the bytes that were saved, or not those of an index of that dimension.
    """
    remedy = "copy the checkpoint again from its source, or build the memory bank anew by training."
    if not torch.equal(_digest(index_bytes), digest):
        msg = f"The faiss index in the checkpoint is damaged: its checksum does not fit its bytes; {remedy}"
        raise ValueError(msg)
    kind, dimension = _HEADER.unpack(index_bytes[: _HEADER.size].numpy().tobytes().ljust(_HEADER.size, b"\0"))
    if kind[:1] != b"I" or dimension != embedding_dim:
        msg = (
            f"The checkpoint holds no faiss index of dimension {embedding_dim} (found {kind!r}, {dimension}); {remedy}"
        )
        raise ValueError(msg)


def stays_on_cpu(faiss: ModuleType, index: Any) -> bool:  # noqa: ANN401
    """Return whether faiss cannot search an index on a GPU.

    Args:
        faiss (ModuleType): The module faiss.
        index (Any): An index.

    Returns:
        bool: True for a graph, and for product-quantised rows with codes of other lengths than the GPU search takes.
    """
    index = _behind_transform(faiss, index)
    return _is_graph(faiss, index) or (isinstance(index, faiss.IndexIVFPQ) and index.pq.nbits not in _GPU_CODE_BITS)


def _digest(index_bytes: torch.Tensor) -> torch.Tensor:
    """Return the SHA-256 of bytes as a tensor ``[32]``."""
    return torch.tensor(list(hashlib.sha256(index_bytes.numpy()).digest()), dtype=torch.uint8)


def _import_faiss() -> ModuleType:
    """Return faiss, which then takes tensors.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import faiss
        import faiss.contrib.torch_utils
    except ImportError as error:
        msg = (
            "This scorer needs faiss: pip install 'anomalib-pedenet[faiss]' (or 'anomalib-pedenet[faiss-gpu]' on Linux "
            "with CUDA), or use the scorer 'exact'."
        )
        raise ImportError(msg) from error
    return faiss


def _behind_transform(faiss: ModuleType, index: Any) -> Any:  # noqa: ANN401
    """Return the index that searches, behind a transform of the embeddings if there is one."""
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _prepare_clustering(faiss: ModuleType, index: Any, seed: int) -> None:  # noqa: ANN401
    """Seed the k-means of an inverted file or a product quantiser, and bound its work."""
    index = _behind_transform(faiss, index)
    clusterings = [index.cp] if isinstance(index, faiss.IndexIVF) else []
    if isinstance(index, faiss.IndexPQ | faiss.IndexIVFPQ):
        clusterings.append(index.pq.cp)
        index.pq.cp.niter = _QUANTIZER_ROUNDS
    for clustering in clusterings:
        clustering.seed = seed + 1
        clustering.max_points_per_centroid = _TRAINING_ROWS


def _search_width(faiss: ModuleType, index: Any) -> tuple[str, int, int]:  # noqa: ANN401
    """Return what says how widely an index is searched: the parameter's name ("" if none), value and largest value."""
    index = _behind_transform(faiss, index)
    if isinstance(index, faiss.IndexIVF):
        return "nprobe", index.nprobe, index.nlist
    if _is_graph(faiss, index):
        return "efSearch", index.hnsw.efSearch, 2048
    return "", 0, 0


def _is_graph(faiss: ModuleType, index: Any) -> bool:  # noqa: ANN401
    return isinstance(index, faiss.IndexHNSW)


def _to_gpus(faiss: ModuleType, index: Any, device: torch.device, all_gpus: bool) -> Any:  # noqa: ANN401
    """Return a copy of an index on a GPU, or with its rows divided among all GPUs.

    Raises:
        ImportError: If the installed faiss has no GPU support.
    """
    if not hasattr(faiss, "StandardGpuResources"):
        msg = "The installed faiss has no GPU support: pip install 'anomalib-pedenet[faiss-gpu]' in place of faiss-cpu."
        raise ImportError(msg)
    if isinstance(index, faiss.IndexIVFPQ):
        # faiss's own copy keeps the rows in a layout that takes codes of 8 bits alone, and few numbers of them.
        config = faiss.GpuIndexIVFPQConfig()
        config.device = device.index or 0
        config.interleavedLayout = True
        return faiss.GpuIndexIVFPQ(faiss.StandardGpuResources(), index, config)
    if all_gpus:
        options = faiss.GpuMultipleClonerOptions()
        options.shard = True
        return faiss.index_cpu_to_all_gpus(index, options)
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
