"""Wrong answers to the exercises of 01: each must fail, with a message that names the mistake."""

WRONG = {
    "ex1-ridge-probe": [
        (
            "forgot to centre the states",
            r"centre the states",
            """
target = 2 * torch.nn.functional.one_hot(labels, n_classes).to(states) - 1
penalty = strength * torch.eye(states.shape[1]).to(states)
weights = torch.linalg.solve(states.T @ states + penalty, states.T @ target).T
return weights, target.mean(0) - weights @ states.mean(0)
""",
        ),
        (
            "targets 0 and 1",
            r"differ from scikit-learn's: targets",
            """
target = torch.nn.functional.one_hot(labels, n_classes).to(states)
x, y = states - states.mean(0), target - target.mean(0)
weights = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]).to(x), x.T @ y).T
return weights, target.mean(0) - weights @ states.mean(0)
""",
        ),
        (
            "no penalty",
            r"differ from scikit-learn's.*lambda",
            """
target = 2 * torch.nn.functional.one_hot(labels, n_classes).to(states) - 1
x, y = states - states.mean(0), target - target.mean(0)
weights = torch.linalg.solve(x.T @ x, x.T @ y).T
return weights, target.mean(0) - weights @ states.mean(0)
""",
        ),
        (
            "a bias without the mean state",
            r"the bias differs",
            """
target = 2 * torch.nn.functional.one_hot(labels, n_classes).to(states) - 1
x, y = states - states.mean(0), target - target.mean(0)
weights = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]).to(x), x.T @ y).T
return weights, target.mean(0)
""",
        ),
        (
            "returns the transpose",
            r"one row of weights and one bias a class",
            """
target = 2 * torch.nn.functional.one_hot(labels, n_classes).to(states) - 1
x, y = states - states.mean(0), target - target.mean(0)
weights = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]).to(x), x.T @ y)
return weights, target.mean(0) - states.mean(0) @ weights
""",
        ),
    ],
    "ex2-control-task": [
        (
            "a random label for every example",
            r"belongs to the type",
            """
return torch.arange(len(types))[torch.randperm(len(types), generator=generator)] % n_labels
""",
        ),
        (
            "drawn, not dealt",
            r"deal, do not draw",
            """
return torch.randint(n_labels, (int(types.max()) + 1,), generator=generator)[types]
""",
        ),
        (
            "not random at all",
            r"must be random",
            """
return types % n_labels
""",
        ),
        (
            "deals from the global generator",
            r"the same seed must deal the same",
            """
return (torch.randperm(int(types.max()) + 1) % n_labels)[types]
""",
        ),
    ],
    "ex3-honest-peak": [
        (
            "reports the half it was chosen on",
            r"not in `choose`|report the other half",
            """
layer = int(right[choose].mean(0).argmax())
return layer, right[choose, layer]
""",
        ),
        (
            "chooses on all examples",
            r"do not look at the other half",
            """
layer = int(right.mean(0).argmax())
return layer, right[~choose, layer]
""",
        ),
        (
            "chooses on the half that it reports",
            r"do not look at the other half",
            """
layer = int(right[~choose].mean(0).argmax())
return layer, right[~choose, layer]
""",
        ),
        (
            "the mean in place of the examples",
            r"one score for each example",
            """
layer = int(right[choose].mean(0).argmax())
return layer, right[~choose, layer].mean()
""",
        ),
    ],
    "ex4-erasing-basis": [
        (
            "the probe's weights",
            r"class means still differ: a probe's weights",
            """
weights, _ = ridge_probe(states - states.mean(0), labels, int(labels.max()) + 1, 1.0)
return torch.linalg.svd(weights - weights.mean(0), full_matrices=False)[2][: len(labels.unique()) - 1]
""",
        ),
        (
            "forgot the mean of the means",
            r"subtract the mean of the means",
            """
means = torch.stack([states[labels == k].mean(0) for k in labels.unique()])
_, size, directions = torch.linalg.svd(means, full_matrices=False)
return directions[size > 1e-6 * size[0]]
""",
        ),
        (
            "the means themselves, not orthonormal",
            r"must be orthonormal",
            """
means = torch.stack([states[labels == k].mean(0) for k in labels.unique()])
return (means - means.mean(0))[:-1]
""",
        ),
        (
            "the states' own principal directions",
            r"the states' own SVD",
            """
return torch.linalg.svd(states - states.mean(0), full_matrices=False)[2][: len(labels.unique()) - 1]
""",
        ),
        (
            "columns in place of rows",
            r"one direction a row",
            """
means = torch.stack([states[labels == k].mean(0) for k in labels.unique()])
_, size, directions = torch.linalg.svd(means - means.mean(0), full_matrices=False)
return directions[size > 1e-6 * size[0]].T
""",
        ),
    ],
}
