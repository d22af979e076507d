"""Wrong answers to the exercises of 00_tour: each must fail, with a message that names the mistake."""

WRONG = {
    "ex1-patch-tokens": [
        (
            "takes the states from the first pictures",
            r"must give the run on `source`",
            """
with torch.no_grad(), record(clip.anatomy, site) as donor:
    clip.model.encode_image(into)
copy = lambda state: torch.where(which[..., None], donor[site], state)
with torch.no_grad(), edit(clip.anatomy, {site: copy}):
    return clip.model.encode_image(into)
""",
        ),
        (
            "runs the second pictures",
            r"must give the run on `into`",
            """
with torch.no_grad(), record(clip.anatomy, site) as donor:
    clip.model.encode_image(source)
copy = lambda state: torch.where(which[..., None], donor[site], state)
with torch.no_grad(), edit(clip.anatomy, {site: copy}):
    return clip.model.encode_image(source)
""",
        ),
        (
            "copies whole pictures, not tokens",
            r"copy token by token",
            """
with torch.no_grad(), record(clip.anatomy, site) as donor:
    clip.model.encode_image(source)
copy = lambda state: torch.where(which.any(1)[:, None, None], donor[site], state)
with torch.no_grad(), edit(clip.anatomy, {site: copy}):
    return clip.model.encode_image(into)
""",
        ),
        (
            "uses the first pair's tokens for every pair",
            r"its own row",
            """
with torch.no_grad(), record(clip.anatomy, site) as donor:
    clip.model.encode_image(source)
copy = lambda state: torch.where(which[:1, :, None], donor[site], state)
with torch.no_grad(), edit(clip.anatomy, {site: copy}):
    return clip.model.encode_image(into)
""",
        ),
    ],
    "ex2-control": [
        (
            "any patch tokens, also those on the object",
            r"lies on the object",
            """
lots = torch.rand(touched.shape, generator=generator).to(touched.device)
lots[:, 0] = 2.0
return lots.argsort(1).argsort(1) < touched.sum(1, keepdim=True)
""",
        ),
        (
            "lets CLS in",
            r"CLS is no patch",
            """
lots = torch.rand(touched.shape, generator=generator).to(touched.device).masked_fill(touched, 2.0)
return lots.argsort(1).argsort(1) < touched.sum(1, keepdim=True)
""",
        ),
        (
            "everything beside the object",
            r"exactly as many",
            """
away = ~touched
away[:, 0] = False
return away
""",
        ),
        (
            "one draw for all pairs",
            r"its own draw",
            """
lots = torch.rand(touched.shape[1:], generator=generator).to(touched.device).expand(touched.shape).clone()
lots = lots.masked_fill(touched, 2.0)
lots[:, 0] = 2.0
return lots.argsort(1).argsort(1) < touched.sum(1, keepdim=True)
""",
        ),
        (
            "the first free tokens, not random ones",
            r"another draw",
            """
lots = torch.arange(touched.shape[1], device=touched.device).float().expand(touched.shape).clone()
lots = lots.masked_fill(touched, 1e6)
lots[:, 0] = 1e6
return lots.argsort(1).argsort(1) < touched.sum(1, keepdim=True)
""",
        ),
    ],
}
