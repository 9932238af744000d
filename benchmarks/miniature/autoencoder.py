"""The miniatures' autoencoders: ComfyUI's TAESD (https://github.com/madebyollin/taesd) with 16 or 32 latent channels.

The encoder is principal components of 8 x 8 pixel patches: instant, and expressible in TAESD's own weights, because
its ReLUs pass pictures (never negative) unchanged. The decoder is TAESD's, trained, but half as wide. `stock_state`
writes both out as ComfyUI reads them, 64 channels wide: added channels are zeros and stay zeros through every ReLU, so
that the function is the same, while the file kept here has an eighth of the bytes.

Latents are in FLUX's model space (what the transformer sees) with about unit variance; ComfyUI's scale and shift for
FLUX.1's latents cancel against `vae_scale` and `vae_shift`. FLUX.2's latents are 32 channels of 2 x 2 patches, folded
into 128 channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = {1: 16, 2: 32}  # of the latents of FLUX.1 and FLUX.2, before FLUX.2's are folded
PATCH = 8
STOCK_WIDTH = 64
SCALE, SHIFT = 0.3611, 0.1159  # of ComfyUI's latent format for FLUX.1


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class Autoencoder(nn.Module):
    """Pictures [B, 3, H, W] in 0..1 to latents in FLUX's model space, and back.

    Latents are [B, 16, H/8, W/8] for FLUX.1, and with 32 `channels` [B, 128, H/16, W/16] for FLUX.2.
    """

    components: Tensor
    offset: Tensor

    def __init__(self, width: int = 32, channels: int = CHANNELS[1]):
        super().__init__()
        self.fold = 2 if channels == CHANNELS[2] else 1
        self.register_buffer("components", torch.zeros(channels, 3 * PATCH**2))
        self.register_buffer("offset", torch.zeros(channels))
        layers = [Clamp(), conv(channels, width), nn.ReLU()]
        for _ in range(3):
            layers += [Block(width), Block(width), Block(width)]
            layers += [nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
        self.taesd_decoder = nn.Sequential(*layers, Block(width), conv(width, 3))
        # There are no norms: keep the signal's variance through the depth, and start blocks near the identity.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
                parameter.data.mul_(0.2 if name.endswith("conv.4.weight") else 1)

    def encode(self, images: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(images, PATCH)
        return F.pixel_unshuffle(F.conv2d(patches, self.components[:, :, None, None], self.offset), self.fold)

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder(F.pixel_shuffle(latents, self.fold))


def fit_components(images: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Components [channels, 192] and offset [channels] of pictures [N, 3, H, W] in 0..1: latents of mean 0.

    Halfway whitened: the standard deviation of a latent channel goes with the fourth root of its component's variance,
    so that fine detail counts for more than in pixels and for less than the mean colour. The mean variance of the first
    16 is 1: FLUX.2's first half is FLUX.1's.
    """
    patches = F.pixel_unshuffle(images.double(), PATCH).movedim(1, -1).flatten(0, -2)
    mean = patches.mean(0)
    variance, basis = torch.linalg.eigh(torch.cov((patches - mean).T))
    variance, basis = variance.flip(0)[:channels], basis.flip(1)[:, :channels]
    signs = torch.where(basis.sum(0) < 0, -1.0, 1.0)
    wanted = variance.sqrt() / variance[: CHANNELS[1]].sqrt().mean()
    components = (basis * signs * (wanted / variance).sqrt()).T
    return components.float(), -(components @ mean).float()


def load(state: dict[str, Tensor]) -> Autoencoder:
    """The autoencoder, fp32, of a state as kept here."""
    model = Autoencoder(*state["taesd_decoder.1.weight"].shape[:2])
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval().requires_grad_(False)


def stock_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function as a state of ComfyUI's stock TAESD, with FLUX's scale and shift.

    FLUX.2's it loads with `{"tae_latent_channels": 128}` as metadata.
    """
    names = [name for name in state if name.startswith("taesd_decoder.")]
    stock = {name: _pad(state[name], name) for name in names}
    stock |= _stock_encoder(state["components"].float(), state["offset"].float())
    second = len(state["components"]) == CHANNELS[2]
    if second:
        stock |= _stock_pools()
    scale, shift = (1.0, 0.0) if second else (SCALE, SHIFT)
    return stock | {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(shift)}


def _pad(value: Tensor, name: str) -> Tensor:
    """Zeros for the channels of the stock decoder that are missing; latents come in and colours go out as they are."""
    outputs, *rest = value.shape
    shape = [3 if outputs == 3 else STOCK_WIDTH, *rest]
    if value.ndim == 4 and name != "taesd_decoder.1.weight":
        shape[1] = STOCK_WIDTH
    out = value.new_zeros(shape)
    out[tuple(slice(n) for n in value.shape)] = value
    return out


def _stock_pools() -> dict[str, Tensor]:
    """What FLUX.2's TAESD adds to the blocks next to the latents, adding nothing."""
    state = {}
    for block in ("taesd_encoder.11", "taesd_encoder.12", "taesd_encoder.13",
                  "taesd_decoder.3", "taesd_decoder.4", "taesd_decoder.5"):  # fmt: skip
        state[f"{block}.pool.0.weight"] = torch.zeros(4 * STOCK_WIDTH, STOCK_WIDTH, 1, 1)
        state[f"{block}.pool.1.weight"] = torch.ones(4 * STOCK_WIDTH)
        state[f"{block}.pool.1.bias"] = torch.zeros(4 * STOCK_WIDTH)
        state[f"{block}.pool.3.weight"] = torch.zeros(STOCK_WIDTH, 4 * STOCK_WIDTH, 1, 1)
    return state


def _stock_encoder(components: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """TAESD's encoder: copy, fold 2 x 2 pixels into channels twice, components and negatives, their difference."""
    channels = len(components)
    state = {"0.weight": torch.zeros(STOCK_WIDTH, 3, 3, 3), "0.bias": torch.zeros(STOCK_WIDTH)}
    state["0.weight"][range(3), range(3), 1, 1] = 1
    for block in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        for layer in (0, 2, 4):  # zero, and inputs are never negative: blocks change nothing
            state[f"{block}.conv.{layer}.weight"] = torch.zeros(STOCK_WIDTH, STOCK_WIDTH, 3, 3)
            state[f"{block}.conv.{layer}.bias"] = torch.zeros(STOCK_WIDTH)
    for name in ("2.weight", "6.weight", "10.weight", "14.weight"):
        state[name] = torch.zeros(channels if name == "14.weight" else STOCK_WIDTH, STOCK_WIDTH, 3, 3)
    # A stride-2 convolution's taps 1 and 2 are a pair of pixels. A channel is (colour, y, x) of the pixel it holds.
    for name, inputs, side in (("2.weight", 3, 1), ("6.weight", 12, 2)):
        for old in range(inputs):
            colour, y, x = old // side**2, old // side % side, old % side
            for dy in range(2):
                for dx in range(2):
                    new = (colour * 2 * side + dy * side + y) * 2 * side + dx * side + x
                    state[name][new, old, 1 + dy, 1 + dx] = 1
    # [channels, colour, dy, y, dx, x] -> [channels, (colour, y, x), dy, dx]
    last = components.view(-1, 3, 2, 4, 2, 4).permute(0, 1, 3, 5, 2, 4).reshape(-1, 48, 2, 2)
    state["10.weight"][:channels, :48, 1:, 1:] = last
    state["10.weight"][channels : 2 * channels, :48, 1:, 1:] = -last
    for channel in range(channels):
        state["14.weight"][channel, channel, 1, 1] = 1
        state["14.weight"][channel, channels + channel, 1, 1] = -1
    state["14.bias"] = offset.clone()
    return {f"taesd_encoder.{name}": value for name, value in state.items()}
