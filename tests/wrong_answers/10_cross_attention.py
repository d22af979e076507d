"""Wrong answers to the exercises of 10: each must fail, with a message that names the mistake."""

WRONG = {
    "ex1-word-map": [
        (
            "averages over steps and heads",
            r"sum, do not average",
            """
heat = 0
for pattern in patterns.values():
    of_word = pattern[..., tokens].mean((0, 1, -1))
    side = round(len(of_word) ** 0.5)
    heat = heat + F.interpolate(of_word.view(1, 1, side, side), (size, size), mode="bicubic")[0, 0]
return heat.clamp(min=0)
""",
        ),
        (
            "columns for rows",
            r"rows come first",
            """
heat = 0
for pattern in patterns.values():
    of_word = pattern[..., tokens].mean(-1).sum((0, 1))
    side = round(len(of_word) ** 0.5)
    heat = heat + F.interpolate(of_word.view(1, 1, side, side).mT, (size, size), mode="bicubic")[0, 0]
return heat.clamp(min=0)
""",
        ),
        (
            "sums over the word's tokens",
            r"gets their mean",
            """
heat = 0
for pattern in patterns.values():
    of_word = pattern[..., tokens].sum((0, 1, -1))
    side = round(len(of_word) ** 0.5)
    heat = heat + F.interpolate(of_word.view(1, 1, side, side), (size, size), mode="bicubic")[0, 0]
return heat.clamp(min=0)
""",
        ),
        (
            "leaves the dips below zero",
            r"clamp it",
            """
heat = 0
for pattern in patterns.values():
    of_word = pattern[..., tokens].mean(-1).sum((0, 1))
    side = round(len(of_word) ** 0.5)
    heat = heat + F.interpolate(of_word.view(1, 1, side, side), (size, size), mode="bicubic")[0, 0]
return heat
""",
        ),
        (
            "keeps the last layer only",
            r"every layer counts|the bright spot",
            """
for pattern in patterns.values():
    of_word = pattern[..., tokens].mean(-1).sum((0, 1))
    side = round(len(of_word) ** 0.5)
    heat = F.interpolate(of_word.view(1, 1, side, side), (size, size), mode="bicubic")[0, 0]
return heat.clamp(min=0)
""",
        ),
    ],
    "ex2-iou": [
        (
            "divides by the mask alone",
            r"divide by the union",
            """
kept = heat >= tau * heat.max()
return ((kept & mask).sum() / mask.sum()).item()
""",
        ),
        (
            "a fixed threshold",
            r"8 of 15|share of the map's own maximum",
            """
kept = heat >= tau
return ((kept & mask).sum() / (kept | mask).sum()).item()
""",
        ),
    ],
    "ex3-reach": [
        (
            "one maximum for the whole batch",
            r"its own maximum",
            """
return (maps >= tau * maps.max()).sum((1, 2)) / masks.sum((1, 2))
""",
        ),
        (
            "one number for the whole batch",
            r"one number a picture",
            """
highest = maps.amax((1, 2), keepdim=True)
return (maps >= tau * highest).sum() / masks.sum()
""",
        ),
        (
            "the threshold of the paper, whatever is asked",
            r"at tau = 0.2",
            """
highest = maps.amax((1, 2), keepdim=True)
return (maps >= 0.4 * highest).sum((1, 2)) / masks.sum((1, 2))
""",
        ),
    ],
    "ex4-swap": [
        (
            "swaps in both halves of the batch",
            r"Only the second half",
            """
sites = [f"{place}.{part}" for place in places for part in ("k", "v")]
with record(sd.anatomy, sites) as seen:
    sd.model.unet(sd.noise(len(others)), 500, sd.encode(others))

def swap(both, site):
    both[:, tokens] = seen[site].repeat(2, 1, 1, 1)[:, tokens]
    return both

with edit(sd.anatomy, {site: swap for site in sites}, passes=passes):
    return sd.paint(prompts, seed=seed, steps=steps, batch=len(prompts))
""",
        ),
        (
            "swaps the keys alone",
            r"Keys and values",
            """
sites = [f"{place}.k" for place in places]
with record(sd.anatomy, sites) as seen:
    sd.model.unet(sd.noise(len(others)), 500, sd.encode(others))

def swap(told, site):
    told[:, tokens] = seen[site][:, tokens]
    return told

with edit(sd.anatomy, {site: anatomy.conditional(swap) for site in sites}, passes=passes):
    return sd.paint(prompts, seed=seed, steps=steps, batch=len(prompts))
""",
        ),
        (
            "swaps in all steps",
            r"pass on `passes`",
            """
sites = [f"{place}.{part}" for place in places for part in ("k", "v")]
with record(sd.anatomy, sites) as seen:
    sd.model.unet(sd.noise(len(others)), 500, sd.encode(others))

def swap(told, site):
    told[:, tokens] = seen[site][:, tokens]
    return told

with edit(sd.anatomy, {site: anatomy.conditional(swap) for site in sites}):
    return sd.paint(prompts, seed=seed, steps=steps, batch=len(prompts))
""",
        ),
        (
            "swaps at all places",
            r"did you use `places`",
            """
sites = [f"{place}.{part}" for place in PLACES for part in ("k", "v")]
with record(sd.anatomy, sites) as seen:
    sd.model.unet(sd.noise(len(others)), 500, sd.encode(others))

def swap(told, site):
    told[:, tokens] = seen[site][:, tokens]
    return told

with edit(sd.anatomy, {site: anatomy.conditional(swap) for site in sites}, passes=passes):
    return sd.paint(prompts, seed=seed, steps=steps, batch=len(prompts))
""",
        ),
        (
            "swaps all tokens",
            r"did you use `tokens`",
            """
sites = [f"{place}.{part}" for place in places for part in ("k", "v")]
with record(sd.anatomy, sites) as seen:
    sd.model.unet(sd.noise(len(others)), 500, sd.encode(others))
swap = anatomy.conditional(lambda told, site: seen[site])
with edit(sd.anatomy, {site: swap for site in sites}, passes=passes):
    return sd.paint(prompts, seed=seed, steps=steps, batch=len(prompts))
""",
        ),
    ],
}
