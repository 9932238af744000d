"""The folder of a comparison: what it is gone on with, what is removed and what never is."""

import numpy as np
import pytest
from ternary_flux.quantizer.comparison.gallery import Gallery

PROMPTS = [{"prompt": "a ring", "tag": "single"}, {"prompt": "two foxes"}, {"prompt": "a ring"}]


def test_a_comparison_is_gone_on_with_or_removed(tmp_path):
    folder = tmp_path / "new"
    gallery = Gallery.open(folder, PROMPTS, 2, {"steps": 3}, overwrite=False)
    gallery.write_picture("original", 0, 1, np.zeros((4, 5, 3), np.uint8))
    (folder / "notes.txt").write_text("mine")
    again = Gallery.open(folder, PROMPTS, 2, {"steps": 3}, overwrite=False)
    assert again.picture("original", 0, 1).exists()
    for prompts, seeds, steps in ((PROMPTS[:2], 2, 3), (PROMPTS, 1, 3), (PROMPTS, 2, 4)):
        with pytest.raises(ValueError, match="holds the work of another run"):
            Gallery.open(folder, prompts, seeds, {"steps": steps}, overwrite=False)
    assert again.picture("original", 0, 1).exists()
    Gallery.open(folder, PROMPTS, 2, {"steps": 4}, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "settings.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_folders_are_left_alone(tmp_path, overwrite):
    (tmp_path / "original").mkdir()
    with pytest.raises(FileExistsError, match="is not empty, and no comparison"):
        Gallery.open(tmp_path, PROMPTS, 2, {}, overwrite=overwrite)
    (tmp_path / "settings.json").write_text('{"format": "another"}')
    with pytest.raises(FileExistsError, match="is not empty, and no comparison"):
        Gallery.open(tmp_path, PROMPTS, 2, {}, overwrite=overwrite)
    assert (tmp_path / "original").is_dir()


def test_pictures_come_back(tmp_path):
    gallery = Gallery.open(tmp_path, PROMPTS, 1, {}, overwrite=False)
    picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    gallery.write_picture("ternary", 1, 0, picture)
    assert np.array_equal((255 * gallery.read_picture("ternary", 1, 0)).round().movedim(0, -1), picture)
    place = gallery.picture("ternary", 1, 0)
    place.write_bytes(place.read_bytes()[:40])
    with pytest.raises(ValueError, match="0000.png cannot be read .*delete it"):
        gallery.read_picture("ternary", 1, 0)
