"""Build the tokenizer that the contrastive, the generative and the diffusion model share (run once; it is shipped).

One token a word, so that a figure's axis reads like a sentence; words outside the list fall back to single letters.
The end token has the largest id, because open_clip pools at the largest id, and any id but 2, because transformers'
CLIPTextModel treats 2 as a legacy value with a rule of its own.
"""

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmfm_utils import scenes

HERE = Path(__file__).parent
COMMON = """
a an the of on in at with and or not no yes is are was it its this that these there here what where which who how
many much why when does do did has have had be been can word words written picture drawing drawn scene style ground
by to from for as than then if so but only also very more less most all each every some any none both other same
different one two three four five six seven eight nine ten zero first second last left right top bottom middle above
below beside near between inside behind front up down over under small medium large big colour color size place
position name named called kind thing things object objects animal animals lives live found usual usually like likes
plural letter letters starts ends begins many question answer caption describe user assistant list they them he she
him her his their you your i we us my our see sees seen show shows shown look looks say says said text image photo
nothing something empty full white black brown true false correct wrong singular home man woman person people day
light dark bright plain pattern sign label
""".split()


def words() -> list[str]:
    """Every word of the world, sorted, and the common words that questions and tasks need."""
    facts = [v for t in scenes.OBJECTS.values() for v in (t.category, t.habitat, t.usual_colour, t.plural)]
    phrases = [*scenes.OBJECTS, *facts, *scenes.COLOURS, *scenes.GROUNDS, *scenes.STYLES, *scenes.SIZES, *scenes.WORDS]
    phrases += [*scenes.CHARACTERS, *scenes.POSITIONS, *scenes.RELATIONS, *scenes.NUMBERS, *COMMON]
    return sorted({word for phrase in phrases for word in phrase.split()})


def build() -> PreTrainedTokenizerFast:
    letters = string.ascii_lowercase + string.digits
    marks = [
        "->",
        "-",
        ">",
        "<",
        ",",
        ".",
        "?",
        "!",
        ":",
        ";",
        "'",
        '"',
        "(",
        ")",
        "=",
        "+",
        "#",
        "%",
        "&",
        "@",
        "$",
        "*",
        "/",
    ]
    pieces = ["<pad>", "<start>", "<unk>", "<image>", *marks, *letters, *("##" + letter for letter in letters)]
    pieces += [word for word in words() if word not in pieces] + ["<end>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(token, vocabulary[token]) for token in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"], model_max_length=40,
    )  # fmt: skip


if __name__ == "__main__":
    tokenizer = build()
    tokenizer.save_pretrained(HERE)
    config = json.loads((HERE / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["vocab_size"] = len(tokenizer)
    (HERE / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{len(tokenizer)} tokens, end token {tokenizer.eos_token_id}")
