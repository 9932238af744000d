# /// script
# requires-python = ">=3.10"
# dependencies = ["open-clip-torch==3.3.0"]
# ///
"""CLIPScore (Hessel et al. 2021): 100 times the cosine of prompt and picture in OpenAI's CLIP ViT-L/14."""

import cosine
import folder

if __name__ == "__main__":
    folder.main("clipscore", lambda: cosine.load("ViT-L-14-quickgelu", "openai", 100.0))
