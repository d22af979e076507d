"""Held-out figures of the contrastive models: abilities, and what a regime makes of written words and of grounds."""

import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F

from mmfm_utils import scenes


def embedders(model, tokenizer):
    """Two functions: unit-length embeddings of scenes (image, embed), and of classes (class, embed), each the mean over
    its list of prompts (prompt ensembling, as in CLIP)."""
    device = next(model.parameters()).device

    def images(drawn: list) -> torch.Tensor:
        pixels = torch.from_numpy(scenes.render_batch(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts = [model.encode_image(part, normalize=True) for part in pixels.to(device).split(256)]
        return torch.cat(parts)

    def texts(prompts: list[list[str]]) -> torch.Tensor:
        flat = [prompt for group in prompts for prompt in group]
        parts = [model.encode_text(part, normalize=True) for part in tokenizer(flat).to(device).split(256)]
        means = torch.stack([group.mean(0) for group in torch.cat(parts).split([len(group) for group in prompts])])
        return F.normalize(means, dim=-1)

    return images, texts


@torch.no_grad()
def evaluate(model, tokenizer, n: int = 1000, seed: int = 1) -> dict[str, float]:
    """Held-out accuracies on unseen combinations of object, colour and ground; n scenes each, chance beside it.

    Zero-shot by the nearest sentence. Where a prompt has to name more than it asks about, its embeddings are averaged
    over that (prompt ensembling, as in CLIP), unless said otherwise.
    """
    images, texts = embedders(model, tokenizer)
    world = scenes.World(split="test", natural=0.0)
    single = [1.0]

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


@torch.no_grad()
def regimes(model, tokenizer, n: int = 600, seed: int = 1) -> dict[str, float]:
    """What a regime does to the zero-shot answer, the nearest of 48 sentences "a dog".

    noun: accuracy on single objects without a word. word_flips, word_changes, glyphs_change: on the same pictures with
    another object's name on a plate, how often the answer is that name, how often another than before; and the same
    with as many glyphs. stroop_word, stroop_ink: a colour's name in the ink of another, alone on a ground, asked for by
    the bare names of colours. ground_usual, ground_unusual: accuracy on the object's home ground and on others, for the
    half of the objects that are planted on it, and for the other half. gap: distance between the means of the two
    modalities' embeddings, over scenes and their full captions. All on the test side of the split.
    """
    images, texts = embedders(model, tokenizer)
    names, colours = list(scenes.OBJECTS), list(scenes.COLOURS)
    world = scenes.World(split="test", natural=0.0, counts=(1.0,))
    rng = np.random.default_rng(seed)
    nouns = texts([[scenes.phrase(name)] for name in names])

    def answers(drawn: list) -> np.ndarray:
        return np.array(names)[(images(drawn) @ nouns.T).argmax(-1).cpu().numpy()]

    plain = dataclasses.replace(world, words=1.0, word_kind="conflicting").sample_many(n, seed)
    bare = [dataclasses.replace(scene, word=None) for scene in plain]
    glyphs = [dataclasses.replace(s, word="".join(rng.choice(list("#%&@$*+=<>"), len(s.word)))) for s in plain]
    without, word, glyph = answers(bare), answers(plain), answers(glyphs)
    out = {
        "noun": np.mean([a == s.names[0] for a, s in zip(without, bare, strict=True)]),
        "word_flips": np.mean([a == s.word for a, s in zip(word, plain, strict=True)]),
        "word_changes": np.mean(word != without),
        "glyphs_change": np.mean(glyph != without),
    }
    pairs = [(w, i, g) for w in colours for i in colours if i != w for g in scenes.GROUNDS]
    signs = [scenes.Scene(items=(), ground=g, word=w, ink=i) for w, i, g in pairs]
    said = np.array(colours)[(images(signs) @ texts([[c] for c in colours]).T).argmax(-1).cpu().numpy()]
    out["stroop_word"], out["stroop_ink"] = (np.mean(said == np.array(pairs)[:, k]) for k in (0, 1))
    for half in ("planted", "other"):
        members = [name for name in names if (name in scenes.GROUNDED) == (half == "planted")]
        for place in ("usual", "unusual"):
            drawn = []
            for name in members:
                home = scenes.HOME_GROUND[name]
                grounds = [g for g in scenes.GROUNDS if (g == home) == (place == "usual")]
                grounds = tuple(g for g in grounds if any((name, c, g) in scenes.HELD_OUT for c in colours))
                if grounds:
                    of_name = dataclasses.replace(world, objects=(name,), grounds=grounds)
                    drawn += of_name.sample_many(n // 24, seed)
            right = [a == s.names[0] for a, s in zip(answers(drawn), drawn, strict=True)]
            out[f"ground_{place}_{half}"] = np.mean(right)
    full = dataclasses.replace(world, counts=(0.5, 0.3, 0.1, 0.1), natural=0.2).sample_many(n, seed)
    means = images(full).mean(0), texts([[scenes.caption(scene)] for scene in full]).mean(0)
    out["gap"] = (means[0] - means[1]).norm().item()
    return {name: round(float(value), 4) for name, value in out.items()}


@torch.no_grad()
def moment(model, tokenizer, n: int = 100) -> dict[str, float]:
    """A row of a run's table, but for its gradients: norms of weights by module and modality, and held-out figures."""
    out = {f"norm_{part}": value for part, value in norms(model, lambda p: p).items()}
    return out | evaluate(model, tokenizer, n) | regimes(model, tokenizer, n)


def norms(model, tensor_of) -> dict[str, float]:
    """Root mean square of the parameters of each module of each tower, or of what `tensor_of` gives for them.

    The modules are "embed" (patches, tokens, positions, class), "attn", "mlp", "ln" and "proj".
    """
    groups: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        tower = "image" if name.startswith("visual.") else "text"
        kinds = {"attn": ".attn.", "mlp": ".mlp.", "ln": "ln_", "proj": "proj"}
        kind = next((kind for kind, part in kinds.items() if part in name), "embed")
        found = tensor_of(p)
        if name != "logit_scale" and found is not None:
            groups.setdefault(f"{tower}_{kind}", []).append(found.detach().flatten())
    return {name: round(float(torch.cat(parts).square().mean().sqrt()), 6) for name, parts in sorted(groups.items())}
