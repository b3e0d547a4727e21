"""A small residual CNN with batch norm, for 8 x 8 images of one channel."""

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm around a skip, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, inputs, h, w]` to `[n, outputs, h / stride, w / stride]`."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.skip(x))


class DigitCNN(nn.Module):
    """Images to class scores, with `blocks` residual blocks at each of `widths`."""

    def __init__(
        self, widths: tuple[int, ...] = (24, 48, 96), blocks: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages = []
        width = widths[0]
        for stage, wider in enumerate(widths):
            for block in range(blocks):
                stages.append(Block(width, wider, 2 if stage and not block else 1))
                width = wider
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[n, 1, 8, 8]` to logits `[n, classes]`."""
        return self.head(self.blocks(self.stem(pixel_values)).mean((2, 3)))
