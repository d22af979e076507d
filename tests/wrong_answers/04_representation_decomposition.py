"""Wrong answers to the exercises of 04: each must fail, with a message that names the mistake."""

WRONG = {
    "ex1-direct-effects": [
        (
            "each term's own sigma",
            r"own sigma",
            """
sigma = (terms.var(-1, unbiased=False, keepdim=True) + ln.eps).sqrt()
return ((terms - terms.mean(-1, keepdim=True)) / sigma * ln.weight) @ tower.projection
""",
        ),
        (
            "forgot the projection",
            r"forget the projection",
            """
sigma = (residual.var(-1, unbiased=False) + ln.eps).sqrt()
return (terms - terms.mean(-1, keepdim=True)) / sigma[:, None, None] * ln.weight
""",
        ),
        (
            "forgot to centre",
            r"check gamma, the mean",
            """
sigma = (residual.var(-1, unbiased=False) + ln.eps).sqrt()
return (terms / sigma[:, None, None] * ln.weight) @ tower.projection
""",
        ),
        (
            "adds the bias to each term",
            r"add the bias to each term",
            """
sigma = (residual.var(-1, unbiased=False) + ln.eps).sqrt()
return ((terms - terms.mean(-1, keepdim=True)) / sigma[:, None, None] * ln.weight + ln.bias) @ tower.projection
""",
        ),
        (
            "centres over terms as well",
            r"own term only",
            """
sigma = (residual.var(-1, unbiased=False) + ln.eps).sqrt()
return ((terms - terms.mean((1, 2), keepdim=True)) / sigma[:, None, None] * ln.weight) @ tower.projection
""",
        ),
        (
            "forgot gamma",
            r"check gamma",
            """
sigma = (residual.var(-1, unbiased=False) + ln.eps).sqrt()
return ((terms - terms.mean(-1, keepdim=True)) / sigma[:, None, None]) @ tower.projection
""",
        ),
    ],
    "ex2-mean-ablate": [
        (
            "zero in place of the mean",
            r"the mean, not zero",
            """
changed = direct.clone()
changed[:, ablated] = 0
return changed.sum(1)
""",
        ),
        (
            "changes its argument",
            r"work on a copy",
            """
direct[:, ablated] = direct[:, ablated].mean(0)
return direct.sum(1)
""",
        ),
        (
            "the mean over terms",
            r"mean over pictures",
            """
changed = direct.clone()
changed[:, ablated] = direct.mean(1, keepdim=True)
return changed.sum(1)
""",
        ),
        (
            "keeps the listed terms and ablates the others",
            r"ablating nothing|only the listed",
            """
changed = direct.mean(0, keepdim=True).expand_as(direct).clone()
changed[:, ablated] = direct[:, ablated]
return changed.sum(1)
""",
        ),
    ],
    "ex3-split-attention": [
        (
            "the column of CLS: who looks at it",
            r"column of CLS",
            """
return torch.einsum("iht,ithd,hdw->ithw", pattern[:, :, :, 0], v, W_O)
""",
        ),
        (
            "sums the tokens away",
            r"one vector of the residual stream for each token and head",
            """
return torch.einsum("iht,ithd,hdw->ihw", pattern[:, :, 0], v, W_O)
""",
        ),
        (
            "every head through the first head's W_O",
            r"must sum to the layer|its own W_O",
            """
return torch.einsum("iht,ithd,dw->ithw", pattern[:, :, 0], v, W_O[0])
""",
        ),
    ],
    "ex4-carried": [
        (
            "does not subtract the mean",
            r"subtract its mean",
            """
return torch.einsum("iht,it,itn->ihn", looks, 1 / sigma, activation)
""",
        ),
        (
            "the mean over tokens only",
            r"tokens of each picture",
            """
return torch.einsum("iht,it,itn->ihn", looks, 1 / sigma, activation - activation.mean(1, keepdim=True))
""",
        ),
        (
            "the mean over pictures only",
            r"pictures at each token",
            """
return torch.einsum("iht,it,itn->ihn", looks, 1 / sigma, activation - activation.mean(0))
""",
        ),
        (
            "multiplies by sigma",
            r"divide by sigma",
            """
return torch.einsum("iht,it,itn->ihn", looks, sigma, activation - activation.mean((0, 1)))
""",
        ),
        (
            "ignores where CLS looks",
            r"weight each token by the attention",
            """
centred = (activation - activation.mean((0, 1))) / sigma[..., None]
return looks.mean(-1)[..., None] * centred.sum(1)[:, None]
""",
        ),
    ],
}
