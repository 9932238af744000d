"""The miniature's autoencoder: ComfyUI's TAESD (https://github.com/madebyollin/taesd) with 16 latent channels.

The encoder is 16 principal components of 8 x 8 pixel patches: instant, and expressible in TAESD's own weights, because
its ReLUs pass pictures (never negative) unchanged. The decoder is TAESD's, trained, but half as wide. `stock_state`
writes both out as the stock VAELoader reads them, 64 channels wide: added channels are zeros and stay zeros through
every ReLU, so that the function is the same, while the file kept here has an eighth of the bytes.

Latents are in FLUX's model space (what the transformer sees) with about unit variance; ComfyUI's scale and shift for
FLUX latents cancel against `vae_scale` and `vae_shift`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_CHANNELS = 16
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
    """Pictures [B, 3, H, W] in 0..1 to latents [B, 16, H/8, W/8] in FLUX's model space, and back."""

    components: Tensor
    offset: Tensor

    def __init__(self, width: int = 32):
        super().__init__()
        self.register_buffer("components", torch.zeros(LATENT_CHANNELS, 3 * PATCH**2))
        self.register_buffer("offset", torch.zeros(LATENT_CHANNELS))
        layers = [Clamp(), conv(LATENT_CHANNELS, width), nn.ReLU()]
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
        return F.conv2d(patches, self.components[:, :, None, None], self.offset)

    def decode(self, latents: Tensor) -> Tensor:
        return self.taesd_decoder(latents)


def fit_components(images: Tensor) -> tuple[Tensor, Tensor]:
    """Components [16, 192] and offset [16] of pictures [N, 3, H, W] in 0..1: latents of mean 0 and mean variance 1.

    Halfway whitened: the standard deviation of a latent channel goes with the fourth root of its component's variance,
    so that fine detail counts for more than in pixels and for less than the mean colour.
    """
    patches = F.pixel_unshuffle(images.double(), PATCH).movedim(1, -1).flatten(0, -2)
    mean = patches.mean(0)
    variance, basis = torch.linalg.eigh(torch.cov((patches - mean).T))
    variance, basis = variance.flip(0)[:LATENT_CHANNELS], basis.flip(1)[:, :LATENT_CHANNELS]
    signs = torch.where(basis.sum(0) < 0, -1.0, 1.0)
    wanted = variance.sqrt() / variance.sqrt().mean()
    components = (basis * signs * (wanted / variance).sqrt()).T
    return components.float(), -(components @ mean).float()


def load(state: dict[str, Tensor]) -> Autoencoder:
    """The autoencoder, fp32, of a state as kept here."""
    model = Autoencoder(state["taesd_decoder.1.weight"].shape[0])
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval().requires_grad_(False)


def stock_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function as a state of ComfyUI's stock TAESD, with FLUX's scale and shift."""
    width = state["taesd_decoder.1.weight"].shape[0]
    decoder = {name: _pad(value, width) for name, value in state.items() if name.startswith("taesd_decoder.")}
    encoder = _stock_encoder(state["components"].float(), state["offset"].float())
    return decoder | encoder | {"vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(SHIFT)}


def _pad(value: Tensor, width: int) -> Tensor:
    out = value.new_zeros([STOCK_WIDTH if i < 2 and n == width else n for i, n in enumerate(value.shape)])
    out[tuple(slice(n) for n in value.shape)] = value
    return out


def _stock_encoder(components: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """TAESD's encoder: copy, fold 2 x 2 pixels into channels twice, components and negatives, their difference."""
    state = {"0.weight": torch.zeros(STOCK_WIDTH, 3, 3, 3), "0.bias": torch.zeros(STOCK_WIDTH)}
    state["0.weight"][range(3), range(3), 1, 1] = 1
    for block in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        for layer in (0, 2, 4):  # zero, and inputs are never negative: blocks change nothing
            state[f"{block}.conv.{layer}.weight"] = torch.zeros(STOCK_WIDTH, STOCK_WIDTH, 3, 3)
            state[f"{block}.conv.{layer}.bias"] = torch.zeros(STOCK_WIDTH)
    for name in ("2.weight", "6.weight", "10.weight", "14.weight"):
        state[name] = torch.zeros(LATENT_CHANNELS if name == "14.weight" else STOCK_WIDTH, STOCK_WIDTH, 3, 3)
    # A stride-2 convolution's taps 1 and 2 are a pair of pixels. A channel is (colour, y, x) of the pixel it holds.
    for name, channels, side in (("2.weight", 3, 1), ("6.weight", 12, 2)):
        for old in range(channels):
            colour, y, x = old // side**2, old // side % side, old % side
            for dy in range(2):
                for dx in range(2):
                    new = (colour * 2 * side + dy * side + y) * 2 * side + dx * side + x
                    state[name][new, old, 1 + dy, 1 + dx] = 1
    # [16, colour, dy, y, dx, x] -> [16, (colour, y, x), dy, dx]
    last = components.view(-1, 3, 2, 4, 2, 4).permute(0, 1, 3, 5, 2, 4).reshape(-1, 48, 2, 2)
    state["10.weight"][:LATENT_CHANNELS, :48, 1:, 1:] = last
    state["10.weight"][LATENT_CHANNELS : 2 * LATENT_CHANNELS, :48, 1:, 1:] = -last
    for channel in range(LATENT_CHANNELS):
        state["14.weight"][channel, channel, 1, 1] = 1
        state["14.weight"][channel, LATENT_CHANNELS + channel, 1, 1] = -1
    state["14.bias"] = offset.clone()
    return {f"taesd_encoder.{name}": value for name, value in state.items()}
