"""Cross-image attention."""

from attnx import steering
from attnx.catalogue.entry import Entry, Example
from attnx.catalogue.pairs import pairs_example
from attnx.core import moments

entry = Entry(
    id="cross-image-attention",
    objects=(steering.cross_image_hooks, steering.cross_image_qkv, steering.contrast_weights, steering.contrast_softmax, moments.adain, steering.swap_guidance,
             steering.rescale_noise, steering.CrossImageSchedule),
    equation="""out_i = sum_j clip(c (a_ij - mean_i) + mean_i, 0, 1) v_j,      a = softmax(Q_out K_app^T / sqrt(H)), of the appearance's keys and values""",
    claim="A given diffusion model transfers the looks of one picture's objects to those of another, whatever their shapes, and keeps the other's structure.",
    examples=(pairs_example(lambda: dict(weights=steering.contrast_softmax(1.67)), name="attention to another picture"),
              Example(lambda case, x, reference, seen, counted: moments.adain(x, reference, mask=seen > 0, reference_mask=counted > 0),
                      {"x": "bxyc", "reference": "buwc", "seen": "bxy", "counted": "buw"}, "bxyc", sizes=dict(x=5, y=4, u=3, w=6, c=3),
                      name="colours of another picture")),
    notes="""Masks of the objects are the user's. The released code rescales guided noise by a share of 0, and its guidance reaches from 3.5 to 1.75 over the steps
that are run.""",
)
