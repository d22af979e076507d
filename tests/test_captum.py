"""What a notebook writes out, held to captum, which computes the same by its own means."""

import ast

import nbformat
import torch

from mmfm_utils import models, root, scenes, texts
from mmfm_utils.hooks import record


def written_out(notebook, *names, **known):
    """Functions of a notebook by name, run with what they use; cells are not executed."""
    cells = nbformat.read(root() / "notebooks" / f"{notebook}.ipynb", 4).cells
    found = known | {"torch": torch}
    for cell in cells:
        if cell.cell_type == "code" and any(f"def {name}(" in cell.source for name in names):
            tree = ast.parse(cell.source)
            tree.body = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name in names]
            exec(compile(tree, notebook, "exec"), found)
    return [found[name] for name in names]


def test_attribution_of_neurons_is_that_of_captum():
    """07, N4: gradient times activation of every neuron, summed over groups of tokens, for the object's word."""
    from captum.attr import LayerGradientXActivation

    attribution, grouped = written_out("07_neurons", "attribution", "grouped")
    vlm = models.load("generative", "tiny", "cpu")
    drawn = scenes.World(counts=(1.0,), natural=0.0).sample_many(3, seed=0)
    inputs = vlm.inputs(drawn, [texts.prompt("what is this ?")] * len(drawn))
    words = torch.tensor([vlm.word_id(scene.names[0]) for scene in drawn])
    groups = grouped(inputs["input_ids"] == vlm.model.config.image_token_id, inputs["attention_mask"])
    with record(vlm.anatomy, "lm.*.mlp.hidden", grad=True) as seen:
        logits = vlm.model(**inputs).logits[:, -1]
        ours = attribution(list(seen.values()), logits.gather(1, words[:, None])[:, 0], groups)

    others = {name: x for name, x in inputs.items() if name != "pixel_values"}
    answer = lambda pixels: vlm.model(pixel_values=pixels, **others).logits[:, -1]
    layers = [m for name, m in vlm.model.named_modules() if "language_model" in name and name.endswith("down_proj")]
    assert ours.shape == (len(drawn), 3, len(layers), layers[0].in_features)
    for i in (0, len(layers) // 2, len(layers) - 1):
        captum = LayerGradientXActivation(answer, layers[i])
        each = captum.attribute(inputs["pixel_values"], target=words, attribute_to_layer_input=True)
        theirs = torch.einsum("stn,stg->sgn", each.detach(), groups)
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours[:, :, i], theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
