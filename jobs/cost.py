"""What the estimate of a run's cost stands on: assumptions, counts of the data, rates, and networks to count.

The work of a network is counted (subcat_core/macs.py) and put over an assumed rate; that of the CPUs is scaled from
measured figures (docs/performance.md). `cost_stages.py` puts it together by stage. Legend: L labels of a CRF.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import nn

from jobs.pipeline import StagePlan
from subcat_core.backbones import Backbone, BackboneSettings, build_backbone
from subcat_core.crf import CrfSettings
from subcat_core.macs import count_macs
from subcat_core.segmenter import SegmenterSettings, build_segmenter
from subcat_core.settings import Settings
from subcat_core.tiles import tile_grid

OPS_PER_MAC = 2
MANIFEST_ROW_BYTES = 200
_CRF_PX, _CRF_ITERATIONS = 375 * 500, 10  # what the figures of the CRF were measured at


class CostAssumptions(Settings):
    """What an estimate takes for granted; `--assume KEY=VALUE` sets each."""

    num_train: int | None = Field(default=None, ge=1)
    """Images of split train, instead of what the lists say."""
    num_val: int | None = Field(default=None, ge=0)
    """Images of split val, all with a mask; instead of what the lists say."""
    num_train_masks: int = Field(default=0, ge=0)
    """Images of split train with a mask, which every round scores; with num_train alone."""
    num_classes: int | None = Field(default=None, ge=1)
    """C, where neither lists nor settings say it; null takes 80 for COCO and 20 for others."""
    labels_per_image: float = Field(default=1.6, gt=0)
    """Tags of an image, where the lists are not read (1.56 in VOC's train_aug, about 3 in COCO)."""
    image_height_px: int | None = Field(default=None, ge=1)
    """Of the typical image; null takes what the manifest says, 480 for COCO, 522 for
    GlaS, and 375 for others."""
    image_width_px: int | None = Field(default=None, ge=1)
    """As image_height_px: 640 for COCO, 775 for GlaS, 500 for others."""
    gpu_tflops: float = Field(default=125.0, gt=0)
    """10^12 operations a second that one GPU sustains in bfloat16: 40 % of the 312 of an A100 (an H100: 395 of 989).
    NVIDIA's training of ResNet-50 on an A100 comes to 60; wider networks to more."""
    fp32_frac: float = Field(default=0.5, gt=0, le=1)
    """Share of gpu_tflops in stages that work in float32 (as TF32)."""
    cpu_gflops: float = Field(default=90.0, gt=0)
    """10^9 operations a second that one CPU core sustains in float32: ResNet-50 on a Zen 4 core, measured."""
    depthwise_frac: float = Field(default=0.2, gt=0, le=1)
    """Share of these rates that networks of depthwise convolutions reach: EfficientNet-lite0 on a Zen 4 core, measured;
    no more is to be expected on a GPU."""
    kmeans_gmacs: float = Field(default=9.4, gt=0)
    """10^9 multiply-adds a second of k-means on one core: faiss, measured. Seeding on a sample is not counted."""
    image_bytes_per_px: float = Field(default=0.55, gt=0)
    """Of a stored image: JPEG of VOC."""
    mask_bytes_per_px: float = Field(default=0.03, gt=0)
    """Of a stored mask: indexed PNG of VOC."""
    decode_ns_per_px: float = Field(default=5.2, ge=0)
    """CPU time of decoding an image: 0.97 ms for 375 x 500, measured."""
    augment_ns_per_px: float = Field(default=60.0, ge=0)
    """CPU time of a training crop, by its own pixels, decoding not counted; an estimate."""
    view_ns_per_px: float = Field(default=3.4, ge=0)
    """CPU time of resizing to one view, by the view's pixels: 4.2 ms for three views of 375 x 500, measured."""
    cam_ns_per_px: float = Field(default=155.0, ge=0)
    """CPU time of adding up, resizing and normalising maps, by the image's pixels: 29 ms, measured."""
    png_ns_per_px: float = Field(default=20.0, ge=0)
    """CPU time of writing or reading a mask; an estimate."""
    score_ns_per_px: float = Field(default=2.0, ge=0)
    """CPU time of one confusion matrix, by the image's pixels: 0.38 ms, measured."""


@dataclasses.dataclass(frozen=True)
class DataCounts:
    """How much data there is. num_images, num_masks: by split. height_px, width_px: of the typical image.

    origin: where these numbers come from, for people.
    """

    origin: str
    num_images: Mapping[str, int]
    num_masks: Mapping[str, int]
    num_classes: int
    labels_per_image: float
    height_px: int
    width_px: int

    @property
    def num_train(self) -> int:
        return self.num_images.get("train", 0)

    @property
    def image_px(self) -> int:
        return self.height_px * self.width_px

    def of_tiles(self, tile_px: int, stride_px: int) -> DataCounts:
        """The same in tiles: as many of each image as of the typical one, and all with its tags."""
        num_tiles = len(tile_grid(self.height_px, self.width_px, tile_px, stride_px))
        return dataclasses.replace(
            self,
            num_images={split: number * num_tiles for split, number in self.num_images.items()},
            num_masks={split: number * num_tiles for split, number in self.num_masks.items()},
            height_px=min(tile_px, self.height_px),
            width_px=min(tile_px, self.width_px),
        )


@dataclasses.dataclass(frozen=True)
class StageCost:
    """One step of the plan. what: how the number came about, for people; None where there is no estimate.

    network_ops: operations of a network, on a GPU if there is one; bf16: at full rate there; depthwise: see
    CostAssumptions.depthwise_frac. cpu_s: core seconds of all else. kept_bytes: those of written_bytes that stay.
    """

    step: StagePlan
    num_images: int = 0
    read_bytes: float = 0
    written_bytes: float = 0
    kept_bytes: float = 0
    network_ops: float = 0
    bf16: bool = False
    depthwise: bool = False
    cpu_s: float = 0
    what: str | None = None

    def gpu_hours(self, assumptions: CostAssumptions) -> float:
        rate = assumptions.gpu_tflops * 1e12 * (1.0 if self.bf16 else assumptions.fp32_frac)
        return self.network_ops / (rate * self._share(assumptions)) / 3600

    def cpu_hours(self) -> float:
        return self.cpu_s / 3600

    def hours_without_gpu(self, assumptions: CostAssumptions) -> float:
        """Core hours where the network too works on CPUs."""
        rate = assumptions.cpu_gflops * 1e9 * self._share(assumptions)
        return (self.cpu_s + self.network_ops / rate) / 3600

    def _share(self, assumptions: CostAssumptions) -> float:
        return assumptions.depthwise_frac if self.depthwise else 1.0


@functools.cache
def backbone_on_meta(settings: BackboneSettings) -> Backbone:
    """The network without weights; nothing is loaded."""
    with torch.device("meta"):
        return build_backbone(settings.model_copy(update={"weights": "none", "frozen_stages": 0}))[0]


@functools.cache
def segmenter_on_meta(settings: SegmenterSettings, num_classes: int) -> nn.Module:
    """As backbone_on_meta."""
    backbone = settings.backbone.model_copy(update={"weights": "none", "frozen_stages": 0})
    with torch.device("meta"):
        return build_segmenter(settings.model_copy(update={"backbone": backbone}), num_classes)[0]


macs_of = functools.cache(count_macs)


def crf_seconds(num_px: int, num_labels: float, settings: CrfSettings) -> float:
    """Core seconds of the dense CRF on one image.

    Of 375 x 500 px in 10 steps: 0.083 + 0.0168 L, of which 0.055 build the lattice; from docs/performance.md's ratios
    and pydensecrf2's 0.22 s (L = 2) to 0.50 s (L = 21). Linear in pixels and steps.
    """
    steps = settings.iterations / _CRF_ITERATIONS
    return num_px / _CRF_PX * (0.055 + steps * (0.028 + 0.0168 * num_labels))
