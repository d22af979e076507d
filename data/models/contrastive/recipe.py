"""Train the contrastive model: image and caption of emoji scenes, symmetric InfoNCE (CLIP, Radford et al. 2021).

    python data/models/contrastive/recipe.py                 train; goes on from the checkpoint if there is one
    python data/models/contrastive/recipe.py --from-shipped --pairs 2000000    train the shipped weights further
    python data/models/contrastive/recipe.py --evaluate      held-out figures of the shipped weights

Scenes are drawn afresh at every step (nothing is seen twice) from the training side of the compositional split.
Checkpoints live in checkpoints/contrastive, outside git; --export writes the weights that are shipped.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from mmfm_utils import scenes, training

HERE = Path(__file__).parent
CHECKPOINT = HERE.parents[2] / "checkpoints" / "contrastive" / "last.safetensors"
SEED = 0
SHIPPED = ("open_clip_model.safetensors", "open_clip_config.json", "tokenizer.json", "tokenizer_config.json")
BATCH = 256
PAIRS = 850_000
# In steps: how long batches are unconstrained; when groups have reached their full share; from when on batches share
# nearly everything; between which steps no patches are dropped.
FREE, GROUPS_IN, SHARP, DENSE = 400, 1400, 1200, (781, 1200)
SIZED = 1800  # step from which the objects of such a batch have one size, any of the three
# Half the captions mention every attribute, half mention them with these probabilities.
MENTION = {"colour": 0.8, "style": 0.7, "ground": 0.6, "size": 0.3, "position": 0.3, "relation": 0.7, "word": 0.9}
WARM_UP, DECAY = 84, 0.25  # steps of rising learning rate; share of training with a falling one


class PlainAttention(nn.MultiheadAttention):
    """Self-attention as three batched products. PyTorch's fused kernel takes more than half of a training step on a
    CPU, nearly all of it in its backward pass; this one is several times as fast there and gives the same result."""

    def forward(self, query, key, value, attn_mask=None, **_unused):
        batch, tokens, width = query.shape
        joint = F.linear(query, self.in_proj_weight, self.in_proj_bias).view(batch, tokens, 3, self.num_heads, -1)
        with torch.autocast(query.device.type, enabled=False):  # keeps the softmax in bfloat16
            q, k, v = joint.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind()  # (batch * head, token, head_dim)
            scores = torch.bmm(q * self.head_dim**-0.5, k.transpose(1, 2))
            if attn_mask is not None:
                scores = scores + attn_mask.to(scores.dtype)
            mixed = torch.bmm(scores.softmax(-1), v)
        mixed = mixed.view(batch, self.num_heads, tokens, -1).transpose(1, 2).reshape(batch, tokens, width)
        return F.linear(mixed, self.out_proj.weight, self.out_proj.bias), None


def kind_at(step: int) -> str:
    """What the batch of a step is meant to teach: everything, objects, or written words."""
    if step < FREE:
        return "free"
    kinds = ["free", "objects", "words", "objects"] + (["words"] if step >= SHARP else [])
    return kinds[step % len(kinds)]


def sparse_at(step: int, steps: int) -> bool:
    """Whether half the patches are dropped, for twice the speed (FLIP, Li et al. 2023); to learn to read needs all."""
    return step < DENSE[0] or DENSE[1] <= step < (1 - DECAY) * steps and kind_at(step) != "words"


def batch_at(step: int, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The images (pair, 3, 64, 64) and tokens (pair, 40) of one step: a function of the step, so a resumed run agrees.

    Single objects come first, pairs and groups join as training goes on. Left alone, colour, ground and position tell
    256 scenes apart, and the model is slow to learn what an object is, and does not learn to read. So from step FREE on
    most batches share what is easy, and from step SHARP on almost everything but what they are meant to teach. (From
    the first step on, such batches are too hard to learn anything from.)
    """
    rng = np.random.default_rng([SEED, step])

    def some(values, n: int) -> tuple:
        return tuple(values[i] for i in rng.choice(len(values), n, replace=False))

    kind, share = kind_at(step), min(1.0, step / GROUPS_IN)
    switches = dict(counts=(1 - 0.5 * share, 0.15 + 0.2 * share, 0.075 * share, 0.075 * share))
    switches |= dict(words=0.3, characters=0.05, split="train")
    mentions = (1.0, MENTION if step >= FREE else 0.7)
    names, colours = tuple(scenes.OBJECTS), tuple(scenes.COLOURS)
    if kind != "free":
        switches |= dict(grounds=some(scenes.GROUNDS, 1), colours=some(colours, 2), words=0.1)
    if kind == "words":
        switches |= dict(objects=some(names, 6), styles=some(scenes.STYLES, 1), words=1.0, characters=0.0)
    if kind != "free" and step >= SHARP:
        silent = {"position": 0.0, "size": 0.0}
        switches |= dict(natural=0.0, sizes=("medium",), counts=(0.7, 0.3))
        if step >= SIZED:
            switches |= dict(sizes=some(tuple(scenes.SIZES), 1))
        if switches["sizes"] == ("large",):
            switches |= dict(counts=(1.0,))  # two do not fit
        mentions = (silent, MENTION | silent)
        switches |= dict(objects=some(names, 4)) if kind == "words" else dict(colours=some(colours, 1), words=0.0)
    worlds = [scenes.World(mention=mention, **switches) for mention in mentions]
    drawn = [(worlds[index % 2], worlds[index % 2].sample(rng)) for index in range(BATCH)]
    captions = [world.caption(scene, rng) for world, scene in drawn]
    images = torch.from_numpy(scenes.render_batch([scene for _, scene in drawn]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1, tokenizer(captions)


def train(device: str, pairs: int, from_shipped: bool = False) -> None:
    torch.manual_seed(SEED)
    model = open_clip.create_model(f"local-dir:{HERE}", load_weights=False).to(device)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{HERE}")
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.__class__ = PlainAttention
    opts = training.optimisers(model, blocks="resblocks")
    step, seconds, _ = training.restore(CHECKPOINT, model, opts)
    if from_shipped and step == 0:
        card = json.loads((HERE / "card.json").read_text())
        model.load_state_dict(load_file(HERE / SHIPPED[0]))
        step, seconds = card["pairs_seen"] // BATCH, 60.0 * card["minutes"]
    steps = pairs // BATCH
    model.train()
    bar = tqdm(total=steps * BATCH, initial=step * BATCH, unit="pair", unit_scale=True, mininterval=10)
    began, losses = time.time(), []
    sparse, whole = PatchDropout(0.5), nn.Identity()
    while step < steps:
        model.visual.patch_dropout = sparse if sparse_at(step, steps) else whole
        images, tokens = (x.to(device) for x in batch_at(step, tokenizer))
        torch.manual_seed(step)  # for the patch dropout
        training.set_rate(opts, training.schedule(step, steps, WARM_UP, DECAY))
        with training.precision(device):
            image, text, scale = model(images, tokens)
            logits = scale * image.float() @ text.float().T  # (image, text)
            target = torch.arange(BATCH, device=device)
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            for optimiser in opts:
                optimiser.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in opts:
            optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        step += 1
        bar.update(BATCH)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", scale=f"{scale.item():.0f}")
        if step % 200 == 0 or step == steps:
            training.save(CHECKPOINT, model, opts, step, seconds + time.time() - began)
        if step % 400 == 0 or step == steps:
            print(f"\n{step * BATCH} pairs", json.dumps(evaluate(model.eval(), tokenizer, n=256)), flush=True)
            model.train()
    bar.close()


@torch.no_grad()
def evaluate(model, tokenizer, n: int = 1000, seed: int = 1) -> dict[str, float]:
    """Held-out accuracies on unseen combinations of object, colour and ground; n scenes each, chance beside it.

    Zero-shot by the nearest sentence. Where a prompt has to name more than it asks about, its embeddings are averaged
    over that (prompt ensembling, as in CLIP), unless said otherwise.
    """
    device = next(model.parameters()).device
    world = scenes.World(split="test", natural=0.0)
    single = [1.0]

    def images(drawn: list) -> torch.Tensor:
        pixels = torch.from_numpy(scenes.render_batch(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts = [model.encode_image(part, normalize=True) for part in pixels.to(device).split(256)]
        return torch.cat(parts)  # (image, embed)

    def texts(prompts: list[list[str]]) -> torch.Tensor:
        flat = [prompt for group in prompts for prompt in group]
        parts = [model.encode_text(part, normalize=True) for part in tokenizer(flat).to(device).split(256)]
        means = torch.stack([group.mean(0) for group in torch.cat(parts).split([len(group) for group in prompts])])
        return F.normalize(means, dim=-1)  # (class, embed)

    def share(drawn, classes: list[str], prompts: list[list[str]], truth) -> float:
        guess = (images(drawn) @ texts(prompts).T).argmax(-1).tolist()
        return float(np.mean([classes[g] == truth(scene) for g, scene in zip(guess, drawn, strict=True)]))

    with_ = functools.partial(dataclasses.replace, world)
    objects, nouns = list(scenes.OBJECTS), [scenes.phrase(name) for name in scenes.OBJECTS]
    alone = with_(counts=tuple(single)).sample_many(n, seed)
    out = {}
    # Object and style: the nearest of all sentences "a noto drawing of a red dog", whatever its colour. What a style
    # looks like depends on the object, so sentences averaged over objects name it less well: reported beside.
    kinds = [(style, name, colour) for style in scenes.STYLES for name in objects for colour in scenes.COLOURS]
    every = texts([[f"{scenes.article(style)} drawing of {scenes.phrase(name, c)}"] for style, name, c in kinds])
    nearest = [kinds[i] for i in (images(alone) @ every.T).argmax(-1).tolist()]
    out["object"] = float(np.mean([name == s.items[0].name for (_, name, _), s in zip(nearest, alone, strict=True)]))
    out["style"] = float(np.mean([style == s.style for (style, _, _), s in zip(nearest, alone, strict=True)]))
    prompts = [[scenes.phrase(name, colour) for colour in scenes.COLOURS] for name in objects]
    out["object_averaged"] = share(alone, objects, prompts, lambda s: s.items[0].name)
    prompts = [[f"{scenes.article(style)} drawing of {noun}" for noun in nouns] for style in scenes.STYLES]
    out["style_averaged"] = share(alone, list(scenes.STYLES), prompts, lambda s: s.style)
    prompts = [[f"{noun} on {ground}" for noun in nouns] for ground in scenes.GROUNDS]
    out["ground"] = share(alone, list(scenes.GROUNDS), prompts, lambda s: s.ground)
    colours = list(scenes.COLOURS)
    tinted = texts([[scenes.phrase(name, colour)] for name in objects for colour in colours])
    variants = tinted.unflatten(0, (len(objects), len(colours)))[[objects.index(s.items[0].name) for s in alone]]
    guess = torch.einsum("ie,ice->ic", images(alone), variants).argmax(-1).tolist()
    out["colour"] = float(np.mean([colours[g] == s.items[0].colour for g, s in zip(guess, alone, strict=True)]))

    def choice(drawn, pair) -> float:
        """How often the true one of two captions is nearer."""
        both = [pair(scene) for scene in drawn]
        embedded = images(drawn)
        true, false = (texts([[p[i]] for p in both]) for i in (0, 1))
        return float(((embedded * true).sum(-1) > (embedded * false).sum(-1)).float().mean())

    def nouns_of(scene, swap=False):
        colours = [item.colour for item in scene.items]
        if swap:
            colours = colours[::-1]
        return [scenes.phrase(item.name, c) for c, item in zip(colours, scene.items, strict=True)]

    two = [s for s in with_(counts=(0.0, 1.0)).sample_many(2 * n, seed + 1) if s.items[0].colour != s.items[1].colour][
        :n
    ]
    flip = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

    def relation(scene):
        a, b = nouns_of(scene)
        return f"{a} {scene.relation} {b}", f"{a} {flip[scene.relation]} {b}"

    beside = [scene for scene in two if scene.relation in ("left of", "right of")]
    out["relation_horizontal"] = choice(beside, relation)
    out["relation_vertical"] = choice([scene for scene in two if scene not in beside], relation)
    out["colour_binding"] = choice(two, lambda s: (" and ".join(nouns_of(s)), " and ".join(nouns_of(s, swap=True))))
    full = with_(counts=(0.5, 0.3, 0.1, 0.1), natural=0.2, words=0.25).sample_many(512, seed + 2)
    scores = images(full) @ texts([[scenes.caption(scene)] for scene in full]).T
    out["recall_at_1"] = float((scores.argmax(-1).cpu() == torch.arange(len(full))).float().mean())
    written = with_(counts=(0.5, 0.5), words=1.0).sample_many(n, seed + 3)
    prompts = [[f"{noun} with the word {word}" for noun in nouns[::4]] for word in scenes.WORDS]
    out["word"] = share(written, list(scenes.WORDS), prompts, lambda s: s.word)
    return {name: round(value, 4) for name, value in out.items()}


CHANCE = {
    "object": 1 / 48, "style": 1 / 4, "object_averaged": 1 / 48, "style_averaged": 1 / 4, "ground": 1 / 8,
    "colour": 1 / 8, "relation_horizontal": 1 / 2, "relation_vertical": 1 / 2, "colour_binding": 1 / 2,
    "recall_at_1": 1 / 512, "word": 1 / len(scenes.WORDS),
}  # fmt: skip


def export() -> None:
    """Write the shipped half-precision weights and the card with their held-out figures."""
    model = open_clip.create_model(f"local-dir:{HERE}", load_weights=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{HERE}")
    step, seconds, machine = training.restore(CHECKPOINT, model, [])
    if step == 0:
        raise SystemExit(f"{CHECKPOINT} does not exist: train first, without --export.")
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, HERE / "open_clip_model.safetensors", {"format": "pt"})
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    card = {
        "name": "contrastive",
        "library": "open_clip",
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": "emoji scenes, training side of the compositional split; the kinds of batches, and when each begins, "
        "stand in batch_at",
        "pairs_seen": step * BATCH,
        "seed": SEED,
        "machine": machine,
        "minutes": round(seconds / 60),
        "held_out": evaluate(model.eval(), tokenizer),
        "chance": {name: round(value, 4) for name, value in CHANCE.items()},
        "tolerance": 0.02,
        "files": {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in SHIPPED},
        "licence": "MIT; trained on pictures composed of the emoji sets named in data/sprites/LICENCES.md",
        "repeat": f"recipe.py --pairs {step * BATCH} and then recipe.py --export, in data/models/contrastive",
    }
    (HERE / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="how many image-caption pairs to train on")
    parser.add_argument("--from-shipped", action="store_true", help="without a checkpoint, go on from what is shipped")
    parser.add_argument("--export", action="store_true", help="write the checkpoint as the shipped weights")
    parser.add_argument("--evaluate", action="store_true", help="held-out figures of the shipped weights")
    options = parser.parse_args()
    if options.evaluate:
        model = open_clip.create_model(f"local-dir:{HERE}").to(options.device).eval()
        print(json.dumps(evaluate(model, open_clip.get_tokenizer(f"local-dir:{HERE}")), indent=2))
    elif options.export:
        export()
    else:
        train(options.device, options.pairs, options.from_shipped)
