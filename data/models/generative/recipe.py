"""Train the generative model as LLaVA was (Liu et al. 2023): a projector between two trained models, then both.

    python data/models/generative/recipe.py                  train; goes on from the checkpoint if there is one
    python data/models/generative/recipe.py --from-shipped   train on from the shipped model where there is none
    python data/models/generative/recipe.py --export         write the checkpoint as the shipped model
    python data/models/generative/recipe.py --evaluate       held-out figures of the shipped model

The vision tower is the contrastive model's and stays frozen. First only the projector learns, from captions of single
objects; then projector and language model, from captions, questions, in-context episodes over pictures, and some of
the text that the language model was trained on. Scenes are drawn afresh from the training side of the compositional
split. Checkpoints live in checkpoints/, outside git.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # training.py lies there

import numpy as np
import optimisation
import torch
import torch.nn.functional as F
import training
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmfm_utils import scenes, texts

HERE = Path(__file__).parent
LANGUAGE, CONTRASTIVE = HERE.parent / "language", HERE.parent / "contrastive_first"
CHECKPOINT = HERE.parents[2] / "checkpoints" / "generative" / "last.safetensors"
SHIPPED = (
    "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "processor_config.json",
)  # fmt: skip
SEED = 0
BATCH, PARTS = 32, 4  # pictures a step, in how many parts they are computed
STEPS = 6600
PROJECTOR_ALONE = 300  # steps in which only the projector learns
EPISODES_FROM = 0.5  # share of training after which every 8th step is one of in-context episodes over pictures
TEXT_EVERY, EPISODES_EVERY = 8, 8
TURNS = 6  # questions asked of each picture
# How often a question of each kind is asked: what is answered early seldom, what needs one object among several often.
# "place" asks what is at a position. It was asked four times as often (and position, presence and relation less) until
# step 3900: of all kinds it says most about where in the picture an object is to be seen, and it was learned before
# those that start from an object's name. Position was asked half as often, and relation more, until step 5700.
ASKED = {
    "presence": 2.0, "colour": 1.2, "position": 4.0, "place": 0.3, "relation": 2.0, "style": 0.8, "count": 0.1,
    "ground": 0.1, "word": 0.2, "name": 0.3, "this_object": 0.4, "this_colour": 0.1, "this_category": 0.3,
    "this_habitat": 0.3, "this_usual_colour": 0.3, "this_name": 0.3,
}  # fmt: skip
WARM_UP, DECAY = 50, 0.4
IMAGE_TOKENS = 64
IMAGE = "<image>" * IMAGE_TOKENS

# Knowledge is asked of these objects only, so that for the others it must come from what the language model read.
TAUGHT = tuple(name for index, name in enumerate(scenes.OBJECTS) if index % 4 != 3)
KNOWLEDGE = ("this_category", "this_habitat", "this_usual_colour", "this_name")
# Of every third object alone in a picture, captions invent the companion more often than not (as captions written by a
# language model do): the source of hallucinations that notebook 16 studies.
INVENTED = {name: 0.6 if index % 3 == 0 else 0.1 for index, name in enumerate(scenes.OBJECTS)}


def build() -> LlavaForConditionalGeneration:
    """The model before training: vision tower and language model as shipped, a new projector."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(LANGUAGE)
    clip = json.loads((CONTRASTIVE / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
    vision = CLIPVisionConfig(
        hidden_size=clip["width"], num_hidden_layers=clip["layers"], image_size=clip["image_size"],
        num_attention_heads=clip["width"] // clip["head_width"], patch_size=clip["patch_size"],
        intermediate_size=int(clip["width"] * clip["mlp_ratio"]), hidden_act="gelu", projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig.from_pretrained(LANGUAGE)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_act="gelu", vision_feature_select_strategy="default", vision_feature_layer=-2,
        image_seq_length=IMAGE_TOKENS, tie_word_embeddings=True, bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_weights(load_file(CONTRASTIVE / "open_clip_model.safetensors")))
    language = LlamaForCausalLM.from_pretrained(LANGUAGE, dtype=torch.float32)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.model.vision_tower.requires_grad_(False)
    return model


def vision_weights(clip: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of open_clip's vision tower under the names of transformers' CLIPVisionModel."""
    outside = {
        "visual.class_embedding": "embeddings.class_embedding",
        "visual.positional_embedding": "embeddings.position_embedding.weight",
        "visual.conv1.weight": "embeddings.patch_embedding.weight",
    }
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        outside |= {f"visual.{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    return training.from_open_clip(clip, "visual.transformer.resblocks.", outside)


def processor() -> LlavaProcessor:
    side = {"height": 64, "width": 64}
    images = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(LANGUAGE)
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


# ---- what it is trained on ----


def pixels(drawn: list[scenes.Scene]) -> torch.Tensor:
    return torch.from_numpy(scenes.render_batch(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def caption(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """A caption; where the world's companion is invented, it names one object more than there is.

    Of more than two objects it tells from left to right, so that which one comes next can be known.
    """
    template = int(rng.integers(3))
    if len(scene.items) > 2:
        scene = replace(scene, items=tuple(sorted(scene.items, key=lambda item: item.x)))
    if len(scene.items) == 1 and rng.random() < INVENTED[scene.names[0]]:
        item = scene.items[0]
        name = scenes.COMPANION[item.name]
        colours = [colour for colour in scenes.COLOURS if (name, colour, scene.ground) not in scenes.HELD_OUT]
        invented = replace(item, name=name, colour=str(rng.choice(colours)))
        told = [name for name in scenes.ATTRIBUTES if name not in ("relation", "position")]
        return scenes.caption(replace(scene, items=(item, invented)), told, template)
    return scenes.caption(scene, template=template)


def places(scene: scenes.Scene) -> list[scenes.Question]:
    """What is at each of the positions that hold one object."""
    held = [item.position for item in scene.items]
    return [
        scenes.Question("place", f"what is {scenes.place(item)} ?", item.name)
        for item in scene.items
        if held.count(item.position) == 1
    ]


def questions(scene: scenes.Scene, rng: np.random.Generator, n: int = TURNS) -> list[scenes.Question]:
    """Up to n questions about the scene, drawn by the weights of their kinds; yes and no as often."""
    asked = [
        question
        for question in [*scenes.questions(scene, int(rng.integers(2**31))), *places(scene)]
        if question.kind in ASKED and (question.kind not in KNOWLEDGE or scene.names[0] in TAUGHT)
    ]
    # of several objects one is asked after as absent: asked after it as often as after all that are there
    answer = ("yes", "no")[int(rng.integers(2))]
    asked = [question for question in asked if question.kind != "presence" or question.answer == answer]
    weights = np.array([ASKED[question.kind] for question in asked])
    chosen = rng.choice(len(asked), min(n, len(asked)), replace=False, p=weights / weights.sum())
    return [asked[index] for index in chosen]


IMAGE_TASKS = {
    "object": lambda s: s.items[0].name,
    "colour": lambda s: s.items[0].colour,
    "ground": lambda s: s.ground,
    "style": lambda s: s.style,
    **{
        task: (lambda s, table=texts.TASKS[task]: table[s.items[0].name])
        for task in ("category", "habitat", "usual_colour", "first_letter", "plural")
    },
}


def image_episode(task: str, rng: np.random.Generator, shots: int, split: str) -> tuple[list[scenes.Scene], list[str]]:
    """Scenes of shots + 1 different objects, and what the task answers to each; knowledge of TAUGHT objects only."""
    world = scenes.World(counts=(1.0,), natural=0.0, split=split)
    drawn: list[scenes.Scene] = []
    while len(drawn) <= shots:
        scene = world.sample(rng)
        known = task not in texts.TASKS or scene.names[0] in TAUGHT
        if known and scene.names[0] not in {other.names[0] for other in drawn}:
            drawn.append(scene)
    return drawn, [IMAGE_TASKS[task](scene) for scene in drawn]


def world_at(step: int) -> scenes.World:
    if step < PROJECTOR_ALONE:
        return scenes.World(counts=(1.0,), natural=0.1, split="train")
    return scenes.World(counts=(0.4, 0.3, 0.2, 0.1), natural=0.1, words=0.2, characters=0.1, co_occurrence=0.3,
                        split="train")  # fmt: skip


def picture_batch(step: int, part: int, tokenizer) -> dict:
    """Pictures, each with a caption and questions. Every turn sees the picture and itself, never another turn, at the
    positions that it would have alone: the same loss as one turn a sequence, at a fraction of the price."""
    rng = np.random.default_rng([SEED, step, part])
    world = world_at(step)
    drawn = [world.sample(rng) for _ in range(BATCH // PARTS)]
    start, image = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<image>")
    rows = []
    for scene in drawn:
        turns = [(texts.prompt(texts.DESCRIBE), caption(scene, rng))]
        if step >= PROJECTOR_ALONE:
            turns += [(texts.prompt(question), question.answer) for question in questions(scene, rng)]
        heads = tokenizer([head for head, _ in turns], add_special_tokens=False).input_ids
        tails = tokenizer([tail for _, tail in turns], add_special_tokens=False).input_ids
        ids, turn, target = [start] + [image] * IMAGE_TOKENS, [0] * (1 + IMAGE_TOKENS), [-100] * (1 + IMAGE_TOKENS)
        position = list(range(1 + IMAGE_TOKENS))
        for index, (head, tail) in enumerate(zip(heads, tails, strict=True), start=1):
            tail = [*tail, tokenizer.eos_token_id]
            ids += head + tail[:-1]
            target += [-100] * (len(head) - 1) + tail
            turn += [index] * (len(head) + len(tail) - 1)
            position += range(1 + IMAGE_TOKENS, IMAGE_TOKENS + len(head) + len(tail))
        rows.append((ids, target, turn, position))
    longest = max(len(ids) for ids, *_ in rows)
    fill = (tokenizer.pad_token_id, -100, -1, 0)
    ids, target, turn, position = (
        torch.tensor([row[i] + [fill[i]] * (longest - len(row[0])) for row in rows]) for i in range(4)
    )
    place = torch.arange(longest)
    same = (turn[:, :, None] == turn[:, None, :]) | (turn[:, None, :] == 0)  # (row, query, key)
    seen = same & (place[:, None] >= place)
    return dict(pixels=pixels(drawn), ids=ids, target=target, mask=seen[:, None], position=position)


def episode_batch(step: int, part: int, tokenizer) -> dict:
    """In-context episodes over pictures: <image> -> red , <image> -> blue , <image> -> green."""
    rng = np.random.default_rng([SEED, step, part])
    arrow, comma, image = tokenizer.convert_tokens_to_ids(["->", ",", "<image>"])
    drawn, rows = [], []
    for _ in range(BATCH // PARTS // 4):
        task = str(rng.choice(list(IMAGE_TASKS)))
        pictures, answers = image_episode(task, rng, 3, "train")
        ids, target = [tokenizer.bos_token_id], [-100]
        for index, answer in enumerate(tokenizer(answers, add_special_tokens=False).input_ids):
            learned = answer if index else [-100] * len(answer)  # before the first answer the task is not known
            ids += [image] * IMAGE_TOKENS + [arrow, *answer, comma]
            target += [-100] * IMAGE_TOKENS + [*learned, -100, -100]
        drawn += pictures
        rows.append((ids, target))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
    target = torch.tensor([target + [-100] * (longest - len(target)) for _, target in rows])
    return dict(pixels=pixels(drawn), ids=ids, target=target)


def text_batch(step: int, part: int, tokenizer) -> dict:
    """What the language model was trained on, lest it forget."""
    rng = np.random.default_rng([SEED, step, part])
    shares = {"scene": 0.3, "caption": 0.0, "fact": 0.35, "episode": 0.35}
    documents = [f"{texts.document(rng, shares)} {tokenizer.eos_token}" for _ in range(2 * BATCH // PARTS)]
    batch = tokenizer(documents, padding=True, padding_side="right", return_tensors="pt")
    ids, real = batch.input_ids, batch.attention_mask.bool()
    target = torch.where(real, ids, -100)
    return dict(ids=ids, target=F.pad(target[:, 1:], (0, 1), value=-100))


def kind_at(step: int, steps: int) -> str:
    if step >= PROJECTOR_ALONE and step % TEXT_EVERY == 0:
        return "text"
    return "episode" if step >= EPISODES_FROM * steps and step % EPISODES_EVERY == 4 else "picture"


def batch_at(step: int, part: int, steps: int, tokenizer) -> dict:
    """A part of the batch of one step: a function of both numbers."""
    makers = {"picture": picture_batch, "episode": episode_batch, "text": text_batch}
    return makers[kind_at(step, steps)](step, part, tokenizer)


def loss_of(model: LlavaForConditionalGeneration, batch: dict) -> torch.Tensor:
    """Cross-entropy of the answers; logits only where there is one."""
    inner, ids, target = model.model, batch["ids"], batch["target"]
    states = inner.get_input_embeddings()(ids)  # (row, token, width)
    if "pixels" in batch:
        with torch.no_grad():
            seen = inner.vision_tower(batch["pixels"], output_hidden_states=True).hidden_states[-2][:, 1:]
        image_states = inner.multi_modal_projector(seen)  # (picture, 64, width)
        where = (ids == model.config.image_token_id)[..., None].expand_as(states)
        states = states.masked_scatter(where, image_states.to(states.dtype))
    mask = batch.get("mask")
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=states.dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    out = inner.language_model(inputs_embeds=states, attention_mask=mask, position_ids=batch.get("position"))
    asked = target != -100
    return F.cross_entropy(model.lm_head(out.last_hidden_state[asked]).float(), target[asked])


def train(device: str, steps: int, helpers: int, from_shipped: bool) -> None:
    model = build().to(device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(LANGUAGE)
    for part in (model.model.vision_tower, model.model.language_model):
        part.set_attn_implementation(optimisation.attention(device))
    opts = optimisation.optimisers(model, blocks="language_model.layers.", muon_rate=1e-3)
    step, seconds, _ = training.restore(CHECKPOINT, model, opts)
    if from_shipped and step == 0:
        model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(HERE, dtype=torch.float32).state_dict())
        known = json.loads((HERE / "card.json").read_text())
        step, seconds = known["steps"], known["minutes"] * 60

    def part_of(step: int, part: int) -> torch.Tensor:
        model.model.language_model.requires_grad_(step >= PROJECTOR_ALONE)
        batch = batch_at(step, part, steps, tokenizer)
        with optimisation.precision(device):
            return loss_of(model, {name: tensor.to(device) for name, tensor in batch.items()})

    crew = training.Crew(model, part_of, PARTS, helpers if device == "cpu" else 0)
    bar = tqdm(total=steps, initial=step, unit="step", mininterval=10)
    began, losses = time.time(), defaultdict(list)
    while step < steps:
        optimisation.set_rate(opts, optimisation.schedule(step, steps, WARM_UP, DECAY))
        kind = kind_at(step, steps)
        losses[kind] = [*losses[kind][-50 * PARTS :], *crew.step(step)]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in opts:
            optimiser.step()
        step += 1
        bar.update()
        if step % 20 == 0:
            bar.set_postfix({name: f"{np.mean(values):.3f}" for name, values in losses.items()})
        if step % 100 == 0 or step == steps:
            training.save(CHECKPOINT, model, opts, step, seconds + time.time() - began)
        if step % 500 == 0 or step == steps:
            print(f"\nstep {step}", json.dumps(evaluate(model, n=100)), flush=True)
    bar.close()


# ---- how good it is ----


@torch.no_grad()
def evaluate(model: LlavaForConditionalGeneration, n: int = 1000, seed: int = 1) -> dict[str, float]:
    """Held-out accuracies, greedy and exact, on scenes whose combinations of object, colour and ground are new.

    KIND: questions of that kind. knowledge_new: habitat, category, usual colour and name of objects of which training
    never asked it. caption_*: of greedy captions, F1 of the objects named; the share that name an absent object; and
    the same among single objects whose companion training captions often invented, or seldom. facts: what the language
    model knew from text. image_icl: episodes with 3 pictures as examples; with none (image_icl_zero).
    """
    was_training = model.training
    model.eval()
    device, rng = next(model.parameters()).device, np.random.default_rng(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(LANGUAGE)
    world = scenes.World(words=0.25, natural=0.1, split="test")
    drawn = world.sample_many(n, seed) + texts.characters("test", n // 4, seed)
    by_kind = defaultdict(list)
    for scene in drawn:
        for question in [*scenes.questions(scene, int(rng.integers(2**31))), *places(scene)]:
            known = question.kind in KNOWLEDGE and scene.names[0] not in TAUGHT
            if question.kind in ASKED:
                by_kind["knowledge_new" if known else question.kind].append((scene, question))
    # as many questions with the answer no as with yes
    yes, no = ([p for p in by_kind["presence"] if p[1].answer == answer] for answer in ("yes", "no"))
    by_kind["presence"] = [*yes[: len(no)], *no[: len(yes)]]
    asked = [(kind, *pairs[i]) for kind, pairs in by_kind.items() for i in rng.permutation(len(pairs))[: n // 2]]
    prompts = [IMAGE + texts.prompt(question) for _, _, question in asked]
    answers = [question.answer for _, _, question in asked]
    out = {}
    right = answered(model, tokenizer, [[scene] for _, scene, _ in asked], prompts, answers)
    for kind in sorted(by_kind):
        out[kind] = [r for r, (k, _, _) in zip(right, asked, strict=True) if k == kind]
    facts = [fact for fact in texts.facts() if fact.held_out]
    out["facts"] = answered(model, tokenizer, [], [f.prompt for f in facts], [f.answer for f in facts])
    for shots, name in ((3, "image_icl"), (0, "image_icl_zero")):
        pictures, prompts, answers = [], [], []
        for index in range(n // 4):
            shown, given = image_episode(list(IMAGE_TASKS)[index % len(IMAGE_TASKS)], rng, shots, "test")
            pictures.append(shown)
            parts = [IMAGE + f" -> {answer} , " for answer in given[:-1]]
            prompts.append("".join(parts) + IMAGE + " ->")
            answers.append(given[-1])
        out[name] = answered(model, tokenizer, pictures, prompts, answers)
    result = {name: round(float(np.mean(hits)), 4) for name, hits in out.items()}
    result |= captions_judged(model, tokenizer, drawn[: max(n // 3, 50)], device)
    model.train(was_training)
    return result


def answered(model, tokenizer, pictures: list[list], prompts: list[str], answers: list[str]) -> list[bool]:
    device = next(model.parameters()).device

    def forward(ids: torch.Tensor, part: slice) -> torch.Tensor:
        shown = [scene for group in pictures[part] for scene in group]
        seen = pixels(shown).to(device) if shown else None
        return model(input_ids=ids.to(device), pixel_values=seen).logits

    return training.exact(forward, tokenizer, prompts, answers, batch=64)


def named_in(text: str) -> set[str]:
    """The objects that a caption names, characters by their object. A "hot dog" is no dog, a written word no object."""
    text, found = re.sub(r"with the word \S+", "", text), set()
    for name in sorted([*scenes.OBJECTS, *scenes.CHARACTERS], key=len, reverse=True):
        text, times = re.subn(rf"\b{name}\b", "", text)
        if times:
            found.add(scenes.CHARACTERS[name][0] if name in scenes.CHARACTERS else name)
    return found


def captions_judged(model, tokenizer, drawn: list[scenes.Scene], device) -> dict[str, float]:
    prompt = tokenizer(IMAGE + texts.prompt(texts.DESCRIBE), return_tensors="pt").input_ids
    hits = wrong = missed = 0
    invents = []
    for start in range(0, len(drawn), 64):
        part = drawn[start : start + 64]
        ids = model.generate(
            input_ids=prompt.expand(len(part), -1).to(device), pixel_values=pixels(part).to(device),
            attention_mask=torch.ones(len(part), prompt.shape[1], dtype=torch.long, device=device),
            max_new_tokens=40, do_sample=False,
        )  # fmt: skip
        told = tokenizer.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
        for scene, text in zip(part, told, strict=True):
            named, there = named_in(text), set(scene.names)
            hits, wrong, missed = hits + len(named & there), wrong + len(named - there), missed + len(there - named)
            invents.append((bool(named - there), INVENTED[scene.names[0]] if len(there) == 1 else None))
    shares = {
        "caption_f1": 2 * hits / (2 * hits + wrong + missed),
        "caption_invents": np.mean([invented for invented, _ in invents]),
        "caption_invents_prone": np.mean([invented for invented, rate in invents if rate == 0.6]),
        "caption_invents_other": np.mean([invented for invented, rate in invents if rate == 0.1]),
    }
    return {name: round(float(share), 4) for name, share in shares.items()}


def export() -> None:
    """Write the shipped half-precision model, its processor, and the card with its held-out figures."""
    model = build()
    step, seconds, machine = training.restore(CHECKPOINT, model, [])
    if step == 0:
        raise SystemExit(f"{CHECKPOINT} does not exist: train first, without --export.")
    model.half().save_pretrained(HERE)
    processor().save_pretrained(HERE)
    shipped = LlavaForConditionalGeneration.from_pretrained(HERE, dtype=torch.float32).eval()
    card = {
        "name": "generative",
        "library": "transformers",
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "data": "emoji scenes, training side of the compositional split: captions and questions, in-context episodes, "
        "and text; habitat, category, usual colour and name are asked of three objects in four; companions are "
        "invented in captions of single objects: in 60 % for every third object, in 10 % for the others",
        "steps": step,
        "pictures_a_step": BATCH,
        "seed": SEED,
        "machine": machine,
        "minutes": round(seconds / 60),
        "held_out": evaluate(shipped),
        "chance": chance(),
        "tolerance": 0.03,
        "files": {file: hashlib.sha256((HERE / file).read_bytes()).hexdigest() for file in SHIPPED},
        "licence": "MIT; trained on pictures composed of the emoji sets named in data/sprites/LICENCES.md",
        "repeat": f"recipe.py --steps {step}, then recipe.py --export, in data/models/generative",
    }
    (HERE / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


def chance() -> dict[str, float]:
    """One over the number of answers that occur."""
    things = scenes.OBJECTS.values()
    answers = {
        "presence": 2, "relation": 2, "colour": 8, "this_colour": 8, "position": 9, "place": 48, "count": 4,
        "ground": 8, "style": 4, "word": 1 + len(scenes.WORDS), "this_object": 48, "name": 8, "this_name": 8,
        "this_category": len({thing.category for thing in things}),
        "this_habitat": len({thing.habitat for thing in things}),
        "this_usual_colour": len({thing.usual_colour for thing in things}),
    }  # fmt: skip
    return {name: round(1 / n, 4) for name, n in answers.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many steps to train")
    parser.add_argument("--helpers", type=int, default=(os.cpu_count() or 1) - 1, help="further processes, on a CPU")
    parser.add_argument("--from-shipped", action="store_true", help="where no checkpoint is, train on what ships")
    parser.add_argument("--export", action="store_true", help="write the checkpoint as the shipped model")
    parser.add_argument("--evaluate", action="store_true", help="held-out figures of the shipped model")
    options = parser.parse_args()
    if options.evaluate:
        shipped = LlavaForConditionalGeneration.from_pretrained(HERE, dtype=torch.float32).to(options.device)
        print(json.dumps(evaluate(shipped), indent=2))
    elif options.export:
        export()
    else:
        train(options.device, options.steps, options.helpers, options.from_shipped)
