"""Efficient channel attention."""

from attnx import vision
from attnx.catalogue.entry import Entry, Example

IMAGE = {"x": "bhwc"}
SIZES = {"h": 3, "w": 4, "c": 10, "j": 5, "r": 2}

entry = Entry(
    id="eca-efficient-channel-attention",
    objects=(vision.eca, vision.ECA, vision.eca_ns, vision.eca_kernel_size, vision.se_var1, vision.se_var2, vision.se_var3),
    equation="""a_c = sigmoid(sum over |j| <= (k - 1) / 2 of w_j g_(c + j)),      g_c the mean of channel c
out = x * a""",
    claim="A shared kernel of three or five weights over the channels' means does for accuracy what squeeze and excitation does, with next to no parameters.",
    examples=(Example(lambda case, x, w: vision.eca(x, w), IMAGE | {"w": "j"}, "bhwc", linear="hwc", sizes=SIZES, name="eca"),
              Example(lambda case, x, w: vision.eca(x, w, padding="circular"), IMAGE | {"w": "j"}, "bhwc", linear="hwc", sizes=SIZES, name="eca, circular"),
              Example(lambda case, x, w: vision.eca_ns(x, w), IMAGE | {"w": "cj"}, "bhwc", linear="hwc", sizes=SIZES, name="eca-ns"),
              Example(lambda case, x, w1, w2: vision.se(x, w1, w2), IMAGE | {"w1": "cr", "w2": "rc"}, "bhwc", linear="hw", sizes=SIZES, name="se")),
    notes="The published ResNets have kernels of sizes of their own a stage, not those of the formula.",
)
