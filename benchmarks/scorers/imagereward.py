# /// script
# requires-python = ">=3.10,<3.12"
# dependencies = [
#     "image-reward==1.5", "clip-anytorch",
#     "torch<2.6", "transformers<4.46", "diffusers<0.31", "numpy<2", "setuptools<81",
# ]
# ///
"""ImageReward (Xu et al. 2023), by its authors' package."""

import folder


def load():
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0")
    return lambda prompt, files: [model.score(prompt, str(file)) for file in files]


if __name__ == "__main__":
    folder.main("imagereward", load)
