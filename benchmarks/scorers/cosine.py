"""Cosines of a prompt and its pictures in a CLIP model of open_clip."""

import open_clip
import torch
from PIL import Image


def load(model: str, pretrained: str, times: float = 1.0):
    """The scorer of `folder.main`; `pretrained` is a name of open_clip's or a file of weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained, device=device)
    tokenize = open_clip.get_tokenizer(model)
    clip.eval()

    @torch.inference_mode()
    def score(prompt, files):
        text = clip.encode_text(tokenize([prompt]).to(device))
        scores = []
        for file in files:
            with Image.open(file) as picture:
                image = clip.encode_image(preprocess(picture.convert("RGB"))[None].to(device))
            scores.append(times * float(torch.cosine_similarity(text, image)))
        return scores

    return score
