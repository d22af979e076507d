"""Vision-language models whose pictures have grids of their own: they differ from LLaVA by a layout and a processor."""

import re

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from mmfm_utils import UsageError, anatomy, models, scenes
from mmfm_utils.hooks import record
from tests.anatomy_families import PICTURE, SIZES, strengthen

LM = dict(SIZES, num_key_value_heads=2, max_position_embeddings=2048)
TEMPLATE = (
    "{% for message in messages %}user : {% for part in message['content'] %}{% if part['type'] == 'image' %}PICTURE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\nassistant :{% endfor %}"
)


pytestmark = pytest.mark.usefixtures("one_thread")


def words(*special):
    """The tokenizer of the embedded model with further special tokens; their ids."""
    tokenizer = AutoTokenizer.from_pretrained(models.FOLDER / "generative", local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer, tokenizer.convert_tokens_to_ids(list(special))


def qwen2_vl():
    """Patches of 8 pixels, of which 2 x 2 make a token: as many as the picture has."""
    tokenizer, (image, video, start, end) = words(
        "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
    )
    sizes = dict(patch_size=8, min_pixels=16 * 16, max_pixels=512 * 512)
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes), tokenizer, transformers.Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=dict(
            LM, vocab_size=len(tokenizer),
            rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=10000.0),
        ),
        vision_config=dict(embed_dim=48, hidden_size=48, depth=2, num_heads=6, mlp_ratio=2, patch_size=8),
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def onevision():
    """The whole picture in 4 x 4 patches, and tiles of 4 x 4 each with a token behind each row."""
    tokenizer, (video,) = words("<video>")
    pins, side = [[32, 32], [32, 64], [64, 32], [64, 64]], dict(height=32, width=32)
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=pins), tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=side), num_image_tokens=16,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**PICTURE, vision_use_head=False),
        text_config=transformers.Qwen2Config(**LM, vocab_size=len(tokenizer)), vision_feature_layer=-1,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), video_token_id=video, image_grid_pinpoints=pins,
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


@pytest.fixture(scope="module", params=[qwen2_vl, onevision], ids=lambda make: make.__name__)
def folder(request, tmp_path_factory):
    """A model and its processor as a hub cache holds them."""
    torch.manual_seed(0)
    model, processor = request.param()
    at = tmp_path_factory.mktemp(request.param.__name__)
    strengthen(model).save_pretrained(at)
    processor.save_pretrained(at)
    processor.image_processor.save_pretrained(at)
    return at


@pytest.fixture
def vlm(folder):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return models.of_processor(model, transformers.AutoProcessor.from_pretrained(folder, local_files_only=True))


def is_qwen(vlm):
    return "Qwen" in type(vlm.model).__name__


def pictures():
    """Three of unlike sizes: (32, 64), (64, 32), (32, 32), random."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 64), (64, 32), (32, 32))]


def test_the_grids_of_pictures_are_those_of_their_tokens(vlm):
    grids, inputs = vlm.grids(pictures()), vlm.inputs(pictures(), "what is this ?")
    if is_qwen(vlm):
        assert grids == [[(2, 4)], [(4, 2)], [(2, 2)]]
    else:
        assert grids == [[(4, 4), (4, 8, 1)], [(4, 4), (8, 4, 1)], [(4, 4), (4, 4, 1)]]
    n = [sum(rows * (columns + sum(behind)) for rows, columns, *behind in scales) for scales in grids]
    ids = inputs["input_ids"]
    assert (ids == vlm.model.config.image_token_id).sum(1).tolist() == n
    assert not inputs["attention_mask"][2, 0] and inputs["attention_mask"][:, -1].all()  # padded on the left
    drawn = scenes.World().sample_many(1)
    assert vlm.grid == vlm.grids(drawn)[0][0] == ((16, 16) if is_qwen(vlm) else (4, 4))
    assert vlm.masks(drawn[0]).shape[1:] == (vlm.resolution,) * 2
    assert len(vlm.pixels(drawn)) == (1024 if is_qwen(vlm) else 1)


def test_spans_point_at_the_tokens_whose_pixels_change(vlm):
    """The first layer's own input says which token a pixel belongs to."""
    for picture, (scales,) in ((picture, vlm.grids([picture])) for picture in pictures()):
        mask = np.zeros(picture.shape[:2], dtype=bool)
        mask[16:32, :16] = True
        other = np.where(mask[..., None], 255 - picture, picture)
        found = []
        for shown in (picture, other):
            inputs = vlm.inputs([shown], "what is this ?")
            with torch.no_grad(), record(vlm.anatomy, ["vision.embed", "projector", "lm.embed"]) as seen:
                vlm.model(**inputs)
            found.append(seen["vision.embed"])
        ids = inputs["input_ids"][0]
        spans = anatomy.spans(vlm.tokenizer, ids, vlm.model.config.image_token_id, scales, [mask], subject="this")
        changed = (found[0] - found[1]).abs().amax(-1) > 1e-6  # (picture or tile, patch)
        if is_qwen(vlm):
            expected = changed[0].view(-1, 4).any(-1).nonzero().flatten()
            assert torch.equal(seen["lm.embed"][0, spans.image], seen["projector"][0])
        else:
            (rows, columns, _), fine = scales[1], changed[1:].view(-1, 4, 4)
            tiles = fine.view(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns)
            row, column = tiles.nonzero().T
            expected = 16 + row * (columns + 1) + column
            whole = [token - spans.image.start for token in spans.objects[0].tolist()]
            assert {token for token in whole if token < 16} <= set(changed[0].nonzero().flatten().tolist())
            assert len([token for token in whole if token < 16]) == mask.mean() * 16
            assert len(spans.context) + len(spans.objects[0]) == 16 + rows * columns  # no token behind a row
        of_patches = spans.objects[0][spans.objects[0] >= spans.image.start + (0 if is_qwen(vlm) else 16)]
        assert (of_patches - spans.image.start).tolist() == expected.tolist() and len(expected)
        assert vlm.tokenizer.decode(ids[spans.subject]).strip() == "this"


def test_a_prompt_alone_and_in_a_batch_gives_the_same(vlm):
    asked = ["what is this ?", "what colour is the red dog on the left ?", "a <image> or <image>"]
    shown = [*pictures(), pictures()[0]]
    together = vlm.logits(shown, asked)
    alone = [vlm.logits(shown[:1], asked[:1]), vlm.logits(shown[1:2], asked[1:2]), vlm.logits(shown[2:], asked[2:])]
    assert torch.allclose(together[:2], torch.cat(alone[:2]), atol=1e-3) and together.isfinite().all()
    assert torch.allclose(together[2], alone[2][0], atol=1e-3)
    assert not torch.allclose(together[0], vlm.logits(shown[1:2], asked[:1])[0], atol=1e-2)  # it sees the picture
    assert torch.allclose(vlm.logits(shown, asked, batch=1), together, atol=1e-3)
    answers = vlm.answer(shown, asked, max_new_tokens=3)
    assert len(answers) == 3 and all(isinstance(answer, str) for answer in answers)
    assert len(vlm.answer(None, ["what is a dog ?"], max_new_tokens=2)) == 1
    with pytest.raises(UsageError, match="places for 4 pictures, and 3 were given"):
        vlm.answer(pictures(), asked)


def test_a_picture_stands_in_a_prompt_as_the_model_was_trained_to_see_it(vlm):
    def text(prompt):
        ids = vlm.inputs(pictures()[:1], prompt)["input_ids"][0]
        return re.sub(r"\s", "", vlm.tokenizer.decode(ids))

    if is_qwen(vlm):
        shown = "<|vision_start|>" + 8 * "<|image_pad|>" + "<|vision_end|>"
        assert vlm.chat and text("a <image> b answer :") == (
            f"<start>user:a{shown}banswerthequestionusingasinglewordorphrase.assistant:"
        )
        assert shown in text("what is this ?")
    else:
        shown = (16 + 4 * 9) * "<image>"
        assert not vlm.chat and text("a <image> b") == f"<start>a{shown}b" and f"<start>{shown}what" in text("what ?")


def test_the_hub_cache_is_read(folder, monkeypatch):
    found = lambda _, file: str(folder / file) if (folder / file).exists() else None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", found)
    vlm = models.load("generative", "hub", "cpu")
    assert vlm.chat and len(vlm.describe(scenes.World().sample_many(1), max_new_tokens=2)) == 1
