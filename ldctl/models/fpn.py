"""The feature pyramid: strides 8, 16, 32 merged top-down, 64 and 128 on top of the outputs or of the input."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

NUM_LEVELS = 5


class FPN(nn.Module):
    """Five maps of equal channels from three; no norm, and no activation but the one that may be asked for.

    Source: FPN (CVPR 2017, arXiv:1612.03144); levels on top as in ATSS and GFL ("on_output"), or as in RetinaNet
    ("on_input").
    """

    def __init__(
        self, in_channels: tuple[int, ...], channels: int, *, has_relu: bool = False, is_on_input: bool = False
    ) -> None:
        """Draw random weights.

        Args:
            in_channels: Of the three maps.
            channels: Of each output.
            has_relu: Put an activation between the two coarsest, as FCOS does.
            is_on_input: Make the map of stride 64 from the coarsest input instead of the output, as RetinaNet does.
        """
        super().__init__()
        self.has_relu = has_relu
        self.is_on_input = is_on_input
        num_inputs = len(in_channels)
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, channels, kernel_size=1) for inputs in in_channels)
        self.output = nn.ModuleList(
            nn.Conv2d(
                in_channels[-1] if is_on_input and level == num_inputs else channels,
                channels,
                kernel_size=3,
                padding=1,
                stride=1 if level < num_inputs else 2,
            )
            for level in range(NUM_LEVELS)
        )
        for conv in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: tuple[Float[Tensor, "B _ _ _"], ...]) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Return maps of strides 8, 16, 32, 64 and 128 from maps of strides 8, 16 and 32."""
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, maps, strict=True)]
        for finer in range(len(merged) - 2, -1, -1):
            size = merged[finer].shape[-2:]
            merged[finer] = merged[finer] + interpolate(merged[finer + 1], size=size, mode="nearest")
        *direct, coarser, coarsest = self.output
        outputs = [conv(feature) for conv, feature in zip(direct, merged, strict=True)]
        outputs.append(coarser(maps[-1] if self.is_on_input else outputs[-1]))
        outputs.append(coarsest(relu(outputs[-1]) if self.has_relu else outputs[-1]))
        return tuple(outputs)
