"""Kept patches over a picture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import sparsevlm
from scripts import draw_kept
from scripts.draw_kept import draw_patches, seen_pixels
from scripts.figures.words import Word, draw_words, words_height


def stage(layer, tokens_out, origin, recycled):
    return SimpleNamespace(layer=layer, tokens_out=[tokens_out], origin=[torch.tensor(origin)], recycled=[recycled])


def test_kept_patches_show_and_the_others_fade():
    pixels = np.random.default_rng(0).random((12, 12, 3)) * 0.5
    ax = Figure().subplots()
    draw_patches(ax, pixels, [1, 8], grid=4)  # first row, second column; third row, first column
    shown = np.asarray(ax.images[0].get_array())
    kept = np.zeros((12, 12), bool)
    kept[0:3, 3:6] = kept[6:9, 0:3] = True
    np.testing.assert_array_equal(shown[kept], pixels[kept])
    assert (shown[~kept] > 0.7).all()


def test_the_outline_runs_around_the_kept_region():
    ax = Figure().subplots()
    draw_patches(ax, np.zeros((8, 8, 3)), [0, 1], grid=4)  # two patches side by side, in the corner
    edges = {tuple(map(tuple, np.transpose(line.get_data()))) for line in ax.lines}
    across = {((x, y), (x + 1, y)) for y in (0, 1) for x in (0, 1)}
    down = {((x, 0), (x, 1)) for x in (0, 2)}
    assert edges == across | down


def test_panels_follow_the_stages():
    record = SimpleNamespace(
        n_visual=[16], stages=[stage(1, 7, [0, 5, 6, 9, 15], 2), stage(-1, 4, [5, -1, 9], 1), stage(6, 2, [5, 9], 0)]
    )
    fig = draw_kept.draw_kept(np.zeros((8, 8, 3)), record, title="what ?")
    titles = [ax.get_title().split("\n") for ax in fig.axes]
    assert titles == [
        ["the picture:", "16 patches"], ["after layer 1:", "5 patches + 2 recycled"],
        ["at the input:", "2 patches + 2 recycled"], ["after layer 6:", "2 patches"],
    ]  # fmt: skip
    visible = [int((np.asarray(ax.images[0].get_array()) == 0).all(-1).sum()) // 4 for ax in fig.axes]
    assert visible == [16, 5, 2, 2]  # patches of 2 x 2 black pixels


def test_frames_of_a_video_are_rows_of_patches_after_their_cls_token():
    """3 frames of 1 + 4 tokens: which patch of which frame, and the CLS tokens nowhere."""
    record = SimpleNamespace(n_visual=[15], stages=[stage(1, 6, [0, 1, 4, 7, 10, 14], 1)])
    fig = draw_kept.draw_kept(np.zeros((3, 4, 4, 3)), record)
    axes = fig.axes
    assert len(axes) == 6 and axes[3].get_ylabel() == "after layer 1\n4 patches\n+ 1 recycled"
    shown = [np.asarray(ax.images[0].get_array())[::2, ::2].sum(-1).ravel() == 0 for ax in axes]
    assert [np.flatnonzero(s).tolist() for s in shown] == [[0, 1, 2, 3]] * 3 + [[0, 3], [1], [3]]
    with pytest.raises(ValueError, match="15 visual tokens are not the patches of 4 square frames"):
        draw_kept.draw_kept(np.zeros((4, 4, 4, 3)), record)


def test_words_carry_their_relevance_and_the_raters_are_marked():
    """Against the definition: softmax over the words of each patch's products with them, mean over patches."""
    model, processor = sparsevlm.load("mini")
    inputs = processor(text="what digit is red ?", images=Image.new("RGB", (168, 168), "red"))
    words, record = draw_kept.rated_words(model, processor, inputs, sparsevlm.build("sparsevlm", budget=64))
    assert [w.text for w in words][:5] == ["what", "digit", "is", "red", "?"]
    first = inputs["input_ids"].shape[1] - len(words)
    assert [i + first for i, w in enumerate(words) if w.rates] == record.raters[0].tolist()
    with torch.no_grad():
        visual = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        text = model.get_input_embeddings()(inputs["input_ids"][0, first:])
    expected = torch.softmax(visual @ text.T, dim=-1).mean(0)
    assert [w.weight for w in words] == pytest.approx(expected.tolist(), abs=1e-5)
    assert all(w.rates == (w.weight > 1 / len(words)) for w in words)
    assert not model.model.language_model._forward_pre_hooks


def test_words_are_drawn_by_weight_and_wrap():
    words = [Word("▁word", w / 40, w % 2 == 0) for w in range(1, 41)]
    fig = Figure(figsize=(3, 2))
    draw_words(fig.subfigures(), words, words_height(words, 3), 2)
    (ax,) = fig.subfigs[0].axes
    texts = [t for t in ax.texts if t.get_text() == "word"]
    shades = [sum(t.get_bbox_patch().get_facecolor()[:3]) for t in texts]
    assert len(texts) == 40 and shades == sorted(shades, reverse=True) and shades[0] > shades[-1]
    assert len(ax.lines) == 20 and len({t.get_position()[1] for t in texts}) > 1
    assert all(t.get_position()[0] < 3 for t in texts) and words_height(words, 3) > words_height(words[:3], 3)
    assert [Word(t, 0, False).text for t in ("Ġa", "<0x0A>", "▁")] == ["a", "↵", "␣"]


def test_other_inputs_than_one_picture_are_refused():
    with pytest.raises(ValueError, match="2056 visual tokens"):
        draw_kept.draw_kept(np.zeros((8, 8, 3)), SimpleNamespace(n_visual=[2056], stages=[]))


def test_the_picture_is_what_the_model_sees():
    _, processor = sparsevlm.load("mini")
    picture = np.random.default_rng(0).integers(0, 256, (168, 168, 3), dtype=np.uint8)
    inputs = processor(text="what digit is red ?", images=Image.fromarray(picture))
    seen = seen_pixels(inputs["pixel_values"][0], processor.image_processor)
    np.testing.assert_allclose(seen, picture / 255, atol=1e-5)


def test_the_command_writes_a_picture(tmp_path, capsys):
    Image.new("RGB", (200, 100), "red").save(tmp_path / "in.png")
    arguments = [str(tmp_path / "in.png"), "what digit is red ?", "--output", str(tmp_path / "out.png")]
    draw_kept.main(arguments)
    assert Image.open(tmp_path / "out.png").width == 1400
    for wrong in (["--method", "sparsvlm"], ["--budget", "0"], ["--model", "nowhere"]):
        with pytest.raises(SystemExit) as stop:
            draw_kept.main([*arguments, *wrong])
        assert stop.value.code == 2
        assert capsys.readouterr().err.strip().count("\n") == 0
