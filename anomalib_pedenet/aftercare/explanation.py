# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Why an image scores as it does: the patch that decided, and the normal patch that is nearest to it."""

from pathlib import Path

import torch
from tqdm import tqdm

from anomalib_pedenet.aftercare.images import PreparedImages, as_seen
from anomalib_pedenet.aftercare.inspection import Box, Explanation
from anomalib_pedenet.anomaly_map import averaging_matrix
from anomalib_pedenet.data.normal_images import spread
from anomalib_pedenet.torch_model import PedenetModel

# Normal images that are searched: their patches take 100 MiB in half precision, of 256x256 px and at four scales.
_MOST_IMAGES = 256

# Patches of the same place lie so far apart at most, in steps of the stride.
_NEAR = 1

# Patches that are compared with others together.
_CHUNK = 2**15

# Normal patches from which the usual distance to the nearest patch of another image is learned.
_USUAL_PATCHES = 256


class NormalPatches:
    """All patches of normal images, to be searched for the one nearest to a patch.

    Args:
        model (PedenetModel): A fitted model, without a tiler.
        images (PreparedImages): Normal images, two or more. Of more than 256 as many are taken, evenly spread.

    Raises:
        ValueError: If there are fewer images, or the model scores tiles.
    """

    @torch.no_grad()
    def __init__(self, model: PedenetModel, images: PreparedImages) -> None:
        if len(images) < 2:
            msg = f"To say what is normal takes two normal images or more, got {len(images)}."
            raise ValueError(msg)
        if model.tiler is not None:
            msg = "Tiles have no place in the image, so that no patch can be shown in it: leave normal images out."
            raise ValueError(msg)
        self._model = model
        self._images = images.take(spread(len(images), _MOST_IMAGES))
        rows: dict[int, list[torch.Tensor]] = {size: [] for size in model.scale_shares}
        sources: dict[int, list[torch.Tensor]] = {size: [] for size in model.scale_shares}
        for index, image in enumerate(tqdm(self._images, "Reading normal images", disable=None)):
            for size, patches in model.patch_scores(image):
                _, height, width, _ = patches.embeddings.shape
                rows[size].append(patches.embeddings[0].flatten(0, 1).half())
                places = torch.cartesian_prod(torch.tensor([index]), torch.arange(height), torch.arange(width))
                sources[size].append(places.to(image.device))
        self._rows = {size: torch.cat(parts) for size, parts in rows.items()}  # [R, Z]
        self._sources = {size: torch.cat(parts) for size, parts in sources.items()}  # [R, 3]: image, row, column
        self._usual: dict[int, float] = {}

    @torch.no_grad()
    def explain(self, image: torch.Tensor, file: Path | None = None) -> Explanation:
        """Find the patch that an image's score is owed to most, and the normal patch nearest to it.

        Args:
            image (torch.Tensor): Pre-processed image ``[1, 3, H, W]``.
            file (Path | None): Its file: if it is among the normal images, the others alone are searched. Defaults to
                ``None``.

        Returns:
            Explanation: Both patches, and their distance.
        """
        size, box, embedding = self._decisive_patch(image)
        files = self._images.files
        stride = self._model.stride
        own = files.index(file) if file in files else -1
        source = torch.tensor([[own, box.top // stride, box.left // stride]], device=image.device)
        distances, nearest = self._nearest(size, embedding[None], source)
        index, row, column = self._sources[size][nearest[0]].tolist()
        return Explanation(
            box=box,
            normal_path=files[index],
            normal_image=as_seen(files[index], (image.shape[-2], image.shape[-1])),
            normal_box=Box(row * stride, column * stride, size, size),
            distance=float(distances[0]) / self._usual_distance(size),
        )

    def _decisive_patch(self, image: torch.Tensor) -> tuple[int, Box, torch.Tensor]:
        """Return scale, place and embedding ``[Z]`` of the patch that the hottest pixel is owed to most."""
        stride = self._model.stride
        patches = dict(self._model.patch_scores(image))
        maps = {size: self._model.scale_map(found.scores, image.shape[-2:], size) for size, found in patches.items()}
        parts = self._model.contributions(maps)
        hottest = int(self._model.combine(list(maps.values())).flatten().argmax())
        pixel = divmod(hottest, image.shape[-1])
        size = max(parts, key=lambda scale: float(parts[scale].flatten()[hottest]))
        # What each patch adds to the pixel's score.
        rows, columns = (
            averaging_matrix(side, size, stride, device=image.device, reach=self._model.reach)[place]
            for side, place in zip(image.shape[-2:], pixel, strict=True)
        )
        added = rows[:, None] * columns * patches[size].scores[0]
        row, column = divmod(int(added.flatten().argmax()), len(columns))
        return size, Box(row * stride, column * stride, size, size), patches[size].embeddings[0, row, column]

    def _nearest(self, size: int, embeddings: torch.Tensor, origins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return distances ``[Q]`` and positions ``[Q]`` of the normal patches nearest to embeddings ``[Q, Z]``.

        Patches of the image that an embedding is of, see ``origins`` ``[Q, 3]`` (image or -1, row and column), are
        passed over, and those of other places where patches are scored by theirs.
        """
        by_place = self._model.scorers[str(size)].by_place
        best = embeddings.new_full((len(embeddings),), torch.inf)
        position = best.new_zeros(len(embeddings), dtype=torch.long)
        start = 0
        for rows, sources in zip(self._rows[size].split(_CHUNK), self._sources[size].split(_CHUNK), strict=True):
            distances = torch.cdist(embeddings, rows.float())
            distances[origins[:, None, 0] == sources[:, 0]] = torch.inf
            if by_place:
                distances[((origins[:, None, 1:] - sources[:, 1:]).abs() > _NEAR).any(dim=-1)] = torch.inf
            least, place = distances.min(dim=1)
            position = torch.where(least < best, place + start, position)
            best = torch.minimum(least, best)
            start += len(rows)
        return best, position

    def _usual_distance(self, size: int) -> float:
        """Return the mean distance of normal patches of a scale to the nearest one of another image."""
        if size not in self._usual:
            rows, sources = self._rows[size], self._sources[size]
            chosen = spread(len(rows), _USUAL_PATCHES)
            distances, _ = self._nearest(size, rows[chosen].float(), sources[chosen])
            self._usual[size] = float(distances.mean().clamp(min=torch.finfo(torch.float32).tiny))
        return self._usual[size]
