"""Which tokens are which: patches of a picture, words of a text, parts of a prompt."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mmfm_utils import UsageError
from mmfm_utils.anatomy import patch_tokens, spans, word_span
from mmfm_utils.hooks import record
from tests.anatomy_families import FAMILIES, IMAGE, inputs


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([0.01, 0.25, 0.5, 1.0]),
    st.integers(0, 2**31),
)
def test_patch_tokens_counts_pixels(grid, patch, share, seed):
    mask = np.random.default_rng(seed).random((grid[0] * patch[0], grid[1] * patch[1])) < 0.6
    expected = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            pixels = mask[row * patch[0] : (row + 1) * patch[0], column * patch[1] : (column + 1) * patch[1]]
            if pixels.mean() >= share:
                expected.append(1 + row * grid[1] + column)
    assert patch_tokens(mask, grid, share).tolist() == expected
    assert patch_tokens(torch.tensor(mask), grid, share, first=7).tolist() == [index + 6 for index in expected]


def test_patch_tokens_point_at_the_pixels_they_name():
    """The first layer's own input says which token a pixel belongs to."""
    opened = FAMILIES["open_clip vision alone"].opened().anatomy
    mask = np.zeros((64, 64), dtype=bool)
    mask[16:24, 40:56] = True
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad(), record(opened, "vision.embed", every=True) as seen:
        opened.module(image)
        opened.module(image + torch.tensor(mask))
    before, after = seen["vision.embed"]
    changed = (before - after).abs().amax((0, 2)).nonzero().flatten()
    assert changed.tolist() == patch_tokens(mask, opened.towers["vision"].grid).tolist() == [1 + 16 + 5, 1 + 16 + 6]


@pytest.mark.parametrize(
    "mask, options, message",
    [
        (np.zeros((65, 64), bool), {}, "divides into a grid of 8 x 8"),
        (np.zeros((64, 64)), {}, "boolean mask"),
        (np.zeros((64, 64), bool), dict(share=0), "share above 0"),
    ],
)
def test_patch_tokens_refuses(mask, options, message):
    with pytest.raises(UsageError, match=message):
        patch_tokens(mask, (8, 8), **options)


@pytest.fixture(scope="module")
def tokenizers_by_name(tmp_path_factory):
    """A byte-level BPE with special tokens, raw and as open_clip wraps it; and open_clip's own BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    raw.train_from_iterator(["a red car and a blue dog"] * 20, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    wrapped = open_clip.tokenizer.HFTokenizer(str(folder), context_length=40)
    return {"fast": fast, "open_clip HF": wrapped, "open_clip BPE": open_clip.tokenizer.SimpleTokenizer()}


@pytest.mark.parametrize("kind", ["fast", "open_clip HF", "open_clip BPE"])
def test_word_span(tokenizers_by_name, kind):
    tokenizer = tokenizers_by_name[kind]

    def ids_of(text):
        return tokenizer(text).input_ids if kind == "fast" else tokenizer(text)[0].tolist()

    def word_at(text, *args):
        span = word_span(tokenizer, text, *args)
        return (tokenizer.tokenizer if kind == "open_clip HF" else tokenizer).decode(ids_of(text)[span]).strip()

    text = "a red carrot, a red car and a blue dog; a zebrafish"
    assert word_at(text, "red car") == "red car"
    assert word_at(text, "car") == "car" and word_at(text, "carrot") == "carrot"
    assert word_at(text, "Zebrafish") == "zebrafish"
    first, second = word_span(tokenizer, text, "red"), word_span(tokenizer, text, "red", 1)
    assert first.stop <= second.start and word_at(text, "red", -1) == "red"
    assert word_span(tokenizer, text, "red", -1) == second
    assert word_span(tokenizer, "a red car", "a") == slice(1, 2)  # token 0 is the start token
    for word, occurrence, message in (
        ("cat", 0, "'cat' is not in"),
        ("fish", 0, "not in"),
        ("dog", 1, "once"),
        ("red", 2, "2 times"),
    ):
        with pytest.raises(UsageError, match=message):
            word_span(tokenizer, text, word, occurrence)


def test_word_span_reads_the_text_as_the_tokenizer_tidies_it(tokenizers_by_name):
    wrapped = tokenizers_by_name["open_clip HF"]
    assert word_span(wrapped, "a   red \n car", "car") == word_span(wrapped, "a red car", "car")


def test_word_span_refuses_what_knows_no_offsets():
    with pytest.raises(UsageError, match="fast tokenizer"):
        word_span(object(), "a car", "car")


# ---- spans ----


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "data" / "models" / "language")


def prompt(tokenizer, text, pictured=0, pad=0):
    start, *rest = [token for token in tokenizer(text).input_ids if token != tokenizer.eos_token_id]
    return [tokenizer.pad_token_id] * pad + [start] + [tokenizer.convert_tokens_to_ids("<image>")] * pictured + rest


QUESTION = "what colour is the red dog near the dog ? answer :"


@pytest.mark.parametrize("pictured, pad", [(64, 0), (65, 0), (65, 4)])
def test_spans_of_a_prompt_with_a_picture(tokenizer, pictured, pad):
    ids = prompt(tokenizer, QUESTION, pictured, pad)
    image = tokenizer.convert_tokens_to_ids("<image>")
    masks = np.zeros((2, 64, 64), dtype=bool)
    masks[0, 8:24, 16:32], masks[1, 40:48, 56:64] = True, True
    found = spans(tokenizer, torch.tensor([ids]), image, (8, 8), masks, subject="Dog")
    assert [i for i, token in enumerate(ids) if token == image] == list(range(len(ids)))[found.image]
    first = pad + 1 + pictured - 64  # the first patch: behind <start>, and behind CLS where it is kept
    expected = [first + 8 + 2, first + 8 + 3, first + 16 + 2, first + 16 + 3]
    assert found.objects[0].tolist() == expected == patch_tokens(masks[0], (8, 8), first=first).tolist()
    assert found.objects[1].tolist() == [first + 5 * 8 + 7]
    rest = set(range(first, first + 64)) - set(expected) - {first + 47}
    assert found.context.tolist() == sorted(rest)
    assert tokenizer.decode(ids[found.question]) == "what colour is the red dog near the dog? answer"
    assert tokenizer.decode(ids[found.subject]) == "dog" and found.subject.start == len(ids) - 4
    assert found.last == len(ids) - 1 and tokenizer.decode(ids[found.last]) == ":"
    two = spans(tokenizer, ids, image, (8, 8), subject="red dog")
    assert tokenizer.decode(ids[two.subject]) == "red dog" and two.objects == () and len(two.context) == 64
    assert spans(tokenizer, ids, image, (8, 8)).subject is None
    masks[1, 40:48, 55] = True  # an eighth of the next patch
    assert len(spans(tokenizer, ids, image, (8, 8), masks).objects[1]) == 1
    assert spans(tokenizer, ids, image, (8, 8), masks, share=0.1).objects[1].tolist() == [first + 46, first + 47]


def test_spans_index_what_the_model_holds(tokenizer):
    """In the model itself: the projector's tokens stand in the stream where `image` says."""
    opened = FAMILIES["llava full"].opened().anatomy
    mask = np.zeros((32, 32), dtype=bool)
    mask[8:16, 24:32] = True
    batch = inputs("llava full", n=1)
    found = spans(tokenizer, batch["input_ids"], IMAGE, opened.towers["vision"].grid, [mask])
    image = batch["pixel_values"]
    with torch.no_grad(), record(opened, ["vision.embed", "projector", "lm.embed"], every=True) as seen:
        for pixels in (image, image + torch.tensor(mask)):
            opened.module(**dict(batch, pixel_values=pixels))
    assert torch.equal(seen["lm.embed"][0][:, found.image], seen["projector"][0])
    changed = (seen["vision.embed"][0] - seen["vision.embed"][1]).abs().amax((0, 2)).nonzero().flatten()
    assert (changed + found.image.start).tolist() == found.objects[0].tolist()


def test_spans_of_text_alone(tokenizer):
    ids = prompt(tokenizer, QUESTION, pad=2)
    found = spans(tokenizer, ids, tokenizer.convert_tokens_to_ids("<image>"), (8, 8), subject="colour")
    assert torch.empty(1, len(ids), 3)[:, found.image].shape == (1, 0, 3) and len(found.context) == 0
    assert found.question == slice(3, len(ids) - 1) and found.subject == slice(4, 5) and found.last == len(ids) - 1
    assert spans(tokenizer, ids).question == found.question


def test_spans_in_a_tokenizer_that_splits_words(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", *pre_tokenizers.ByteLevel.alphabet()])}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    text = "is the zebra a zebrafish or a zebra ?"
    ids = [letters.bos_token_id, *letters(text).input_ids]
    found = spans(letters, ids, subject="zebra")
    assert letters.decode(ids[found.subject]) == "zebra" and found.subject.stop == len(ids) - 2


@pytest.mark.parametrize("split", [True, False])
def test_a_character_of_several_tokens(split):
    """Llama 2 and its kin write a rare character as its bytes: half of one decodes to as many signs as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    signs = ["<s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁helionst", *([] if split else ["🦁", "狮", "é"])]
    raw = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, [], byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    for text in ("the lion is", "the 🦁 lion is", "🦁狮é 狮 lion 🦁 is", "é lion", "🦁 the 🦁"):
        ids = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
        for word in {*text.split()} - {"the", "is"}:
            found = spans(tokenizer, [*ids, *tokenizer(" .").input_ids], subject=word).subject
            assert tokenizer.decode(ids[found]) == word, (text, word)
            last = text.split().count(word) - 1
            assert tokenizer.decode(tokenizer(text).input_ids[word_span(tokenizer, text, word, last)]) == word
            assert found.stop - found.start == len(word) if not split or word.isascii() else len(word.encode())


def test_spans_refuses(tokenizer):
    image, mask = tokenizer.convert_tokens_to_ids("<image>"), np.zeros((64, 64), dtype=bool)
    ids = prompt(tokenizer, QUESTION, 64)
    for options, message in (
        (dict(ids=[*ids, tokenizer.eos_token_id]), "cut the end token"),
        (dict(ids=[]), "ends in text"),
        (dict(ids=ids[:33] + ids[65:] + ids[1:33] + ids[65:]), "one picture"),
        (dict(ids=prompt(tokenizer, QUESTION, 63)), r"not \(8, 8\) for 63 tokens"),
        (dict(ids=prompt(tokenizer, QUESTION, 66)), "for 66 tokens"),
        (dict(grid=None), "not None for 64 tokens"),
        (dict(ids=prompt(tokenizer, QUESTION, 1), grid=None), "not None for 1 tokens"),
        (dict(ids=prompt(tokenizer, QUESTION), masks=[mask]), "no picture"),
        (dict(subject="cat"), "'cat' is not in"),
        (dict(masks=[mask[:60]]), "divides into a grid"),
    ):
        with pytest.raises(UsageError, match=message):
            spans(**dict(dict(tokenizer=tokenizer, ids=ids, image_token_id=image, grid=(8, 8)), **options))
