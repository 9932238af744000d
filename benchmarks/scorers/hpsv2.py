# /// script
# requires-python = ">=3.10"
# dependencies = ["open-clip-torch==3.3.0", "huggingface-hub"]
# ///
"""Human Preference Score v2.1 (Wu et al. 2023): the cosine of prompt and picture in its CLIP ViT-H/14.

The weights are the authors'; their package (hpsv2 1.2.0) lacks the tokenizer's vocabulary.
"""

import cosine
import folder


def load():
    from huggingface_hub import hf_hub_download

    return cosine.load("ViT-H-14", hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt"))


if __name__ == "__main__":
    folder.main("hpsv2", load)
